"""Each loss against a slow reference written from its formula, its gradient against differences, and laws that must hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from everlearn.losses.spec import SAMPLED_MASK, SAMPLING_LOGPROBS, SPECS
from everlearn.losses.table import LOSSES, loss_and_grad
from tests.losses.reference import LENGTH, POLICY, SEGMENTS, config_of, example, frozen_loss, reference_token, run, torch_inputs


@pytest.mark.parametrize("name", POLICY)
@pytest.mark.parametrize("seed", range(5))
def test_value_is_the_formula_summed_per_datum(name: str, seed: int) -> None:
    logprobs, inputs = example(seed)
    config = config_of(name)
    loss_D, _ = run(name, logprobs, inputs, config)
    expected = [sum(reference_token(name, t, logprobs, inputs, config, (a, b)) for t in range(a, b)) for a, b in SEGMENTS]
    np.testing.assert_allclose(loss_D, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", POLICY)
@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_that_of_differences(name: str, seed: int) -> None:
    logprobs, inputs = example(seed)
    config = config_of(name)
    _, grad = run(name, logprobs, inputs, config)
    value, step = frozen_loss(name, inputs, config, logprobs), 1e-6
    for t in range(LENGTH):
        up, down = logprobs.copy(), logprobs.copy()
        up[t] += step
        down[t] -= step
        assert grad[t] == pytest.approx((value(up) - value(down)) / (2 * step), rel=1e-6, abs=1e-8), t


@pytest.mark.parametrize("shape", [(LENGTH,), (LENGTH, 3)])
def test_cross_entropy_is_the_weighted_sum_and_its_gradient_the_negative_weights(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    logprobs, weights = -rng.exponential(1.0, shape), rng.standard_normal(shape)
    loss_D, grad = run("cross_entropy", logprobs, {"weights": weights}, {})
    expected = [-sum(float(x) for x in (logprobs[a:b] * weights[a:b]).ravel()) for a, b in SEGMENTS]
    np.testing.assert_allclose(loss_D, expected, rtol=1e-12)
    np.testing.assert_array_equal(grad, -weights)


# --- laws

vectors = st.lists(
    st.tuples(st.floats(-5, -0.01), st.floats(-1, 1), st.floats(-3, 3)),
    min_size=1,
    max_size=12,
).map(lambda rows: [np.array(column) for column in zip(*rows, strict=True)])


def inputs_of(behaviour: np.ndarray, advantages: np.ndarray) -> dict[str, np.ndarray]:
    ones = np.ones_like(behaviour)
    return {
        "logprobs": behaviour,
        SAMPLING_LOGPROBS: behaviour,
        "advantages": advantages,
        SAMPLED_MASK: ones,
        "sequence_ratio_mask": ones,
    }


@budget(max_examples=60, deadline=None)
@given(vectors)
def test_ppo_and_stable_reinforce_are_importance_sampling_inside_their_bounds(rows: list[np.ndarray]) -> None:
    behaviour, shift, advantages = rows
    logprobs, inputs, segments = behaviour + 0.15 * shift, inputs_of(behaviour, advantages), [(0, len(behaviour))]
    plain = run("importance_sampling", logprobs, inputs, {}, segments)
    for name, config in {"ppo": config_of("ppo"), "stable_reinforce": {"kl_coeff": 0.0, "ratio_low": 0.5, "ratio_high": 5.0}}.items():
        loss_D, grad = run(name, logprobs, inputs, config, segments)
        np.testing.assert_allclose(loss_D, plain[0], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(grad, plain[1], rtol=1e-12, atol=1e-12)


@budget(max_examples=40, deadline=None)
@given(vectors)
def test_on_policy_every_policy_loss_has_the_gradient_of_reinforce(rows: list[np.ndarray]) -> None:
    behaviour, _, advantages = rows
    for name in POLICY:
        _, grad = run(name, behaviour, inputs_of(behaviour, advantages), config_of(name), [(0, len(behaviour))])
        expected = -advantages if name != "mirror_descent" else -2 * config_of(name)["tau"] * np.full_like(advantages, advantages.mean())
        np.testing.assert_allclose(grad, expected, rtol=1e-12, atol=1e-12)


@budget(max_examples=40, deadline=None)
@given(vectors)
def test_ppo_never_promises_more_than_importance_sampling(rows: list[np.ndarray]) -> None:
    behaviour, shift, advantages = rows
    logprobs, inputs, segments = behaviour + shift, inputs_of(behaviour, advantages), [(i, i + 1) for i in range(len(behaviour))]
    clipped, _ = run("ppo", logprobs, inputs, config_of("ppo"), segments)
    plain, _ = run("importance_sampling", logprobs, inputs, {}, segments)
    assert (clipped >= plain - 1e-12).all()


@budget(max_examples=40, deadline=None)
@given(vectors, st.integers(0, 2**32 - 1))
def test_the_order_of_datums_changes_nothing(rows: list[np.ndarray], seed: int) -> None:
    behaviour, shift, advantages = rows
    length = len(behaviour)
    logprobs, inputs = behaviour + shift, inputs_of(behaviour, advantages)
    rng = np.random.default_rng(seed)
    cuts = sorted(rng.choice(np.arange(1, length), size=rng.integers(0, length), replace=False)) if length > 1 else []
    segments = list(zip([0, *cuts], [*cuts, length], strict=True))
    order = rng.permutation(len(segments))
    places = np.concatenate([np.arange(*segments[i]) for i in order])
    lengths = [segments[i][1] - segments[i][0] for i in order]
    moved = list(zip(np.cumsum([0, *lengths[:-1]]).tolist(), np.cumsum(lengths).tolist(), strict=True))
    for name in POLICY:
        loss_D, grad = run(name, logprobs, inputs, config_of(name), segments)
        other_D, other_grad = run(name, logprobs[places], {k: v[places] for k, v in inputs.items()}, config_of(name), moved)
        np.testing.assert_allclose(other_D, loss_D[order], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(other_grad, grad[places], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["cross_entropy", *POLICY])
def test_a_datum_sent_twice_counts_twice_and_alone_as_in_company(name: str) -> None:
    logprobs, inputs = example(3)
    inputs["weights"] = inputs["advantages"]
    whole_D, whole_grad = run(name, logprobs, inputs, config_of(name))
    for (a, b), loss in zip(SEGMENTS, whole_D, strict=True):
        twice = {k: np.tile(v[a:b], 2) for k, v in inputs.items()}
        loss_D, grad = run(name, np.tile(logprobs[a:b], 2), twice, config_of(name), [(0, b - a), (b - a, 2 * (b - a))])
        np.testing.assert_allclose(loss_D, [loss, loss], rtol=1e-12)
        np.testing.assert_allclose(grad, np.tile(whole_grad[a:b], 2), rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in SPECS if SPECS[name].per_token])
def test_per_token_losses_may_be_taken_in_chunks(name: str) -> None:
    logprobs, inputs = example(4)
    inputs["weights"] = inputs["advantages"]
    _, whole_grad = run(name, logprobs, inputs, config_of(name))
    chunks = [run(name, logprobs[a : a + 5], {k: v[a : a + 5] for k, v in inputs.items()}, config_of(name), [(0, 5)]) for a in (0, 5)]
    np.testing.assert_allclose(np.concatenate([grad for _, grad in chunks]), whole_grad[:10], rtol=1e-12)


@pytest.mark.parametrize("name", POLICY)
def test_tokens_without_advantage_stay_finite_however_far_the_policies_are(name: str) -> None:
    logprobs, behaviour = np.array([-0.1, -400.0, -1.0]), np.array([-300.0, -0.1, -1.0])
    inputs = inputs_of(behaviour, np.array([0.0, 0.0, 1.0]))
    loss_D, grad = loss_and_grad(
        LOSSES[name],
        torch.tensor(logprobs, dtype=torch.float32),
        {k: v.float() for k, v in torch_inputs(inputs).items()},
        config_of(name),
        [(0, 3)],
    )
    assert loss_D.dtype == grad.dtype == torch.float32
    assert torch.isfinite(loss_D).all()
    assert torch.isfinite(grad).all()


def test_stable_reinforce_masks_the_policy_gradient_but_keeps_the_pull() -> None:
    behaviour, logprobs = np.array([-1.0, -1.0]), np.array([-3.0, -1.0 + math.log(6.0)])
    _, grad = run("stable_reinforce", logprobs, inputs_of(behaviour, np.array([2.0, 2.0])), SPECS["stable_reinforce"].defaults, [(0, 2)])
    np.testing.assert_allclose(grad, 0.001 * (logprobs - behaviour), rtol=1e-12)


def test_bounds_per_token_replace_the_configured_ones() -> None:
    logprobs, inputs = example(5)
    tight = {**inputs, "clip_low_threshold": np.full(LENGTH, 0.95), "clip_high_threshold": np.full(LENGTH, 1.05)}
    for name in ("ppo", "cispo"):
        expected = run(name, logprobs, inputs, config_of(name, clip_low_threshold=0.95, clip_high_threshold=1.05))
        for got, want in zip(run(name, logprobs, tight, config_of(name)), expected, strict=True):
            np.testing.assert_array_equal(got, want)


def test_half_precision_logprobs_are_raised_to_float32() -> None:
    loss_D, grad = loss_and_grad(
        LOSSES["importance_sampling"],
        torch.tensor([-1.0, -2.0], dtype=torch.bfloat16),
        {"logprobs": torch.tensor([-1.0, -2.0]), "advantages": torch.tensor([1.0, 1.0])},
        {},
        [(0, 2)],
    )
    assert loss_D.dtype == grad.dtype == torch.float32
