"""LoRA on frozen linear layers, several adapters in one pass.

A row of tokens is cut into segments, one for each adapter; `y = x W^T + scale · (x A^T) B^T` with the A and B of the token's own
segment (Hu et al. 2021, arXiv:2106.09685; scale = alpha / rank). Ranks may differ between segments: nothing is padded.
Gradients of A and B are added straight into the adapter's gradient buffers during the backward pass, so autograd holds no leaf
for them and an adapter that does not train costs nothing. This module knows nothing of requests, optimizers or files.

Axes: T tokens, I and O the layer's input and output size, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from everlearn.models.few_rows import are_few, product_of_few
from everlearn.models.grouped import accumulate
from everlearn.models.quant import PackedLinear, dense_of

if TYPE_CHECKING:
    from everlearn.models.siblings import Siblings

Pair = tuple[torch.Tensor, torch.Tensor]
Block = tuple[slice, slice, torch.Tensor]  # rows of y, rows of A x, and the B [O, R] that leads from the one to the other
HEAD = "lm_head"
ROUTERS = ("gate", "router", "shared_expert_gate")  # linear layers that choose experts; they are never adapted


class PairShape(NamedTuple):
    """The shapes of A [..., R, I] and B [..., O, R]; what has an axis more in front is one for each expert."""

    a: tuple[int, ...]
    b: tuple[int, ...]


@dataclass(eq=False)
class AdapterWeights:
    """A [R, I] and B [O, R] by module path; on experts with an axis in front (experts.py), and with a scale of their own. `grads` has the
    same keys where the adapter trains, else it is None. The values of a `frozen` adapter never change, so layers that read one input may
    lay its matrices out together (siblings.py; `families`)."""

    version: str
    scale: float
    pairs: dict[str, Pair]
    grads: dict[str, Pair] | None = field(default=None, repr=False)
    frozen: bool = False
    families: dict[str, tuple[torch.Tensor, list[Block]]] = field(default_factory=dict, repr=False)
    expert_scale: float = 0.0  # alpha / rank of an expert; 0: that of the other layers

    def __post_init__(self) -> None:
        self.expert_scale = self.expert_scale or self.scale


def expert_scale(alpha: float, pairs: dict[str, Pair]) -> float:
    """alpha / rank of the matrices on experts, which may have a rank of their own; 0 where there are none."""
    return next((alpha / a.shape[-2] for a, b in pairs.values() if a.ndim == 3 or b.ndim == 3), 0.0)


@dataclass(eq=False)
class Segment:
    """Tokens [start, stop) of the packed row use `adapter` (None: the base model as it is). `temperature` divides their logits, where the
    head makes log-probabilities of them."""

    adapter: AdapterWeights | None
    start: int
    stop: int
    temperature: float = 1.0

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


class _Active:
    """The segments of the batch that is being run; `anchor` makes autograd record layers whose input needs no gradient."""

    def __init__(self) -> None:
        self.current: list[Segment] = []
        self.anchor = torch.zeros((), requires_grad=True)


active_segments = _Active()


class LoraLinear(nn.Module):
    """A frozen linear layer that adds the low-rank update of each token's adapter."""

    def __init__(self, linear: nn.Linear | PackedLinear, path: str):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.path = path
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.siblings: Siblings | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        segments = active_segments.current
        if torch.is_grad_enabled():
            return _LoraFunction.apply(x, active_segments.anchor, self, parts_of(segments, self.path))
        if self.siblings is not None and (y := self.siblings.output(self, x, segments)) is not None:
            return y
        parts = frozen_parts(segments, self.path)
        return frozen_product(x.reshape(-1, self.in_features), dense_of(self.weight), self.bias, parts).view(
            *x.shape[:-1], self.out_features
        )


Part = tuple[Segment, torch.Tensor, torch.Tensor]  # a segment with its adapter's A [R, I] and B [O, R] for one layer
FrozenPart = tuple[slice, float, torch.Tensor, list[Block]]  # an adapter's rows of x, its scale, its A, what A x goes through


def parts_of(segments: list[Segment], path: str) -> list[Part]:
    """The segments whose adapter changes the layer at `path`."""
    return [(s, *s.adapter.pairs[path]) for s in segments if s.adapter is not None and path in s.adapter.pairs]


def frozen_parts(segments: list[Segment], path: str) -> list[FrozenPart]:
    """The same, as `frozen_product` takes them."""
    whole, parts = slice(None), []
    for segment in segments:
        if segment.adapter is not None and path in segment.adapter.pairs:
            a_RI, b_OR = segment.adapter.pairs[path]
            parts.append((segment.rows, segment.adapter.scale, a_RI, [(whole, whole, b_OR)]))
    return parts


def frozen_product(x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, parts: list[FrozenPart]) -> torch.Tensor:
    """x W^T + b with the parts' low-rank updates [N, O]; no gradient."""
    if are_few(x_NI):
        y_NO = product_of_few(x_NI, weight_OI)
        if bias_O is not None:
            y_NO += bias_O
    else:
        y_NO = F.linear(x_NI, weight_OI, bias_O)
    for rows, scale, a_RI, blocks in parts:
        h_NR = F.linear(x_NI[rows], a_RI)
        for outs, ranks, b_OR in blocks:
            y_NO[rows, outs].addmm_(h_NR[:, ranks], b_OR.t(), alpha=scale)
    return y_NO


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
        y = F.linear(x, dense_of(layer.weight), layer.bias)
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
        dx_TI = dy_TO @ dense_of(layer.weight) if ctx.needs_input_grad[0] else None
        for (segment, a_RI, b_OR), h_TR in zip(ctx.parts, lows, strict=True):
            rows = slice(segment.start, segment.stop)
            dh_TR = dy_TO[rows] @ b_OR
            if segment.adapter.grads is not None:
                da_RI, db_OR = segment.adapter.grads[layer.path]
                accumulate(da_RI, dh_TR.t(), x_TI[rows], segment.adapter.scale)
                accumulate(db_OR, dy_TO[rows].t(), h_TR, segment.adapter.scale)
            if dx_TI is not None:
                dx_TI[rows].addmm_(dh_TR, a_RI, alpha=segment.adapter.scale)
        return (dx_TI.view_as(x) if dx_TI is not None else None, None, None, None)


def kind_of(path: str) -> str | None:
    """Which of LoraSpec's switches a linear layer falls under: attn, mlp, vision, or None (never adapted: routers)."""
    parts = path.split(".")
    if "visual" in parts or "vision_tower" in parts:
        return None if parts[-1].endswith("embed") else "vision"
    if any(part in ("self_attn", "attn", "attention", "linear_attn") for part in parts):
        return "attn"
    if any(part in ("mlp", "feed_forward", "block_sparse_moe") for part in parts) and parts[-1] not in ROUTERS:
        return "mlp"
    return None


def install(decoder: nn.Module, prefix: str) -> dict[str, LoraLinear]:
    """Replaces every adaptable nn.Linear of `decoder` by a LoraLinear over the same weight. Returns them by full path."""
    found: dict[str, LoraLinear] = {}
    for name, module in list(decoder.named_modules()):
        for child_name, child in list(module.named_children()):
            path = ".".join(p for p in (prefix, name, child_name) if p)
            if type(child) in (nn.Linear, PackedLinear) and kind_of(path) is not None:
                layer = LoraLinear(child, path)
                setattr(module, child_name, layer)
                found[path] = layer
    return found
