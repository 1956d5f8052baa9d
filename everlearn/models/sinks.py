"""Attention with sinks: every head has one more logit that takes part in the softmax and has no value, so a head may attend to nothing.

With Z = sum_j exp(s_j) and a sink of logit c, softmax with the sink is the plain one times Z / (Z + e^c). So on a GPU the output is flash
attention's own times sigmoid(log Z - c), and its own backward pass gives the exact gradient when it is handed that output and
log(Z + e^c) for log Z: it rebuilds the probabilities from the one and their mean gradient from the other. Sinks are frozen.

Axes: N sequences, H query heads, G key/value heads, Q heads of a group, L queries, M keys, D head size, T tokens of the packed row.
"""

from __future__ import annotations

from typing import Any

import torch

SCORES = 2**26  # scores that are held at one time


def attend_with_sinks(
    query_NHLD: torch.Tensor,
    key_NGMD: torch.Tensor,
    value_NGMD: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    sinks_H: torch.Tensor,
) -> torch.Tensor:
    """The plain form, a bounded number of queries at a time. `mask` is added to the scores; it has shape [N or 1, 1, L or 1, M]."""
    num, heads, length, _ = query_NHLD.shape
    groups, context = key_NGMD.shape[1:3]
    query_NGQLD = query_NHLD.unflatten(1, (groups, heads // groups))
    key_NG1DM = key_NGMD.transpose(2, 3).unsqueeze(2)
    sinks_GQ11 = sinks_H.view(groups, heads // groups, 1, 1)
    step = max(1, SCORES // (num * heads * context))
    outs = []
    for start in range(0, length, step):
        rows = slice(start, start + step)
        scores = (query_NGQLD[..., rows, :] @ key_NG1DM).float() * scaling
        if mask is not None:
            scores = scores + (mask if mask.shape[2] == 1 else mask[:, :, rows]).unsqueeze(1)
        whole = torch.cat([scores, sinks_GQ11.float().expand(*scores.shape[:-1], 1)], dim=-1)
        weights = torch.softmax(whole, dim=-1)[..., :-1].to(value_NGMD.dtype)
        outs.append(weights @ value_NGMD.unsqueeze(2))
    return torch.cat(outs, dim=3).flatten(1, 2)


class FlashWithSinks(torch.autograd.Function):
    """Variable-length flash attention over a packed row: query, key, value [T, H, D], half precision on a GPU."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks_H: torch.Tensor,
        borders: torch.Tensor,
        longest: int,
        scaling: float,
        left: int,
    ) -> torch.Tensor:
        causal = left < 0
        out, lse_HT, rng, unused, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, borders, borders, longest, longest, 0.0, causal, False,
            scale=scaling, window_size_left=left, window_size_right=0,
        )  # fmt: skip
        sinks_H1 = sinks_H.float().unsqueeze(1)
        out = (out * torch.sigmoid(lse_HT - sinks_H1).t().unsqueeze(-1)).to(query.dtype)
        ctx.save_for_backward(query, key, value, out, torch.logaddexp(lse_HT, sinks_H1), borders, rng, unused)
        ctx.settings = (longest, causal, scaling, left)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse_HT, borders, rng, unused = ctx.saved_tensors
        longest, causal, scaling, left = ctx.settings
        found = torch.ops.aten._flash_attention_backward(
            grads[0].contiguous(), query, key, value, out, lse_HT, borders, borders, longest, longest, 0.0, causal, rng, unused,
            scale=scaling, window_size_left=left, window_size_right=0,
        )  # fmt: skip
        return (*found, None, None, None, None, None)
