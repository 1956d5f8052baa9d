"""Terms that are added to a policy loss: KL to a reference policy, entropy, and cross-entropy. Each is 0 unless asked for.

Axes: T tokens of a packed row. With p the trained policy's log-probability of a target and f that of a reference policy:

    kl_coeff * (exp(f - p) - 1 - (f - p))   on tokens that count, with the gradient kl_coeff * (p - f) dp
    entropy_coeff * p                       on tokens that count, with the gradient entropy_coeff * p dp
    -weights * p                            wherever weights aren't 0

The first two are estimates from sampled tokens, whose value and whose gradient come from different estimators (Schulman, "Approximating
KL divergence", 2020). The value of the KL is k3, unbiased and never negative; but differentiating k3 doesn't give the KL's gradient, and
differentiating k2 = (p - f)^2 / 2 does: for tokens that the trained policy drew, E[(p - f) dp] is the gradient of KL(p || f). The
entropy is minus the KL to uniform, up to a constant: E[-p] is its value, and E[-p dp] its gradient, while the gradient of the value,
E[-dp], is 0 on average and teaches nothing. Both are right in expectation for tokens of the trained policy; for stale ones they are
pulls of the same direction, not weighted by the drift, and a token that the correction masks keeps them.

The cross-entropy is PTX (InstructGPT, arXiv 2203.02155; Kimi K2, arXiv 2507.20534): datums of text to imitate carry advantages of 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from everlearn.losses.correction import counted
from everlearn.losses.logprobs import MAX_LOG_RATIO
from everlearn.losses.spec import Config

Inputs = Mapping[str, Tensor]


def straight_through(value_T: Tensor, gradient_of_T: Tensor) -> Tensor:
    """The value of the first with the gradient of the second."""
    return value_T.detach() + gradient_of_T - gradient_of_T.detach()


def k3(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """exp(f - p) - 1 - (f - p): an estimate of KL(trained || reference) from the trained policy's tokens. f - p is capped at +-20."""
    log_ratio_T = (reference_T - logprobs_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio_T) - log_ratio_T


def kl(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2."""
    return straight_through(k3(logprobs_T, reference_T), 0.5 * (logprobs_T - reference_T).square())


def negative_entropy(logprobs_T: Tensor) -> Tensor:
    """The value p with the gradient p dp."""
    return straight_through(logprobs_T, 0.5 * logprobs_T.square())


def terms(logprobs_T: Tensor, inputs: Inputs, config: Config) -> Tensor | None:
    """What is added to the loss of each token, None where nothing is."""
    parts = []
    if config.get("kl_coeff"):
        parts.append(config["kl_coeff"] * counted(inputs, logprobs_T.dtype) * kl(logprobs_T, inputs["reference_logprobs"]))
    if config.get("entropy_coeff"):
        parts.append(config["entropy_coeff"] * counted(inputs, logprobs_T.dtype) * negative_entropy(logprobs_T))
    if "weights" in inputs:
        parts.append(-inputs["weights"] * logprobs_T)
    return sum(parts[1:], parts[0]) if parts else None


def active(inputs: Inputs, config: Config) -> Tensor | None:
    """[T] bool: the tokens to which the terms may give a gradient; None where no term is asked for."""
    marks = []
    if config.get("kl_coeff") or config.get("entropy_coeff"):
        marks.append(counted(inputs, torch.float32) != 0)
    if "weights" in inputs:
        marks.append(inputs["weights"] != 0)
    return torch.stack(marks).any(0) if marks else None
