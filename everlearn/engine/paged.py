"""One packed row of a sampling step: chunks of sequences, attention over the paged cache.

Every index is made once a step and shared by all layers. Chunks of one token (decoding) attend together, over one gather of their
blocks; a CPU gathers those of a few rows at a time, which it reads back from its cache. Longer chunks (prompts) attend one by one. Query
heads of a group are laid side by side as if they were positions, so that grouped-query attention reads each key once. Layers with a
window read what is inside of it alone. Where the cache keeps latents, decoding attends over them and prompts expand them
(everlearn/models/mla.py).

Axes: T tokens of the row, B decoding rows, M context (padded to whole blocks), H query heads, G key/value heads, D head size, C latent.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from everlearn.engine.kvcache import NULL_BLOCK, KVCache, StateCache
from everlearn.engine.routes import keep, watch_of
from everlearn.engine.sequence import Sequence
from everlearn.models.attention import Form, attend_masked, rows_of
from everlearn.models.lora import Segment
from everlearn.models.mla import LatentUp
from everlearn.models.recurrent import Recurrent, States
from everlearn.models.sinks import attend_with_sinks

PART_BYTES = 6 << 20  # what a CPU gathers at once of a layer's cache: more goes out to memory and comes back


@dataclass(eq=False)
class Chunk:
    """Tokens [start, stop) of a sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    stop: int


@dataclass(eq=False)
class Context:
    """What some rows read: `slots` of the cache, and a mask that is added to the scores. `width` tokens a row. `parts` are the same, some
    rows at a time and each no wider than its own rows; none where all are read at once."""

    slots: torch.Tensor
    mask: torch.Tensor
    width: int
    parts: list[tuple[slice, Context]] = field(default_factory=list)


@dataclass(eq=False)
class Span:
    """Rows [first, last) of the packed row are one prompt chunk. `context` is None where nothing precedes the chunk."""

    chunk: Chunk
    first: int
    last: int
    context: Context | None
    windowed: Context | None
    state: torch.Tensor | None  # the sequence's slot, where layers keep a state

    @property
    def rows(self) -> slice:
        return slice(self.first, self.last)


class PagedBatch:
    """The `Batch` (everlearn/models/attention.py) of a sampling step. `chunks` must be sorted so that an adapter's are neighbours."""

    keeps_latents = True

    def __init__(self, chunks: list[Chunk], cache: KVCache, states: StateCache, device: torch.device, dtype: torch.dtype):
        self.cache, self.states, self.device, self.dtype = cache, states, device, dtype
        self.window = cache.form.window
        self.stops = np.cumsum([c.stop - c.start for c in chunks]).tolist()  # row after each chunk
        num_rows = self.stops[-1]
        self.shows = any(c.sequence.images(c.start, c.stop) for c in chunks)
        tokens, positions = np.empty(num_rows, np.int64), np.empty((3, num_rows) if self.shows else num_rows, np.int64)
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
                tokens[first], positions[..., first] = chunk.sequence.token(position), chunk.sequence.position(position)
                slots[first] = chunk.sequence.blocks[position // size] * size + position % size
                decoding.append(chunk)
                decoding_rows.append(first)
                continue
            tokens[first:last] = chunk.sequence.tokens(chunk.start, chunk.stop)
            positions[..., first:last] = chunk.sequence.positions(chunk.start, chunk.stop)
            all_slots = (np.array(chunk.sequence.blocks, np.int64)[:, None] * size + np.arange(size)).ravel()[: chunk.stop]
            slots[first:last] = all_slots[chunk.start :]
            self.spans.append(self._span(first, last, chunk, all_slots))
        self.tokens_T, self.positions_T, self.slots_T = (self._move(a) for a in (tokens, positions, slots))
        self.segments = segments_of(chunks, self.stops)
        self.watch = watch_of(chunks)
        self.needs_expanded = bool(self.spans)
        self.num_decoding = len(decoding)
        if decoding:
            self._prepare_decoding(decoding)
        self.decoding_rows = self._move(np.array(decoding_rows)) if decoding and self.spans else None

    def _move(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    # --- indices ---

    def _span(self, first: int, last: int, chunk: Chunk, all_slots: np.ndarray) -> Span:
        state = None if chunk.sequence.state is None else self._move(np.array([chunk.sequence.state]))
        if chunk.start == 0 and (self.window is None or chunk.stop <= self.window):
            return Span(chunk, first, last, None, None, state)
        begin = 0 if self.window is None else max(0, chunk.start - self.window + 1)
        context = self._context(chunk, all_slots, 0, None) if chunk.start else None
        windowed = self._context(chunk, all_slots, begin, self.window) if self.window is not None else None
        return Span(chunk, first, last, context, windowed, state)

    def _context(self, chunk: Chunk, all_slots: np.ndarray, begin: int, window: int | None) -> Context:
        """Tokens [begin, stop) of a chunk's sequence for the chunk's rows."""
        position_T1 = torch.arange(chunk.start, chunk.stop, device=self.device)[:, None]
        key_M = torch.arange(begin, chunk.stop, device=self.device)
        seen = key_M <= position_T1
        if window is not None:
            seen &= key_M > position_T1 - window
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, float("-inf"))
        return Context(self._move(all_slots[begin:]), mask, chunk.stop - begin)

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
        self.decoding = self._rows(slots_BM, lengths_B1)
        self.windowed = self.decoding
        if self.window is not None and self.window < self.decoding.width:
            first_B1 = np.maximum(lengths_B1 - self.window, 0)
            self.windowed = self._rows(np.take_along_axis(slots_BM, first_B1 + np.arange(self.window), axis=1), lengths_B1 - first_B1)
        self.decoding_segments = segments_of(chunks, list(range(1, len(chunks) + 1)))
        if self.states.num_slots:
            self.decoding_states = self._move(np.array([c.sequence.state for c in chunks], np.int64))

    def _rows(self, slots_BM: np.ndarray, lengths_B1: np.ndarray) -> Context:
        beyond_BM = np.arange(slots_BM.shape[1]) >= lengths_B1
        slots_BM[beyond_BM] = NULL_BLOCK * self.cache.block_size
        mask_BM = np.where(beyond_BM, np.float32("-inf"), np.float32(0))
        mask = self._move(mask_BM).to(self.dtype)[:, None, None, :]
        whole = Context(self._move(slots_BM.ravel()), mask, slots_BM.shape[1])
        if self.device.type == "cpu" and slots_BM.size * self.cache.slot_bytes > PART_BYTES:
            whole.parts = self._parts(slots_BM, lengths_B1[:, 0].tolist(), mask)
        return whole

    def _parts(self, slots_BM: np.ndarray, lengths: list[int], mask: torch.Tensor) -> list[tuple[slice, Context]]:
        """As many rows at a time as PART_BYTES hold, one at least."""
        cuts, first, width = [], 0, 0
        for row, length in enumerate(lengths):
            wider = max(width, length)
            if row > first and (row + 1 - first) * wider * self.cache.slot_bytes > PART_BYTES:
                cuts.append((slice(first, row), width))
                first, wider = row, length
            width = wider
        cuts.append((slice(first, len(lengths)), width))
        return [(rows, Context(self._move(slots_BM[rows, :width].ravel()), mask[rows, ..., :width], width)) for rows, width in cuts]

    @property
    def context(self) -> int:
        """Tokens that a decoding row reads in a layer without a window."""
        return self.decoding.width

    # --- fixed shapes ---

    def keep_routes(self, chunks: list[Chunk]) -> None:
        """After the step: sequences that want the experts of their tokens get them."""
        keep(chunks, self.stops, self.watch)

    def padded(self, num_rows: int, width: int, segments: list[Segment]) -> PagedBatch:
        """A batch of decoding rows with fixed shapes, to be filled from others that fit into it (engine/graphs.py)."""
        fixed = copy(self)
        fixed.segments = fixed.decoding_segments = segments
        fixed.num_decoding = num_rows
        fixed.tokens_T, fixed.positions_T, fixed.slots_T = (self.tokens_T.new_zeros(num_rows) for _ in range(3))
        fixed.decoding = fixed.windowed = self._empty_rows(num_rows, width)
        if self.window is not None and self.window < width:
            fixed.windowed = self._empty_rows(num_rows, self.window)
        if self.states.num_slots:
            fixed.decoding_states = self.decoding_states.new_empty(num_rows)
        return fixed

    def _empty_rows(self, num_rows: int, width: int) -> Context:
        slots, mask = self.decoding.slots.new_empty(num_rows * width), self.decoding.mask.new_empty(num_rows, 1, 1, width)
        return Context(slots, mask, width)

    def fill(self, batch: PagedBatch) -> None:
        """Takes over another batch's rows. What is beyond them reads the null block and writes into the spare slot."""
        rows = batch.num_decoding
        for mine, its in ((self.tokens_T, batch.tokens_T), (self.positions_T, batch.positions_T), (self.slots_T, batch.slots_T)):
            mine[:rows].copy_(its)
        self.slots_T[rows:] = self.cache.spare_slot
        pairs = [(self.decoding, batch.decoding)]
        if self.windowed is not self.decoding:
            pairs.append((self.windowed, batch.windowed))
        for own, other in pairs:
            own.slots.fill_(NULL_BLOCK * self.cache.block_size)
            own.slots.view(self.num_decoding, -1)[:rows, : other.width].copy_(other.slots.view(rows, -1))
            own.mask.fill_(float("-inf"))
            own.mask[..., 0] = 0.0
            own.mask[:rows, ..., : other.width].copy_(other.mask)
        if self.states.num_slots:
            self.decoding_states[:rows].copy_(batch.decoding_states)
            self.decoding_states[rows:] = self.states.num_slots

    def rehearse(self) -> None:
        """The rows may be run once more than they count: keys that are written twice are the same keys, a state would move on twice."""
        if self.states.num_slots:
            self.decoding_states.fill_(self.states.num_slots)

    # --- attention ---

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: Form) -> torch.Tensor:
        """query [H, T, D], key and value [G, T, D] -> [H, T, D]."""
        if form.latent is not None:
            self.cache.write(layer, self.slots_T, form.latent.entry(key))
        else:
            self.cache.write(layer, self.slots_T, key.transpose(0, 1), value.transpose(0, 1))
        query_THD = query.transpose(0, 1)
        if not self.spans:
            return self._decode(layer, query_THD, form).transpose(0, 1)
        out_THD = query.new_empty(query_THD.shape[0], query_THD.shape[1], value.shape[-1])
        if self.decoding_rows is not None:
            out_THD[self.decoding_rows] = self._decode(layer, query_THD[self.decoding_rows], form)
        for span in self.spans:
            rows = span.rows
            out_HTD = self._attend_span(layer, span, query[:, rows], key[:, rows], value[:, rows], form)
            out_THD[rows] = out_HTD.transpose(0, 1)
        return out_THD.transpose(0, 1)

    def _decode(self, layer: int, query_BHD: torch.Tensor, form: Form) -> torch.Tensor:
        seen = self.windowed if form.window is not None else self.decoding
        if form.latent is None:
            return in_parts(seen, query_BHD, partial(self._read, layer, form))
        query_HBC = form.latent.absorb(query_BHD.transpose(0, 1), self.decoding_segments)
        mixed_BHC = in_parts(seen, query_HBC.transpose(0, 1), partial(self._read_latents, layer, form, form.latent))
        return form.latent.values(mixed_BHC.transpose(0, 1), self.decoding_segments).transpose(0, 1)

    def _read(self, layer: int, form: Form, query_BHD: torch.Tensor, seen: Context) -> torch.Tensor:
        key, value = self.cache.read(layer, seen.slots)
        num, heads, head_dim = query_BHD.shape
        groups = key.shape[1]
        key_BGMD = key.view(num, seen.width, groups, head_dim).transpose(1, 2)
        value_BGMD = value.view(num, seen.width, groups, -1).transpose(1, 2)
        if form.sinks is not None:
            out_BH1D = attend_with_sinks(query_BHD.unsqueeze(2), key_BGMD, value_BGMD, seen.mask, form.scaling, form.sinks)
            return out_BH1D.squeeze(2)
        query_BGQD = query_BHD.reshape(num, groups, heads // groups, head_dim)
        out_BGQD = F.scaled_dot_product_attention(query_BGQD, key_BGMD, value_BGMD, attn_mask=seen.mask, scale=form.scaling)
        return out_BGQD.reshape(num, heads, -1)

    def _read_latents(self, layer: int, form: Form, latent: LatentUp, query_BHC: torch.Tensor, seen: Context) -> torch.Tensor:
        """The absorbed form: all heads read one entry (c, r) of each token."""
        (entries,) = self.cache.read(layer, seen.slots)
        entries_B1MD = entries.view(query_BHC.shape[0], 1, seen.width, -1)
        mixed_B1HC = F.scaled_dot_product_attention(
            query_BHC.unsqueeze(1), entries_B1MD, entries_B1MD[..., : latent.latent_size], attn_mask=seen.mask, scale=form.scaling
        )
        return mixed_B1HC.squeeze(1)

    def _attend_span(self, layer: int, span: Span, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: Form) -> torch.Tensor:
        """One chunk of a prompt: [H, T, D] of its rows."""
        seen = span.windowed if form.window is not None and self.window is not None else span.context
        if seen is not None and form.latent is not None:
            (entries,) = self.cache.read(layer, seen.slots)
            own = Segment(span.chunk.sequence.request.adapter, 0, seen.width)
            return form.latent.attend_expanded(query, entries.squeeze(1), seen.mask, form.scaling, own)
        if seen is not None:
            key, value = (entry.transpose(0, 1) for entry in self.cache.read(layer, seen.slots))
        mask = None if seen is None else seen.mask
        if form.sinks is not None:
            if mask is None:
                length = query.shape[1]
                mask = query.new_full((length, length), float("-inf")).triu_(1)
            return attend_with_sinks(query[None], key[None], value[None], mask[None, None], form.scaling, form.sinks)[0]
        if mask is not None:
            return attend_masked(query, key, value, mask, form.scaling)
        return F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True, scale=form.scaling, enable_gqa=True)[0]

    # --- layers with a state ---

    def recur(self, layer: Recurrent, hidden_TD: torch.Tensor) -> torch.Tensor:
        tensors = self.states.of_layer[layer.index]
        out_TD = torch.empty_like(hidden_TD)
        if self.num_decoding:
            rows = self.decoding_rows if self.decoding_rows is not None else slice(None)
            with rows_of(self.decoding_segments, 0, self.num_decoding):
                out_TD[rows] = layer.run(hidden_TD[rows].unsqueeze(1), States(tensors, self.decoding_states)).squeeze(1)
        for span in self.spans:
            assert span.state is not None
            with rows_of(self.segments, span.first, span.last):
                out_TD[span.rows] = layer.run(hidden_TD[span.rows].unsqueeze(0), States(tensors, span.state)).squeeze(0)
        return out_TD


def in_parts(seen: Context, query_BHD: torch.Tensor, read: Callable[[torch.Tensor, Context], torch.Tensor]) -> torch.Tensor:
    """What `read` makes of the rows, all at once or part by part."""
    if not seen.parts:
        return read(query_BHD, seen)
    return torch.cat([read(query_BHD[rows], part) for rows, part in seen.parts])


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
