#!/usr/bin/env python3
"""A head of importance distilled from a model's counterfactuals, beside the one by hand: what each keeps of histories that neither was
made on.

    python benchmarks/memory_head.py --model smollm2 --only 0 --into RUNS      # the examples of one history; they may run side by side
    python benchmarks/memory_head.py --collect RUNS                            # the head, its file, and what it keeps

Training histories have seeds from 1,000 on, those that are looked at 100 to 102; both are made by the same generator.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, arguments, model_folder, origin, server, write_result

sys.path.insert(0, str(ROOT))
from everlearn.memory import importance, study
from everlearn.memory.distil import examples
from everlearn.memory.methods import method
from everlearn.memory.synthetic import synthetic
from everlearn.render.tokenizer import load

HELD_OUT = 100  # added to a seed: the weights by hand were set while looking at histories 0 to 2


def one(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    import tinker

    tokenizer = load(model_folder(args.model))
    with server(args) as live:
        sampler = tinker.ServiceClient(base_url=live.url).create_sampling_client(base_model=live.model).result()
        found = examples(sampler, tokenizer.encode, synthetic(300, 1000 + seed, args.facts), seed=seed)
    return {"seed": seed, "features": found[0].tolist(), "targets": found[1].tolist()}


def kept(head: importance.Head, encode: Any) -> list[dict[str, Any]]:
    rows = []
    for turns in (300, 2000):
        for name in ("extract", "forget"):
            for budget in (256, 512, 1024):
                runs = []
                for seed in range(3):
                    made = method(name, encode, budget, head=head)
                    runs.append(study.run(f"synthetic-{turns}", synthetic(turns, HELD_OUT + seed), made, budget, encode, seed))
                rows += study.summed(runs)
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", type=int, metavar="SEED")
    parser.add_argument("--into", type=Path, default=Path("memory-head-runs"), metavar="FOLDER")
    parser.add_argument("--collect", type=Path, metavar="FOLDER")
    parser.add_argument("--facts", type=int, default=20, help="questions, and so windows, of a history")
    args = parser.parse_args()
    if args.only is not None:
        started = time.perf_counter()
        run = one(args, args.only)
        targets = np.array(run["targets"])
        seconds = time.perf_counter() - started
        print(f"seed {args.only}: {len(targets)} chunks, {(targets > 0.5).mean():.1%} of them above 0.5, {seconds:.0f} s")
        args.into.mkdir(parents=True, exist_ok=True)
        sys.argv[1:] = ["--model", args.model, "--only", str(args.only)]
        (args.into / f"{args.only}.json").write_text(json.dumps(origin("memory-head") | {"run": run}, default=str))
    elif args.collect is not None:
        told = [json.loads(path.read_text()) for path in sorted(args.collect.glob("*.json"))]
        runs = [row.pop("run") for row in told]
        inputs, targets = np.concatenate([run["features"] for run in runs]), np.concatenate([run["targets"] for run in runs])
        head = importance.distilled(inputs, targets, origin=f"counterfactuals of {len(targets)} chunks")
        tokenizer = load(model_folder("smollm2"))
        results: dict[str, Any] = {"head": {"weights": dict(head.weights), "bias": head.bias}, "chunks": len(targets), "origins": told}
        for name, own in (("distilled", head), ("by_hand", importance.BY_HAND)):
            results[name] = kept(own, tokenizer.encode)
            for row in results[name]:
                mean, low, high = (100 * row["kept"][end] for end in ("mean", "low", "high"))
                print(f"{name:10} {row['suite']:16} {row['budget']:5} {row['method']:8} {mean:.1f} ({low:.0f}-{high:.0f})")
        sys.argv[1:] = ["--collect", args.collect.name]
        write_result(args, "memory-head", results)
    else:
        parser.error("say --only or --collect")


if __name__ == "__main__":
    main()
