#!/usr/bin/env python3
"""A value function against group baselines, where one late reward pays for many choices: corridors of six doors.

python benchmarks/rl_value.py                                   # everything, one run after the other
python benchmarks/rl_value.py --only gae --luck --seed 0 --learning-rate 1e-3   # one run; others may go on beside it
python benchmarks/rl_value.py --collect                         # the result file and the plot from all runs

Each step plays the same walks in every arm of a seed: groups x size, all past six doors, which is the budget that is compared. All arms
train on it with the same loss, substeps and entropy term, at each of the learning rates; the plot shows every arm at the rate that was best
for it. (Rate and entropy term of the defaults were chosen on a seed of their own, 100, for gae and group_mean without luck.)
`--luck`: coins on the floor add to the reward what no choice brings.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import curves
import walker
from common import ROOT, arguments, origin, server

GROUPS, SIZE, DOORS, SIGNS = 6, 8, 6, 4
ARMS: dict[str, dict[str, Any]] = {
    "gae": {"estimator": "gae", "value_function": {"lam": 0.95, "standardise": True}},
    "group_mean": {"estimator": "group_mean"},
    "leave_one_out": {"estimator": "leave_one_out"},
}
PER_STEP = GROUPS * SIZE * DOORS  # choices, each of which is one sampled action
RIGHT = "env/right"
CURVES = (RIGHT, "reward/total", "entropy", "kl/k3", "value/mean", "value/explained", "advantage/std")  # a number for each step
SMOOTH = 5  # steps


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(threads=1)
    parser.add_argument("--only", choices=list(ARMS), help="one arm; --seed and --luck say which run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--luck", action="store_true")
    parser.add_argument("--seeds", default="0,1,2", help="of all runs, without --only")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--learning-rates", default="1e-3", help="of all runs, without --only")
    parser.add_argument("--entropy", type=float, default=0.05, help="entropy_coeff, of all arms: without it most runs close too early")
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "everlearn-rl-value", help="a file for each run")
    parser.add_argument("--collect", action="store_true", help="run nothing; make the result file of what is there")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    if args.collect:
        collect(args)
        return
    args.model = str(walker.ensure())
    if args.only:
        one_run(args, args.only, args.luck, args.seed)
    else:
        for seed, luck, rate, arm in itertools.product(
            map(int, args.seeds.split(",")), (False, True), map(float, args.learning_rates.split(",")), ARMS
        ):
            args.learning_rate = rate
            one_run(args, arm, luck, seed)
        collect(args)


def one_run(args: argparse.Namespace, arm: str, luck: bool, seed: int) -> None:
    import tinker

    from everlearn.rl.envs.corridor import CorridorTasks
    from everlearn.rl.prompts import ChatMl
    from everlearn.rl.settings import Settings
    from everlearn.rl.train import train
    from everlearn.rl.values import ValueFunction

    options = dict(ARMS[arm])
    if "value_function" in options:
        options["value_function"] = ValueFunction(**options["value_function"])
    with server(args) as live, tempfile.TemporaryDirectory() as folder:
        service = tinker.ServiceClient(base_url=live.url)
        tokenizer = walker.make_tokenizer()
        chat = ChatMl(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.decode)
        settings = Settings(
            live.model,
            steps=args.steps,
            rank=16,
            learning_rate=args.learning_rate,
            loss="ppo",
            substeps=2,
            max_tokens=1,
            seed=seed,
            loss_config={"entropy_coeff": args.entropy} if args.entropy else {},
            evaluate_every=max(1, args.steps // 4),
            save_every=args.steps,
            **options,
        )
        tasks = CorridorTasks(chat, seed, "train", DOORS, SIGNS, luck, args.steps, GROUPS, SIZE, intro="")
        held_out = CorridorTasks(chat, seed, "test", DOORS, SIGNS, luck, 1, 24, 1, intro="")
        started, cpu = time.perf_counter(), live.cpu_seconds()
        rows = train(service, settings, tasks, Path(folder), held_out)
        seconds, cpu = time.perf_counter() - started, live.cpu_seconds() - cpu
        service.close("success").result()
    held_out = [row["held_out/env/right"] for row in rows if "held_out/env/right" in row]
    curve = {name: [round(row[name], 5) for row in rows if name in row] for name in CURVES}
    name = f"{arm}{'-luck' if luck else ''}-{args.learning_rate:g}-{seed}"
    print(
        f"{name:30} held out {held_out[0]:.2f} -> {held_out[-1]:.2f}, while training {statistics.mean(curve[RIGHT]):.3f}, {seconds:.0f} s",
        flush=True,
    )
    run = {"arm": arm, "luck": luck, "seed": seed, "seconds": seconds, "server_cpu_seconds": cpu, "steps": args.steps}
    run |= {"learning_rate": args.learning_rate, "entropy_coeff": args.entropy, "options": ARMS[arm], "held_out": held_out, "curves": curve}
    (args.runs / f"{name}.json").write_text(json.dumps(origin("rl-value") | {"run": run}))


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each arm came to at each learning rate, with a figure for each seed."""
    table = []
    for luck, arm, rate in sorted({(run["luck"], run["arm"], run["learning_rate"]) for run in runs}):
        own = [run for run in runs if (run["arm"], run["luck"], run["learning_rate"]) == (arm, luck, rate)]
        row = {"arm": arm, "luck": luck, "learning_rate": rate, "seeds": [run["seed"] for run in own]}
        row["held_out_right_at_the_end"] = [run["held_out"][-1] for run in own]
        # How fast it was learned, in one number: the share of right handles over all of training.
        row["mean_right_while_training"] = [statistics.mean(run["curves"][RIGHT]) for run in own]
        table.append(row)
        ends, means = (statistics.mean(row[name]) for name in ("held_out_right_at_the_end", "mean_right_while_training"))
        print(f"{arm:14} luck {luck!s:5} rate {rate:<7g} held out at the end {ends:.3f}, while training {means:.3f}, {len(own)} seeds")
    return table


def collect(args: argparse.Namespace) -> None:
    files = [json.loads(path.read_text()) for path in sorted(args.runs.glob("*.json"))]
    if not files:
        raise SystemExit(f"{args.runs} holds no runs; make some first, or say --runs")
    runs = [file["run"] for file in files]
    table = summary(runs)
    panels: dict[str, dict[str, list[list[tuple[float, float]]]]] = {}
    for luck, arm in itertools.product((False, True), ARMS):
        rates = [row for row in table if row["arm"] == arm and row["luck"] == luck]
        if not rates:
            continue
        best = max(rates, key=lambda row: statistics.mean(row["mean_right_while_training"]))["learning_rate"]
        own = [run for run in runs if (run["arm"], run["luck"], run["learning_rate"]) == (arm, luck, best)]
        lines = [[((step + 1) * PER_STEP, right) for step, right in enumerate(run["curves"][RIGHT])] for run in own]
        title = "with coins on the floor" if luck else "without luck"
        panels.setdefault(title, {})[arm] = [curves.smoothed(line, SMOOTH) for line in lines]
    out = args.out or ROOT / "benchmarks" / "results" / f"{time.strftime('%F')}-rl-value.json"
    per_run = [{key: file[key] for key in ("command", "when", "load_average")} | file["run"] for file in files]
    first = {key: files[0][key] for key in ("commit", "hardware", "versions")}  # of the runs, wherever they are collected
    results = {"interactions_per_step": PER_STEP, "table": table, "runs": per_run}
    out.write_text(json.dumps(origin("rl-value") | first | {"results": results}, indent=1) + "\n")
    out.with_suffix(".svg").write_text(curves.svg(panels, "choices made", "right handles while training (mean of 5 steps)"))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
