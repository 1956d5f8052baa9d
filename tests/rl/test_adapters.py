"""Environments that others wrote, unchanged: of the tinker-cookbook, and of reasoning-gym."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import tinker
from tokenizers import Tokenizer

from everlearn.errors import InvalidRequest
from everlearn.rewards.verifiers import VerifierFailed, judge
from everlearn.rl.adapters import CookbookTasks
from everlearn.rl.advantages import advantages_of
from everlearn.rl.datums import datums_of
from everlearn.rl.envs.reasoning import ReasoningEnv, ReasoningTasks
from everlearn.rl.policy import TinkerPolicy
from everlearn.rl.prompts import ChatMl
from everlearn.rl.rollouts import Limits, count, play_batch
from tests.live import LiveServer


@pytest.fixture(scope="module")
def chat(tokenizer: Tokenizer) -> ChatMl:
    return ChatMl(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.decode)


# ---- tinker-cookbook ----


@pytest.fixture(scope="module")
def renderer(service: tinker.ServiceClient, server: LiveServer) -> Any:
    pytest.importorskip("tinker_cookbook", reason="pip install --no-deps tinker-cookbook==0.6.1, and its requirements but tml-renderers")
    from tinker_cookbook import renderers

    tokenizer = service.create_lora_training_client(server.model, rank=4).result().get_tokenizer()
    return renderers.get_renderer("qwen3_instruct", tokenizer=tokenizer)


def test_the_cookbook_s_arithmetic_is_played_and_trained_on(
    renderer: Any, policy: TinkerPolicy, service: tinker.ServiceClient, server: LiveServer
):
    from tinker_cookbook.recipes.math_rl.arithmetic_env import ArithmeticDataset

    tasks = CookbookTasks(ArithmeticDataset(batch_size=2, renderer=renderer, group_size=3, n_batches=4))
    assert len(tasks) == 4
    groups = asyncio.run(play_batch(tasks.get_batch(1), policy, seed=0))
    assert count(groups) == {"episodes": 6, "failed": 0, "groups_failed": 0}
    for group in groups:
        for one in group.trajectories_G:
            (turn,) = one.transitions
            assert turn.episode_done and set(turn.reward.values) == {"reward"} and {"format", "correct"} <= set(turn.metrics)
    training = service.create_lora_training_client(server.model, rank=4).result()
    data = [datum for group in groups for one in group.trajectories_G for datum in datums_of(one, [1.0])]
    assert training.forward_backward(data, "importance_sampling").result().metrics["trained_tokens:sum"] > 0


def test_the_cookbook_s_groups_see_its_own_trajectories(renderer: Any, policy: TinkerPolicy):
    from tinker_cookbook.recipes.math_rl.arithmetic_env import ArithmeticEnv
    from tinker_cookbook.rl import types as cookbook

    class Longest(cookbook.EnvGroupBuilder):
        async def make_envs(self) -> list[cookbook.Env]:
            return [ArithmeticEnv(1, number, renderer) for number in range(3)]

        async def compute_group_rewards(self, trajectory_group: list[cookbook.Trajectory], env_group: Any) -> Any:
            assert all(isinstance(env, ArithmeticEnv) for env in env_group)
            tokens = [sum(len(turn.ac.tokens) + 0 * turn.ac.logprobs[0] for turn in one.transitions) for one in trajectory_group]
            return [(float(place), {"tokens": count}) for place, count in enumerate(tokens)]

        def logging_tags(self) -> list[str]:
            return ["longest"]

    class Dataset(cookbook.RLDataset):
        def __len__(self) -> int:
            return 1

        def get_batch(self, index: int) -> list[cookbook.EnvGroupBuilder]:
            return [Longest()]

    (group,) = asyncio.run(play_batch(CookbookTasks(Dataset()).get_batch(0), policy))
    assert group.tags == ["longest"] and [group.reward(place).values["group"] for place in range(3)] == [0.0, 1.0, 2.0]
    assert [own["tokens"] for own in group.metrics_G] == [one.num_tokens for one in group.trajectories_G]
    assert any(any(own) for own in advantages_of(group))


def test_a_prompt_over_the_budget_is_a_failure(renderer: Any, policy: TinkerPolicy):
    from tinker_cookbook.rl import types as cookbook

    class TooLong(cookbook.Env):
        async def initial_observation(self) -> Any:
            return cookbook.InitialObservationOverflow(reward=-1.0)

        async def step(self, action: list[int], *, extra: Any = None) -> Any:
            raise AssertionError("never played")

    class Builder(cookbook.EnvGroupBuilder):
        async def make_envs(self) -> list[cookbook.Env]:
            return [TooLong()]

    class Dataset(cookbook.RLDataset):
        def __len__(self) -> int:
            return 1

        def get_batch(self, index: int) -> list[cookbook.EnvGroupBuilder]:
            return [Builder()]

    (group,) = asyncio.run(play_batch(CookbookTasks(Dataset()).get_batch(0), policy))
    failure = group.trajectories_G[0].failure
    assert failure is not None and failure.kind == "environment" and "InitialObservationOverflow" in failure.message


# ---- reasoning-gym ----


def say(env: ReasoningEnv, text: str) -> Any:
    return asyncio.run(env.step(env.chat.encode(text)))


def test_tasks_of_reasoning_gym(chat: ChatMl, policy: TinkerPolicy):
    reasoning_gym = pytest.importorskip("reasoning_gym", reason="pip install reasoning-gym")
    tasks = reasoning_gym.create_dataset("chain_sum", seed=1, size=20)
    data = ReasoningTasks(tasks, chat, last=16, groups_per_batch=4, group_size=2)
    held_out = ReasoningTasks(tasks, chat, first=16, groups_per_batch=4, group_size=1)
    assert (len(data), len(held_out)) == (4, 1)
    entry = tasks[3]
    right = say(ReasoningEnv(tasks, entry, chat), f"so it is <answer>{entry['answer']}</answer>")
    assert right.reward.values == {"parsed": 0.0, "score": 1.0} and right.episode_done
    wrong = say(ReasoningEnv(tasks, entry, chat), "<answer>none</answer>")
    assert wrong.reward.values["score"] < 1.0
    assert say(ReasoningEnv(tasks, entry, chat), entry["answer"]).reward.values == {"parsed": -0.1, "score": 0.0}
    groups = asyncio.run(play_batch(data.get_batch(3), policy, Limits(seconds=60), seed=0))
    assert count(groups)["failed"] == 0 and groups[0].tags[0] == "reasoning"
    with pytest.raises(InvalidRequest, match="make no batch"):
        ReasoningTasks(tasks, chat, first=18, groups_per_batch=4)
    with pytest.raises(InvalidRequest, match="no batch 4"):
        data.get_batch(4)


class Broken:
    """Stands for a task whose author made a mistake; reasoning-gym's own are sound."""

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        if answer == "hang":
            time.sleep(60)
        raise ZeroDivisionError("mistake")


@pytest.mark.parametrize(("answer", "seconds", "word"), [("hang", 0.5, "within 0.5 s"), ("raise", 30, "ZeroDivisionError: mistake")])
def test_a_score_that_does_not_come_fails_the_episode(chat: ChatMl, answer: str, seconds: float, word: str):
    started = time.monotonic()
    with pytest.raises(VerifierFailed, match=word):
        say(ReasoningEnv(Broken(), {"question": "?", "answer": ""}, chat, seconds=seconds), f"<answer>{answer}</answer>")
    assert time.monotonic() - started < 30, "nobody waits for a thread that hangs"


def test_a_judgement_comes_back():
    assert asyncio.run(judge(divmod, 7, 2, seconds=60)) == (3, 1)
