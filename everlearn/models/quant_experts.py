"""The frozen stack of a layer's experts, kept packed: an expert is unpacked when it has rows, used, and let go.

It stands for experts.Stack. At most one expert's matrix exists unpacked at a time, in the forward pass and again in the backward pass.

Axes: S rows (pairs of a token and an expert, sorted by expert), E experts, I and O the sizes of a matrix.
"""

from __future__ import annotations

import torch

from everlearn.models.grouped import Pairs, linear_into
from everlearn.models.quant import PackedWeight


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
        y_SO = x_SI.new_empty(len(x_SI), self.weight.shape[1])
        for expert, start, stop in pairs.spans:
            linear_into(x_SI[start:stop], self.weight.dense(expert), y_SO[start:stop])
        return y_SO if self.bias is None else y_SO.add_(self.bias[pairs.expert])

    def back(self, dy_SO: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """[S, I]: dy times each row's matrix."""
        dx_SI = dy_SO.new_empty(len(dy_SO), self.weight.shape[2])
        for expert, start, stop in pairs.spans:
            torch.mm(dy_SO[start:stop], self.weight.dense(expert), out=dx_SI[start:stop])
        return dx_SI
