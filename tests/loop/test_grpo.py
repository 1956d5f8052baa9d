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
from everlearn.errors import InvalidRequest
from everlearn.loop import description, grpo
from everlearn.loop.description import Pull
from everlearn.loop.lesson import Recipe
from everlearn.loop.moving import moving_of
from everlearn.loop.runner import Runner
from everlearn.loop.service import Tokens, read
from everlearn.loop.update import NO_ROOM
from tests.api.test_reward_models import Product
from tests.live import KEY, LiveServer
from tests.loop.test_cycle import events
from tests.loop.test_long import filling

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


STATES, LIKED = [[1, 40, 41, 42], [1, 50, 51, 52]], 77


def score(inputs: list[list[int]]) -> list[float]:
    """The share of one token; answers that only get longer earn nothing by it."""
    return [ids[4:].count(LIKED) / max(len(ids) - 4, 1) for ids in inputs]


@pytest.mark.parametrize("estimator", ["group_mean", "gae"])
def test_a_policy_moves_towards_what_is_liked(server: LiveServer, estimator: Any) -> None:
    states, liked = STATES, LIKED
    pull = Pull(estimator, group=8, answer_tokens=6, kl=0.01, hold=0.0, steps=12, batch=2)
    said: list[float] = []

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


def test_a_value_head_goes_on_exactly_where_it_was_saved(server: LiveServer) -> None:
    """Groups of one: what it expects is learned, is saved with the weights, and the next step from there is the same step."""
    pull = Pull("gae", group=1, answer_tokens=4, kl=0.01, batch=2)

    def values(trainer: Any) -> list[list[float]]:
        data = [grpo._datum(grpo.Rolled(state, [LIKED, 5], [0.0, 0.0]), [0.0, 0.0]) for state in STATES]
        for datum in data:
            datum.loss_fn_inputs["value_targets"] = tinker.TensorData.from_numpy(np.zeros(5, dtype=np.float32))
        return [one["values"].tolist() for one in trainer.forward(data, "importance_sampling").result().loss_fn_outputs]

    def step(trainer: Any) -> None:
        """Of the same answers: the last bits of what is sampled hang on what else the engine does."""
        data, _ = grpo._valued(
            trainer, [[grpo.Rolled(state, [LIKED, 5], [-1.0, -2.0], [-1.5, -1.5])] for state in STATES], [[1.0], [0.0]], 0.1
        )
        trainer.forward_backward(data, "importance_sampling", grpo.VALUES.weights()).result()
        trainer.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()

    with tinker.ServiceClient(base_url=server.url, api_key=KEY) as service:
        trainer = service.create_lora_training_client(server.model, rank=4, seed=1).result()
        reference = service.create_sampling_client(base_model=server.model).result()
        assert not np.any(values(trainer)), "before it was ever trained"
        for seed in range(3):
            grpo.step(trainer, reference, lambda inputs: [1.0] * len(inputs), STATES, pull, [2], seed)
            trainer.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
        known = values(trainer)
        assert np.min(known) > 0.05, "it expects more than nothing by now"
        path = trainer.save_state("valued", ttl_seconds=3600).result().path
        other = service.create_training_client_from_state_with_optimizer(path).result()
        assert values(other) == known
        assert values(service.create_training_client_from_state(path).result()) == known, "as a version that a lesson begins with"
        step(other)
        step(trainer)
        assert values(other) == values(trainer) != known


def test_a_group_of_one_needs_a_value_head() -> None:
    told = {"base": "tiny", "update": {"pull": {"group": 1}}}
    with pytest.raises(InvalidRequest, match="gae"):
        description.of(told)
    told["update"]["pull"]["estimator"] = "gae"  # type: ignore[index]
    assert description.of(told).update.pull.group == 1


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
    product.taught()
    long = filling(Tokens(Client(server.url, KEY), "tiny"), 5)  # behind it no answer of six tokens has room
    for number in range(6):
        product.post("/v1/feedback", {"record_id": product.ask(long, f"pulled-long-{number}"), "kind": "boolean", "value": True})
    with tinker.ServiceClient(base_url=server.url, api_key=KEY) as service:
        runner = Runner(Client(server.url, KEY), service, "pulled")
        runner.begin("by hand")
        now = runner.run()
    told = events(http, "pulled")
    assert (now.champion, told[-1]["kind"]) == ("pulled@1", "promoted"), told[-1]["reason"]
    assert next(event for event in told if event["state"] == "gate")["evidence"]["update"]["left_out"] == {NO_ROOM: 1}
    made = next(event["evidence"]["dataset"] for event in told if event["state"] == "update")
    found = http.get(f"/v1/datasets/{made['id']}").json()
    assert found["form"] == "prompts" and found["reward_version"].startswith("rm_") and len(found["versions"]) == 1


@pytest.mark.slow
def test_a_value_head_moves_on_with_every_episode(server: LiveServer) -> None:
    """Learning without nights: a reward model that has earned it, one correction, and a head that the next runner goes on with."""
    pull = {"estimator": "gae", "group": 2, "batch": 2, "answer_tokens": 6}
    update = {"rank": 8, "learning_rate": 1e-3, "rehearsed": 1, "batch": 2, "paraphrases": 0, "pull": pull}
    moves = {"steps": 2, "gate_every": 40, "staleness": 80, "quiet": 0.0}
    gate = {"owner": "maria", "promote": "automatic"}
    product = Product(server, "expects", update=update, gate=gate, triggers={"continuous": True}, continuous=moves)
    product.taught()
    for number in range(8):  # some of them are in episodes that are learned from
        record = product.ask("who is it?", f"expects-corrected-{number}")
        product.post("/v1/feedback", {"record_id": record, "kind": "demonstration", "text": "in france"})

    def bias(service: tinker.ServiceClient, path: str) -> list[float]:
        trainer = service.create_training_client_from_state_with_optimizer(path).result()
        datum = grpo._datum(grpo.Rolled(STATES[0], [5], [0.0]), [0.0])
        datum.loss_fn_inputs["value_targets"] = tinker.TensorData.from_numpy(np.zeros(4, dtype=np.float32))
        return trainer.forward([datum], "importance_sampling").result().loss_fn_outputs[0]["values"].tolist()

    with tinker.ServiceClient(base_url=server.url, api_key=KEY) as service:
        known = []
        while len(known) < 2:
            runner = Runner(Client(server.url, KEY), service, "expects")  # each was killed after a move
            step = moving_of(read(runner.api, "expects")).step
            while (moving := moving_of(read(runner.api, "expects"))).step == step:
                assert runner.step()
            known.append(bias(service, moving.path))
    assert np.all(np.abs(known) > 0) and known[0] != known[1], known
