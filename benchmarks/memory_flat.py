#!/usr/bin/env python3
"""Time of a memory's turn from the 1st to the 10,000th, and the process's memory: both must stay flat, however long the history.

    python benchmarks/memory_flat.py [--turns 10000] [--budget 512]

The library form (everlearn/memory/memory.py) with its archive in a file, the head by hand and extraction; tokens of the embedded model.
Each turn is a durable transaction, whose fsync is most of its time on many disks, so the time without the archive is measured as well. The
text of the turns repeats every 100, so that blocks of turns differ in nothing but the history behind them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import PAGE, ROOT, model_folder, write_result

sys.path.insert(0, str(ROOT))
from everlearn.memory.memory import Memory
from everlearn.memory.methods import method
from everlearn.memory.synthetic import synthetic
from everlearn.memory.window import Encode
from everlearn.render.tokenizer import load

BLOCK = 100


def resident() -> float:
    """MiB of this process."""
    return int(Path(f"/proc/{os.getpid()}/statm").read_text().split()[1]) * PAGE / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10_000)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/DATE-memory-flat.json)")
    args = parser.parse_args()
    tokenizer = load(model_folder("smollm2"))
    text = synthetic(BLOCK, 0, 20).turns
    blocks = range(args.turns // BLOCK)

    def encode(said: str) -> list[int]:
        return tokenizer.encode(tokenizer.guard(said))

    with tempfile.TemporaryDirectory() as folder:
        results = {
            "with_archive": measured(args, blocks, text, archived(Path(folder), encode, args.budget)),
            "window_alone": measured(args, blocks, text, method("extract", encode, args.budget).read),
        }
        results["archive_mib"] = (Path(folder) / "flat.memory").stat().st_size / 2**20
    write_result(args, "memory-flat", results)


def archived(folder: Path, encode: Encode, budget: int) -> Any:
    return Memory.open(folder / "flat.memory", encode, budget).add


def measured(args: argparse.Namespace, blocks: range, text: list[tuple[str, str]], add: Any) -> dict[str, Any]:
    """Median milliseconds of a turn by block of turns. The reference is the first block after the window filled."""
    medians, memory = [], []
    for _ in blocks:
        times = []
        for role, said in text:
            started = time.perf_counter()
            add(role, said)
            times.append(1000 * (time.perf_counter() - started))
        medians.append(statistics.median(times))
        memory.append(resident())
    early, late = statistics.median(medians[1:11]), statistics.median(medians[-10:])
    print(
        f"turns 100 to 1,100: {early:.3f} ms; last 1,000: {late:.3f} ms, {late / early:.3f} times; {memory[1]:.0f} -> {memory[-1]:.0f} MiB"
    )
    return {"ms_median_per_100_turns": medians, "rss_mib_per_100_turns": memory, "ratio": late / early, "early_ms": early, "late_ms": late}


if __name__ == "__main__":
    main()
