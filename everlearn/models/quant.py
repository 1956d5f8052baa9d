"""Frozen weights that stay packed in memory, and what a model folder says about how it was quantised.

A `PackedWeight` stands where a frozen matrix [O, I] or a stack of them [E, O, I] (the fused experts) would: it has a shape and a dtype,
and `dense(part)` unpacks an expert, a range of experts or of rows, or all. Nothing keeps what it returns: a forward pass unpacks
a layer, uses it, lets it go, and the backward pass unpacks it again. The formats are in quant_int4.py, quant_fp8.py and
quant_nf4.py; each also says which tensors on disk make up a weight. This module knows nothing of files, adapters or routing.

Axes: T tokens, I and O a matrix's input and output size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

Part = int | slice | None
Shape = tuple[int, ...]


class PackedWeight(nn.Module):
    """A frozen weight whose values are unpacked when they are used; what is packed lies in buffers."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        super().__init__()
        self.shape, self.dtype = torch.Size(shape), dtype

    def dense(self, part: Part = None) -> torch.Tensor:
        """The values along the first axis: of one expert (or row), of a slice of them, or all; a new tensor of `dtype`."""
        raise NotImplementedError

    def __getitem__(self, part: int | slice | torch.Tensor) -> torch.Tensor:
        return self.dense(int(part) if isinstance(part, torch.Tensor) else part)

    def numel(self) -> int:
        """How many values it stands for."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device


Weight = torch.Tensor | PackedWeight


def dense_of(weight: Weight, part: Part = None) -> torch.Tensor:
    """The values of a weight (or of `part` of its first axis), packed or not; a view where it isn't packed."""
    if isinstance(weight, PackedWeight):
        return weight.dense(part)
    return weight if part is None else weight[part]


class Piece(NamedTuple):
    """One tensor on disk and where it goes. `decode(tensor, read)` turns it into what is kept, where that is something else; `read` gives
    another tensor of the same layer by its suffix. `store(tensor)`, where there is one, does all of it."""

    suffix: str
    into: torch.Tensor
    decode: Callable[[torch.Tensor, Callable[[str], torch.Tensor]], torch.Tensor] | None = None
    store: Callable[[torch.Tensor], None] | None = None


class Scheme(Protocol):
    """A way to quantise the linear layers of a folder, as its config.json describes it."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def marker(self) -> str:
        """A linear layer `M` is quantised where the folder holds the tensor `M.<marker>`."""

    def stored(self, shape: Shape) -> dict[str, tuple[Shape, tuple[str, ...]]]:
        """By suffix: shape on disk and the types that are read, of a layer [O, I]. Raises Unsupported for a shape that doesn't fit."""

    def empty(self, shape: Shape, rows: list[int], dtype: torch.dtype, device: torch.device, types: dict[str, torch.dtype]) -> PackedWeight:
        """A weight of `shape` ([O, I] or [E, O, I]) to be filled. A matrix is made of layers with `rows` rows each (gate and up, say);
        `types` are those of the layers' tensors on disk, by suffix."""

    def pieces(self, weight: PackedWeight, expert: int | None, first_row: int, num_rows: int) -> list[Piece]:
        """Where the tensors of the layer go that makes up these rows of `weight` (of one expert, where it is a stack)."""

    def pack(self, dense: torch.Tensor) -> PackedWeight:
        """Quantises [..., O, I]."""

    def nbytes(self, shape: Shape) -> float:
        """What a layer of `shape` takes."""


def pack_into(scheme: Scheme, weight: PackedWeight, expert: int | None, first_row: int, dense: torch.Tensor) -> None:
    """Quantises a layer [O, I] into its rows of `weight`."""
    packed, num_rows = scheme.pack(dense), dense.shape[0]
    parts = zip(scheme.pieces(packed, None, 0, num_rows), scheme.pieces(weight, expert, first_row, num_rows), strict=True)
    for source, target in parts:
        target.into.copy_(source.into)


class PackedLinear(nn.Module):
    """A frozen linear layer over a packed weight. It stands in for nn.Linear where transformers' code calls the layer."""

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return packed_linear(x, self.weight, self.bias)


def unpacked(layer: PackedLinear) -> nn.Linear:
    """The layer with its values in place of what is packed."""
    with torch.device("meta"):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
    linear.weight = nn.Parameter(layer.weight.dense(), requires_grad=False)
    linear.register_parameter("bias", layer.bias)
    return linear


def packed_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, part: Part = None) -> torch.Tensor:
    """x W^T + b with W = weight.dense(part); the backward pass (dx = dy W) unpacks W again instead of keeping it."""
    y: torch.Tensor = _PackedLinear.apply(x, weight, bias, part)
    return y


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, part: Part) -> torch.Tensor:
        ctx.weight, ctx.part = weight, part
        return F.linear(x, weight.dense(part), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (grads[0] @ ctx.weight.dense(ctx.part) if ctx.needs_input_grad[0] else None, None, None, None)


def count_parameters(model: nn.Module) -> int:
    """Values of all weights, packed ones counted as what they stand for."""
    packed = sum(module.numel() for module in model.modules() if isinstance(module, PackedWeight))
    return packed + sum(parameter.numel() for parameter in model.parameters())
