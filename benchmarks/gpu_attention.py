#!/usr/bin/env python3
"""How the sampler's attention is asked for on a GPU: each form beside the other that says the same, and beside the bytes it must read.

    python benchmarks/gpu_attention.py --out results.json          # bfloat16 on a CUDA device; without one, small and in float32

- `chunk`: T tokens, a later piece of a prompt, over the M that its sequence has by then. Ours (`attend_masked`) against a mask together
  with `enable_gqa`, for which the kernels that take masks have no form: torch then keeps all scores.
- `decode`: one token of each of B sequences over M. Ours (the heads of a group as queries) against two products with a softmax between.

Errors are ||out - reference|| / ||reference||, the reference in float32. Times are medians; inputs are drawn anew for each size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.common import write_result
from benchmarks.gpu_common import DEVICE, DTYPE, GPU, sync, timed
from everlearn.models.attention import attend_masked

HEADS, GROUPS, DIM = 32, 8, 128  # Qwen3-8B's
SCALING = DIM**-0.5
CHUNKS = ((512, 2048), (512, 8192), (512, 32768)) if GPU else ((64, 256),)  # T, M
DECODES = ((8, 1024), (8, 8192), (64, 1024), (64, 8192)) if GPU else ((4, 256),)  # B, M

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def chunk(length: int, width: int) -> Inputs:
    """Query [H, T, D], key and value [G, M, D], mask [T, M]."""
    position_T1 = torch.arange(width - length, width, device=DEVICE)[:, None]
    unseen = torch.arange(width, device=DEVICE) > position_T1
    mask = torch.zeros(length, width, device=DEVICE, dtype=DTYPE).masked_fill_(unseen, float("-inf"))
    return drawn(HEADS, length, DIM), drawn(GROUPS, width, DIM), drawn(GROUPS, width, DIM), mask


def decode(num: int, width: int) -> Inputs:
    """Query [B, G, Q, D], key and value [B, G, M, D] as the cache's rows lie, mask [B, 1, 1, M]. Sequences have all lengths up to M."""
    lengths_B1 = torch.linspace(width / 2, width, num, device=DEVICE)[:, None]
    unseen = torch.arange(width, device=DEVICE) >= lengths_B1
    mask = torch.zeros(num, width, device=DEVICE, dtype=DTYPE).masked_fill_(unseen, float("-inf"))[:, None, None]
    key, value = (drawn(num, width, GROUPS, DIM).transpose(1, 2) for _ in range(2))
    return drawn(num, GROUPS, HEADS // GROUPS, DIM), key, value, mask


def chunk_ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return attend_masked(query, key, value, mask, SCALING)


def chunk_other(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=mask, scale=SCALING, enable_gqa=True)[0]


def decode_ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SCALING)


def decode_other(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = (query @ key.transpose(-1, -2)).float() * SCALING + mask.float()
    return scores.softmax(-1).to(value.dtype) @ value


def in_single(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The reference for the inputs of either."""
    if key.dim() == 3:  # a chunk: each group a batch, as a decoding sequence has them
        return in_single(query.unflatten(0, (key.shape[0], -1)), key[:, None], value[:, None], mask).flatten(0, 1)
    return decode_other(query.float(), key.float(), value.float(), mask.float())


def median_ms(run: Callable[[], Any], repeats: int = 30) -> float:
    for _ in range(5):
        run()
    if not GPU:
        return 1e3 * statistics.median(timed(run, repeats))
    found = []
    for _ in range(repeats):  # by the device's clock: some runs are shorter than the host's way there and back
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        run()
        last.record()
        sync()
        found.append(first.elapsed_time(last))
    return statistics.median(found)


def measured(what: str, size: tuple[int, int], inputs: Inputs, forms: dict[str, Form]) -> Iterator[dict[str, Any]]:
    reference = in_single(*inputs)
    must_read = sum(each.numel() * each.element_size() for each in inputs)
    for name, form in forms.items():
        sync()
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if GPU else 0
        out = form(*inputs)
        extra = (torch.cuda.max_memory_allocated() - before) / 2**20 if GPU else None
        error = float((out.float() - reference).norm() / reference.norm())
        ms = median_ms(lambda form=form: form(*inputs))  # type: ignore[misc]
        yield {"what": what, "size": size, "form": name, "ms": ms, "error": error, "extra_mib": extra, "read_gb_s": must_read / ms / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/DATE-gpu-attention.json)")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for what, sizes, make, forms in (
        ("chunk", CHUNKS, chunk, {"mask and groups together": chunk_other, "ours": chunk_ours}),
        ("decode", DECODES, decode, {"two products": decode_other, "ours": decode_ours}),
    ):
        for size in sizes:
            pair = list(measured(what, size, make(*size), forms))
            rows += pair
            for row in pair:
                ratio = pair[0]["ms"] / row["ms"]
                cost = f"{row['ms']:8.3f} ms  {ratio:5.2f}x  {row['read_gb_s']:6.0f} GB/s  error {row['error']:.1e}  {row['extra_mib']} MiB"
                print(f"{what:6} {size!s:14} {row['form']:25} {cost}")
    write_result(args, "gpu-attention", {"shape": {"heads": HEADS, "groups": GROUPS, "dim": DIM}, "rows": rows})


if __name__ == "__main__":
    main()
