"""One packed row of a sampling step: chunks of sequences, attention over the paged cache.

Every index is made once a step and shared by all layers. Chunks of one token (decoding) attend together, over one gather of their
blocks; longer chunks (prompts) attend one by one. Query heads of a group are laid side by side as if they were positions, so that
grouped-query attention reads each key once.

Axes: T tokens of the row, B decoding rows, M context (padded to whole blocks), H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from everlearn.engine.kvcache import NULL_BLOCK, KVCache
from everlearn.engine.sequence import Sequence
from everlearn.models.lora import Segment


@dataclass(eq=False)
class Chunk:
    """Tokens [start, stop) of a sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    stop: int


@dataclass(eq=False)
class Span:
    """Rows [first, last) of the packed row are one prompt chunk. `slots` and `mask` are None where nothing precedes the chunk."""

    first: int
    last: int
    slots_M: torch.Tensor | None
    mask_TM: torch.Tensor | None


class PagedBatch:
    """The `Batch` (everlearn/models/attention.py) of a sampling step. `chunks` must be sorted so that an adapter's are neighbours."""

    def __init__(self, chunks: list[Chunk], cache: KVCache, device: torch.device, dtype: torch.dtype):
        self.cache, self.device, self.dtype = cache, device, dtype
        self.stops = np.cumsum([c.stop - c.start for c in chunks]).tolist()  # row after each chunk
        num_rows = self.stops[-1]
        tokens, positions = np.empty(num_rows, np.int64), np.empty(num_rows, np.int64)
        slots = np.empty(num_rows, np.int64)
        size = cache.block_size
        self.spans: list[Span] = []
        decoding: list[Chunk] = []
        decoding_rows: list[int] = []
        for chunk, last in zip(chunks, self.stops, strict=True):
            num = chunk.stop - chunk.start
            first = last - num
            if num == 1:
                position = chunk.start
                tokens[first], positions[first] = chunk.sequence.token(position), position
                slots[first] = chunk.sequence.blocks[position // size] * size + position % size
                decoding.append(chunk)
                decoding_rows.append(first)
                continue
            tokens[first:last] = chunk.sequence.tokens(chunk.start, chunk.stop)
            positions[first:last] = np.arange(chunk.start, chunk.stop)
            all_slots = (np.array(chunk.sequence.blocks, np.int64)[:, None] * size + np.arange(size)).ravel()[: chunk.stop]
            slots[first:last] = all_slots[chunk.start :]
            self.spans.append(self._span(first, last, chunk, all_slots))
        self.tokens_T, self.positions_T, self.slots_T = (self._move(a) for a in (tokens, positions, slots))
        self.segments = segments_of(chunks, self.stops)
        if decoding:
            self._prepare_decoding(decoding)
        self.num_decoding = len(decoding)
        self.decoding_rows = self._move(np.array(decoding_rows)) if decoding and self.spans else None

    def _move(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _span(self, first: int, last: int, chunk: Chunk, all_slots: np.ndarray) -> Span:
        if chunk.start == 0:
            return Span(first, last, None, None)
        position_T1 = np.arange(chunk.start, chunk.stop)[:, None]
        mask = np.where(np.arange(chunk.stop) <= position_T1, np.float32(0), np.float32("-inf"))
        return Span(first, last, self._move(all_slots), self._move(mask).to(self.dtype))

    def _prepare_decoding(self, chunks: list[Chunk]) -> None:
        """Slots and mask of all decoding rows: past a row's end both padding and stale slots become the null block's."""
        size = self.cache.block_size
        lengths_B1 = np.array([c.stop for c in chunks])[:, None]
        width = -(-int(lengths_B1.max()) // size)
        blocks = np.full((len(chunks), width), NULL_BLOCK, np.int64)
        for row, chunk in zip(blocks, chunks, strict=True):
            held = chunk.sequence.blocks[:width]
            row[: len(held)] = held
        slots_BM = (blocks[:, :, None] * size + np.arange(size)).reshape(len(chunks), -1)
        beyond_BM = np.arange(width * size) >= lengths_B1
        slots_BM[beyond_BM] = NULL_BLOCK * size
        mask_BM = np.where(beyond_BM, np.float32("-inf"), np.float32(0))
        self.context = width * size
        self.decoding_slots = self._move(slots_BM.ravel())
        self.decoding_mask = self._move(mask_BM).to(self.dtype)[:, None, None, :]

    def padded(self, num_rows: int, width: int, segments: list[Segment]) -> PagedBatch:
        """A batch of decoding rows with fixed shapes, to be filled from others that fit into it (engine/graphs.py)."""
        fixed = copy(self)
        fixed.segments, fixed.context, fixed.num_decoding = segments, width, num_rows
        fixed.tokens_T, fixed.positions_T, fixed.slots_T = (self.tokens_T.new_zeros(num_rows) for _ in range(3))
        fixed.decoding_slots = self.decoding_slots.new_empty(num_rows * width)
        fixed.decoding_mask = self.decoding_mask.new_empty(num_rows, 1, 1, width)
        return fixed

    def fill(self, batch: PagedBatch) -> None:
        """Takes over another batch's rows. What is beyond them reads the null block and writes into the spare slot."""
        rows, context = batch.num_decoding, batch.context
        for mine, its in ((self.tokens_T, batch.tokens_T), (self.positions_T, batch.positions_T), (self.slots_T, batch.slots_T)):
            mine[:rows].copy_(its)
        self.slots_T[rows:] = self.cache.spare_slot
        self.decoding_slots.fill_(NULL_BLOCK * self.cache.block_size)
        self.decoding_slots.view(self.num_decoding, -1)[:rows, :context].copy_(batch.decoding_slots.view(rows, -1))
        self.decoding_mask.fill_(float("-inf"))
        self.decoding_mask[..., 0] = 0.0
        self.decoding_mask[:rows, ..., :context].copy_(batch.decoding_mask)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """query [H, T, D], key and value [G, T, D] -> [H, T, D]."""
        self.cache.write(layer, self.slots_T, key.transpose(0, 1), value.transpose(0, 1))
        query_THD = query.transpose(0, 1)
        if not self.spans:
            return self._decode(layer, query_THD, scaling).transpose(0, 1)
        out_THD = torch.empty_like(query_THD)
        if self.decoding_rows is not None:
            out_THD[self.decoding_rows] = self._decode(layer, query_THD[self.decoding_rows], scaling)
        for span in self.spans:
            rows = slice(span.first, span.last)
            if span.slots_M is None:
                out_HTD = _attend_span(query[:, rows], key[:, rows], value[:, rows], None, scaling)
            else:
                key_MGD, value_MGD = self.cache.read(layer, span.slots_M)
                out_HTD = _attend_span(query[:, rows], key_MGD.transpose(0, 1), value_MGD.transpose(0, 1), span.mask_TM, scaling)
            out_THD[rows] = out_HTD.transpose(0, 1)
        return out_THD.transpose(0, 1)

    def _decode(self, layer: int, query_BHD: torch.Tensor, scaling: float) -> torch.Tensor:
        key, value = self.cache.read(layer, self.decoding_slots)
        num, heads, head_dim = query_BHD.shape
        groups = key.shape[1]
        key_BGMD = key.view(num, self.context, groups, head_dim).transpose(1, 2)
        value_BGMD = value.view(num, self.context, groups, head_dim).transpose(1, 2)
        query_BGQD = query_BHD.reshape(num, groups, heads // groups, head_dim)
        out_BGQD = F.scaled_dot_product_attention(query_BGQD, key_BGMD, value_BGMD, attn_mask=self.decoding_mask, scale=scaling)
        return out_BGQD.reshape(num, heads, head_dim)


def _attend_span(
    query_HTD: torch.Tensor, key_GMD: torch.Tensor, value_GMD: torch.Tensor, mask_TM: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    out = F.scaled_dot_product_attention(
        query_HTD[None], key_GMD[None], value_GMD[None], attn_mask=mask_TM, is_causal=mask_TM is None, scale=scaling, enable_gqa=True
    )
    return out[0]


def segments_of(chunks: list[Chunk], stops: list[int]) -> list[Segment]:
    """One segment for each run of chunks of one adapter; `stops[i]` is the row after chunk i."""
    segments: list[Segment] = []
    for chunk, stop in zip(chunks, stops, strict=True):
        adapter = chunk.sequence.request.adapter
        if segments and segments[-1].adapter is adapter:
            segments[-1].stop = stop
        else:
            segments.append(Segment(adapter, segments[-1].stop if segments else 0, stop))
    return segments
