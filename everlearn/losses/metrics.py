"""What a forward_backward reports beside its loss: how far the trained policy is from the one that sampled.

Keys are `name:reduction`: a client that split its data combines the parts by the reduction. Call once per request, with all of
its datums packed, because means don't add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from everlearn.losses.logprobs import MAX_LOG_RATIO, Segments
from everlearn.losses.policy import clip_bounds
from everlearn.losses.spec import SAMPLED_MASK, LossSpec
from everlearn.losses.stable_reinforce import band_mask
from everlearn.losses.table import Loss, pack_inputs
from everlearn.types import Datum


def request_metrics(loss: Loss, data: Sequence[Datum], logprobs: Sequence[Tensor], config: Mapping[str, float]) -> dict[str, float]:
    """`policy_metrics` of a whole request: `logprobs[i]` are the trained policy's for datum i's targets."""
    if not loss.spec.behaviour:
        return {}
    inputs, segments = pack_inputs(loss, data, config)
    return policy_metrics(loss.spec, torch.cat([own.cpu() for own in logprobs]), inputs, config, segments)


def policy_metrics(
    spec: LossSpec, logprobs_T: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float], segments: Segments
) -> dict[str, float]:
    """Over the tokens that were sampled, as far as the inputs tell (else: that carry an advantage). With l = logp - q:

    logprob_diff_abs:mean |l|; kl_sample_train_v1:mean -l; kl_k3:mean e^l - 1 - l (an estimate of KL(q || p) that is never negative);
    ratio:mean, ratio:max, ratio:min e^l; effective_sample_fraction:mean (sum e^l)^2 / (n sum e^2l);
    clip_fraction:mean (outside the clip bounds) or mask_fraction:mean (outside the band); trained_tokens:sum n.
    Empty for a loss that knows no sampling policy; just the count where no token qualifies.
    """
    if not spec.behaviour:
        return {}
    chosen_T = _chosen(spec, inputs)
    count = int(chosen_T.sum())
    if count == 0:
        return {"trained_tokens:sum": 0.0}
    log_ratio = (logprobs_T.detach().double() - inputs[spec.behaviour].double())[chosen_T].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    metrics = {
        "logprob_diff_abs:mean": log_ratio.abs().mean(),
        "kl_sample_train_v1:mean": -log_ratio.mean(),
        "kl_k3:mean": (torch.expm1(log_ratio) - log_ratio).mean(),
        "ratio:mean": ratio.mean(),
        "ratio:max": ratio.max(),
        "ratio:min": ratio.min(),
        "effective_sample_fraction:mean": ratio.sum().square() / (count * ratio.square().sum()),
    }
    outside = _outside(spec, ratio, inputs, config, chosen_T)
    if outside is not None:
        metrics["mask_fraction:mean" if spec.name == "stable_reinforce" else "clip_fraction:mean"] = outside.double().mean()
    return {"trained_tokens:sum": float(count), **{name: float(value) for name, value in metrics.items()}}


def _chosen(spec: LossSpec, inputs: Mapping[str, Tensor]) -> Tensor:
    for name in (SAMPLED_MASK, "sequence_ratio_mask"):
        if name in inputs:
            return inputs[name] != 0
    return inputs["advantages"] != 0


def _outside(spec: LossSpec, ratio: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float], chosen_T: Tensor) -> Tensor | None:
    """Which of the chosen tokens the loss clips or masks. gspo clips sequences, not tokens, and is left out."""
    if spec.name == "stable_reinforce":
        return band_mask(ratio, config) == 0
    if spec.name not in ("ppo", "cispo"):
        return None
    low, high = (bound[chosen_T] if isinstance(bound, Tensor) else bound for bound in clip_bounds(inputs, config))
    return (ratio < low) | (ratio > high)
