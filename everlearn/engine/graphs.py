"""Decoding steps that are recorded once and replayed: on a GPU a step is a thousand small kernels, and starting each of them from
Python takes longer than running it.

A recorded step has fixed shapes, so a batch is padded: rows to the next multiple of eight, context to the next of a few widths. Padded
rows compute garbage from the null block into a spare slot that nobody reads. A step is recorded for one layout of adapters; it keeps
their tensors alive, so a replay never reads memory that another adapter has got meanwhile. On a CPU the same padded step runs without
a recording, which is what the tests compare.

Axes: T rows, B decoding rows (padded), M context (padded).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import torch

from everlearn.engine.paged import PagedBatch
from everlearn.models.load import BaseModel
from everlearn.models.lora import Segment

ROWS = 8
WIDTH = 128  # context grows by this many tokens up to eight times of it, then by an eighth of itself
KEPT = 48  # recordings in memory; each takes a few megabytes
WORTH = 3  # a layout that was met as often in a row of steps is recorded

Layout = tuple[int, int, tuple[tuple[str, int, int], ...]]


def padded_width(context: int) -> int:
    """The context width that a step of `context` tokens is padded to."""
    step = max(WIDTH, 1 << (max(context - 1, 8).bit_length() - 4))
    return -(-context // step) * step


class Recording:
    """One padded step: the tensors that it reads, and the graph that reads them (None on a CPU)."""

    def __init__(self, base: BaseModel, batch: PagedBatch, layout: Layout):
        num_rows, width, spans = layout
        self.base = base
        adapters = {s.adapter.version if s.adapter else "": s.adapter for s in batch.segments}
        self.step = batch.padded(num_rows, width, [Segment(adapters[version], start, stop) for version, start, stop in spans])
        self.graph: torch.cuda.CUDAGraph | None = None
        self.hidden_TD: torch.Tensor | None = None

    def record(self, pool: Any) -> None:
        """Runs the step once to warm up and once to record it. Its writes go where the real step writes too."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.hidden_TD = self._run()
        self.graph = graph

    def replay(self, batch: PagedBatch) -> torch.Tensor:
        """The final hidden states of `batch`, good until the next replay."""
        self.step.fill(batch)
        if self.graph is None:
            return self._run()[: batch.num_decoding]
        self.graph.replay()
        assert self.hidden_TD is not None
        return self.hidden_TD[: batch.num_decoding]

    def _run(self) -> torch.Tensor:
        return self.base.hidden(self.step.tokens_T, self.step.positions_T, self.step)


class DecodeGraphs:
    """The recordings of one base model."""

    def __init__(self, base: BaseModel):
        self.base = base
        self.recordings: OrderedDict[Layout, Recording] = OrderedDict()
        self.met: Counter[Layout] = Counter()
        self.pool = torch.cuda.graph_pool_handle() if base.device.type == "cuda" else None

    def hidden(self, batch: PagedBatch) -> torch.Tensor | None:
        """The step's final hidden states; None where it has to run as it is (prompts in it, or a layout that has just come)."""
        if batch.spans or batch.watch is not None:
            return None
        layout = layout_of(batch)
        recording = self.recordings.get(layout)
        if recording is None:
            self.met[layout] += 1
            if self.met[layout] < WORTH:
                return None
            recording = self._record(batch, layout)
        self.recordings.move_to_end(layout)
        return recording.replay(batch)

    def _record(self, batch: PagedBatch, layout: Layout) -> Recording:
        self.met.clear()
        recording = self.recordings[layout] = Recording(self.base, batch, layout)
        if self.pool is not None:
            recording.step.fill(batch)
            recording.step.rehearse()
            recording.record(self.pool)
        if len(self.recordings) > KEPT:
            self.recordings.popitem(last=False)
        return recording


def layout_of(batch: PagedBatch) -> Layout:
    """What a recording is made for. A lone adapter takes the padded rows too, so that its batch may shrink by a few."""
    num_rows = -(-batch.num_decoding // ROWS) * ROWS
    spans = [(s.adapter.version if s.adapter else "", s.start, s.stop) for s in batch.segments]
    if len(spans) == 1:
        spans = [(spans[0][0], 0, num_rows)]
    return num_rows, padded_width(batch.context), tuple(spans)
