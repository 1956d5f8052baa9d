"""LoRA on experts beside LoRA on attention, by SFT and by GRPO, on a model that the recipes train from nothing.

    python benchmarks/moe_expert_lora.py

The claim: adapters on experts learn a shifted task, by answers and by rewards alone, and sampler and trainer agree at every step to
float32's rounding (`moe_rounding.py` says how much that is). Adapters on attention get the same steps, examples and seeds, and once
more a rank at which they have about as many parameters. Writes the curves of all runs, and a plot beside them. Steps, examples and
rewards are those of `recipes/moe_expert_lora.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import common


class Arm(NamedTuple):
    """One thing to compare. `layout` is that of the experts' matrices, where there are any."""

    name: str
    on: str
    rank: int
    layout: str
    seeds: int


ARMS = (
    Arm("experts", "experts", 8, "shared_outer", 2),
    Arm("attention", "attention", 8, "shared_outer", 2),
    Arm("attention, rank 128", "attention", 128, "shared_outer", 1),
    Arm("experts, per_expert", "experts", 8, "per_expert", 1),
    Arm("experts, rank_split", "experts", 8, "rank_split", 1),
)
COLOURS = dict(zip((arm.name for arm in ARMS), ("#c2410c", "#1d4ed8", "#60a5fa", "#f59e0b", "#65a30d"), strict=True))
TASKS = ("shifted", "common", "unseen")


def main() -> None:
    from recipes import moe_expert_lora as lessons
    from recipes.moe_from_scratch import CACHE, Recipe, ensure

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-steps", type=int, default=Recipe.steps, help="steps of the base model's own training")
    parser.add_argument("--lesson-steps", type=int, help="steps of every run (default: the recipe's)")
    parser.add_argument("--held-out", type=int, default=80, help="held-out problems of each task in a measurement")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/DATE-moe-expert-lora.json)")
    args = parser.parse_args()
    folder = ensure(Recipe(steps=args.base_steps), CACHE, lambda line: print(line, flush=True))
    changed = {"steps": args.lesson_steps, "every": max(1, args.lesson_steps // 5)} if args.lesson_steps else {}
    methods = {name: (method, replace(lesson, **changed)) for name, (method, lesson) in lessons.METHODS.items()}
    args.model, args.base_url, args.base_model = str(folder), None, None
    args.out = args.out or common.ROOT / "benchmarks" / "results" / f"{time.strftime('%F')}-moe-expert-lora.json"
    started, runs = time.perf_counter(), []
    for layout in dict.fromkeys(arm.layout for arm in ARMS):
        with common.server(args, **{"engine.expert_lora": layout}) as server:
            for arm in (arm for arm in ARMS if arm.layout == layout):
                for name, (method, lesson) in methods.items():
                    for seed in range(arm.seeds):
                        run = one_run(server, arm, name, method, replace(lesson, rank=arm.rank, seed=seed), args.held_out)
                        runs.append(run | {"parameters": parameters(folder, run)})
        # Written after each layout: what is measured stays, whatever happens to the next.
        results = {
            "model": describe(folder),
            "lessons": {name: asdict(lesson) for name, (_, lesson) in methods.items()},
            "held_out": args.held_out,
            "seconds": time.perf_counter() - started,
            "greatest_gap": max(run["greatest_gap"] for run in runs),
            "compared_tokens": sum(run["compared_tokens"] for run in runs),
            "summary": summary(runs),
            "runs": runs,
        }
        common.write_result(args, "moe-expert-lora", results)
        args.out.with_suffix(".svg").write_text(plot(runs))


def one_run(server: common.Server, arm: Arm, name: str, method: Any, lesson: Any, held_out: int) -> dict[str, Any]:
    """One adapter, trained from the start to the end. `seconds` has the measurements in it."""
    import tinker

    from recipes import moe_expert_lora as lessons

    service = tinker.ServiceClient(base_url=server.url)
    training = lessons.open_training(service, server.model, arm.on, lesson)
    started, cpu = time.perf_counter(), server.cpu_seconds()
    rows = method(training, lesson, lessons.measure_tasks(held_out))
    seconds, cpu = time.perf_counter() - started, server.cpu_seconds() - cpu
    agreed = lessons.agreement(training)
    service.close("success").result()
    gaps = [row["gap"] for row in rows if "gap" in row] + [agreed["gap"]]
    tokens = sum(int(row.get("tokens", 0)) for row in rows) + int(agreed["tokens"])
    first, last = (next(row for row in of if "shifted" in row) for of in (rows, rows[::-1]))
    moved = "  ".join(f"{task} {first[task]:.0%} -> {last[task]:.0%}" for task in TASKS)
    print(f"{name:5} {arm.name:20} seed {lesson.seed}  {moved}  gap {max(gaps):.1e}  {seconds:.0f} s", flush=True)
    return {
        "method": name,
        "arm": arm.name,
        "on": arm.on,
        "layout": arm.layout if arm.on != "attention" else None,
        "rank": arm.rank,
        "seed": lesson.seed,
        "seconds": seconds,
        "server_cpu_seconds": cpu,
        "greatest_gap": max(gaps),
        "compared_tokens": tokens,
        "rows": rows,
    }


def parameters(folder: Path, run: dict[str, Any]) -> int:
    """What the adapter trains, counted by the planner from the configuration."""
    from everlearn.models.planner import make_plan

    return make_plan(folder, rank=run["rank"]).lora["attention" if run["on"] == "attention" else f"mlp and experts, {run['layout']}"]


def describe(folder: Path) -> dict[str, Any]:
    from everlearn.models.planner import make_plan

    plan = make_plan(folder)
    return {**json.loads((folder / "recipe.json").read_text()), "parameters": plan.parameters, "active": plan.active, "parts": plan.parts}


def summary(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """First and last measurement of every arm and method, mean over its seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["method"], run["arm"]), []).append(run)
    table = []
    for (method, arm), members in groups.items():
        measured = [[row for row in run["rows"] if "shifted" in row] for run in members]
        table.append(
            {"method": method, "arm": arm, "seeds": len(members), "parameters": members[0]["parameters"]}
            | {f"{task}_{when}": statistics.mean(rows[place][task] for rows in measured)
               for task in TASKS for when, place in (("first", 0), ("last", -1))}
            | {"seconds": statistics.mean(run["seconds"] for run in members)}
        )  # fmt: skip
    return table


def plot(runs: Iterable[dict[str, Any]], width: int = 460, height: int = 260) -> str:
    """A panel for each method: held-out accuracy by step, the shifted task as a line, the common one dashed; a line for each seed."""
    runs = list(runs)
    methods, arms = (list(dict.fromkeys(run[key] for run in runs)) for key in ("method", "arm"))
    left, top, below = 44, 28, 30
    inner_x, inner_y = width - left - 12, height - top - below
    drawn = []
    for panel, method in enumerate(methods):
        offset = panel * width + left
        of_panel = [run for run in runs if run["method"] == method]
        last = max(row["step"] for run in of_panel for row in run["rows"])
        drawn.append(f'<text x="{offset}" y="18" font-weight="bold">{method.upper()}: held-out accuracy by step</text>')
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            y = top + inner_y * (1 - share)
            drawn.append(f'<line x1="{offset}" x2="{offset + inner_x}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>')
            drawn.append(f'<text x="{offset - 6}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>')
        drawn.append(f'<text x="{offset + inner_x}" y="{height - 12}" text-anchor="end">step {last}</text>')
        for run in of_panel:
            for task, dashes, opacity in (("shifted", "", 0.9), ("common", ' stroke-dasharray="4 3"', 0.5)):
                points = " ".join(
                    f"{offset + inner_x * row['step'] / last:.1f},{top + inner_y * (1 - row[task]):.1f}"
                    for row in run["rows"]
                    if task in row
                )
                style = f'stroke="{COLOURS[run["arm"]]}" opacity="{opacity}"{dashes}'
                drawn.append(f'<polyline points="{points}" fill="none" stroke-width="1.6" {style}/>')
    for place, arm in enumerate(arms):
        x = left + place * 175
        drawn.append(f'<rect x="{x}" y="{height + 2}" width="12" height="12" fill="{COLOURS[arm]}"/>')
        drawn.append(f'<text x="{x + 18}" y="{height + 12}">{arm}</text>')
    drawn.append(f'<text x="{left}" y="{height + 34}">line: the shifted task; dashed: the common task, which is not trained on</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * len(methods)} {height + 44}" font-family="system-ui, sans-serif" '
        f'font-size="12" fill="#666">' + "".join(drawn) + "</svg>\n"
    )


if __name__ == "__main__":
    main()
