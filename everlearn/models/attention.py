"""Attention over the batch that is being run.

One function is registered with transformers' attention interface under the name `everlearn`; it knows no masks and no caches, it
hands query, key and value to the active batch, and what is special about the layer (`Form`: a window, sinks, a latent). A training
batch attends within each packed sequence (`PackedBatch`), a sampling batch writes into the paged cache and attends over blocks
(everlearn/engine/paged.py). transformers builds no mask for an implementation that it has no mask function for, so nothing of size
[T, T] exists unless a batch makes it.

Axes: H query heads, G key/value heads, T tokens of the packed row, D head size, N sequences of one length, L that length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from everlearn.errors import Unsupported
from everlearn.models.lora import Segment, active_segments
from everlearn.models.sinks import FlashWithSinks, attend_with_sinks

if TYPE_CHECKING:
    from everlearn.models.beginnings import Beginnings
    from everlearn.models.mla import LatentUp
    from everlearn.models.recurrent import Recurrent
    from everlearn.models.routing import Watch

IMPLEMENTATION = "everlearn"
FLASH_HEAD = 256  # the largest head of flash attention


@dataclass(frozen=True, eq=False)
class Form:
    """How a layer attends. With a `window` a token sees itself and the `window` - 1 tokens before it. `sinks` [H] take part in the
    softmax (sinks.py). `latent`: keys and values were expanded from a latent, which a cache may keep in their place (mla.py)."""

    scaling: float
    window: int | None = None
    sinks: torch.Tensor | None = None
    latent: LatentUp | None = None


@dataclass(frozen=True)
class CacheForm:
    """What a sampler keeps. Of each token, in each of `layers`: tensors of the `entries`' shapes (keys and values [G, D], or one latent
    [1, C]); `window` is that of the layers that have one. Of each sequence, in each of `state_layers`: tensors of `state_shapes`
    (recurrent.py)."""

    layers: tuple[int, ...]
    entries: tuple[tuple[int, int], ...]
    window: int | None = None
    state_layers: tuple[int, ...] = ()
    state_shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def floats(self) -> int:
        """Numbers kept of one token."""
        return len(self.layers) * sum(heads * size for heads, size in self.entries)


class Batch(Protocol):
    """What the decoder needs to know of the tokens in its row."""

    segments: list[Segment]
    keeps_latents: bool  # wants a layer's latents (mla.py)
    needs_expanded: bool  # and the keys and values that they stand for

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: Form) -> torch.Tensor:
        """query [H, T, D], key and value [G, T, D] (rotated) -> [H, T, D]."""
        ...

    def recur(self, layer: Recurrent, hidden_TD: torch.Tensor) -> torch.Tensor:
        """A layer with a state, run over each sequence by itself: [T, D] -> [T, D]."""
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


def active_batch() -> Batch:
    return _active[-1]


@contextmanager
def rows_of(segments: list[Segment], start: int, stop: int) -> Iterator[None]:
    """LoRA layers see rows [start, stop) of a row with these segments as if they were all."""
    inside = [
        Segment(s.adapter, max(s.start, start) - start, min(s.stop, stop) - start) for s in segments if s.start < stop and s.stop > start
    ]
    outer, active_segments.current = active_segments.current, inside
    try:
        yield
    finally:
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
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' calling convention: [1, heads, T, D] in, [1, T, H, D] out."""
    if softcap is not None:
        raise Unsupported("this base model's attention has soft caps, which this version doesn't compute; choose another one")
    if attention_mask is not None:
        raise Unsupported("this base model makes attention masks of its own, which this version doesn't compute; choose another one")
    latent: Any = module._modules.get("kv_b_proj")  # a LatentUp wherever keys and values come from a latent (mla.py)
    form = Form(scaling if scaling is not None else query.shape[-1] ** -0.5, sliding_window, s_aux, latent)
    out_HTD = _active[-1].attend(module.layer_idx, query[0], key[0], value[0], form)  # type: ignore[arg-type]
    return out_HTD.transpose(0, 1).unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, everlearn_attention)

# cuDNN's attention compiles a plan for every new shape, about 45 ms each, and a decoding batch has a new shape every few tokens.
torch.backends.cuda.enable_cudnn_sdp(False)


def attend_masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float) -> torch.Tensor:
    """query [H, T, D] over key and value [G, M, D], with a mask [T, M] that is added -> [H, T, D]. Each group is a batch whose heads read
    one key, which isn't copied: of a GPU's kernels those that take masks know no groups, and without them all scores would be kept."""
    query_GQTD = query.unflatten(0, (key.shape[0], -1))
    key_GQMD, value_GQMD = (heads.unsqueeze(1).expand(-1, query_GQTD.shape[1], -1, -1) for heads in (key, value))
    return F.scaled_dot_product_attention(query_GQTD, key_GQMD, value_GQMD, attn_mask=mask, scale=scaling).flatten(0, 1)


class PackedBatch:
    """Sequences laid end to end in one row, each attending causally within itself. `lengths` in row order.

    On a GPU in half precision one variable-length call does the row; elsewhere neighbours of equal length share one call, so a
    packer that sorts by length pays for few calls.

    With `beginnings` the layers see only the tokens that are computed, and `segments` are of those; attention lays the row out whole, and
    `lengths` are those of whole sequences.
    """

    keeps_latents, needs_expanded = False, True

    def __init__(self, lengths: list[int], segments: list[Segment], beginnings: Beginnings | None = None):
        self.segments, self.beginnings = segments, beginnings
        self.watch: Watch | None = None  # what is wanted of the experts' choice (routing.py)
        self.masks: dict[tuple[int, int | None], torch.Tensor] = {}
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

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: Form) -> torch.Tensor:
        if self.beginnings is None:
            return self._attend(query, key, value, form)
        places_T, firsts_U = self.beginnings
        query, key, value = (inputs.index_select(1, places_T) for inputs in (query, key, value))
        return self._attend(query, key, value, form).index_select(1, firsts_U)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: Form) -> torch.Tensor:
        if key.shape[0] != query.shape[0]:
            repeat = query.shape[0] // key.shape[0]
            key, value = key.repeat_interleave(repeat, dim=0), value.repeat_interleave(repeat, dim=0)
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= FLASH_HEAD:
            return self._attend_varlen(query, key, value, form)
        outs = []
        for start, num, length in self.groups:
            stop = start + num * length
            q_NHLD, k_NHLD, v_NHLD = (t[:, start:stop].unflatten(1, (num, length)).transpose(0, 1) for t in (query, key, value))
            if form.sinks is not None:
                mask = self._mask(length, form.window, query)
                out_NHLD = attend_with_sinks(q_NHLD, k_NHLD, v_NHLD, mask, form.scaling, form.sinks)
            elif form.window is not None and form.window < length:
                mask = self._mask(length, form.window, query)
                out_NHLD = F.scaled_dot_product_attention(q_NHLD, k_NHLD, v_NHLD, attn_mask=mask, scale=form.scaling)
            else:
                out_NHLD = F.scaled_dot_product_attention(q_NHLD, k_NHLD, v_NHLD, is_causal=True, scale=form.scaling)
            outs.append(out_NHLD.transpose(0, 1).flatten(1, 2))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _mask(self, length: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """[1, 1, L, L], made once for all layers: 0 where a token sees another one, else -inf."""
        if window is not None and window >= length:
            window = None
        if (length, window) not in self.masks:
            seen = torch.ones(length, length, dtype=torch.bool, device=like.device).tril()
            if window is not None:
                seen = seen.triu(1 - window)
            mask = torch.zeros(1, 1, length, length, dtype=like.dtype, device=like.device)
            self.masks[length, window] = mask.masked_fill_(~seen, float("-inf"))
        return self.masks[length, window]

    def _attend_varlen(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: Form) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        self.borders = self.borders.to(query.device)
        value_size = value.shape[-1]
        if value_size < key.shape[-1]:  # flash attention has one head size
            value = F.pad(value, (0, key.shape[-1] - value_size))
        q_THD, k_THD, v_THD = (t.transpose(0, 1).contiguous() for t in (query, key, value))
        left = -1 if form.window is None or form.window >= self.longest else form.window - 1
        if form.sinks is not None:
            found = FlashWithSinks.apply(q_THD, k_THD, v_THD, form.sinks, self.borders, self.longest, form.scaling, left)
            return found.transpose(0, 1)
        out_THD = varlen_attn(
            q_THD, k_THD, v_THD, self.borders, self.borders, self.longest, self.longest, scale=form.scaling, window_size=(left, 0)
        )
        assert isinstance(out_THD, torch.Tensor)
        return out_THD[..., :value_size].transpose(0, 1)

    def recur(self, layer: Recurrent, hidden_TD: torch.Tensor) -> torch.Tensor:
        outs = []
        for start, num, length in self.groups:
            stop = start + num * length
            with rows_of(self.segments, start, stop):
                outs.append(layer.run(hidden_TD[start:stop].unflatten(0, (num, length)), None).flatten(0, 1))
        return torch.cat(outs)
