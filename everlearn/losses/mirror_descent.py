"""Policy mirror descent with a squared loss: the objective of Kimi k1.5 (arXiv 2501.12599) and Kimi K2 (arXiv 2507.20534).

Axes: T tokens of a packed row, D datums. For a datum with sampled tokens S (`sequence_ratio_mask` not 0), the log-probabilities p of the
trained policy and q of the one that sampled (`logprobs`), and A the mean of `advantages` over S:

    loss_D = (A - tau * sum over S of (p - q))^2

A is reward minus the mean reward of the group, r - rbar, on every token of S; the client computes it. The gradient at a token of S is
-2 tau (A - tau log ratio) dp: REINFORCE with the group's baseline, and a pull towards q. No importance ratio multiplies it: the minimum,
tau log(p / q) = A for every answer, is the same whoever drew the answer.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from everlearn.losses.logprobs import Segments, segment_ids, segment_sums
from everlearn.losses.spec import Config


def mirror_descent(logprobs_T: Tensor, inputs: Mapping[str, Tensor], config: Config, segments: Segments) -> Tensor:
    """Each token of S is given an equal share of its datum's loss, so that the sum over tokens is the loss."""
    mask_T = (inputs["sequence_ratio_mask"] != 0).to(logprobs_T.dtype)
    counts_D = segment_sums(mask_T, segments).clamp(min=1)
    advantage_D = segment_sums(inputs["advantages"] * mask_T, segments) / counts_D
    log_ratio_D = segment_sums((logprobs_T - inputs["logprobs"]) * mask_T, segments)
    share_D = (advantage_D - config["tau"] * log_ratio_D).square() / counts_D
    return share_D[segment_ids(segments, logprobs_T.device)] * mask_T
