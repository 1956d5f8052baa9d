"""What a forward_backward reports beside its loss: how far the trained policy is from the one that sampled.

Keys are `name:reduction`: a client that split its data combines the parts by the reduction. Call once per request, with all of
its datums packed, because means don't add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from everlearn.losses.correction import WAYS, anchored, correction
from everlearn.losses.logprobs import MAX_LOG_RATIO, Segments
from everlearn.losses.policy import clip_bounds
from everlearn.losses.spec import SAMPLED_MASK, Config
from everlearn.losses.stable_reinforce import band_mask
from everlearn.losses.table import Loss, pack_inputs
from everlearn.losses.terms import k3
from everlearn.types import Datum


def request_metrics(loss: Loss, data: Sequence[Datum], logprobs: Sequence[Tensor], config: Config) -> dict[str, float]:
    """`policy_metrics` of a whole request: `logprobs[i]` are the trained policy's for datum i's targets."""
    if not loss.spec.behaviour:
        return {}
    inputs, segments = pack_inputs(loss, data, config)
    return policy_metrics(loss, torch.cat([own.cpu() for own in logprobs]), inputs, config, segments)


def policy_metrics(loss: Loss, logprobs_T: Tensor, inputs: Mapping[str, Tensor], config: Config, segments: Segments) -> dict[str, float]:
    """Over the tokens that were sampled, as far as the inputs tell (else: that carry an advantage). With l = logp - q:

    logprob_diff_abs:mean |l|; kl_sample_train_v1:mean -l; kl_k3:mean e^l - 1 - l (an estimate of KL(q || p) that is never negative);
    ratio:mean, ratio:max, ratio:min e^l; effective_sample_fraction:mean (sum e^l)^2 / (n sum e^2l);
    clip_fraction:mean (outside the clip bounds) or mask_fraction:mean (left out by a band or a rule for sequences); trained_tokens:sum n.
    Empty for a loss that knows no sampling policy; just the count where no token qualifies. What else a request asks for adds its own:
    see `_drift` for `old_logprobs`, `_of_correction` and `_of_terms`.
    """
    spec = loss.spec
    if not spec.behaviour:
        return {}
    config = {**spec.defaults, **config}
    chosen_T = _chosen(inputs)
    count = int(chosen_T.sum())
    metrics = {"trained_tokens:sum": float(count)} | _of_weights(logprobs_T, inputs)
    if count == 0:
        return metrics
    sampling_T = inputs[spec.behaviour].double()
    log_ratio = (logprobs_T.detach().double() - sampling_T)[chosen_T]
    metrics |= _drift(log_ratio)
    if "old_logprobs" in inputs:
        metrics |= {f"old_{name}": value for name, value in _drift((inputs["old_logprobs"].double() - sampling_T)[chosen_T]).items()}
    anchor_T = anchored(inputs)[spec.behaviour].double()
    outside = _outside(loss, (logprobs_T.detach().double() - anchor_T)[chosen_T], inputs, config, chosen_T)
    if outside is not None:
        metrics["mask_fraction:mean" if spec.name == "stable_reinforce" else "clip_fraction:mean"] = float(outside.double().mean())
    if spec.corrects and loss.corrected(inputs, config):
        metrics |= _of_correction(loss, logprobs_T, inputs, config, segments, chosen_T)
    return metrics | _of_terms(logprobs_T, inputs, config, chosen_T)


def _drift(log_ratio: Tensor) -> dict[str, float]:
    """How far one policy is from the one that sampled, from log-ratios of sampled tokens."""
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    metrics = {
        "logprob_diff_abs:mean": log_ratio.abs().mean(),
        "kl_sample_train_v1:mean": -log_ratio.mean(),
        "kl_k3:mean": (torch.expm1(log_ratio) - log_ratio).mean(),
        "ratio:mean": ratio.mean(),
        "ratio:max": ratio.max(),
        "ratio:min": ratio.min(),
        "effective_sample_fraction:mean": ratio.sum().square() / (len(ratio) * ratio.square().sum()),
    }
    return {name: float(value) for name, value in metrics.items()}


def _of_correction(
    loss: Loss, logprobs_T: Tensor, inputs: Mapping[str, Tensor], config: Config, segments: Segments, chosen_T: Tensor
) -> dict[str, float]:
    """mask_fraction:mean, the share of tokens that a band or a rule for sequences left out; truncated_fraction:mean, of those whose
    weight was cut down to tis_threshold."""
    found = correction(logprobs_T, inputs, config, segments)
    way = WAYS[config["importance_weight"]]
    metrics = {}
    if way.masks or loss.leaves_sequences_out(config):
        metrics["mask_fraction:mean"] = float((~found.kept_T)[chosen_T].double().mean())
    if way.truncates:
        metrics["truncated_fraction:mean"] = float(found.truncated_T[chosen_T].double().mean())
    return metrics


def _of_terms(logprobs_T: Tensor, inputs: Mapping[str, Tensor], config: Config, chosen_T: Tensor) -> dict[str, float]:
    """kl_reference_k3:mean, the estimate of KL(trained || reference); entropy_sampled:mean, that of the entropy, if it is in the loss."""
    own = logprobs_T.detach().double()[chosen_T]
    metrics = {}
    if "reference_logprobs" in inputs:
        metrics["kl_reference_k3:mean"] = float(k3(own, inputs["reference_logprobs"].double()[chosen_T]).mean())
    if config.get("entropy_coeff"):
        metrics["entropy_sampled:mean"] = float(-own.mean())
    return metrics


def _of_weights(logprobs_T: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """cross_entropy:sum, the part of loss:sum that `weights` added."""
    if "weights" not in inputs:
        return {}
    return {"cross_entropy:sum": float(-(inputs["weights"].double() * logprobs_T.detach().double()).sum())}


def _chosen(inputs: Mapping[str, Tensor]) -> Tensor:
    for name in (SAMPLED_MASK, "sequence_ratio_mask"):
        if name in inputs:
            return inputs[name] != 0
    return inputs["advantages"] != 0


def _outside(loss: Loss, log_ratio: Tensor, inputs: Mapping[str, Tensor], config: Config, chosen_T: Tensor) -> Tensor | None:
    """Which of the chosen tokens the loss clips or masks. gspo clips sequences, not tokens, and is left out."""
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if loss.name == "stable_reinforce":
        return band_mask(ratio, config) == 0
    if loss.name not in ("ppo", "cispo"):
        return None
    low, high = (bound[chosen_T] if isinstance(bound, Tensor) else bound for bound in clip_bounds(inputs, config))
    return (ratio < low) | (ratio > high)
