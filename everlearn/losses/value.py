"""The loss of the value head: what the policy is worth at each token, against what the client computed.

Axes: T tokens of a packed row. With the head's value V and the target R (`value_targets`, such as the return, or GAE's advantage plus
the value before), on tokens that count (losses/correction.py):

    value_coeff / 2 * (V - R)^2

V at position t is that of the tokens up to t, before target t is drawn. The gradient reaches the head, and through the hidden state the
adapter, there times `value_trunk` (0: the adapter learns from the policy alone). Schulman et al., 2017, arXiv 1707.06347, section 5.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from everlearn.losses.correction import counted
from everlearn.losses.spec import VALUE_TARGETS, Config

Inputs = Mapping[str, Tensor]


def value_loss(values_T: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """What is added to the loss of each token, differentiable in the values."""
    errors_T = values_T - inputs[VALUE_TARGETS]
    return 0.5 * config["value_coeff"] * counted(inputs, values_T.dtype) * errors_T.square()


def value_gradient(values_T: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """dloss/dV [T]."""
    return config["value_coeff"] * counted(inputs, values_T.dtype) * (values_T - inputs[VALUE_TARGETS])


def value_metrics(values_T: Tensor, inputs: Inputs, config: Config) -> dict[str, float]:
    """value_loss:sum, its part of loss:sum; value_error_abs:mean |V - R|; value_explained_variance:mean 1 - Var(R - V) / Var(R), absent
    where all targets are equal. Over the tokens that count."""
    metrics = {"value_loss:sum": float(value_loss(values_T.double(), inputs, config).sum())}
    chosen_T = counted(inputs, torch.float64) != 0
    if not bool(chosen_T.any()):
        return metrics
    targets = inputs[VALUE_TARGETS].double()[chosen_T]
    errors = targets - values_T.double()[chosen_T]
    metrics["value_error_abs:mean"] = float(errors.abs().mean())
    spread = float(targets.var(correction=0))
    if spread > 0:
        metrics["value_explained_variance:mean"] = 1 - float(errors.var(correction=0)) / spread
    return metrics
