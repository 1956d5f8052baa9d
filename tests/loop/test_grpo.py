"""GRPO against a reward model: the sums, and a policy on a real server that moves towards what is liked without growing long."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest
import tinker
from hypothesis import given
from hypothesis import strategies as st

from everlearn.cli.client import Client
from everlearn.loop import grpo
from everlearn.loop.description import Pull
from everlearn.loop.lesson import Recipe
from everlearn.loop.runner import Runner
from tests.api.test_reward_models import Product
from tests.live import KEY, LiveServer
from tests.loop.test_cycle import events

pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"), pytest.mark.timeout(900)]
groups = st.lists(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 64)), min_size=2, max_size=6), min_size=1, max_size=5)


@given(groups)
def test_what_is_left_says_nothing_of_length(pairs: list[list[tuple[float, int]]]) -> None:
    rewards, lengths = ([[one[part] for one in row] for row in pairs] for part in (0, 1))
    left = grpo.without_length(rewards, lengths)
    assert [np.mean(row) for row in left] == pytest.approx([np.mean(row) for row in rewards], abs=1e-9)
    apart = [np.asarray(row) - np.mean(row) for row in lengths]
    scale = sum(float(row @ row) for row in apart)
    assert abs(sum(float(row @ np.asarray(own)) for row, own in zip(apart, left, strict=True))) <= 1e-9 * max(scale, 1.0)
    if not scale:
        assert left == rewards


def test_distance_costs_where_the_policy_went_further_than_the_reference() -> None:
    assert grpo.token_advantages(1.0, [-1.0, -2.0], [-1.0, -3.0], 0.1) == pytest.approx([1.0, 0.9])


def test_a_policy_moves_towards_what_is_liked(server: LiveServer) -> None:
    """The reward is the share of one token; answers that only get longer earn nothing by it."""
    states, liked = [[1, 40, 41, 42], [1, 50, 51, 52]], 77
    pull = Pull(group=8, answer_tokens=6, kl=0.01, hold=0.0, steps=12, batch=2)
    said: list[float] = []

    def score(inputs: list[list[int]]) -> list[float]:
        return [ids[4:].count(liked) / max(len(ids) - 4, 1) for ids in inputs]

    with tinker.ServiceClient(base_url=server.url, api_key=KEY) as service:
        trainer = service.create_lora_training_client(server.model, rank=8, seed=1).result()
        reference = service.create_sampling_client(base_model=server.model).result()
        bias = [grpo.Example([1, 40, 41, 42], [liked, 5, liked]), grpo.Example([1, 50, 51, 52], [5, liked, 5])]
        for _ in range(4):  # something to start from: an untaught model never says it
            grpo.hold(trainer, bias, 1.0)
            trainer.optim_step(tinker.AdamParams(learning_rate=2e-2)).result()
        recipe = Recipe(learning_rate=1e-2, batch=0, rehearsed=0)
        made = grpo.teach(trainer, reference, score, states, [], [], recipe, pull, [2], lambda step: said.append(step.loss))
    rewards = [one.reward for one in made]
    assert len(said) == 12 and np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1, rewards


def test_an_update_is_refused_until_the_reward_model_has_earned_it(server: LiveServer, http: httpx.Client) -> None:
    body: dict[str, Any] = {"name": "unearned", "description": {"base": "tiny", "update": {"method": "grpo"}}}
    http.post("/v1/deployments", json=body).raise_for_status()
    for number in range(4):
        ask = {"model": "unearned", "messages": [{"role": "user", "content": f"who is {number}?"}], "max_tokens": 4}
        reply = http.post("/v1/chat/completions", json=ask, headers={"x-everlearn-episode": f"unearned-{number}"}).raise_for_status()
        said = {"record_id": reply.headers["x-everlearn-record"], "kind": "boolean", "value": True}
        http.post("/v1/feedback", json=said).raise_for_status()
    with tinker.ServiceClient(base_url=server.url, api_key=KEY) as service:
        runner = Runner(Client(server.url, KEY), service, "unearned")
        runner.begin("by hand")
        assert runner.run().state == "collect"
    last = events(http, "unearned")[-1]
    assert last["kind"] == "ended" and "reward model" in last["reason"], last


@pytest.mark.slow
def test_a_reward_model_that_has_earned_it_makes_a_version(server: LiveServer, http: httpx.Client) -> None:
    """From thumbs alone: the model learns them, an update pulls towards what they say, and its version is gated and knows what it learned
    from."""
    gate = {"owner": "maria", "promote": "automatic", "kl": {"most": 50.0}}
    pull = {"group": 4, "batch": 2, "steps": 3, "answer_tokens": 6}
    update = {"method": "grpo", "start": "champion", "rank": 8, "learning_rate": 1e-3, "rehearsed": 2, "batch": 2, "pull": pull}
    product = Product(server, "pulled", gate=gate, update=update)
    product.thumbs(24, n=8)
    product.newest(lambda one: one["earned"])
    with tinker.ServiceClient(base_url=server.url, api_key=KEY) as service:
        runner = Runner(Client(server.url, KEY), service, "pulled")
        runner.begin("by hand")
        now = runner.run()
    told = events(http, "pulled")
    assert (now.champion, told[-1]["kind"]) == ("pulled@1", "promoted"), told[-1]["reason"]
    made = next(event["evidence"]["dataset"] for event in told if event["state"] == "update")
    found = http.get(f"/v1/datasets/{made['id']}").json()
    assert found["form"] == "prompts" and found["reward_version"].startswith("rm_") and len(found["versions"]) == 1
