"""Attention over the batch that is being run.

One function is registered with transformers' attention interface under the name `everlearn`; it knows no masks and no caches, it
hands query, key and value to the active batch. A training batch attends within each packed sequence (`PackedBatch`), a sampling
batch writes into the paged cache and attends over blocks (everlearn/engine/kvcache.py). transformers builds no mask for an
implementation that it has no mask function for, so nothing of size [T, T] exists unless a batch makes it.

Axes: H query heads, G key/value heads, T tokens of the packed row, D head size, N sequences of one length, L that length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from everlearn.errors import Unsupported
from everlearn.models.lora import Segment, active_segments

IMPLEMENTATION = "everlearn"


class Batch(Protocol):
    """What the decoder needs to know of the tokens in its row."""

    segments: list[Segment]

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """query [H, T, D], key and value [G, T, D] (rotated) -> [H, T, D]."""
        ...


# One thread owns the device (docs/design/engine.md), so one active batch is enough; backward passes run inside `running` too.
_active: list[Batch] = []


@contextmanager
def running(batch: Batch) -> Iterator[None]:
    """Makes `batch` the one that attention and LoRA layers see."""
    _active.append(batch)
    outer = active_segments.current
    active_segments.current = batch.segments
    try:
        yield
    finally:
        _active.pop()
        active_segments.current = outer


def everlearn_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' calling convention: [1, heads, T, D] in, [1, T, H, D] out."""
    if softcap is not None or s_aux is not None:
        raise Unsupported("this base model's attention has soft caps or sinks, which this version doesn't compute; choose another one")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out_HTD = _active[-1].attend(module.layer_idx, query[0], key[0], value[0], scale)  # type: ignore[arg-type]
    return out_HTD.transpose(0, 1).unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, everlearn_attention)

# cuDNN's attention compiles a plan for every new shape, about 45 ms each, and a decoding batch has a new shape every few tokens.
torch.backends.cuda.enable_cudnn_sdp(False)


class PackedBatch:
    """Sequences laid end to end in one row, each attending causally within itself. `lengths` in row order.

    On a GPU in half precision one variable-length call does the row; elsewhere neighbours of equal length share one call, so a
    packer that sorts by length pays for few calls.
    """

    def __init__(self, lengths: list[int], segments: list[Segment]):
        self.segments = segments
        self.longest = max(lengths)
        self.borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        self.groups: list[tuple[int, int, int]] = []  # (start, num sequences, length)
        start = 0
        for length in lengths:
            if self.groups and self.groups[-1][2] == length:
                first, num, _ = self.groups[-1]
                self.groups[-1] = (first, num + 1, length)
            else:
                self.groups.append((start, 1, length))
            start += length

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        if key.shape[0] != query.shape[0]:
            repeat = query.shape[0] // key.shape[0]
            key, value = key.repeat_interleave(repeat, dim=0), value.repeat_interleave(repeat, dim=0)
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            return self._attend_varlen(query, key, value, scaling)
        outs = []
        for start, num, length in self.groups:
            stop = start + num * length
            q_NHLD, k_NHLD, v_NHLD = (t[:, start:stop].unflatten(1, (num, length)).transpose(0, 1) for t in (query, key, value))
            out_NHLD = F.scaled_dot_product_attention(q_NHLD, k_NHLD, v_NHLD, is_causal=True, scale=scaling)
            outs.append(out_NHLD.transpose(0, 1).flatten(1, 2))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _attend_varlen(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        self.borders = self.borders.to(query.device)
        q_THD, k_THD, v_THD = (t.transpose(0, 1).contiguous() for t in (query, key, value))
        causal = (-1, 0)
        out_THD = varlen_attn(
            q_THD, k_THD, v_THD, self.borders, self.borders, self.longest, self.longest, scale=scaling, window_size=causal
        )
        assert isinstance(out_THD, torch.Tensor)
        return out_THD.transpose(0, 1)
