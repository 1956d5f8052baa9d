"""INT4 in groups along the input axis, symmetric: `pack-quantized` of compressed-tensors, as Kimi K2 Thinking ships its experts.

A linear layer `M` of shape [O, I] is three tensors on disk: `M.weight_packed` int32 [O, I / 8], eight values in a word, the first in its
lowest bits, each stored as value + 8; `M.weight_scale` [O, I / group]; `M.weight_shape` [2]. A value is (stored - 8) · scale.
In memory it is the same bytes, seen as uint8 [O, I / 2]: two values a byte. https://github.com/vllm-project/compressed-tensors

Axes: O output size, I input size, G groups of an input row, E experts.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

from everlearn.errors import Unsupported
from everlearn.models.quant import PackedWeight, Part, Piece, Shape

ZERO = 8  # what 0 is stored as
FIXED = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}


class Int4Weight(PackedWeight):
    """`packed` uint8 [..., O, I / 2] and `scale` [..., O, G] in the type that they were shipped in."""

    packed: torch.Tensor
    scale: torch.Tensor

    def __init__(self, shape: Shape, group: int, dtype: torch.dtype, scale_dtype: torch.dtype, device: torch.device | str):
        super().__init__(shape, dtype)
        self.group = group
        *lead, num_in = shape
        self.register_buffer("packed", torch.empty(*lead, num_in // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(*lead, num_in // group, dtype=scale_dtype, device=device))

    def dense(self, part: Part = None) -> torch.Tensor:
        packed, scale = (self.packed, self.scale) if part is None else (self.packed[part], self.scale[part])
        if packed.is_cuda and has_triton():
            from everlearn.models.quant_int4_gpu import unpack

            return unpack(packed, scale, self.group, self.dtype)
        values = packed.new_empty((*packed.shape, 2), dtype=self.dtype)
        values[..., 0] = packed & 15
        values[..., 1] = packed >> 4
        grouped = values.view(*scale.shape, self.group)
        grouped.sub_(ZERO).mul_(scale.to(self.dtype).unsqueeze(-1))
        return grouped.view(*packed.shape[:-1], packed.shape[-1] * 2)


class Int4Scheme(NamedTuple):
    """Symmetric 4-bit integers in groups of `group` values, their scales in 16 bits."""

    group: int
    name: str
    marker: str = "weight_packed"

    def stored(self, shape: Shape) -> dict[str, tuple[Shape, tuple[str, ...]]]:
        num_out, num_in = shape
        if num_in % self.group:
            raise Unsupported(f"a layer of shape {list(shape)} can't be INT4: {num_in} is no multiple of the group size {self.group}")
        return {
            "weight_packed": ((num_out, num_in // 8), ("I32",)),
            "weight_scale": ((num_out, num_in // self.group), ("BF16", "F16", "F32")),
            "weight_shape": ((2,), ("I32", "I64")),
        }

    def empty(self, shape: Shape, rows: list[int], dtype: torch.dtype, device: torch.device, types: dict[str, torch.dtype]) -> Int4Weight:
        return Int4Weight(shape, self.group, dtype, types["weight_scale"], device)

    def pieces(self, weight: PackedWeight, expert: int | None, first_row: int, num_rows: int) -> list[Piece]:
        assert isinstance(weight, Int4Weight)
        packed, scale = (weight.packed, weight.scale) if expert is None else (weight.packed[expert], weight.scale[expert])
        rows = slice(first_row, first_row + num_rows)
        return [Piece("weight_packed", packed[rows].view(torch.int32)), Piece("weight_scale", scale[rows])]

    def pack(self, dense: torch.Tensor) -> Int4Weight:
        return pack(dense, self.group)

    def nbytes(self, shape: Shape) -> float:
        return math.prod(shape) * (0.5 + 2 / self.group)


def read_scheme(config: Mapping[str, Any]) -> Int4Scheme:
    """The scheme that a `quantization_config` of quant_method compressed-tensors describes. Which layers `ignore` leaves out shows in the
    folder's tensors."""
    groups = config.get("config_groups") or {}
    if config.get("format") != "pack-quantized" or len(groups) != 1:
        raise Unsupported(
            f"compressed-tensors in the format {config.get('format')!r} with {len(groups)} groups of layers isn't read; "
            "use a folder in the format 'pack-quantized' with one group (INT4), an FP8 one, or the unquantised model"
        )
    group = next(iter(groups.values()))
    weights = group.get("weights") or {}
    size = weights.get("group_size")
    wrong = [f"{key} {weights.get(key)!r}" for key, value in FIXED.items() if weights.get(key) != value]
    wrong += [f"{key} {group[key]!r}" for key in ("input_activations", "output_activations") if group.get(key)]
    wrong += [f"{key} {config[key]!r}" for key in ("kv_cache_scheme", "sparsity_config", "transform_config") if config.get(key)]
    wrong += [f"actorder {weights['actorder']!r}"] if weights.get("actorder") else []
    if wrong or not isinstance(size, int) or size < 8 or size % 8:
        raise Unsupported(
            f"compressed-tensors with {', '.join(wrong) or f'group_size {size!r}'} isn't read; symmetric 4-bit integers in groups of a "
            "multiple of 8, weights only, are; use such a folder or the unquantised model"
        )
    return Int4Scheme(size, f"INT4 in groups of {size}")


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def pack(dense: torch.Tensor, group: int = 32, scale_dtype: torch.dtype = torch.bfloat16) -> Int4Weight:
    """Quantises [..., O, I]: scale = max |w| / 7 of each group, rounded to its own type first; values within ±7."""
    *lead, num_in = dense.shape
    grouped = dense.float().reshape(*lead, num_in // group, group)
    scale = (grouped.abs().amax(-1) / 7).clamp_min(1e-8).to(scale_dtype)
    levels = (grouped / scale.float().unsqueeze(-1)).round_().clamp_(-7, 7).add_(ZERO).to(torch.uint8).view(*lead, num_in // 2, 2)
    weight = Int4Weight(tuple(dense.shape), group, dense.dtype, scale_dtype, dense.device)
    weight.packed.copy_(levels[..., 0] | (levels[..., 1] << 4))
    weight.scale.copy_(scale)
    return weight
