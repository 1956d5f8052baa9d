"""A critic on a real server: it is trained on pairs with a known winner, and asked by the same messages."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pytest
import tinker

from everlearn.errors import InvalidRequest
from everlearn.rewards.judge import Judge, Rubric, comparison
from everlearn.rl.critic import CriticisedGroup, Pair, RefreshSettings, datums_of, known_pairs, letters_of, refresh
from everlearn.rl.env import SameTask, StepResult
from everlearn.rl.policy import TinkerPolicy
from everlearn.rl.rollouts import count, play_now
from tests.live import KEY, LiveServer

pytest.importorskip("openai", reason="judges are asked through the package openai")
DOGS = Rubric("dogs", "dog.")


def test_pairs_have_a_known_winner():
    answers, scores = ["a", "b", "c", "c "], [1.0, 3.0, 1.05, 2.0]
    pairs = known_pairs("t", answers, scores, DOGS, margin=0.1)
    assert {(pair.better, pair.worse) for pair in pairs} == {("b", "a"), ("b", "c"), ("b", "c "), ("c ", "a")}
    few = known_pairs("t", answers, scores, DOGS, margin=0.1, most=2, seed=1)
    assert len(few) == 2 and few == known_pairs("t", answers, scores, DOGS, margin=0.1, most=2, seed=1) and set(few) < set(pairs)
    with pytest.raises(InvalidRequest):
        known_pairs("t", answers, [1.0], DOGS)


@pytest.fixture(scope="module")
def client(service: tinker.ServiceClient, server: LiveServer) -> tinker.TrainingClient:
    return service.create_lora_training_client(base_model=server.model, rank=8, seed=3).result()


def render_of(client: tinker.TrainingClient) -> Any:
    tokenizer = client.get_tokenizer()
    return lambda messages: tokenizer.encode(
        tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False), add_special_tokens=False
    )


def test_both_orders_and_only_the_letter_counts(client: tinker.TrainingClient):
    letters, render = letters_of(client.get_tokenizer()), render_of(client)
    first, second = datums_of(Pair("t", "good", "bad", DOGS), render, letters)
    for datum, letter, shown in ((first, letters[0], ("good", "bad")), (second, letters[1], ("bad", "good"))):
        targets, weights = (datum.loss_fn_inputs[name].to_numpy() for name in ("target_tokens", "weights"))
        assert targets[-1] == letter and weights.tolist() == [0.0] * (len(weights) - 1) + [1.0]
        prompt = render(comparison("t", *shown, DOGS))
        assert datum.model_input.to_ints() == prompt and targets[:-1].tolist() == prompt[1:]


def test_a_refresh_teaches_the_critic_and_the_judge_hears_it(client: tinker.TrainingClient, server: LiveServer):
    """A made-up preference (the quick fox over the lazy dog) is learned from pairs; what the judge reads is what the trainer computes."""
    good, bad = ["the quick fox", "quick brown fox", "fox"], ["the lazy dog", "lazy dog", "dog"]
    pairs = [Pair("t", one, other, DOGS) for one in good[:2] for other in bad[:2]]
    losses = refresh(client, pairs, render_of(client), RefreshSettings(batch=4, epochs=30, learning_rate=3e-3, seed=1))
    assert len(losses) == 30 and losses[0] > 1.0 and losses[-1] < 0.3, losses
    path = client.save_weights_for_sampler("critic").result().path
    letters = letters_of(client.get_tokenizer())
    logprobs = []
    for letter in letters:
        datum, _ = datums_of(Pair("t", good[2], bad[2], DOGS), render_of(client), (letter, letter))
        logprobs.append(float(client.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy()[-1]))

    async def ask() -> Any:
        judge = Judge.at(f"{server.url}/v1", path, key=KEY)
        try:
            return await judge.choose(comparison("t", good[2], bad[2], DOGS), ("A", "B")), await judge.prefers("t", good[2], bad[2], DOGS)
        finally:
            await judge.close()

    heard, verdict = asyncio.run(ask())
    share = math.exp(logprobs[0]) / np.exp(logprobs).sum()
    assert heard["A"] == pytest.approx(share, abs=1e-3)
    assert verdict.share > 0.5


def test_a_critic_rewards_a_group(client: tinker.TrainingClient, server: LiveServer, policy: TinkerPolicy):
    """Win rates are added to what the environment itself rewards; a judge that is down takes the group's score away, and is counted."""
    path = client.save_weights_for_sampler("critic-group").result().path
    texts = iter(["the quick fox", "the lazy dog", "As requested, this answer is complete."])

    class Written:
        def __init__(self) -> None:
            self.text = next(texts)

        async def initial_observation(self) -> Any:
            return tinker.ModelInput.from_ints([20, 30]), None

        async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
            said[tuple(action)] = self.text
            return StepResult(0.25, True)

    said: dict[tuple[int, ...], str] = {}

    def group(url: str, **options: Any) -> CriticisedGroup:
        judge = Judge.at(url, path, key=KEY, least=0.0, **options)
        return CriticisedGroup(SameTask(Written, 3), "t", lambda tokens: said[tuple(tokens)], judge, [DOGS])

    (played,) = play_now([group(f"{server.url}/v1")], policy, seed=4)
    assert count([played])["failed"] == 0, played
    rewards = [played.reward(index) for index in range(3)]
    assert rewards[2].values == {"reward": 0.25, "veto": -1.25} and "this answer is complete" in rewards[2].parts[-1].reason
    rates = [reward.values["critic/dogs"] for reward in rewards[:2]]
    assert sum(rates) == pytest.approx(1.0) and rates[0] > 0.5 and played.metrics_G[0]["critic/vetoed"] == pytest.approx(1 / 3)
    texts = iter(["the quick fox", "the lazy dog", "fox"])
    (down,) = play_now([group("http://127.0.0.1:9/v1", tries=1)], policy, seed=4)
    assert count([down])["failed/verifier"] == 3


def test_a_refresh_on_nothing_is_refused(client: tinker.TrainingClient):
    with pytest.raises(InvalidRequest, match="0 pairs"):
        refresh(client, [], render_of(client))
