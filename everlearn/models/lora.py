"""LoRA on frozen linear layers, several adapters in one pass.

A row of tokens is cut into segments, one for each adapter; `y = x W^T + scale · (x A^T) B^T` with the A and B of the token's own
segment (Hu et al. 2021, arXiv:2106.09685; scale = alpha / rank). Ranks may differ between segments: nothing is padded.
Gradients of A and B are added straight into the adapter's gradient buffers during the backward pass, so autograd holds no leaf
for them and an adapter that does not train costs nothing. This module knows nothing of requests, optimizers or files.

Axes: T tokens, I and O the layer's input and output size, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Pair = tuple[torch.Tensor, torch.Tensor]
HEAD = "lm_head"
FEW_ROWS = 32


@dataclass(eq=False)
class AdapterWeights:
    """A [R, I] and B [O, R] by module path. `grads` has the same keys where the adapter trains, else it is None."""

    version: str
    scale: float
    pairs: dict[str, Pair]
    grads: dict[str, Pair] | None = field(default=None, repr=False)


@dataclass(eq=False)
class Segment:
    """Tokens [start, stop) of the packed row use `adapter` (None: the base model as it is)."""

    adapter: AdapterWeights | None
    start: int
    stop: int


class _Active:
    """The segments of the batch that is being run; `anchor` makes autograd record layers whose input needs no gradient."""

    def __init__(self) -> None:
        self.current: list[Segment] = []
        self.anchor = torch.zeros((), requires_grad=True)


active_segments = _Active()


class LoraLinear(nn.Module):
    """A frozen linear layer that adds the low-rank update of each token's adapter."""

    def __init__(self, linear: nn.Linear, path: str):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.path = path
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = parts_of(active_segments.current, self.path)
        if torch.is_grad_enabled():
            return _LoraFunction.apply(x, active_segments.anchor, self, parts)
        return frozen_product(x.view(-1, self.in_features), self.weight, self.bias, parts).view(*x.shape[:-1], self.out_features)


Part = tuple[Segment, torch.Tensor, torch.Tensor]  # a segment with its adapter's A [R, I] and B [O, R] for one layer


def parts_of(segments: list[Segment], path: str) -> list[Part]:
    """The segments whose adapter changes the layer at `path`."""
    return [(s, *s.adapter.pairs[path]) for s in segments if s.adapter is not None and path in s.adapter.pairs]


def frozen_product(x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, parts: list[Part]) -> torch.Tensor:
    """x W^T + b with the parts' low-rank updates [N, O]; no gradient.

    For the few rows of a decoding step CPU libraries are up to twice as quick with the weight on the left, and a single row is a
    matrix-vector product that they run on one thread unless it is cut.
    """
    num_rows = x_NI.shape[0]
    if x_NI.device.type != "cpu" or num_rows > FEW_ROWS:
        y_NO = F.linear(x_NI, weight_OI, bias_O)
        for part in parts:
            add_low_rank(y_NO, x_NI, *part)
        return y_NO
    pieces = torch.get_num_threads()
    if num_rows == 1 and weight_OI.shape[0] % pieces == 0 and weight_OI.is_contiguous():
        y_ON = torch.bmm(weight_OI.view(pieces, -1, weight_OI.shape[1]), x_NI.t().expand(pieces, -1, 1)).view(-1, 1)
    else:
        y_ON = weight_OI @ x_NI.t()
    for segment, a_RI, b_OR in parts:
        assert segment.adapter is not None
        rows = slice(segment.start, segment.stop)
        y_ON[:, rows].addmm_(b_OR, a_RI @ x_NI[rows].t(), alpha=segment.adapter.scale)
    y_NO = y_ON.t().contiguous()
    return y_NO if bias_O is None else y_NO.add_(bias_O)


def add_low_rank(y_TO: torch.Tensor, x_TI: torch.Tensor, segment: Segment, a_RI: torch.Tensor, b_OR: torch.Tensor) -> torch.Tensor:
    """Adds scale · (x A^T) B^T to the segment's rows of y, in place; returns x A^T [t, R] of those rows."""
    assert segment.adapter is not None
    h_TR = x_TI[segment.start : segment.stop] @ a_RI.t()
    y_TO[segment.start : segment.stop].addmm_(h_TR, b_OR.t(), alpha=segment.adapter.scale)
    return h_TR


class _LoraFunction(torch.autograd.Function):
    """forward: y = x W^T + b + low-rank update. backward: dx, and A and B's gradients added into the adapters' buffers.

    With dh = scale · dy B:  dx = dy W + dh A,  dA += dh^T x,  dB += scale · dy^T (x A^T).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, layer: LoraLinear, parts: list[Any]) -> torch.Tensor:
        y = F.linear(x, layer.weight, layer.bias)
        rows_x, rows_y = x.reshape(-1, layer.in_features), y.view(-1, layer.out_features)
        lows = [add_low_rank(rows_y, rows_x, *part) for part in parts]
        ctx.layer, ctx.parts = layer, parts
        ctx.save_for_backward(x, *lows)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *lows = ctx.saved_tensors
        layer: LoraLinear = ctx.layer
        dy_TO = grads[0].reshape(-1, layer.out_features)
        x_TI = x.reshape(-1, layer.in_features)
        dx_TI = dy_TO @ layer.weight if ctx.needs_input_grad[0] else None
        for (segment, a_RI, b_OR), h_TR in zip(ctx.parts, lows, strict=True):
            rows = slice(segment.start, segment.stop)
            dh_TR = dy_TO[rows] @ b_OR
            if segment.adapter.grads is not None:
                da_RI, db_OR = segment.adapter.grads[layer.path]
                _accumulate(da_RI, dh_TR.t(), x_TI[rows], segment.adapter.scale)
                _accumulate(db_OR, dy_TO[rows].t(), h_TR, segment.adapter.scale)
            if dx_TI is not None:
                dx_TI[rows].addmm_(dh_TR, a_RI, alpha=segment.adapter.scale)
        return (dx_TI.view_as(x) if dx_TI is not None else None, None, None, None)


def _accumulate(grad: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """grad += scale · left @ right; the sum is kept in float32 whatever the activations' type."""
    if grad.dtype == left.dtype:
        grad.addmm_(left, right, alpha=scale)
    else:
        grad.add_((left @ right).to(grad.dtype), alpha=scale)


def kind_of(path: str) -> str | None:
    """Which of LoraSpec's switches a linear layer falls under: attn, mlp, or None (never adapted: routers, vision towers)."""
    parts = path.split(".")
    if any(part in ("self_attn", "attn", "attention", "linear_attn") for part in parts):
        return "attn"
    if any(part in ("mlp", "feed_forward", "block_sparse_moe") for part in parts) and parts[-1] != "gate":
        return "mlp"
    return None


def install(decoder: nn.Module, prefix: str) -> dict[str, LoraLinear]:
    """Replaces every adaptable nn.Linear of `decoder` by a LoraLinear over the same weight. Returns them by full path."""
    found: dict[str, LoraLinear] = {}
    for name, module in list(decoder.named_modules()):
        for child_name, child in list(module.named_children()):
            path = ".".join(p for p in (prefix, name, child_name) if p)
            if type(child) is nn.Linear and kind_of(path) is not None:
                layer = LoraLinear(child, path)
                setattr(module, child_name, layer)
                found[path] = layer
    return found
