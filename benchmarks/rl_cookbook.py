#!/usr/bin/env python3
"""tinker-cookbook's own `rl train`, unmodified, and everlearn's loop, on one server, one model and one task: do the curves agree?

python benchmarks/rl_cookbook.py                                # everything, one run after the other
python benchmarks/rl_cookbook.py --only cookbook --seed 0       # one run; others may go on beside it
python benchmarks/rl_cookbook.py --collect                      # the result file and the plot from all runs

The task is the cookbook's arithmetic (a + b up to 100, one example before the question), on the embedded model. The cookbook's recipe runs
as its users run it, in a process of its own. Our loop plays the same dataset through `CookbookTasks`, with the same settings. Both deal
the same sums in the same order; what differs is chance: the cookbook takes no seed for sampling, so its seeds are repetitions.

Needs `pip install --no-deps tinker-cookbook==0.6.1` and what its arithmetic recipe imports.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import curves
from common import ROOT, Server, arguments, model_folder, origin, server

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the name that the cookbook loads a tokenizer by; the server knows it as an alias
RENDERER = "qwen3_instruct"  # ChatML without a default system prompt, which is what SmolLM2 speaks
SIDES = ("cookbook", "everlearn")
GROUPS, SIZE, MAX_TOKENS, RANK = 6, 8, 5, 16
REWARDS = {"cookbook": "env/all/reward/total", "everlearn": "reward/total"}
RIGHT = {"cookbook": "env/all/correct", "everlearn": "env/correct"}
SMOOTH = 3  # steps


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(threads=2, model="smollm2")
    parser.add_argument("--only", choices=SIDES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", default="0,1,2", help="of all runs, without --only")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--loss", default="importance_sampling")
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "everlearn-rl-cookbook", help="a file for each run")
    parser.add_argument("--collect", action="store_true", help="run nothing; make the result file of what is there")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    if args.collect:
        collect(args)
    elif args.only:
        one_run(args, args.only, args.seed)
    else:
        for seed in map(int, args.seeds.split(",")):
            for side in SIDES:
                one_run(args, side, seed)
        collect(args)


def one_run(args: argparse.Namespace, side: str, seed: int) -> None:
    with server(args, name="smollm2", **{f'models.aliases."{MODEL}"': "smollm2"}) as live, tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = str(hub_cache(Path(folder) / "hub", model_folder(args.model)))
        started, cpu = time.perf_counter(), live.cpu_seconds()
        rows = (cookbook if side == "cookbook" else everlearn)(live, args, seed, Path(folder) / "run")
        seconds, cpu = time.perf_counter() - started, live.cpu_seconds() - cpu
    rows = [{"step": place, "reward": row[REWARDS[side]], "right": row[RIGHT[side]]} for place, row in enumerate(rows)]
    if len(rows) != args.steps:
        raise SystemExit(f"{side} made {len(rows)} steps, not {args.steps}")
    print(f"{side:10} seed {seed}  reward {rows[0]['reward']:.2f} -> {rows[-1]['reward']:.2f}, {seconds:.0f} s", flush=True)
    run = {"side": side, "seed": seed, "seconds": seconds, "server_cpu_seconds": cpu, "rows": rows, "loss": args.loss}
    run |= {"learning_rate": args.learning_rate}
    (args.runs / f"{side}-{seed}.json").write_text(json.dumps(origin("rl-cookbook") | {"run": run}))


def cookbook(live: Server, args: argparse.Namespace, seed: int, folder: Path) -> list[dict[str, Any]]:
    options = {
        "model_name": MODEL,
        "renderer_name": RENDERER,
        "env": "arithmetic",
        "seed": seed,
        "group_size": SIZE,
        "groups_per_batch": GROUPS,
        "max_tokens": MAX_TOKENS,
        "max_steps": args.steps,
        "learning_rate": args.learning_rate,
        "lora_rank": RANK,
        "loss_fn": args.loss,
        "eval_every": 0,
        "save_every": 0,
        "log_path": folder,
        "behavior_if_log_dir_exists": "delete",
    }
    command = [sys.executable, "-m", "tinker_cookbook.recipes.math_rl.train", *(f"{name}={value}" for name, value in options.items())]
    environment = {**os.environ, "TINKER_BASE_URL": live.url, "WANDB_MODE": "disabled", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-5000:])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if REWARDS["cookbook"] in row]


def everlearn(live: Server, args: argparse.Namespace, seed: int, folder: Path) -> list[dict[str, Any]]:
    import tinker
    from tinker_cookbook import renderers
    from tinker_cookbook.recipes.math_rl.arithmetic_env import ArithmeticDataset
    from tinker_cookbook.tokenizer_utils import get_tokenizer

    from everlearn.rl.adapters import CookbookTasks
    from everlearn.rl.settings import Settings
    from everlearn.rl.train import train

    settings = Settings(
        MODEL,
        steps=args.steps,
        rank=RANK,
        learning_rate=args.learning_rate,
        loss=args.loss,
        estimator="group_mean",
        max_tokens=MAX_TOKENS,
        seed=seed,
        save_every=args.steps,
    )
    renderer = renderers.get_renderer(RENDERER, tokenizer=get_tokenizer(MODEL))
    dataset = ArithmeticDataset(batch_size=GROUPS, renderer=renderer, group_size=SIZE, n_batches=100)
    service = tinker.ServiceClient(base_url=live.url)
    rows = train(service, settings, CookbookTasks(dataset), folder)
    service.close("success").result()
    return [row for row in rows if REWARDS["everlearn"] in row]


def hub_cache(cache: Path, folder: Path) -> Path:
    """A Hugging Face home in which MODEL's tokenizer was downloaded once."""
    model, revision = cache / "hub" / f"models--{MODEL.replace('/', '--')}", "0" * 40
    snapshot = model / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(revision)
    for file in folder.absolute().glob("*.json"):
        (snapshot / file.name).symlink_to(file)
    return cache


def collect(args: argparse.Namespace) -> None:
    files = [json.loads(path.read_text()) for path in sorted(args.runs.glob("*.json"))]
    runs = {side: [file["run"] for file in files if file["run"]["side"] == side] for side in SIDES}
    if not all(runs.values()):
        raise SystemExit(f"{args.runs} lacks the runs of a side; make some first, or say --runs")
    table = {name: compared(runs, name) for name in ("reward", "right")}
    for name, row in table.items():
        for when in ("whole", "last_third"):
            one = row[when]
            sides = ", ".join(f"{side} {one[side]['mean']:.3f} +- {one[side]['deviation']:.3f}" for side in SIDES)
            print(f"{name:7} {when:11} {sides}; difference {one['difference']:+.3f}, standard error {one['standard_error']:.3f}")
    panels = {
        title: {side: [curves.smoothed([(row["step"], row[name]) for row in run["rows"]], SMOOTH) for run in runs[side]] for side in SIDES}
        for title, name in (("reward", "reward"), ("right answers", "right"))
    }
    out = args.out or ROOT / "benchmarks" / "results" / f"{time.strftime('%F')}-rl-cookbook.json"
    per_run = [{key: file[key] for key in ("command", "when", "load_average")} | file["run"] for file in files]
    first = {key: files[0][key] for key in ("commit", "hardware", "versions")}  # of the runs, wherever they are collected
    out.write_text(json.dumps(origin("rl-cookbook") | first | {"results": {"table": table, "runs": per_run}}, indent=1) + "\n")
    out.with_suffix(".svg").write_text(curves.svg(panels, "steps", "mean over a batch (mean of 3 steps)"))
    print(f"written to {out}")


def compared(runs: dict[str, list[dict[str, Any]]], name: str) -> dict[str, dict[str, Any]]:
    """Each run's mean over all of its steps, and over the last third; the sides' means, and the difference beside its standard error."""
    found: dict[str, dict[str, Any]] = {}
    for when in ("whole", "last_third"):
        row: dict[str, Any] = {}
        for side in SIDES:
            curve = [[step[name] for step in run["rows"]] for run in runs[side]]
            means = [statistics.mean(one if when == "whole" else one[-max(1, len(one) // 3) :]) for one in curve]
            deviation = statistics.stdev(means) if len(means) > 1 else 0.0
            row[side] = {"seeds": means, "mean": statistics.mean(means), "deviation": deviation}
        row["difference"] = row["everlearn"]["mean"] - row["cookbook"]["mean"]
        row["standard_error"] = sum(row[side]["deviation"] ** 2 / len(row[side]["seeds"]) for side in SIDES) ** 0.5
        found[when] = row
    return found


if __name__ == "__main__":
    main()
