"""What both loops do with answers that have no advantage: left out by a policy gradient, trained on where the loss or a term pulls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import tinker

from everlearn.rewards.reward import Reward
from everlearn.rl.asynchronous import train_asynchronously
from everlearn.rl.datums import MASK, extended
from everlearn.rl.env import SameTask, StepResult
from everlearn.rl.settings import Pace, Settings
from everlearn.rl.train import Learner, train
from everlearn.rl.trajectory import Action, Trajectory, TrajectoryGroup, Transition
from tests.rl.run_first import Starts

BASE = Settings("tiny", steps=1, rank=4, learning_rate=1e-2, max_tokens=4, seed=5)
PULLS: list[dict[str, Any]] = [
    {"loss": "mirror_descent"},
    {"loss_config": {"kl_coeff": 0.1}},
    {"loss": "ppo", "loss_config": {"entropy_coeff": 0.05}},
]
PLAIN: list[dict[str, Any]] = [{}, {"loss": "gspo"}, {"loss_config": {"kl_coeff": 0.0}}]


def changed(**options: Any) -> Settings:
    return msgspec.structs.replace(BASE, **options)


def played(*rewards: float, cut: int | None = None) -> TrajectoryGroup:
    """Members whose answers begin with the token 10 + their place."""
    actions = [Action([10 + place, 8], [-1.0, -2.0], "length" if place == cut else "stop") for place in range(len(rewards))]
    seen = tinker.ModelInput.from_ints([1, 2])
    turns = [Transition(seen, action, Reward.of(reward), True) for action, reward in zip(actions, rewards, strict=True)]
    return TrajectoryGroup([Trajectory([turn]) for turn in turns], [Reward()] * len(turns))


class Same:
    """Two turns; the second pays one point, whatever was said."""

    def __init__(self, start: int):
        self.seen, self.turns = tinker.ModelInput.from_ints([20, start]), 0

    async def initial_observation(self) -> tuple[tinker.ModelInput, list[int]]:
        return self.seen, []

    async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
        self.turns += 1
        self.seen = extended(self.seen, action, 21)
        return StepResult(float(self.turns == 2), self.turns == 2, self.seen, [])


class Sames(Starts):
    def get_batch(self, index: int) -> list[SameTask]:
        return [SameTask(lambda start=start: Same(start), self.size) for start in range(self.first, self.first + self.groups)]  # type: ignore[misc]


@pytest.mark.parametrize(("options", "kept"), [*((one, True) for one in PULLS), *((one, False) for one in PLAIN)], ids=str)
def test_who_is_trained_on(service: tinker.ServiceClient, tmp_path: Path, options: dict[str, Any], kept: bool):
    """In a group of 0, 1/2 and 1 the middle has no advantage, in one where all are right nobody has."""
    learner = Learner(service, changed(**options), tmp_path)
    groups = [played(0.0, 0.5, 1.0), played(1.0, 1.0)]
    data_G = learner.data_of(groups, learner.compare(groups))
    told = [[int(datum.loss_fn_inputs["target_tokens"].to_numpy()[1]) for datum in own] for own in data_G]
    assert told == ([[10, 11, 12], [10, 11]] if kept else [[10, 12], []])
    sent = learner._asked(data_G[0])
    assert [MASK in datum.loss_fn_inputs for datum in sent] == [kept or options.get("loss") == "gspo"] * len(sent)
    if kept:
        assert [float(datum.loss_fn_inputs["advantages"].to_numpy()[1]) for datum in data_G[0]] == [-0.5, 0.0, 0.5]
        assert all(("reference_logprobs" in datum.loss_fn_inputs) == ("kl_coeff" in options.get("loss_config", {})) for datum in sent)


def test_answers_that_were_cut_off_stay_out_where_they_are_masked(service: tinker.ServiceClient, tmp_path: Path):
    learner = Learner(service, changed(loss="mirror_descent", mask_over_long=True), tmp_path)
    groups = [played(0.0, 0.5, 1.0, cut=0), played(1.0, 1.0, cut=1)]
    assert [len(own) for own in learner.data_of(groups, learner.compare(groups))] == [2, 1]


@pytest.mark.parametrize("options", [*PULLS, {"loss": "stable_reinforce", "loss_config": {"kl_coeff": 0.1}}], ids=str)
@pytest.mark.parametrize("estimator", ["group_mean", "per_turn"])
def test_a_batch_in_which_all_earned_the_same_is_pulled(
    service: tinker.ServiceClient, tmp_path: Path, options: dict[str, Any], estimator: str
):
    """Every sampled token counts, of both turns, for the loss and for what is measured."""
    (row,) = train(service, changed(**options, estimator=estimator), Sames(30, 2, 3), tmp_path)
    assert row["groups/collapsed"] == 1.0 and row["groups/trained"] == 2
    assert row["tokens/sampled"] == row["tokens/trained"] == row["loss/trained_tokens:sum"] == 2 * 3 * 8


def test_so_it_is_in_the_other_loop(service: tinker.ServiceClient, tmp_path: Path):
    for number, (options, trained) in enumerate([(PULLS[1], 2), ({}, 0)]):
        settings = changed(**options, pace=Pace(minibatches=2))
        (row,) = train_asynchronously(service, settings, Sames(30, 2, 3), tmp_path / str(number))
        assert row["groups/trained"] == trained and row.get("tokens/trained", 0) == 24 * trained
