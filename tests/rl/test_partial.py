"""Answers in pieces on a real server: which version drew what, what a time limit leaves, and that nothing drawn is drawn again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import tinker
from tokenizers import Tokenizer

from everlearn.errors import InvalidRequest
from everlearn.rl.datums import datums_of, extended
from everlearn.rl.env import SameTask, StepResult
from everlearn.rl.partial import Begun, PartialPolicy
from everlearn.rl.records import record_of
from everlearn.rl.rollouts import Limits, count, play_now
from everlearn.rl.trajectory import Trajectory
from tests.live import LiveServer

START = tinker.ModelInput.from_ints([20, 21, 22])


class Talk:
    """Two turns; the first answer is followed by token 30."""

    def __init__(self, start: Sequence[int] = (20, 21, 22)):
        self.observation, self.left = tinker.ModelInput.from_ints(list(start)), 2

    async def initial_observation(self) -> tuple[tinker.ModelInput, list[int]]:
        return self.observation, []

    async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
        self.left -= 1
        self.observation = extended(self.observation, action, 30)
        return StepResult(float(len(set(action))), self.left == 0, self.observation, [])


class Versions:
    """Samplers by name; `newest` gives the one of now, and may stop answering after some pieces."""

    def __init__(self, **samplers: tinker.SamplingClient):
        self.samplers, self.now, self.pieces, self.silent_after = samplers, next(iter(samplers)), 0, 10**9

    def newest(self) -> tuple[str, Any]:
        return self.now, self

    async def sample(self, *given: Any) -> Any:
        self.pieces += 1
        if self.pieces > self.silent_after:
            await asyncio.sleep(3600)
        return await self.samplers[self.now].sample(*given)


@pytest.fixture(scope="module")
def samplers(service: tinker.ServiceClient, server: LiveServer) -> dict[str, tinker.SamplingClient]:
    """The base model, and an adapter that went far from it."""
    trainer = service.create_lora_training_client(server.model, rank=4).result()
    tokens = list(range(40, 60))
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * 19}
    )
    for _ in range(3):
        trainer.forward_backward([datum], "cross_entropy").result()
        trainer.optim_step(tinker.AdamParams(learning_rate=0.05)).result()
    older = service.create_sampling_client(base_model=server.model).result()
    return {"older": older, "newer": trainer.save_weights_and_get_sampling_client().result()}


def check_versions(one: Trajectory, samplers: dict[str, tinker.SamplingClient]) -> None:
    """Every token's log-probability is that of the version that is said to have drawn it, behind what was drawn before."""
    for turn in one.transitions:
        drawn, versions = turn.action.tokens, turn.action.versions
        assert versions is not None and len(versions) == len(drawn)
        whole = extended(turn.observation, drawn)
        scores = {name: sampler.compute_logprobs(whole).result()[-len(drawn) :] for name, sampler in samplers.items()}
        assert np.abs(np.subtract(scores["older"], scores["newer"])).max() > 0.1, "the versions differ"
        np.testing.assert_allclose([scores[name][place] for place, name in enumerate(versions)], turn.action.logprobs, atol=2e-3)


def test_an_answer_goes_on_under_the_newer_version(samplers: dict[str, tinker.SamplingClient]):
    versions = Versions(**samplers)

    def newest() -> tuple[str, Any]:
        versions.now = "older" if versions.pieces < 1 else "newer"
        return versions.newest()

    policy = PartialPolicy(newest, max_tokens=10, piece_tokens=4)
    (group,) = play_now([SameTask(Talk, 1)], policy, seed=1)
    one = group.trajectories_G[0]
    assert one.failure is None and one.transitions[0].action.versions == ["older"] * 4 + ["newer"] * 6
    check_versions(one, samplers)
    (datum,) = datums_of(one, [1.0, 1.0])
    drawn = [logprob for turn in one.transitions for logprob in turn.action.logprobs]
    recorded = datum.loss_fn_inputs["logprobs"].to_numpy()
    np.testing.assert_allclose(recorded[recorded != 0], drawn, rtol=1e-6)
    assert record_of(group)["members"][0]["turns"][0]["action"]["versions"][4] == "newer"


def test_a_time_limit_leaves_what_was_drawn_and_the_next_version_goes_on(samplers: dict[str, tinker.SamplingClient]):
    versions = Versions(**samplers)
    versions.silent_after = 4  # the first answer takes three pieces; the second is cut off after its first
    policy = PartialPolicy(versions.newest, max_tokens=10, piece_tokens=4)
    (cut,) = play_now([SameTask(Talk, 1)], policy, Limits(seconds=20), seed=1)
    failed = cut.trajectories_G[0]
    assert failed.failure is not None and failed.failure.kind == "timeout" and len(failed.transitions) == 1
    policy.keep([cut])
    kept = msgspec.json.decode(msgspec.json.encode(policy.begun), type=list[Begun])  # as another process would read it
    assert sorted((len(one.action.tokens), one.whole) for one in kept) == [(4, False), (10, True)]

    versions.now, versions.silent_after, versions.pieces = "newer", 10**9, 0
    resumed = PartialPolicy(versions.newest, max_tokens=10, piece_tokens=4, begun=kept)
    (whole,) = play_now([SameTask(Talk, 1)], resumed, seed=2)
    one = whole.trajectories_G[0]
    assert count([whole])["failed"] == 0 and resumed.begun == []
    assert one.transitions[0].action == failed.transitions[0].action, "what was said is not said again"
    assert one.transitions[1].action.versions == ["older"] * 4 + ["newer"] * 6 and versions.pieces == 2
    check_versions(one, samplers)


def test_members_of_a_group_share_nothing_but_what_is_kept(samplers: dict[str, tinker.SamplingClient]):
    versions = Versions(**samplers)
    versions.silent_after = 7
    policy = PartialPolicy(versions.newest, max_tokens=8, piece_tokens=4)
    cut = play_now([SameTask(Talk, 3)], policy, Limits(seconds=20), seed=1)
    policy.keep(cut)
    before = sum(len(one.action.tokens) for one in policy.begun)
    assert before == 4 * 7, "all that was drawn, and nothing twice"
    versions.silent_after, versions.pieces = 10**9, 0
    (whole,) = play_now([SameTask(Talk, 3)], policy, seed=1)
    assert count([whole])["failed"] == 0 and versions.pieces == 3 * 4 - 7
    assert len({tuple(one.transitions[0].action.tokens) for one in whole.trajectories_G}) == 3


def test_a_string_that_lies_across_two_pieces_ends_the_answer(samplers: dict[str, tinker.SamplingClient], tokenizer: Tokenizer):
    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    class Until(Talk):
        stop: tuple[str, ...] = ()

        async def initial_observation(self) -> tuple[tinker.ModelInput, Any]:
            return self.observation, list(self.stop)

        async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
            return StepResult(1.0, True, logs={"reason": extra["stop_reason"]})

    versions = Versions(**samplers)
    for seed in range(30):  # one whose fourth and fifth token are text together, and new
        Until.stop = ()
        free = play_now([SameTask(Until, 1)], PartialPolicy(versions.newest, 12, piece_tokens=4), seed=seed)[0].trajectories_G[0]
        tokens = free.transitions[0].action.tokens
        Until.stop = (decode(tokens[3:5]),)
        if "\ufffd" not in Until.stop[0] and Until.stop[0] not in decode(tokens[:4]) and Until.stop[0] in decode(tokens[:5]):
            break
    else:
        raise AssertionError("no seed draws such an answer")
    policy = PartialPolicy(versions.newest, 12, piece_tokens=4, decode=decode)
    one = play_now([SameTask(Until, 1)], policy, seed=seed)[0].trajectories_G[0]
    assert one.transitions[0].action.tokens == tokens[:5] and one.transitions[0].logs == {"reason": "stop"}
    failed = play_now([SameTask(Until, 1)], PartialPolicy(versions.newest, 12), seed=3)[0].trajectories_G[0].failure
    assert failed is not None and "give `decode`" in failed.message
    with pytest.raises(InvalidRequest, match="both must be at least 1"):
        PartialPolicy(versions.newest, 0)
