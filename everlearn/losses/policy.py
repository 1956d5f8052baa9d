"""Policy-gradient losses, as pure functions of log-probabilities.

Axes: T tokens of a packed row. Throughout, logp is the trained policy's log-probability of a target (the only thing with a
gradient), q the sampling policy's (`logprobs`; where a request brings `old_logprobs`, those come in here instead), A the advantage,
r = exp(logp - q), and sg stops the gradient. What else may multiply or join a loss is in losses/correction.py and losses/terms.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from everlearn.losses.logprobs import MAX_LOG_RATIO, Segments, ratio, segment_ids, segment_sums
from everlearn.losses.spec import Config

Inputs = Mapping[str, Tensor]


def clip_bounds(inputs: Inputs, config: Config) -> tuple[Tensor | float, Tensor | float]:
    """The ratio's bounds: per token where the datum brings them, else those of the configuration."""
    low = inputs.get("clip_low_threshold", config["clip_low_threshold"])
    high = inputs.get("clip_high_threshold", config["clip_high_threshold"])
    return low, high


def clip(ratio_T: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    low_T = torch.as_tensor(low, dtype=ratio_T.dtype, device=ratio_T.device)
    high_T = torch.as_tensor(high, dtype=ratio_T.dtype, device=ratio_T.device)
    return torch.minimum(torch.maximum(ratio_T, low_T), high_T)


def clipped_surrogate(ratio_T: Tensor, advantages_T: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """-min(r A, clip(r, low, high) A), per token. Written as a choice, so that the gradient is exactly -A dr where the
    clip doesn't bind, a bound included, and exactly 0 where it does: min and clamp would split it on ties."""
    unclipped_T = ratio_T * advantages_T
    clipped_T = clip(ratio_T.detach(), low, high) * advantages_T
    return -torch.where(unclipped_T.detach() <= clipped_T, unclipped_T, clipped_T)


def importance_sampling(logprobs_T: Tensor, inputs: Inputs, config: Config, segments: Segments) -> Tensor:
    """loss_t = -r A. The gradient is that of REINFORCE with the importance ratio: -r A dlogp."""
    return -ratio(logprobs_T, inputs["logprobs"]) * inputs["advantages"]


def ppo(logprobs_T: Tensor, inputs: Inputs, config: Config, segments: Segments) -> Tensor:
    """loss_t = -min(r A, clip(r, low, high) A) (Schulman et al., 2017, arXiv 1707.06347); low and high bound r itself."""
    low, high = clip_bounds(inputs, config)
    return clipped_surrogate(ratio(logprobs_T, inputs["logprobs"]), inputs["advantages"], low, high)


def cispo(logprobs_T: Tensor, inputs: Inputs, config: Config, segments: Segments) -> Tensor:
    """loss_t = -sg(clip(r, low, high)) A logp (MiniMax-M1, arXiv 2506.13585): the clip bounds a token's weight, never silences it."""
    low, high = clip_bounds(inputs, config)
    weight_T = clip(ratio(logprobs_T.detach(), inputs["logprobs"]), low, high)
    return -weight_T * inputs["advantages"] * logprobs_T


def dro(logprobs_T: Tensor, inputs: Inputs, config: Config, segments: Segments) -> Tensor:
    """loss_t = -(logp A - beta/2 (logp - q)^2) (Richemond et al., 2024, arXiv 2405.19107). The penalty counts
    where A is 0 too, as the formula says: positions of the prompt need their true `logprobs`, since a 0 there pulls them towards 1."""
    penalty_T = (logprobs_T - inputs["logprobs"]).square()
    return -(logprobs_T * inputs["advantages"] - 0.5 * config["beta"] * penalty_T)


def gspo(logprobs_T: Tensor, inputs: Inputs, config: Config, segments: Segments) -> Tensor:
    """GSPO-token (Zheng et al., 2025, arXiv 2507.18071). With M the datum's tokens where sequence_ratio_mask is not 0:

    s = exp(mean over M of (logp - q)), s_t = sg(s) exp(logp - sg(logp)), loss_t = -min(s_t A, clip(s_t, low, high) A).
    The paper's objective has one term min(s A, clip(s, low, high) A) for each sequence, so its token form divides by |M|. This is a sum, as
    every loss: send A / |M| for the paper's gradient, or a sequence weighs as much as it is long.
    Where M is empty (all of its tokens were left out: replayed routes that aren't known), s = 1.
    """
    mask_T = (inputs["sequence_ratio_mask"] != 0).to(logprobs_T.dtype)
    log_ratio_T = logprobs_T.detach() - inputs["logprobs"]
    mean_D = segment_sums(log_ratio_T * mask_T, segments) / segment_sums(mask_T, segments).clamp(min=1)
    sequence_T = mean_D.clamp(max=MAX_LOG_RATIO)[segment_ids(segments, logprobs_T.device)]
    ratio_T = torch.exp(sequence_T + logprobs_T - logprobs_T.detach())
    low, high = clip_bounds(inputs, config)
    return clipped_surrogate(ratio_T, inputs["advantages"], low, high)
