#!/usr/bin/env python3
"""What recording an answer costs those who are answered: the time of `add`, and how late the event loop turns while records are written.

    python benchmarks/records.py

No model: an event loop that ticks every millisecond, without records and with them at a steady rate (the rounds alternate), on SQLite.
Each record holds a prompt of 500 tokens and an answer of 100 with log-probabilities, and a page of text. Then how many a second fit.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, write_result

sys.path.insert(0, str(ROOT))
from everlearn.api.recorder import Recorder
from everlearn.store import records
from everlearn.store.db import open_database
from everlearn.store.records import Record, RecordedChoice
from everlearn.store.spool import Spool

TEXT = "The parcel left our house on Monday and should be with you by Thursday; the number below follows it. " * 20


def record() -> Record:
    return Record(
        record_id=records.new_id(),
        tenant="bench",
        key_id="key-1",
        route="chat.completions",
        model="support@3",
        base_model="smollm2",
        version="v-1",
        prompt=records.int32(range(500)),
        choices=[RecordedChoice(records.int32(range(100)), records.float32([-0.123 * n for n in range(100)]), "stop")],
        messages=[{"role": "user", "content": TEXT}],
        answer=[{"role": "assistant", "content": TEXT[:400]}],
        params={"temperature": 0.7, "max_tokens": 100},
    )


async def ticks(seconds: float) -> list[float]:
    """By how many milliseconds each tick of one millisecond came late."""
    late, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        await asyncio.sleep(0.001)
        late.append(1000 * (time.perf_counter() - began - 0.001))
    return late


async def feed(recorder: Recorder, rate: float, seconds: float) -> list[float]:
    """Adds `rate` records a second; milliseconds of each `add`."""
    times, began = [], time.perf_counter()
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
        one = record()
        started = time.perf_counter()
        recorder.add(one)
        times.append(1000 * (time.perf_counter() - started))
    return times


def summary(name: str, values: list[float]) -> dict[str, Any]:
    ordered = sorted(values)
    row = {
        "p50_ms": statistics.median(ordered),
        "p99_ms": ordered[int(0.99 * (len(ordered) - 1))],
        "max_ms": ordered[-1],
        "n": len(ordered),
    }
    print(f"{name:44} p50 {row['p50_ms']:7.3f} ms   p99 {row['p99_ms']:7.3f} ms   max {row['max_ms']:7.3f} ms", flush=True)
    return row


async def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    db = open_database(f"sqlite:///{folder / 'records.db'}")
    recorder = Recorder(db, Spool(folder / "spool"))
    recorder.start()
    quiet, busy, adds = [], [], []
    for _ in range(args.rounds):
        quiet += await ticks(args.seconds)
        late, added = await asyncio.gather(ticks(args.seconds), feed(recorder, args.rate, args.seconds))
        busy += late
        adds += added
    results: dict[str, Any] = {"rate": args.rate, "quiet_loop": summary("loop, without records", quiet)}
    results["busy_loop"] = summary(f"loop, with {args.rate:g} records a second", busy)
    results["add"] = summary("add", adds)
    started = time.perf_counter()
    one = record()
    recorder.add(one)
    await recorder.settled(one.record_id, 60)
    results["durable_ms"] = 1000 * (time.perf_counter() - started)
    started = time.perf_counter()
    for _ in range(args.burst):
        recorder.add(record())
    await asyncio.to_thread(recorder.close)
    results["records_per_second"] = args.burst / (time.perf_counter() - started)
    results["bytes_per_record"] = db.read(records.size) / (args.burst + len(adds) + 1)
    print(f"one record durable after {results['durable_ms']:.1f} ms; {results['records_per_second']:.0f} records a second")
    print(f"{results['bytes_per_record']:.0f} bytes of content each")
    db.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=100, help="records a second")
    parser.add_argument("--seconds", type=float, default=3, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--burst", type=int, default=5000, help="records of the last part")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/DATE-records.json)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="everlearn-bench-") as folder:
        results = asyncio.run(measure(args, Path(folder)))
    write_result(args, "records", results)


if __name__ == "__main__":
    main()
