"""Experts that a sample met are recorded, and a training row meets them again."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from everlearn.config import EngineSettings, Settings
from everlearn.engine.protocol import Completed, Sample
from everlearn.engine.sampler import Sampler
from everlearn.engine.trainer import Trainer
from everlearn.errors import InvalidRequest, TooLarge, Unsupported
from everlearn.models.bank import Bank
from everlearn.models.catalog import read_info
from everlearn.models.load import BaseModel, load_base
from everlearn.models.routing import RULES, UNKNOWN, Routing, balance
from everlearn.types import Array, Datum, SampledSequence, SamplingParams
from tests.engine.harness import CPU, FLOAT32, adapter, datum, forward_backward, load_tiny, random_datums
from tests.engine.test_trainer import with_random_b
from tests.moe import KINDS, make_moe

EXPERTS, TOP_K = 8, 3
PROMPT = list(range(10, 47))


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = make_moe(tmp_path_factory.mktemp("moe") / request.param, request.param)
    return load_base(read_info("tiny", folder, []), CPU, FLOAT32)


def sample(sampler: Sampler, name: str, num_samples: int = 1, seed: int = 5, routing: bool = True) -> list[SampledSequence]:
    params = SamplingParams(max_tokens=12, seed=seed, routing=routing)
    sampler.add(Sample(name, "tiny", "", "", "t", Array.of(np.array(PROMPT, np.int32)), num_samples, params))
    events = []
    while sampler.has_work():
        events += sampler.step()
    assert isinstance(events[-1], Completed), events
    return events[-1].result.sequences  # type: ignore[union-attr]


def new_sampler(base: BaseModel) -> Sampler:
    return Sampler(base, Settings(engine=EngineSettings(kv_tokens=2048, prefill_tokens=16)), Bank(2, CPU, FLOAT32))


def with_routes(row: Datum, routing: np.ndarray) -> Datum:
    return msgspec.structs.replace(row, routing=Array.of(routing.astype(np.int32)))


def test_recorded_routes_are_the_trainers_own_and_replay_to_the_same(base: BaseModel) -> None:
    trainer, who = Trainer(base, 256), with_random_b(adapter(base, expert_lora="per_expert"), 1)
    sampler = new_sampler(base)
    zero = adapter(base, "zero")
    for drawn in sample(sampler, "a", num_samples=2):
        assert drawn.routing is not None
        tokens = PROMPT + drawn.tokens.numpy().tolist()
        routes = drawn.routing.numpy()
        assert routes.shape == (len(tokens) - 1, len(base.expert_modules), TOP_K) and routes.min() >= 0 and routes.max() < EXPERTS
        row = datum(tokens[:-1], tokens[1:], weights=[1.0] * (len(tokens) - 1))
        plain = forward_backward(trainer, zero, [row], forward_only=True)
        again = forward_backward(trainer, zero, [with_routes(row, routes)], forward_only=True)
        mine, theirs = (r.outputs[0]["logprobs"].numpy() for r in (plain, again))
        np.testing.assert_allclose(theirs, mine, atol=1e-5)
        np.testing.assert_allclose(theirs[len(PROMPT) - 1 :], drawn.logprobs.numpy(), atol=1e-5)
        assert again.metrics["routing_replayed_tokens:sum"] == len(tokens) - 1 and again.metrics["routing_masked_tokens:sum"] == 0
        # Another adapter would choose others: replayed, it meets the recorded ones.
        moved = forward_backward(trainer, who, [row], forward_only=True).outputs[0]["logprobs"].numpy()
        replayed = forward_backward(trainer, who, [with_routes(row, routes)], forward_only=True).outputs[0]["logprobs"].numpy()
        assert np.abs(moved - replayed).max() > 1e-4
    later = sample(sampler, "b")[0].routing
    assert later is not None and (later.numpy()[:32] == UNKNOWN).all() and (later.numpy()[36:] >= 0).all()  # two blocks were cached


def test_replay_uses_present_logits_and_their_gradient(base: BaseModel) -> None:
    """Any routes: the gradient of a row that replays them is that of finite differences."""
    trainer, who = Trainer(base, 256), with_random_b(adapter(base, rank=2, expert_lora="shared_outer", train_unembed=False), 1)
    row = random_datums(3, [9])[0]
    rng = np.random.default_rng(0)
    routes = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(9 * len(base.expert_modules))]).reshape(9, -1, TOP_K)
    replayed = with_routes(row, routes)
    forward_backward(trainer, who, [replayed])
    gradient = who.grad.clone()
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1))
    start, step, losses = who.params.clone(), 2e-3, []
    for sign in (1, -1):
        who.params.copy_(start + sign * step * direction / direction.norm())
        who.refresh()
        losses.append(forward_backward(trainer, who, [replayed], forward_only=True).metrics["loss:sum"])
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope == pytest.approx(float(gradient @ direction / direction.norm()), rel=2e-2, abs=2e-3)


def test_tokens_without_a_route_are_silent_and_counted(base: BaseModel) -> None:
    trainer = Trainer(base, 256)
    row, other = random_datums(7, [12, 6])
    weights = np.ones(12, np.float32)
    row = datum(row.tokens.numpy().tolist(), row.inputs["target_tokens"].numpy().tolist(), weights=weights.tolist())
    routes = np.tile(np.arange(TOP_K), (12, len(base.expert_modules), 1))
    routes[[2, 5]] = UNKNOWN
    masked = weights.copy()
    masked[[2, 5]] = 0
    silenced = datum(row.tokens.numpy().tolist(), row.inputs["target_tokens"].numpy().tolist(), weights=masked.tolist())
    one, two = (with_random_b(adapter(base, expert_lora="rank_split"), 4) for _ in range(2))
    mine = forward_backward(trainer, one, [with_routes(row, routes), other])
    theirs = forward_backward(trainer, two, [with_routes(silenced, routes), other])
    assert mine.metrics["routing_masked_tokens:sum"] == 2 and mine.metrics["routing_replayed_tokens:sum"] == 10
    assert mine.metrics["loss:sum"] == pytest.approx(theirs.metrics["loss:sum"], rel=1e-6)
    torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("loss_fn", ["ppo", "gspo", "mirror_descent"])
def test_terms_are_silent_on_tokens_without_a_route_too(base: BaseModel, loss_fn: str) -> None:
    """KL, entropy, values and text: nothing is learned from such a token."""
    trainer, rng, silent = Trainer(base, 256), np.random.default_rng(1), [2, 5]
    row = random_datums(7, [12])[0]
    given = {name: rng.normal(-6, 0.3, 12) for name in ("logprobs", "reference_logprobs")}
    given |= {name: rng.normal(size=12) for name in ("advantages", "weights", "value_targets")} | {"sequence_ratio_mask": np.ones(12)}
    routes = np.tile(np.arange(TOP_K), (12, len(base.expert_modules), 1))
    routes[silent] = UNKNOWN
    config, grads = {"kl_coeff": 0.5, "entropy_coeff": 0.5}, []
    for change in (0.0, 3.0):  # what stands at silent tokens doesn't matter
        inputs = {name: values.copy() for name, values in given.items()}
        for name in ("advantages", "weights", "value_targets", "reference_logprobs"):
            if not (loss_fn == "mirror_descent" and name == "advantages"):
                inputs[name][silent] += change
        own = datum(row.tokens.numpy().tolist(), row.inputs["target_tokens"].numpy().tolist(), **inputs)
        who = with_random_b(adapter(base, expert_lora="rank_split"), 4)
        result = forward_backward(trainer, who, [with_routes(own, routes)], loss_fn, config=config)
        assert result.metrics["routing_masked_tokens:sum"] == 2
        grads.append((who.grad.clone(), who.value.grad.clone()))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])
    assert grads[0][0].any() and grads[0][1].any()


def test_a_silent_token_has_no_part_in_the_ratio_of_its_sequence(base: BaseModel) -> None:
    """gspo's loss of a token depends on all of its sequence; a sequence without a known route has none, and leaves no NaN behind."""
    trainer, layers = Trainer(base, 256), len(base.expert_modules)
    rows = random_datums(8, [12, 6])
    routes = [np.tile(np.arange(TOP_K), (len(row.tokens.numpy()), layers, 1)) for row in rows]
    routes[0][[2, 5]], routes[1][:] = UNKNOWN, UNKNOWN

    def losses(sampled: float) -> tuple[float, torch.Tensor]:
        data = []
        for row, route in zip(rows, routes, strict=True):
            ones, logprobs = np.ones(len(route)), np.full(len(route), -6.0)
            logprobs[(route == UNKNOWN).all(axis=(1, 2))] = sampled
            more = {"advantages": ones, "sequence_ratio_mask": ones, "logprobs": logprobs}
            data.append(with_routes(datum(row.tokens.numpy().tolist(), row.inputs["target_tokens"].numpy().tolist(), **more), route))
        who = with_random_b(adapter(base, expert_lora="per_expert"), 4)
        wide = {"clip_low_threshold": 0.0, "clip_high_threshold": 100.0}
        return forward_backward(trainer, who, data, "gspo", config=wide).metrics["loss:sum"], who.grad

    (one, one_grad), (two, two_grad) = losses(-1.0), losses(-9.0)
    assert one == two != 0 and torch.equal(one_grad, two_grad) and bool(torch.isfinite(one_grad).all()) and bool((one_grad != 0).any())


def test_a_token_without_a_route_keeps_its_bits(base: BaseModel) -> None:
    """Whoever shares a row with routes, and replays none, gets the router's own weights."""
    trainer, who = Trainer(base, 256), with_random_b(adapter(base, expert_lora="per_expert"), 4)
    row = random_datums(7, [12])[0]
    unknown = with_routes(row, np.full((12, len(base.expert_modules), TOP_K), UNKNOWN))
    plain, replayed = (forward_backward(trainer, who, [one], forward_only=True).outputs[0]["logprobs"].numpy() for one in (row, unknown))
    np.testing.assert_array_equal(replayed, plain)


def test_a_rule_is_settled_on_by_tokens_that_tell_it_from_others() -> None:
    """Weights of a sure router are those of several rules; what its next tokens weigh is that of one."""
    normalised = RULES["softmax of the chosen"]
    routing = Routing(0, 16, None, 1.0)
    batches = [torch.randn(tokens, 16, generator=torch.Generator().manual_seed(tokens)) for tokens in (2, 4)]
    batches[0][:, 3] += 9
    batches[0][:, 5] += 8
    for logits, count in zip(batches, (2, 1), strict=True):
        ids = logits.topk(2).indices
        own = normalised(logits, ids).bfloat16()
        routing.logits = logits
        chosen, weights = routing._replay(ids, own, ids)
        assert torch.equal(chosen, ids) and len(routing.rules) == count
        torch.testing.assert_close(weights, own, rtol=0, atol=1e-2)
    assert routing.rules == [normalised]


@pytest.mark.parametrize("lost", [slice(1, 3), slice(None)], ids=["some", "all"])
def test_tokens_that_are_no_numbers_tell_nothing_of_the_rule(lost: slice) -> None:
    """An adapter that has diverged gets the error that says so."""
    normalised, routing = RULES["softmax of the chosen"], Routing(0, 16, None, 1.0)
    logits = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    ids = logits.topk(2).indices
    logits[lost] = float("nan")
    own = normalised(logits, ids)
    routing.logits = logits
    chosen, weights = routing._replay(ids, own, ids)
    assert torch.equal(chosen, ids) and weights[lost].isnan().all()
    torch.testing.assert_close(weights, own, equal_nan=True)
    assert (routing.rules == [normalised]) == (lost != slice(None))


def test_too_many_routes_are_refused_before_they_are_recorded(base: BaseModel) -> None:
    params = SamplingParams(max_tokens=40, seed=1, routing=True)
    wanted = Sample("big", "tiny", "", "", "t", Array.of(np.array(PROMPT, np.int32)), 2**22, params)
    with pytest.raises(TooLarge, match="routes of"):
        new_sampler(base).add(wanted)
    new_sampler(base).add(msgspec.structs.replace(wanted, num_samples=4))


def test_metrics_of_balance(base: BaseModel) -> None:
    trainer, who = Trainer(base, 64), adapter(base)
    metrics = forward_backward(trainer, who, random_datums(1, [30, 30, 20])).metrics
    assert 0 < metrics["e_frac_with_tokens:mean"] <= 1 and metrics["e_max_violation:max"] >= metrics["e_max_violation:mean"] > 0
    assert -1 <= metrics["e_min_violation:mean"] < 0 < metrics["e_frac_oversubscribed:mean"] < 1


def test_balance_by_hand() -> None:
    found = balance(torch.tensor([[4, 0, 2, 2], [2, 2, 2, 2]]))
    assert found == {
        "e_frac_with_tokens:mean": 7 / 8, "e_frac_oversubscribed:mean": 1 / 8, "e_max_violation:mean": 0.5, "e_max_violation:max": 1.0,
        "e_min_violation:mean": -0.5,
    }  # fmt: skip


def test_bad_routes_are_refused_by_name(base: BaseModel, tiny_model: Path) -> None:
    trainer, who = Trainer(base, 64), adapter(base)
    row = random_datums(1, [5])[0]
    layers = len(base.expert_modules)
    for routes, match in ((np.zeros((5, layers, 2)), "has shape"), (np.full((5, layers, TOP_K), EXPERTS), "numbered 0 to 7")):
        with pytest.raises(InvalidRequest, match=match):
            forward_backward(trainer, who, [with_routes(row, routes)])
    dro = datum([1, 2, 3], [2, 3, 4], advantages=[1, 1, 1], logprobs=[-1, -1, -1])
    with pytest.raises(Unsupported, match="dro"):
        forward_backward(trainer, who, [with_routes(dro, np.zeros((3, layers, TOP_K)))], "dro")
    dense = load_tiny(tiny_model)
    with pytest.raises(InvalidRequest, match="no experts"):
        forward_backward(Trainer(dense, 64), adapter(dense), [with_routes(row, np.zeros((5, 1, TOP_K)))])
    with pytest.raises(InvalidRequest, match="no experts"):
        sample(new_sampler(dense), "a")
