"""stable_reinforce: REINFORCE on recorded sequences that tolerates a sampling policy other than the trained one.

The hosted service's objective is not public; this one takes the same inputs and may differ from it (docs/design/stable_reinforce.md).

Axes: T tokens of a packed row. With q_t the log-probability that the sampler recorded for token t, r_t = exp(logp_t - q_t),
S the tokens that were sampled, m_t = 1 if ratio_low <= r_t <= ratio_high else 0, and sg the stopped gradient:

    loss_t = -sg(m_t) r_t A_t + kl_coeff / 2 (logp_t - q_t)^2      for t in S, and 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from everlearn.losses.logprobs import MAX_LOG_RATIO, Segments, ratio
from everlearn.losses.spec import SAMPLED_MASK, SAMPLING_LOGPROBS, Config


def band_mask(ratio_T: Tensor, config: Config) -> Tensor:
    """m_t, without gradient: 1 where the ratio lies in the band [ratio_low, ratio_high]."""
    ratio_T = ratio_T.detach()
    return ((ratio_T >= config["ratio_low"]) & (ratio_T <= config["ratio_high"])).to(ratio_T.dtype)


def stable_reinforce(logprobs_T: Tensor, inputs: Mapping[str, Tensor], config: Config, segments: Segments) -> Tensor:
    """A token whose ratio left the band says little about the trained policy (it is stale, or the two policies' numerics disagree)
    and gets no policy gradient; the KL term, whose gradient is kl_coeff (logp - q) dlogp, still draws it back."""
    ratio_T = ratio(logprobs_T, inputs[SAMPLING_LOGPROBS])
    policy_T = -band_mask(ratio_T, config) * ratio_T * inputs["advantages"]
    log_ratio_T = (logprobs_T - inputs[SAMPLING_LOGPROBS]).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    kl_T = 0.5 * config["kl_coeff"] * log_ratio_T.square()
    return inputs[SAMPLED_MASK] * (policy_T + kl_T)
