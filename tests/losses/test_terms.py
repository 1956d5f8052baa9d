"""KL, entropy and cross-entropy as terms of a policy loss: value, gradient, and that the gradient is the true one in expectation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from everlearn.losses import terms
from everlearn.losses.table import LOSSES, loss_and_grad
from tests.losses.reference import CORRECTED, LENGTH, SEGMENTS, config_of, example, run

WITH_TERMS = [*CORRECTED, "mirror_descent"]


def with_reference(seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    logprobs, inputs = example(seed)
    rng = np.random.default_rng(seed + 50)
    inputs["reference_logprobs"] = inputs["logprobs"] + 0.5 * rng.standard_normal(LENGTH)
    inputs["weights"] = np.where(inputs["sequence_ratio_mask"] == 0, rng.random(LENGTH), 0.0)
    return logprobs, inputs


@pytest.mark.parametrize("name", WITH_TERMS)
@pytest.mark.parametrize("seed", range(3))
def test_terms_are_added_with_the_value_of_k3_and_the_gradient_of_k2(name: str, seed: int) -> None:
    logprobs, inputs = with_reference(seed)
    bare = {key: value for key, value in inputs.items() if key not in ("reference_logprobs", "weights")}
    plain_D, plain_grad = run(name, logprobs, bare, config_of(name))
    loss_D, grad = run(name, logprobs, inputs, config_of(name, kl_coeff=0.3, entropy_coeff=0.2))
    for place, (a, b) in enumerate(SEGMENTS):
        value = 0.0
        for t in range(a, b):
            p, f, w = float(logprobs[t]), float(inputs["reference_logprobs"][t]), float(inputs["weights"][t])
            sampled = float(inputs["sequence_ratio_mask"][t])
            value += sampled * 0.3 * (math.exp(f) / math.exp(p) - 1 - (f - p)) + sampled * 0.2 * p - w * p
            slope = sampled * 0.3 * (p - f) + sampled * 0.2 * p - w
            assert grad[t] - plain_grad[t] == pytest.approx(slope, rel=1e-9, abs=1e-12)
        assert loss_D[place] - plain_D[place] == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("function", ["kl", "negative_entropy"])
def test_gradients_are_those_of_the_second_estimator_by_differences(function: str) -> None:
    logprobs, inputs = with_reference(1)
    reference, step = torch.tensor(inputs["reference_logprobs"]), 1e-6
    leaf = torch.tensor(logprobs, requires_grad=True)
    value_T = terms.kl(leaf, reference) if function == "kl" else terms.negative_entropy(leaf)
    (grad,) = torch.autograd.grad(value_T.sum(), leaf)
    surrogate = (lambda p, t: (p - inputs["reference_logprobs"][t]) ** 2 / 2) if function == "kl" else (lambda p, t: p**2 / 2)
    for t, p in enumerate(logprobs):
        assert float(grad[t]) == pytest.approx((surrogate(p + step, t) - surrogate(p - step, t)) / (2 * step), rel=1e-6, abs=1e-8)


def expectation(logits: torch.Tensor, per_token) -> torch.Tensor:
    """The expected gradient with respect to the logits, over tokens drawn from the softmax: every token once, times its probability."""
    leaf = logits.clone().requires_grad_()
    logprobs = leaf.log_softmax(-1)
    (grad,) = torch.autograd.grad((logprobs.detach().exp() * per_token(logprobs)).sum(), leaf)
    return grad


def true_gradient(logits: torch.Tensor, of) -> torch.Tensor:
    leaf = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(of(leaf.log_softmax(-1)), leaf)
    return grad


@pytest.mark.parametrize("seed", range(5))
def test_in_expectation_values_and_gradients_are_those_of_kl_and_entropy(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, others = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    reference, own = others.log_softmax(-1), logits.log_softmax(-1)
    exact_kl = (own.exp() * (own - reference)).sum()
    assert float((own.exp() * terms.kl(own, reference)).sum()) == pytest.approx(float(exact_kl), rel=1e-9)
    assert float((own.exp() * terms.negative_entropy(own)).sum()) == pytest.approx(float((own.exp() * own).sum()), rel=1e-9)
    of_kl = true_gradient(logits, lambda p: (p.exp() * (p - reference)).sum())
    torch.testing.assert_close(expectation(logits, lambda p: terms.kl(p, reference)), of_kl)
    of_entropy = true_gradient(logits, lambda p: (p.exp() * p).sum())
    torch.testing.assert_close(expectation(logits, terms.negative_entropy), of_entropy)
    # What the two must not be: k3 as a loss has another gradient, and the entropy's value alone has none.
    assert float((expectation(logits, lambda p: terms.k3(p, reference)) - of_kl).abs().max()) > 0.01
    torch.testing.assert_close(expectation(logits, lambda p: p), torch.zeros_like(logits))


@pytest.mark.parametrize("name", WITH_TERMS)
def test_text_beside_episodes_equals_two_requests(name: str) -> None:
    """PTX in one request: the sum of the policy loss of the one part and the cross-entropy of the other."""
    logprobs, inputs = example(7)
    for key in ("advantages", "sequence_ratio_mask"):
        inputs[key] = np.where(np.arange(LENGTH) < 5, inputs[key], 0.0)  # the third datum is text
    weights = np.where(np.arange(LENGTH) >= 5, 0.25, 0.0)
    loss_D, grad = run(name, logprobs, {**inputs, "weights": weights}, config_of(name))
    policy_D, policy_grad = run(name, logprobs, inputs, config_of(name))
    text_D, text_grad = run("cross_entropy", logprobs, {"weights": weights}, {})
    np.testing.assert_allclose(loss_D, policy_D + text_D, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(grad, policy_grad + text_grad, rtol=1e-12, atol=1e-12)
    assert np.isfinite(grad).all()


def test_a_token_that_the_correction_masks_keeps_its_kl() -> None:
    behaviour, logprobs = torch.tensor([-3.0, -1.0]), torch.tensor([-1.0, -1.0])
    inputs = {"logprobs": behaviour, "advantages": torch.tensor([2.0, 2.0]), "reference_logprobs": torch.tensor([-2.0, -1.0])}
    _, grad = loss_and_grad(LOSSES["ppo"], logprobs, inputs, {"importance_weight": "icepop", "kl_coeff": 0.5}, [(0, 2)])
    assert grad.tolist() == pytest.approx([0.5, -2.0])


def test_silenced_tokens_have_no_term() -> None:
    logprobs, inputs = with_reference(2)
    silent = np.where(np.arange(LENGTH) == 2, 1.0, 0.0)
    config = config_of("gspo", kl_coeff=0.3, entropy_coeff=0.2)
    _, grad = run("gspo", logprobs, {**inputs, "silenced": silent, "advantages": np.zeros(LENGTH), "weights": np.zeros(LENGTH)}, config)
    assert grad[2] == 0 and grad[1] != 0
