"""FP8 (e4m3) in blocks of 128 x 128 with one scale each, as DeepSeek-V3, Kimi K2 Instruct and Qwen3's FP8 folders ship their layers.

A linear layer `M` of shape [O, I] is `M.weight` float8_e4m3fn [O, I] and `M.weight_scale_inv` [O / 128, I / 128] (rounded up); a value
is weight · scale of its block ("inv": it undoes the scaling). Such folders ask for activations in FP8 too; here they stay in the
engine's type, which is more exact. Blocks end where a layer does, so that rows of a weight made of several layers (gate and up)
remember which row of scales is theirs.

Axes: O output size, I input size, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from everlearn.errors import Unsupported
from everlearn.models.quant import PackedWeight, Part, Piece, Shape

LARGEST = 448.0  # of e4m3fn


class Fp8Weight(PackedWeight):
    """`values` float8 [..., O, I]; `scale` [..., blocks of rows, blocks of columns]; `block_of_row` [O]."""

    values: torch.Tensor
    scale: torch.Tensor
    block_of_row: torch.Tensor

    def __init__(
        self, shape: Shape, rows: list[int], block: tuple[int, int], dtype: torch.dtype, scale_dtype: torch.dtype,
        device: torch.device | str,
    ):  # fmt: skip
        super().__init__(shape, dtype)
        self.rows, self.block = rows, block
        blocks = [-(-count // block[0]) for count in rows]
        of_row = [
            sum(blocks[:layer]) + torch.arange(count, device=device, dtype=torch.int32) // block[0] for layer, count in enumerate(rows)
        ]
        self.register_buffer("values", torch.empty(shape, dtype=torch.float8_e4m3fn, device=device))
        self.register_buffer("scale", torch.empty(*shape[:-2], sum(blocks), -(-shape[-1] // block[1]), dtype=scale_dtype, device=device))
        self.register_buffer("block_of_row", torch.cat(of_row))

    def dense(self, part: Part = None) -> torch.Tensor:
        values, scale, of_row = self.values, self.scale, self.block_of_row
        if part is not None and values.dim() == 3:
            values, scale = values[part], scale[part]
        elif part is not None:
            of_row, values = of_row[part], values[part]
        scale = scale.float().index_select(-2, of_row.reshape(-1))
        if values.dim() == 1:  # one row of a matrix
            scale = scale[0]
        dense, block = values.to(self.dtype), self.block[1]  # exact; times float32 it is rounded once
        whole = dense.shape[-1] // block
        dense[..., : whole * block].unflatten(-1, (whole, block)).mul_(scale[..., :whole, None])
        dense[..., whole * block :].mul_(scale[..., whole:])
        return dense


class Fp8Scheme(NamedTuple):
    """Blocks of `block` rows and columns."""

    block: tuple[int, int]
    name: str
    marker: str = "weight_scale_inv"

    def stored(self, shape: Shape) -> dict[str, tuple[Shape, tuple[str, ...]]]:
        num_out, num_in = shape
        blocks = (-(-num_out // self.block[0]), -(-num_in // self.block[1]))
        return {"weight": (shape, ("F8_E4M3",)), "weight_scale_inv": (blocks, ("F32", "BF16", "F16"))}

    def empty(self, shape: Shape, rows: list[int], dtype: torch.dtype, device: torch.device, types: dict[str, torch.dtype]) -> Fp8Weight:
        return Fp8Weight(shape, rows, self.block, dtype, types["weight_scale_inv"], device)

    def pieces(self, weight: PackedWeight, expert: int | None, first_row: int, num_rows: int) -> list[Piece]:
        assert isinstance(weight, Fp8Weight)
        values, scale = (weight.values, weight.scale) if expert is None else (weight.values[expert], weight.scale[expert])
        first_block = sum(-(-count // self.block[0]) for count in weight.rows[: _layer_at(weight.rows, first_row)])
        blocks = slice(first_block, first_block - (-num_rows // self.block[0]))
        return [Piece("weight", values[first_row : first_row + num_rows]), Piece("weight_scale_inv", scale[blocks])]

    def pack(self, dense: torch.Tensor) -> Fp8Weight:
        return pack(dense, self.block)

    def nbytes(self, shape: Shape) -> float:
        return math.prod(shape) * (1 + 4 / math.prod(self.block))


def _layer_at(rows: list[int], first_row: int) -> int:
    return next(layer for layer in range(len(rows)) if sum(rows[:layer]) == first_row)


def read_scheme(config: Mapping[str, Any]) -> Fp8Scheme:
    """The scheme that a `quantization_config` of quant_method fp8 describes."""
    block = config.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)):
        raise Unsupported(
            f"FP8 with weight_block_size {block!r} isn't read: only scales for blocks of rows and columns are, [128, 128] say"
        )
    if config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise Unsupported(f"FP8 in the format {config['fmt']!r} isn't read, only e4m3 is")
    return Fp8Scheme((block[0], block[1]), f"FP8 in blocks of {block[0]}x{block[1]}")


def pack(dense: torch.Tensor, block: tuple[int, int] = (128, 128)) -> Fp8Weight:
    """Quantises [..., O, I]: the scale of a block is its largest magnitude / 448."""
    *lead, num_out, num_in = dense.shape
    weight = Fp8Weight(tuple(dense.shape), [num_out], block, dense.dtype, torch.float32, dense.device)
    blocks = weight.scale.shape[-2:]
    padded = dense.new_zeros(*lead, blocks[0] * block[0], blocks[1] * block[1], dtype=torch.float32)
    padded[..., :num_out, :num_in] = dense
    tiles = padded.view(*lead, blocks[0], block[0], blocks[1], block[1])
    weight.scale.copy_((tiles.abs().amax(dim=(-3, -1)) / LARGEST).clamp_min(1e-12))
    tiles /= weight.scale[..., :, None, :, None]
    weight.values.copy_(padded[..., :num_out, :num_in].to(torch.float8_e4m3fn))
    return weight
