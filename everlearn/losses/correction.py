"""The drift from the sampling policy, as a factor without gradient on the loss of each token.

Axes: T tokens of a packed row, D datums. With the log-probabilities p of the trained policy, q of the sampling policy (`logprobs`) and o
of the policy that the step started from (`old_logprobs`), and w a way of weighing (`importance_weight`):

    decoupled, where o is given:  the loss's ratio is r = exp(p - o), the drift rho = exp(o - q), the factor w(rho)
    bypass, where it isn't:       the loss's ratio is r = exp(p - q), the drift rho = sg(r),      the factor w(rho) / rho

so that the drift weighs on a token's gradient once: in bypass w takes the place of the rho that r holds already (Hilton et al., 2021,
arXiv 2110.00641, and AReaL, arXiv 2505.24298, for the decoupled objective; the two modes and their ways as in verl's rollout correction).

    full          w = rho                                    unbiased, unbounded
    none          the factor is 1 in both modes              ignores the drift (decoupled), leaves it to the loss's ratio (bypass)
    tis_token     w = min(rho, C)                            truncated importance sampling per token
    tis_sequence  w = min(product of rho over S, C)          the same for the whole sequence
    icepop        w = rho within [a, b], else 0              masks single tokens (Ling team's IcePop, 2025)

C is `tis_threshold`, [a, b] is [`ratio_low`, `ratio_high`], S are the datum's tokens that count (`counted`). Whole sequences are left
out (factor 0) where their geometric mean or product of rho over S leaves its bounds, and their tokens with a negative advantage where
the mean of q - p over S is above `negative_drift_max` (DeepSeek-V3.2, arXiv 2512.02556). Log-ratios are capped at +-20.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from everlearn.losses.logprobs import MAX_LOG_RATIO, Segments, segment_ids, segment_sums
from everlearn.losses.spec import SILENCED, Config
from everlearn.losses.stable_reinforce import band_mask

Inputs = Mapping[str, Tensor]


class Correction(NamedTuple):
    """Per token: the factor on its loss; whether it is left in; whether its weight was cut down to the threshold."""

    factor_T: Tensor
    kept_T: Tensor
    truncated_T: Tensor


@dataclass(frozen=True)
class Way:
    """`log_weight(log_rho_T, counted_T, segments)` before truncation; `truncates` at tis_threshold; `masks` outside the band."""

    log_weight: Callable[[Tensor, Tensor, Segments], Tensor]
    truncates: bool = False
    masks: bool = False


def _token(log_rho_T: Tensor, counted_T: Tensor, segments: Segments) -> Tensor:
    return log_rho_T


def _nothing(log_rho_T: Tensor, counted_T: Tensor, segments: Segments) -> Tensor:
    return torch.zeros_like(log_rho_T)


def _product(log_rho_T: Tensor, counted_T: Tensor, segments: Segments) -> Tensor:
    sums_D = segment_sums(log_rho_T * counted_T, segments)
    return sums_D.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)[segment_ids(segments, log_rho_T.device)]


def _mean(values_T: Tensor, counted_T: Tensor, segments: Segments) -> Tensor:
    """[T]: each datum's mean over its tokens that count, at all of its tokens; 0 where none counts."""
    sums_D, counts_D = segment_sums(values_T * counted_T, segments), segment_sums(counted_T, segments)
    return (sums_D / counts_D.clamp(min=1))[segment_ids(segments, values_T.device)]


WAYS: dict[str, Way] = {
    "full": Way(_token),
    "none": Way(_nothing),
    "tis_token": Way(_token, truncates=True),
    "tis_sequence": Way(_product, truncates=True),
    "icepop": Way(_token, masks=True),
}


def counted(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """[T]: 1 on the tokens that were sampled, as far as the inputs tell (else: that carry an advantage), but for silenced ones."""
    counted_T = (inputs["sequence_ratio_mask"] if "sequence_ratio_mask" in inputs else inputs["advantages"]) != 0
    if SILENCED in inputs:
        counted_T = counted_T & (inputs[SILENCED] == 0)
    return counted_T.to(dtype)


def anchored(inputs: Inputs) -> Inputs:
    """The inputs as the surrogate sees them: its ratio is to the old policy where that is given."""
    return {**inputs, "logprobs": inputs["old_logprobs"]} if "old_logprobs" in inputs else inputs


def correction(logprobs_T: Tensor, inputs: Inputs, config: Config, segments: Segments) -> Correction:
    """The factor of each token, and why it is what it is. `config` is the complete one."""
    own_T, sampling_T = logprobs_T.detach(), inputs["logprobs"]
    decoupled = "old_logprobs" in inputs
    log_rho_T = ((inputs["old_logprobs"] if decoupled else own_T) - sampling_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    counted_T = counted(inputs, log_rho_T.dtype)
    name = config["importance_weight"]
    way = WAYS["full" if name == "none" and not decoupled else name]
    log_weight_T = way.log_weight(log_rho_T, counted_T, segments)
    truncated_T = torch.zeros_like(log_rho_T, dtype=torch.bool)
    if way.truncates:
        log_threshold = math.log(config["tis_threshold"])
        truncated_T = log_weight_T > log_threshold
        log_weight_T = log_weight_T.clamp(max=log_threshold)
    kept_T = torch.ones_like(truncated_T)
    if way.masks:
        kept_T = band_mask(log_rho_T.exp(), config) != 0
    kept_T = kept_T & _kept_sequences(log_rho_T, counted_T, config, segments)
    drift_T = (sampling_T - own_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    far_T = _mean(drift_T, counted_T, segments) > config["negative_drift_max"]
    kept_T = kept_T & ~(far_T & (inputs["advantages"] < 0))
    factor_T = (log_weight_T if decoupled else log_weight_T - log_rho_T).exp()
    return Correction(factor_T * kept_T, kept_T, truncated_T)


def _kept_sequences(log_rho_T: Tensor, counted_T: Tensor, config: Config, segments: Segments) -> Tensor:
    geometric_T = _mean(log_rho_T, counted_T, segments).exp()
    product_T = _product(log_rho_T, counted_T, segments).exp()
    within_T = (geometric_T >= config["geometric_ratio_low"]) & (geometric_T <= config["geometric_ratio_high"])
    return within_T & (product_T >= config["product_ratio_low"]) & (product_T <= config["product_ratio_high"])
