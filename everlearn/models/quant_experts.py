"""The frozen stack of a layer's experts, kept packed: experts are unpacked when they have rows, used, and let go.

It stands for experts.Stack. One expert's matrix exists unpacked at a time; where grouped products are one kernel, that of RUN neighbours,
because starting a kernel for each expert takes longer there than what it computes. The backward pass unpacks them again.

Axes: S rows (pairs of a token and an expert, sorted by expert), E experts, I and O the sizes of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from everlearn.models import grouped
from everlearn.models.grouped import Pairs, linear_into
from everlearn.models.quant import PackedWeight

RUN = 8  # of Kimi K2's joint gate and up matrices 470 MB


class PackedStack:
    """Products of sorted rows with their experts' matrices [O, I]."""

    def __init__(self, weight_EOI: PackedWeight, bias_EO: torch.Tensor | None):
        self.weight, self.bias = weight_EOI, bias_EO

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, output size, input size)"""
        num, size_out, size_in = self.weight.shape
        return num, size_out, size_in

    def product(self, x_SI: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """[S, O], with the bias."""
        if grouped.runs_fused(x_SI) and len(x_SI):
            y_SO = torch.cat([grouped.fused_product(x_SI[rows], self.weight.dense(part), stops) for part, rows, stops in runs(pairs)])
        else:
            y_SO = x_SI.new_empty(len(x_SI), self.weight.shape[1])
            for expert, start, stop in pairs.spans:
                linear_into(x_SI[start:stop], self.weight.dense(expert), y_SO[start:stop])
        return y_SO if self.bias is None else y_SO.add_(self.bias[pairs.expert])

    def back(self, dy_SO: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """[S, I]: dy times each row's matrix."""
        if grouped.runs_fused(dy_SO) and len(dy_SO):
            found = [grouped.fused_product(dy_SO[rows], self.weight.dense(part).mT, stops) for part, rows, stops in runs(pairs)]
            return torch.cat(found)
        dx_SI = dy_SO.new_empty(len(dy_SO), self.weight.shape[2])
        for expert, start, stop in pairs.spans:
            torch.mm(dy_SO[start:stop], self.weight.dense(expert), out=dx_SI[start:stop])
        return dx_SI


def runs(pairs: Pairs) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Up to RUN neighbouring experts that all have rows: which they are, their rows, and int32 each one's last row + 1 among those."""
    spans, at = pairs.spans, 0
    while at < len(spans):
        first, start, stop = spans[at]
        last = first
        while at + 1 < len(spans) and spans[at + 1][0] == last + 1 and last + 1 - first < RUN:
            at, last, stop = at + 1, last + 1, spans[at + 1][2]
        at += 1
        yield slice(first, last + 1), slice(start, stop), pairs.stops[first : last + 1] - start
