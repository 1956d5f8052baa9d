"""Cross-entropy, and what the losses share: the ratio, and sums over segments.

Axes: T tokens of a packed row, K targets per token, D datums. `segments` holds each datum's [start, end) and tiles the row.
A loss takes the log-probabilities of the targets and returns one contribution per token; the caller sums. It never averages:
a datum's weight in the step is what the client put into weights or advantages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from everlearn.losses.spec import Config

Segments = Sequence[tuple[int, int]]

# exp(20) is 5e8: no honest ratio is near it, and it keeps inf * 0 = NaN out of tokens that don't count.
MAX_LOG_RATIO = 20.0


def cross_entropy(logprobs_TK: Tensor, inputs: Mapping[str, Tensor], config: Config, segments: Segments) -> Tensor:
    """loss_t = - sum_k weights[t, k] * logp[t, k]; targets and weights are [T] or [T, K]. Negative weights are as good as others:
    a custom loss that the client computes arrives here as weights = -dL/dlogp."""
    loss_TK = -logprobs_TK * inputs["weights"]
    return loss_TK.sum(-1) if loss_TK.ndim == 2 else loss_TK


def ratio(logprobs_T: Tensor, behaviour_T: Tensor) -> Tensor:
    """p / q from log-probabilities, with gradient. Capped at exp(20), where the gradient becomes 0."""
    return torch.exp((logprobs_T - behaviour_T).clamp(max=MAX_LOG_RATIO))


def segment_ids(segments: Segments, device: torch.device) -> Tensor:
    """[T]: the index of the datum that each token belongs to."""
    lengths = torch.tensor([end - start for start, end in segments], device=device)
    return torch.repeat_interleave(torch.arange(len(segments), device=device), lengths)


def segment_sums(values_T: Tensor, segments: Segments) -> Tensor:
    """[D]: the sum over each datum's tokens."""
    sums_D = values_T.new_zeros(len(segments))
    return sums_D.index_add(0, segment_ids(segments, values_T.device), values_T)
