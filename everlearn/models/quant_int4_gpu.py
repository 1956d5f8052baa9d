"""INT4 unpacked by one kernel on a GPU: each packed byte is read once, each value written once.

The same values, bit for bit, as Int4Weight.dense computes elsewhere with seven operations over the whole matrix, which read and write it
four times. Needs Triton, which torch's GPU builds bring.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

BLOCK = 2048  # bytes of a program: 16 for each of its threads


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _unpack(packed, scale, out, num_bytes, HALF_GROUP: tl.constexpr, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.program_id(0).to(tl.int64) * BYTES
    at = first + tl.arange(0, BYTES)
    inside = at < num_bytes
    byte = tl.load(packed + at, mask=inside, other=0).to(tl.int32)
    factor = tl.load(scale + at // HALF_GROUP, mask=inside, other=0.0).to(out.dtype.element_ty).to(tl.float32)
    low = ((byte & 15) - 8).to(tl.float32) * factor
    high = ((byte >> 4) - 8).to(tl.float32) * factor
    place = 2 * first + tl.arange(0, 2 * BYTES)
    tl.store(out + place, tl.interleave(low, high).to(out.dtype.element_ty), mask=place < 2 * num_bytes)


def unpack(packed: torch.Tensor, scale: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """[..., O, I] of `packed` uint8 [..., O, I / 2] and `scale` [..., O, I / group], both contiguous."""
    out = torch.empty((*packed.shape[:-1], 2 * packed.shape[-1]), dtype=dtype, device=packed.device)
    num_bytes = packed.numel()
    with torch.cuda.device(packed.device):
        _unpack[(triton.cdiv(num_bytes, BLOCK),)](packed, scale, out, num_bytes, HALF_GROUP=group // 2, BYTES=BLOCK)
    return out
