"""NF4: 4-bit codes of a normal distribution's quantiles in blocks of 64 values (Dettmers et al. 2023, arXiv:2305.14314), in the layout
of bitsandbytes' checkpoints and without that library.

A linear layer `M` [O, I] is on disk `M.weight` uint8 [O · I / 2, 1], two codes a byte with the first in the high bits, row after row;
`M.weight.absmax` one scale a block; and small tensors beside it. With double quantisation absmax is itself uint8 codes in blocks of
256: nested_quant_map[code] · nested_absmax + nested_offset. Here absmax is kept as float32 (half a bit a value).

Axes: O output size, I input size, E experts, B blocks of a layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from everlearn.errors import Unsupported
from everlearn.models.quant import PackedWeight, Part, Piece, Shape

BLOCK = 64
NESTED = 256
# Quantiles of N(0, 1), scaled to [-1, 1], with an exact zero: the paper's appendix E.
CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
STATE = "weight.quant_state.bitsandbytes__nf4"


class Nf4Weight(PackedWeight):
    """`packed` uint8 [..., O, I / 2]; `absmax` float32 [..., B], blocks running through the rows of a layer or expert."""

    packed: torch.Tensor
    absmax: torch.Tensor
    codes: torch.Tensor

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device | str):
        super().__init__(shape, dtype)
        *lead, num_out, num_in = shape
        self.register_buffer("packed", torch.empty(*lead, num_out, num_in // 2, dtype=torch.uint8, device=device))
        self.register_buffer("absmax", torch.empty(*lead, num_out * num_in // BLOCK, dtype=torch.float32, device=device))
        self.register_buffer("codes", torch.tensor(CODES, device=device))

    def dense(self, part: Part = None) -> torch.Tensor:
        if self.packed.dim() == 2 and part is not None:
            return self._rows(part)
        packed, absmax = (self.packed, self.absmax) if part is None else (self.packed[part], self.absmax[part])
        return self._unpack(packed, absmax)

    def _rows(self, part: int | slice) -> torch.Tensor:
        """Rows of a matrix. A block may span rows, so the blocks that they touch are unpacked."""
        num_in = self.shape[1]
        start, stop, step = part.indices(self.shape[0]) if isinstance(part, slice) else (part % self.shape[0], part % self.shape[0] + 1, 1)
        first, last = start * num_in // BLOCK, -(-max(stop, start) * num_in // BLOCK)
        flat = self._unpack(self.packed.view(-1)[first * BLOCK // 2 : last * BLOCK // 2], self.absmax[first:last])
        rows = flat[start * num_in - first * BLOCK :][: max(stop - start, 0) * num_in].view(-1, num_in)[::step]
        return rows if isinstance(part, slice) else rows[0]

    def _unpack(self, packed: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        values = packed.new_empty((*packed.shape, 2), dtype=self.dtype)
        blocks, pairs = values.view(*absmax.shape, BLOCK // 2, 2), packed.view(*absmax.shape, BLOCK // 2)
        for place, shift in enumerate((4, 0)):  # code and scale are float32: their product is rounded once
            blocks[..., place] = self.codes[((pairs >> shift) & 15).int()].mul_(absmax.unsqueeze(-1))
        return values.view(*packed.shape[:-1], packed.shape[-1] * 2)


class Nf4Scheme(NamedTuple):
    """As bitsandbytes writes it; `double`: absmax is quantised too."""

    double: bool
    name: str
    marker: str = STATE

    def stored(self, shape: Shape) -> dict[str, tuple[Shape, tuple[str, ...]]]:
        count = math.prod(shape)
        if count % BLOCK or shape[-1] % 2:
            raise Unsupported(f"a layer of shape {list(shape)} can't be NF4: its {count} values are no multiple of the block size {BLOCK}")
        found: dict[str, tuple[Shape, tuple[str, ...]]] = {
            "weight": ((count // 2, 1), ("U8",)),
            "weight.absmax": ((count // BLOCK,), ("U8",) if self.double else ("F32",)),
            "weight.quant_map": ((len(CODES),), ("F32",)),
            STATE: ((-1,), ("U8",)),
        }
        if self.double:
            found["weight.nested_absmax"] = ((-(-count // BLOCK // NESTED),), ("F32",))
            found["weight.nested_quant_map"] = ((256,), ("F32",))
        return found

    def empty(self, shape: Shape, rows: list[int], dtype: torch.dtype, device: torch.device, types: dict[str, torch.dtype]) -> Nf4Weight:
        return Nf4Weight(shape, dtype, device)

    def pieces(self, weight: PackedWeight, expert: int | None, first_row: int, num_rows: int) -> list[Piece]:
        assert isinstance(weight, Nf4Weight)
        packed, absmax = (weight.packed, weight.absmax) if expert is None else (weight.packed[expert], weight.absmax[expert])
        first, last = first_row * weight.shape[-1] // BLOCK, (first_row + num_rows) * weight.shape[-1] // BLOCK
        rows = packed[first_row : first_row + num_rows]
        return [Piece("weight", rows.view(-1, 1)), Piece("weight.absmax", absmax[first:last], decode_absmax)]

    def pack(self, dense: torch.Tensor) -> Nf4Weight:
        return pack(dense)

    def nbytes(self, shape: Shape) -> float:
        return math.prod(shape) * (0.5 + 4 / BLOCK)


def decode_absmax(stored: torch.Tensor, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """float32 scales, the second quantisation undone."""
    state = json.loads(bytes(read(STATE).tolist()))
    if state.get("quant_type") != "nf4" or state.get("blocksize") != BLOCK:
        raise Unsupported(f"bitsandbytes weights of type {state.get('quant_type')!r} in blocks of {state.get('blocksize')} aren't read")
    if not torch.allclose(read("weight.quant_map"), torch.tensor(CODES), atol=1e-6):
        raise Unsupported("a bitsandbytes weight has a code table of its own; only NF4's is read")
    if stored.dtype != torch.uint8:
        return stored
    nested = read("weight.nested_absmax").repeat_interleave(int(state["nested_blocksize"]))[: len(stored)]
    return read("weight.nested_quant_map")[stored.int()] * nested + float(state["nested_offset"])


def read_scheme(config: Mapping[str, Any]) -> Nf4Scheme:
    """The scheme that a `quantization_config` of quant_method bitsandbytes describes."""
    if not config.get("load_in_4bit") or config.get("bnb_4bit_quant_type") != "nf4":
        kind = f"4 bits of type {config.get('bnb_4bit_quant_type')!r}" if config.get("load_in_4bit") else "8 bits"
        raise Unsupported(f"bitsandbytes with {kind} isn't read, only NF4 is; use such a folder or the unquantised model")
    if config.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        raise Unsupported(f"bitsandbytes with bnb_4bit_quant_storage {config['bnb_4bit_quant_storage']!r} isn't read, only uint8 is")
    double = bool(config.get("bnb_4bit_use_double_quant"))
    return Nf4Scheme(double, f"NF4 in blocks of {BLOCK}")


def pack(dense: torch.Tensor) -> Nf4Weight:
    """Quantises [..., O, I] to the nearest code of each value over its block's largest magnitude."""
    weight = Nf4Weight(tuple(dense.shape), dense.dtype, dense.device)
    blocks = dense.float().reshape(*weight.absmax.shape, BLOCK)
    weight.absmax.copy_(blocks.abs().amax(-1))
    middles = (weight.codes[1:] + weight.codes[:-1]) / 2
    codes = torch.bucketize(blocks / weight.absmax.clamp_min(1e-12).unsqueeze(-1), middles).to(torch.uint8).view(*weight.packed.shape, 2)
    weight.packed.copy_((codes[..., 0] << 4) | codes[..., 1])
    return weight
