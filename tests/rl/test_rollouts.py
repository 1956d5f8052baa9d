"""Episodes on a real server: good ones, and every way in which an environment goes wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types
from tokenizers import Tokenizer

from everlearn.rewards.reward import Part, Reward
from everlearn.rewards.verifiers import VerifierFailed
from everlearn.rl.datums import datums_of, extended
from everlearn.rl.env import Env, EnvGroup, SameTask, StepResult
from everlearn.rl.policy import TinkerPolicy, seed_of
from everlearn.rl.records import record_of, write_records
from everlearn.rl.rollouts import Limits, count, play, play_batch, play_group, play_now
from everlearn.rl.trajectory import Trajectory, TrajectoryGroup
from tests.live import LiveServer

START = tinker.ModelInput.from_ints([20, 21, 22])


class Talk:
    """`turns` turns; each is answered by token 30. Rewards the number of distinct tokens, in two parts."""

    def __init__(self, turns: int = 1):
        self.left, self.observation = turns, START

    async def initial_observation(self) -> tuple[tinker.ModelInput, None]:
        return self.observation, None

    async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
        self.left -= 1
        self.observation = extended(self.observation, action, 30)
        reward = Reward((Part("distinct", len(set(action)) / 10, "counted"), Part("length", -len(action) / 100)))
        logs = {"extra": extra, "odd": object(), "nan": float("nan")}
        return StepResult(reward, self.left == 0, self.observation, None, {"tokens": float(len(action))}, logs)


class Bad(Talk):
    """Talks one turn, then does `what` instead of going on."""

    def __init__(self, what: Callable[[], Any]):
        super().__init__(turns=10)
        self.what = what

    async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
        if self.left < 10:
            done = self.what()
            return await done if asyncio.iscoroutine(done) else done
        return await super().step(action, extra=extra)


class Group(EnvGroup):
    def __init__(self, envs: Sequence[Env]):
        self.envs, self.clean = envs, 0

    async def make_envs(self) -> Sequence[Env]:
        return self.envs

    async def cleanup(self) -> None:
        self.clean += 1


def raising() -> StepResult:
    raise ZeroDivisionError("the environment's own bug")


async def stubborn() -> StepResult:
    while True:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            continue


def unjudged() -> StepResult:
    raise VerifierFailed("the verifier 'maths' gave no judgement: not over after 5 s")


async def cancelling() -> StepResult:
    raise asyncio.CancelledError


def rewarding(value: Any) -> Callable[[], StepResult]:
    return lambda: StepResult(value, True)


BAD = {
    "raises": (raising, "environment", "ZeroDivisionError: the environment's own bug"),
    "sleeps": (lambda: asyncio.sleep(600), "timeout", "not over after"),
    "is NaN": (rewarding(float("nan")), "not_finite", "'reward' is nan"),
    "is infinite": (rewarding(Reward((Part("hit", float("inf")),))), "not_finite", "'hit' is inf"),
    "measures NaN": (lambda: StepResult(1.0, True, metrics={"x": float("nan")}), "not_finite", "the metric 'x'"),
    "is no reward": (rewarding("much"), "not_finite", "ValueError"),
    "returns nothing": (lambda: None, "environment", "AttributeError"),
    "shows nothing": (lambda: StepResult(0.0, False), "environment", "observation is empty"),
    "shows a list": (lambda: StepResult(0.0, False, [1, 2]), "environment", "must be a tinker.ModelInput"),
    "shows too much": (lambda: StepResult(0.0, False, tinker.ModelInput.from_ints([20] * 5000)), "sampling", "5000"),
    "cannot be judged": (unjudged, "verifier", "gave no judgement"),
    "cancels itself": (cancelling, "environment", "cancelled itself"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_member_fails_alone(policy: TinkerPolicy, name: str):
    what, kind, message = BAD[name]
    group = Group([Talk(), Bad(what), Talk(2)])
    # The good ones must be over within the limit, on a machine that has other things to do; only who sleeps uses it up.
    played = asyncio.run(play_group(group, policy, Limits(seconds=15 if kind == "timeout" else 120), seed=1))
    assert [one.failure and one.failure.kind for one in played.trajectories_G] == [None, kind, None], played.trajectories_G
    failed = played.trajectories_G[1].failure
    assert failed is not None and message in failed.message
    assert failed.turn == (2 if kind == "sampling" else 1)
    assert played.scored == [0, 2] and played.reward(0).total != 0.0
    assert played.trajectories_G[1].transitions[0].reward.total != 0.0, "what happened before is kept, to be looked at"
    with pytest.raises(Exception, match="has no reward"):
        played.reward(1)
    assert count([played]) == {"episodes": 3, "failed": 1, f"failed/{kind}": 1, "groups_failed": 0}
    assert group.clean == 1
    json.dumps(record_of(played), allow_nan=False)


def test_an_environment_that_never_ends_is_stopped_by_turns_and_one_that_cannot_be_stopped_is_left(policy: TinkerPolicy):
    endless = asyncio.run(play(Talk(turns=10**9), policy, Limits(turns=3)))
    assert endless.failure is not None and endless.failure.kind == "turns" and len(endless.transitions) == 3

    (group,) = play_now([Group([Bad(stubborn)])], policy, Limits(seconds=1))
    left = group.trajectories_G[0]
    assert left.failure is not None and left.failure.kind == "timeout" and left.seconds < 60, "it would go on for ever"


def test_groups_fail_as_values_too(policy: TinkerPolicy):
    class CannotBegin(Group):
        async def make_envs(self) -> Sequence[Env]:
            raise OSError("no sandbox left")

    class CannotCompare(Group):
        async def compute_group_rewards(self, trajectory_group: list[Trajectory], env_group: Sequence[Env]) -> Any:
            return [(1.0, {})]

    class MeasuresNothing(Group):
        async def compute_group_rewards(self, trajectory_group: list[Trajectory], env_group: Sequence[Env]) -> Any:
            return [(1.0, {"place": float(place) / place if place else float("nan")}) for place in (1, 0)]

    class CannotClean(Group):
        async def cleanup(self) -> None:
            raise OSError("still in use")

    class Nameless(Group):
        def logging_tags(self) -> list[str]:
            raise KeyError("name")

    class Misnamed(Group):
        def logging_tags(self) -> Any:
            return "talk"

    unnamed = asyncio.run(play_batch([MeasuresNothing([Talk(), Talk()]), Nameless([Talk()]), Misnamed([Talk()])], policy))
    assert [one.failure and one.failure.kind for one in unnamed[0].trajectories_G] == ["group", "group"]
    assert "the metric 'place' is nan" in unnamed[0].trajectories_G[0].failure.message and unnamed[0].metrics_G == [{}, {}]
    for group, word in zip(unnamed[1:], ("KeyError: 'name'", "list of strings"), strict=True):
        assert group.scored == [0] and group.tags == [] and word in group.failures[0].message

    groups = [CannotBegin([]), CannotCompare([Talk(), Talk()]), CannotClean([Talk()]), SameTask(Talk, 2, ["talk"])]
    none, incomparable, unclean, good = asyncio.run(play_batch(groups, policy))
    assert none.trajectories_G == [] and "no sandbox left" in none.failures[0].message
    assert [one.failure and one.failure.kind for one in incomparable.trajectories_G] == ["group", "group"]
    assert unclean.scored == [0] and "still in use" in unclean.failures[0].message
    assert good.scored == [0, 1] and good.tags == ["talk"]
    assert count([none, incomparable, unclean, good]) == {"episodes": 5, "failed": 2, "failed/group": 2, "groups_failed": 2}


def test_a_group_compares_those_that_have_a_score(policy: TinkerPolicy):
    class Best(Group):
        async def compute_group_rewards(self, trajectory_group: list[Trajectory], env_group: Sequence[Env]) -> Any:
            assert len(trajectory_group) == len(env_group) == 2 and env_group == [self.envs[0], self.envs[2]]
            return [(Reward((Part("wins", float(index)),)), {"place": float(index)}) for index in range(2)]

    played = asyncio.run(play_group(Best([Talk(), Bad(raising), Talk()]), policy))
    assert [played.reward(index).values["wins"] for index in (0, 2)] == [0.0, 1.0]
    assert played.reward(2).total == pytest.approx(played.trajectories_G[2].reward.total + 1.0)
    assert played.metrics_G == [{"place": 0.0}, {}, {"place": 1.0}]


def test_the_same_seed_plays_the_same_and_another_does_not(policy: TinkerPolicy):
    def tokens(seed: int) -> list[list[int]]:
        groups: list[EnvGroup] = [SameTask(lambda: Talk(2), 2), SameTask(lambda: Talk(2), 2)]
        played = asyncio.run(play_batch(groups, policy, seed=seed))
        return [turn.action.tokens for group in played for one in group.trajectories_G for turn in one.transitions]

    first = tokens(7)
    assert first == tokens(7) != tokens(8)
    assert len({tuple(action) for action in first}) > 4, "each place has a seed of its own"
    assert seed_of(1, 2) == seed_of(1, 2) != seed_of(12) and 0 <= seed_of("x") < 2**31


@pytest.fixture(scope="module")
def played(policy: TinkerPolicy) -> list[TrajectoryGroup]:
    return asyncio.run(play_batch([SameTask(lambda: Talk(3), 4)], policy, seed=3))


def test_what_was_sampled_is_what_is_trained_on(
    played: list[TrajectoryGroup], tokenizer: Tokenizer, service: tinker.ServiceClient, server: LiveServer
):
    """A model with random weights spells text in ways that no tokenizer would: who goes through text trains on other tokens."""
    trajectories = played[0].trajectories_G
    respelled = 0
    for trajectory in trajectories:
        (datum,) = datums_of(trajectory, [1.0, 2.0, 3.0])
        targets, logprobs = (datum.loss_fn_inputs[name].to_numpy() for name in ("target_tokens", "logprobs"))
        sampled = [token for turn in trajectory.transitions for token in turn.action.tokens]
        assert targets[logprobs != 0].tolist() == sampled
        assert logprobs[logprobs != 0].tolist() == np.float32([x for turn in trajectory.transitions for x in turn.action.logprobs]).tolist()
        respelled += tokenizer.encode(tokenizer.decode(sampled, skip_special_tokens=False), add_special_tokens=False).ids != sampled
    assert respelled == len(trajectories), "text that comes back as it was wouldn't show anything"

    training = service.create_lora_training_client(server.model, rank=4, seed=1).result()
    data = [datums_of(trajectory, [1.0] * 3)[0] for trajectory in trajectories]
    output = training.forward_backward(data, "importance_sampling").result()
    for datum, result in zip(data, output.loss_fn_outputs, strict=True):
        recorded = datum.loss_fn_inputs["logprobs"].to_numpy()
        assert result["logprobs"].to_numpy()[recorded != 0] == pytest.approx(recorded[recorded != 0], abs=1e-5)
    assert output.metrics["ratio:max"] == pytest.approx(1.0, abs=1e-4) == output.metrics["ratio:min"]


def test_spans_lead_to_what_the_server_recorded(service: tinker.ServiceClient, server: LiveServer):
    training = service.create_lora_training_client(server.model, rank=4, seed=1).result()
    path = training.save_weights_for_sampler("recorded").result().path
    sampler = training.create_sampling_client(path, record_stability_info=True).result()
    group = asyncio.run(play_group(SameTask(lambda: Talk(2), 2), TinkerPolicy(sampler, max_tokens=5)))
    data = [datum for one in group.trajectories_G for datum in datums_of(one, [1.0, -1.0], provenance=True)]
    metrics = training.forward_backward(data, "stable_reinforce").result().metrics
    assert metrics["trained_tokens:sum"] == sum(one.num_tokens for one in group.trajectories_G)
    assert metrics["ratio:max"] == pytest.approx(1.0, abs=1e-4)


def test_a_record_shows_everything(played: list[TrajectoryGroup], tokenizer: Tokenizer, tmp_path: Path):
    path = tmp_path / "rollouts.jsonl"
    write_records(path, played, lambda ids: tokenizer.decode(ids, skip_special_tokens=False), step=4)
    write_records(path, played, step=5)
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["step"] == 4 and second["step"] == 5
    member, trajectory = first["members"][1], played[0].trajectories_G[1]
    assert member["reward"]["total"] == pytest.approx(played[0].reward(1).total) and member["failure"] is None
    assert [part["name"] for part in member["reward"]["parts"]] == ["distinct", "length"]
    assert member["turns"][0]["prompt"][0]["tokens"] == [20, 21, 22] and not member["turns"][0]["continues"]
    assert member["turns"][1]["prompt"][0]["tokens"] == [30] and member["turns"][1]["continues"]
    for turn, transition in zip(member["turns"], trajectory.transitions, strict=True):
        assert turn["action"]["tokens"] == transition.action.tokens and turn["action"]["logprobs"] == transition.action.logprobs
        assert turn["action"]["text"] == tokenizer.decode(transition.action.tokens, skip_special_tokens=False)
        assert turn["reward"]["parts"][0]["reason"] == "counted" and turn["logs"]["nan"] == "nan"
    assert second["members"][1]["turns"][0]["action"]["text"] is None


def test_images_are_in_the_record():
    from everlearn.rl.trajectory import Action, Transition

    shown = extended(START, [], types.ImageChunk(data=b"\x89PNG", format="png", expected_tokens=4), 9)
    group = TrajectoryGroup([Trajectory([Transition(shown, Action([5], [-1.0]), Reward.of(1.0), True)])], [Reward()])
    (turn,) = record_of(group)["members"][0]["turns"]
    assert [part["type"] for part in turn["prompt"]] == ["text", "image", "text"]
    assert turn["prompt"][1] == {"type": "image", "format": "png", "num_tokens": 4, "data": "iVBORw=="}
