#!/usr/bin/env python3
"""Learning by reward: recipes/rl_loop.py on the embedded model, several seeds; held-out sums that are right, before and after.

python benchmarks/rl_sums.py --model smollm2 [--seeds 0,1,2] [--steps 40] [--loss ppo] [--retained]

Two figures before training: what the base model answers, and what it would get if its answer were cut off after the number. The base model
goes on talking; learning to stop is a part of the gain, and the second figure says how large a part at most.

With --retained the suite of `everlearn eval retained` is put to the base model and to each run's last weights, and what changed is printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, Server, arguments, server, write_result

RECIPE = ROOT / "recipes" / "rl_loop.py"
CUT = 4  # tokens: a space, two digits and the end


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--loss", default="importance_sampling")
    parser.add_argument("--retained", action="store_true", help="what else the model can still do, at the end of each run")
    parser.add_argument("--data", type=Path, action="append", default=[], metavar="FOLDER", help="with --retained: ask also what is in it")
    parser.add_argument("--limit", type=int, metavar="N", help="with --retained: so many units of each file")
    args = parser.parse_args()
    runs = []
    for seed in map(int, args.seeds.split(",")):
        with server(args) as live:
            runs.append({"seed": seed, "base_cut_after_the_number": base_accuracy(live, seed), **run(live, args, seed)})
        last = runs[-1]
        print(f"seed {seed}: {last['start']:.3f} -> {last['end']:.3f} in {last['seconds'] / 60:.1f} min", flush=True)
    write_result(args, f"rl-sums-{args.loss}{'-retained' if args.retained else ''}", {"runs": runs})


def base_accuracy(live: Server, seed: int) -> float:
    """Of the same held-out sums, with answers cut off after the number."""
    import tinker

    spec = importlib.util.spec_from_file_location("rl_loop", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    client = tinker.ServiceClient(base_url=live.url).create_lora_training_client(live.model, rank=1).result()
    sampler = client.save_weights_and_get_sampling_client().result()
    held_out = recipe.pairs(20, seed, held_out=True)
    chosen = random.Random(seed).sample(held_out, min(64, len(held_out)))
    return float(recipe.evaluate(sampler, client.get_tokenizer(), chosen, argparse.Namespace(max_tokens=CUT)))


def run(live: Server, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(RECIPE), "--model", live.model, "--out", folder, "--seed", str(seed)]
        command += ["--steps", str(args.steps), "--loss", args.loss]
        command += ["--save-every", str(args.steps)] if args.retained else []
        started = time.perf_counter()
        subprocess.run(command, check=True, env={**os.environ, "TINKER_BASE_URL": live.url}, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        kept = retained(live, Path(folder), args) if args.retained else {}
    held_out = [row["held_out"] for row in rows if "held_out" in row]
    return {"start": held_out[0], "end": held_out[-1], "seconds": round(seconds, 1), **kept, "steps": rows}


def retained(live: Server, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The suite's results of the base model and of the weights that the run saved last, compared."""
    import msgspec
    import tinker

    from everlearn.evals.asked import read_suite
    from everlearn.evals.asking import measure
    from everlearn.evals.retained import compare, table

    state = json.loads((folder / "state.json").read_text())
    client = tinker.ServiceClient(base_url=live.url).create_training_client_from_state(state["path"]).result()
    path = client.save_weights_for_sampler("retained").result().path
    suite = read_suite(args.data, limit=args.limit)
    before, after = (measure(live.url, model, suite) for model in (live.model, path))
    changes = compare(before, after)
    print(table(changes), flush=True)
    told = [{**msgspec.to_builtins(change), "half_width": change.half_width, "verdict": change.verdict} for change in changes]
    return {"retained": {"step": state["step"], "suite": suite.digest, "changes": told}}


if __name__ == "__main__":
    main()
