"""Beside the formula (test_losses.py): where the squared objective has its minimum, whoever drew the answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from everlearn.losses.table import LOSSES, loss_and_grad
from tests.losses.reference import run


def inputs_of(behaviour: np.ndarray, advantage: float) -> dict[str, np.ndarray]:
    ones = np.ones_like(behaviour)
    return {"logprobs": behaviour, "advantages": advantage * ones, "sequence_ratio_mask": ones}


def test_the_gradient_vanishes_where_the_log_ratio_is_the_advantage_over_tau() -> None:
    behaviour, tau, advantage = np.array([-1.0, -2.0, -0.5]), 0.4, 0.6
    at_minimum = behaviour + advantage / tau / 3
    loss_D, grad = run("mirror_descent", at_minimum, inputs_of(behaviour, advantage), {"tau": tau}, [(0, 3)])
    np.testing.assert_allclose(loss_D, 0, atol=1e-12)
    np.testing.assert_allclose(grad, 0, atol=1e-12)
    _, grad = run("mirror_descent", behaviour, inputs_of(behaviour, advantage), {"tau": tau}, [(0, 3)])
    np.testing.assert_allclose(grad, -2 * tau * advantage)


def test_an_answer_without_advantage_is_pulled_back() -> None:
    behaviour = np.array([-1.0, -2.0])
    _, grad = run("mirror_descent", behaviour + 0.3, inputs_of(behaviour, 0.0), {"tau": 0.5}, [(0, 2)])
    np.testing.assert_allclose(grad, 2 * 0.5**2 * 0.6)


@pytest.mark.parametrize("drawn_by", ["uniform", "other"])
def test_descent_finds_the_tilted_policy_whoever_drew_the_answers(drawn_by: str) -> None:
    """The paper's fixed point: tau log(pi / pi_old) = r - tau log Z. With the baseline tau log Z in the place of the mean reward it is exact,
    from answers (one token here) that any policy drew, without an importance ratio."""
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(-1)
    rewards, tau = torch.rand(6, generator=generator, dtype=torch.float64), 0.5
    baseline = tau * (old + rewards / tau).logsumexp(-1)
    drawn = torch.full((6,), 1 / 6, dtype=torch.float64) if drawn_by == "uniform" else torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.1]).double()
    logits = old.clone()
    inputs = {"logprobs": old, "advantages": rewards - baseline, "sequence_ratio_mask": torch.ones(6)}
    for _ in range(3000):
        leaf = logits.clone().requires_grad_()
        logprobs = leaf.log_softmax(-1)
        _, grad = loss_and_grad(LOSSES["mirror_descent"], logprobs, inputs, {"tau": tau}, [(i, i + 1) for i in range(6)])
        (slope,) = torch.autograd.grad((logprobs * grad * drawn).sum(), leaf)
        logits = logits - 2.0 * slope
    torch.testing.assert_close(logits.log_softmax(-1), (old + rewards / tau).log_softmax(-1), rtol=1e-3, atol=1e-3)
