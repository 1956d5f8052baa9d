"""The factor for the drift from the sampling policy: its formula and gradient, that it weighs once, and that it bounds what explodes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from everlearn.losses.correction import correction
from everlearn.losses.spec import NEVER, SPECS
from everlearn.losses.table import LOSSES
from tests.losses.reference import CORRECTED, LENGTH, SEGMENTS, config_of, example, frozen_loss, reference_token, run, torch_inputs

WAYS: dict[str, dict[str, float | str]] = {
    "full": {},
    "none": {"importance_weight": "none"},
    "tis_token": {"importance_weight": "tis_token", "tis_threshold": 1.1},
    "tis_sequence": {"importance_weight": "tis_sequence", "tis_threshold": 1.2},
    "icepop": {"importance_weight": "icepop", "ratio_low": 0.8, "ratio_high": 1.3},
    "geometric": {"geometric_ratio_low": 0.9, "geometric_ratio_high": 1.1},
    "product": {"product_ratio_low": 0.6, "product_ratio_high": 1.3},
    "negative": {"negative_drift_max": 0.02},
    "all": {"importance_weight": "icepop", "geometric_ratio_high": 1.3, "product_ratio_high": 3.0, "negative_drift_max": 0.1},
}
BYPASS_WAYS = {name: way for name, way in WAYS.items() if not name.startswith("tis")}


def drifted(seed: int, decoupled: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    logprobs, inputs = example(seed)
    if decoupled:
        inputs["old_logprobs"] = inputs["logprobs"] + 0.3 * np.random.default_rng(seed + 100).standard_normal(LENGTH)
    return logprobs, inputs


def reference_factor(t: int, logp: np.ndarray, inputs: dict[str, np.ndarray], config: dict[str, float | str], segment) -> float:
    """From the definitions, with products of ratios and no logarithms but in the mean that DeepSeek's rule takes."""
    decoupled = "old_logprobs" in inputs
    top = inputs["old_logprobs"] if decoupled else logp
    rho = {i: math.exp(top[i]) / math.exp(inputs["logprobs"][i]) for i in range(*segment)}
    counted = [i for i in range(*segment) if inputs["sequence_ratio_mask"][i]]
    product = math.prod(rho[i] for i in counted)
    way = config["importance_weight"]
    weight = {
        "full": rho[t],
        "none": 1.0 if decoupled else rho[t],
        "tis_token": min(rho[t], config["tis_threshold"]),
        "tis_sequence": min(product, config["tis_threshold"]),
        "icepop": rho[t] if config["ratio_low"] <= rho[t] <= config["ratio_high"] else 0.0,
    }[way]
    if not config["geometric_ratio_low"] <= product ** (1 / len(counted)) <= config["geometric_ratio_high"]:
        weight = 0.0
    if not config["product_ratio_low"] <= product <= config["product_ratio_high"]:
        weight = 0.0
    drift = sum(math.log(math.exp(inputs["logprobs"][i]) / math.exp(logp[i])) for i in counted) / len(counted)
    if inputs["advantages"][t] < 0 and drift > config["negative_drift_max"]:
        weight = 0.0
    return weight if decoupled else weight / rho[t]


def cases() -> list[tuple[str, str, bool]]:
    return [
        (name, way, decoupled)
        for name in CORRECTED
        for way in WAYS
        for decoupled in (True, False)
        if decoupled or way in BYPASS_WAYS or not SPECS[name].own_weight
    ]


@pytest.mark.parametrize(("name", "way", "decoupled"), cases())
def test_value_and_gradient_are_those_of_the_formula(name: str, way: str, decoupled: bool) -> None:
    for seed in range(4):
        logprobs, inputs = drifted(seed, decoupled)
        config = config_of(name, **WAYS[way])
        surrogate = {**inputs, "logprobs": inputs.get("old_logprobs", inputs["logprobs"])}
        factors = {t: reference_factor(t, logprobs, inputs, config, span) for span in SEGMENTS for t in range(*span)}
        loss_D, grad = run(name, logprobs, inputs, config)
        expected = [
            sum(factors[t] * reference_token(name, t, logprobs, surrogate, config, (a, b)) for t in range(a, b)) for a, b in SEGMENTS
        ]
        np.testing.assert_allclose(loss_D, expected, rtol=1e-10, atol=1e-10)
        step = 1e-6
        for t in range(LENGTH):  # the factor of token t multiplies its own contribution alone: take it alone
            only = {**surrogate, "advantages": np.where(np.arange(LENGTH) == t, inputs["advantages"], 0.0)}
            value = frozen_loss(name, only, config, logprobs)
            up, down = logprobs.copy(), logprobs.copy()
            up[t] += step
            down[t] -= step
            assert grad[t] == pytest.approx(factors[t] * (value(up) - value(down)) / (2 * step), rel=1e-5, abs=1e-8), (seed, t)


def test_the_cases_above_mask_and_truncate_some_and_not_all() -> None:
    for way in set(WAYS) - {"full", "none"}:
        marks = []
        for seed in range(4):
            logprobs, inputs = drifted(seed, True)
            found = correction(torch.tensor(logprobs), torch_inputs(inputs), config_of("ppo", **WAYS[way]), SEGMENTS)
            marks.append(found.truncated_T if way.startswith("tis") else ~found.kept_T)
        share = torch.cat(marks).double().mean()
        assert 0 < share < 1, way


# --- the weight stands once


@pytest.mark.parametrize("seed", range(5))
def test_decoupled_and_bypass_give_reinforce_the_same_gradient_whatever_the_old_policy_is(seed: int) -> None:
    """(pi_old / mu) (pi / pi_old) = pi / mu: a weight that stood twice, or not at all, would show."""
    logprobs, inputs = drifted(seed, True)
    bypass = {name: value for name, value in inputs.items() if name != "old_logprobs"}
    one, two = (run("importance_sampling", logprobs, some, config_of("importance_sampling")) for some in (inputs, bypass))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CORRECTED)
@pytest.mark.parametrize("way", BYPASS_WAYS)
def test_an_old_policy_that_is_the_trained_one_gives_the_surrogate_of_a_first_step(name: str, way: str) -> None:
    """At the start of a step pi = pi_old, r = 1, and the gradient is -w A: w alone."""
    logprobs, inputs = drifted(1, False)
    inputs["old_logprobs"] = logprobs
    config = config_of(name, **WAYS[way])
    _, grad = run(name, logprobs, inputs, config)
    factors = np.array([reference_factor(t, logprobs, inputs, config, span) for span in SEGMENTS for t in range(*span)])
    np.testing.assert_allclose(grad, -factors * inputs["advantages"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CORRECTED)
def test_an_old_policy_that_is_the_sampling_one_changes_nothing(name: str) -> None:
    logprobs, inputs = drifted(2, False)
    plain = run(name, logprobs, inputs, config_of(name))
    same = run(name, logprobs, {**inputs, "old_logprobs": inputs["logprobs"]}, config_of(name))
    for a, b in zip(plain, same, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("way", WAYS)
def test_in_bypass_the_gradient_of_reinforce_is_the_weight_once(way: str) -> None:
    logprobs, inputs = drifted(3, False)
    config = config_of("importance_sampling", **WAYS[way])
    _, grad = run("importance_sampling", logprobs, inputs, config)
    for span in SEGMENTS:
        for t in range(*span):
            rho = math.exp(logprobs[t] - inputs["logprobs"][t])
            weight = reference_factor(t, logprobs, inputs, config, span) * rho
            assert grad[t] == pytest.approx(-weight * inputs["advantages"][t], rel=1e-9, abs=1e-12)


# --- laws

vectors = st.lists(st.tuples(st.floats(-5, -0.01), st.floats(-6, 6), st.floats(-3, 3)), min_size=1, max_size=12)


@budget(max_examples=80, deadline=None)
@given(vectors)
def test_truncation_and_bands_bound_every_gradient(rows: list[tuple[float, float, float]]) -> None:
    behaviour, drift, advantages = (np.array(column) for column in zip(*rows, strict=True))
    span = [(0, len(behaviour))]
    inputs = {"logprobs": behaviour, "advantages": advantages}
    for decoupled in (True, False):
        logprobs = behaviour + drift
        given_ = {**inputs, "old_logprobs": logprobs} if decoupled else inputs
        for config, bound in (
            ({"importance_weight": "tis_token", "tis_threshold": 2.0}, 2.0),
            ({"importance_weight": "tis_sequence", "tis_threshold": 3.0}, 3.0),
            ({"importance_weight": "icepop", "ratio_high": 5.0}, 5.0),
        ):
            _, grad = run("importance_sampling", logprobs, given_, config, span)
            assert (np.abs(grad) <= bound * np.abs(advantages) * (1 + 1e-9)).all()


@budget(max_examples=40, deadline=None)
@given(vectors)
def test_bounds_that_nothing_reaches_change_no_bit(rows: list[tuple[float, float, float]]) -> None:
    behaviour, drift, advantages = (np.array(column) for column in zip(*rows, strict=True))
    span, inputs = [(0, len(behaviour))], {"logprobs": behaviour, "advantages": advantages}
    wide = {"geometric_ratio_low": 1e-30, "product_ratio_low": 1e-30, "negative_drift_max": NEVER / 2}
    for name in ("importance_sampling", "ppo", "cispo"):
        for a, b in zip(
            run(name, behaviour + drift, inputs, config_of(name), span),
            run(name, behaviour + drift, inputs, config_of(name, **wide), span),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)


def test_sequences_are_told_by_their_advantages_where_no_mask_says() -> None:
    logprobs, inputs = drifted(4, True)
    inputs["advantages"] = np.where(inputs["sequence_ratio_mask"] != 0, 0.5, 0.0)
    bare = {name: value for name, value in inputs.items() if name != "sequence_ratio_mask"}
    config = config_of("importance_sampling", **WAYS["tis_sequence"])
    for a, b in zip(run("importance_sampling", logprobs, inputs, config), run("importance_sampling", logprobs, bare, config), strict=True):
        np.testing.assert_array_equal(a, b)


def test_which_configurations_look_at_sequences() -> None:
    spec = SPECS["ppo"]
    for way in ("full", "none", "tis_token", "icepop"):
        assert spec.per_token_with(config_of("ppo", **WAYS[way])), way
    for way in ("tis_sequence", "geometric", "product", "negative", "all"):
        assert not spec.per_token_with(config_of("ppo", **WAYS[way])), way
    assert not SPECS["gspo"].per_token_with(config_of("gspo"))


@pytest.mark.parametrize("way", ["none", "tis_token", "icepop"])
@pytest.mark.parametrize("decoupled", [True, False])
def test_ways_per_token_may_be_taken_in_chunks(way: str, decoupled: bool) -> None:
    logprobs, inputs = drifted(4, decoupled)
    config = config_of("ppo", **WAYS[way])
    _, whole = run("ppo", logprobs, inputs, config)
    for a in (0, 5):
        _, grad = run("ppo", logprobs[a : a + 5], {k: v[a : a + 5] for k, v in inputs.items()}, config, [(0, 5)])
        np.testing.assert_array_equal(grad, whole[a : a + 5])


def test_ratios_beyond_all_measure_stay_finite() -> None:
    logprobs, behaviour = torch.tensor([-0.1, -400.0, -1.0]), torch.tensor([-300.0, -0.1, -1.0])
    inputs = {"logprobs": behaviour, "advantages": torch.tensor([0.0, 0.0, 1.0]), "old_logprobs": torch.tensor([-500.0, -0.1, -1.0])}
    for way in WAYS.values():
        loss_T = LOSSES["importance_sampling"].fn(logprobs.requires_grad_(), inputs, dict(way), [(0, 3)])
        (grad,) = torch.autograd.grad(loss_T.sum(), logprobs)
        assert torch.isfinite(loss_T).all() and torch.isfinite(grad).all()
