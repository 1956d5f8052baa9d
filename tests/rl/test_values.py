"""Advantages over the value head's values: against a slow reference, on episodes of several turns and datums, and in the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tinker
from tinker import types

from everlearn.errors import InvalidRequest
from everlearn.rewards.reward import Reward
from everlearn.rl.datums import extended
from everlearn.rl.env import SameTask, StepResult
from everlearn.rl.policy import TinkerPolicy
from everlearn.rl.rollouts import play_now
from everlearn.rl.settings import Settings
from everlearn.rl.train import train
from everlearn.rl.trajectory import Failure, Trajectory, TrajectoryGroup
from everlearn.rl.values import ValueFunction, valued
from tests.live import LiveServer

TURNS = 3


class Late:
    """Three turns of which the last pays for all: the share of first tokens that were small. The second prompt forgets the first."""

    def __init__(self, start: int):
        self.start, self.small = start, []  # type: ignore[var-annotated]

    async def initial_observation(self) -> tuple[tinker.ModelInput, None]:
        self.seen = tinker.ModelInput.from_ints([20, self.start])
        return self.seen, None

    async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
        self.small.append(action[0] < 256)
        if len(self.small) == TURNS:
            return StepResult(sum(self.small) / TURNS, True)
        self.seen = tinker.ModelInput.from_ints([30]) if len(self.small) == 1 else extended(self.seen, action, 21)
        return StepResult(0.0, False, self.seen)


class LateTasks:
    def __init__(self, size: int, groups: int = 2):
        self.size, self.groups = size, groups

    def __len__(self) -> int:
        return 1

    def get_batch(self, index: int) -> list[SameTask]:
        return [SameTask(lambda start=start: Late(40 + start), self.size) for start in range(self.groups)]  # type: ignore[misc]


@pytest.fixture(scope="module")
def groups(service: tinker.ServiceClient, server: LiveServer) -> list[TrajectoryGroup]:
    policy = TinkerPolicy(service.create_sampling_client(base_model=server.model).result(), max_tokens=3)
    played = play_now(LateTasks(2).get_batch(0), policy, seed=3)
    failed = Trajectory([], Failure("environment", "down"))
    bonus = TrajectoryGroup([*played[1].trajectories_G, failed], [Reward.of(0.25), Reward.of(0.0), Reward()])
    return [played[0], bonus]


@pytest.fixture(scope="module")
def client(service: tinker.ServiceClient, server: LiveServer) -> tinker.TrainingClient:
    return service.create_lora_training_client(server.model, rank=4, seed=1).result()


def by_hand(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Equation 16 of arXiv 1506.02438, term by term: A[t] = sum over l of (gamma lam)^l d[t + l]."""
    after = [*values[1:], 0.0]
    errors = [reward + gamma * later - value for reward, later, value in zip(rewards, after, values, strict=True)]
    return [sum((gamma * lam) ** (at - t) * errors[at] for at in range(t, len(errors))) for t in range(len(errors))]


def sampled(data: list[types.Datum], name: str) -> list[float]:
    """An input at the sampled tokens, the datums' in order; everywhere else it must be 0."""
    found: list[float] = []
    for datum in data:
        chosen = datum.loss_fn_inputs["sequence_ratio_mask"].to_numpy() != 0
        row = datum.loss_fn_inputs[name].to_numpy()
        assert not row[~chosen].any()
        found += row[chosen].tolist()
    return found


def test_an_untrained_head_gives_discounted_rewards(client: tinker.TrainingClient, groups: list[TrajectoryGroup]):
    data_G, metrics = valued(client, groups, ValueFunction(gamma=0.9, lam=1.0))
    assert metrics["groups/trained"] == 2 and metrics["value/mean"] == 0 and metrics["value/explained"] == 0
    assert [len(data) for data in data_G] == [4, 4], "two datums for each member that has a score: the second prompt forgot the first"
    for group, data in zip(groups, data_G, strict=True):
        for index in range(2):
            earned, count = group.reward(index).total, group.trajectories_G[index].num_tokens
            expected = [earned * 0.9 ** (count - 1 - at) for at in range(count)]
            assert sampled(data[2 * index : 2 * index + 2], "advantages") == pytest.approx(expected, rel=1e-6)


def test_advantages_of_a_trained_head_are_those_by_hand(client: tinker.TrainingClient, groups: list[TrajectoryGroup]):
    function = ValueFunction(gamma=0.97, lam=0.8)
    for _ in range(3):
        data_G, _ = valued(client, groups, function)
        client.forward_backward([datum for data in data_G for datum in data], "ppo", function.weights())
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    data_G, metrics = valued(client, groups, function)
    outputs = client.forward([datum for data in data_G for datum in data], "ppo").result().loss_fn_outputs
    everything: list[float] = []
    for place, (group, data) in enumerate(zip(groups, data_G, strict=True)):
        for index in range(2):
            own = data[2 * index : 2 * index + 2]
            told = outputs[4 * place + 2 * index : 4 * place + 2 * index + 2]
            values = [
                float(value)
                for datum, output in zip(own, told, strict=True)
                for value, chosen in zip(output["values"].tolist(), datum.loss_fn_inputs["sequence_ratio_mask"].tolist(), strict=True)
                if chosen
            ]
            rewards = [0.0] * (group.trajectories_G[index].num_tokens - 1) + [group.reward(index).total]
            expected = by_hand(rewards, values, 0.97, 0.8)
            assert any(values) and sampled(own, "advantages") == pytest.approx(expected, abs=1e-5)
            assert sampled(own, "value_targets") == pytest.approx(np.add(expected, values), abs=1e-5)
            everything += expected
    assert metrics["advantage/std"] == pytest.approx(np.std(everything), rel=1e-4)
    data_G, same = valued(client, groups, msgspec.structs.replace(function, standardise=True))
    assert same == metrics
    standard = [number for data in data_G for number in sampled(data, "advantages")]
    assert np.mean(standard) == pytest.approx(0, abs=1e-4) and np.std(standard) == pytest.approx(1, abs=1e-3)


def test_cut_off_and_failed_episodes(client: tinker.TrainingClient, groups: list[TrajectoryGroup]):
    assert all(one.truncated for one in groups[0].trajectories_G), "no answer of the tiny model ends by itself"
    assert valued(client, groups, ValueFunction(), mask_over_long=True) == ([[], []], {"groups/trained": 0.0})
    failed = TrajectoryGroup([Trajectory([], Failure("timeout", "slow"))], [Reward()])
    data_G, metrics = valued(client, [failed, groups[0]], ValueFunction())
    assert not data_G[0] and len(data_G[1]) == 4 and metrics["groups/trained"] == 1


@pytest.mark.parametrize("loss", ["ppo", "gspo"])
def test_a_policy_learns_from_values_alone(service: tinker.ServiceClient, tmp_path: Path, loss: str):
    """Groups of one, which no comparison could learn from: the value head is all there is to compare with."""
    settings = Settings(
        "tiny",
        steps=12,
        rank=8,
        learning_rate=2e-2,
        loss=loss,
        estimator="gae",
        value_function=ValueFunction(lam=0.9),
        max_tokens=1,
        substeps=2,
        seed=2,
    )
    if loss == "gspo":
        settings = msgspec.structs.replace(settings, steps=2)
    rows = train(service, settings, LateTasks(1, 48), tmp_path)
    for row in rows:
        assert row["groups/trained"] == 48 and row["loss/value_loss:sum"] > 0 and "value/mean" in row and row["ratio/max"] < 10
    if loss == "ppo":
        assert rows[0]["value/mean"] == 0 and rows[-1]["value/mean"] > 0.3
        assert rows[0]["reward/total"] < 0.65 and rows[-1]["reward/total"] > 0.8


WRONG = [
    ({"value_function": ValueFunction(lam=0.5)}, "no effect"),
    ({"estimator": "gae", "value_function": ValueFunction(gamma=1.5)}, "value_function.gamma"),
    ({"estimator": "gae", "value_function": ValueFunction(lam=-0.1)}, "value_function.lam"),
    ({"estimator": "gae", "value_function": ValueFunction(value_trunk=2.0)}, "value_function.value_trunk"),
    ({"estimator": "gae", "value_function": ValueFunction(value_coeff=0.0)}, "value_function.value_coeff"),
    ({"estimator": "gae", "loss": "stable_reinforce"}, "trains no value head"),
    ({"estimator": "gae", "loss_config": {"value_coeff": 1.0}}, "value_function.value_coeff"),
]


@pytest.mark.parametrize(("wrong", "word"), WRONG)
def test_value_functions_that_cannot_be_meant(wrong: dict[str, Any], word: str):
    with pytest.raises(InvalidRequest, match=word):
        Settings("tiny", steps=1, **wrong).check()
