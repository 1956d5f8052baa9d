#!/usr/bin/env python3
"""What training does for a memory: rules, baselines, a policy before and after reinforcement learning, on histories that none was made on.

    python benchmarks/listener.py RUNS/listener                        # the small model, once (a GPU makes it in minutes)
    python benchmarks/memory_train.py --list                           # one line for each run; they may run side by side
    python benchmarks/memory_train.py --only small/0/trained --into RUNS
    python benchmarks/memory_train.py --collect RUNS                   # one result file and its plot

A run is MODEL/SEED/PART. MODEL: `small` (listener.py) on histories of 2,000 turns, or `smollm2`, the embedded one, on 300 (with --reader:
after reader.py taught it to answer). Every part is examined on the same histories at the same places: budgets at the full length, and
lengths at 512 tokens; with --data on LongMemEval's histories and MemoryBank too. Who answers is the same in all: the model that policies
begin with. Training histories have seeds of their own (`TRAINED_ON`), as have those that the small model and the reader come from.

| part | what |
|---|---|
| `rules` | full, last, random, bm25, and the window with weights by hand: `extract`, `forget` |
| `writers` | `summary` and `overwrite`, written by the model as it is |
| `untrained` | the policy before training: it decides and writes (`untrained`), or sentences stay, by its word (`untrained+extract`) or by a head that was set by hand (`untrained+hand`) |
| `head` | a head distilled from the model's counterfactuals on training histories, with extraction (`head`) |
| `trained` | the policy after training, in the same three ways |
"""  # noqa: E501 - a table's row is a line

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import curves
import numpy as np
from common import ROOT, model_folder, origin, server, short, side_by_side, write_result
from memory_study import BUDGETS as SUITE_BUDGETS
from memory_study import HELD_OUT, SEEDS, cases, portion

sys.path.insert(0, str(ROOT))
import msgspec
import tinker

from everlearn.memory import importance, study
from everlearn.memory.asking import Asking
from everlearn.memory.decide import ByPolicy, Certain, Surest
from everlearn.memory.distil import examples
from everlearn.memory.environment import Judge, MemoryTasks
from everlearn.memory.generate import Generate
from everlearn.memory.methods import RULES, Method, method
from everlearn.memory.refill import Extract, Refill
from everlearn.memory.suites import Case
from everlearn.memory.synthetic import synthetic
from everlearn.memory.train import recipe, train
from everlearn.render.tokenizer import load
from everlearn.rl.prompts import ChatMl

PARTS = ("trained", "head", "untrained", "rules", "writers")
TRAINED_ON = 1000  # the first history that is trained on; HELD_OUT is the first that is looked at
REAL = ("longmemeval", "memorybank")
BUDGET, BUDGETS = 512, (256, 1024)
KV_TOKENS = 131_072  # so that several runs fit one GPU
ARMS = ("trained+extract", "untrained+extract", "head", "extract", "bm25", "last")  # that are drawn; the table has all


NOTED = ("held_out/env/kept", "env/kept", "env/level/needed", "env/level/other", "reward/total", "warm/nll", "entropy", "seconds/step")


class Size(NamedTuple):
    """`turns` of the histories, the shorter `lengths`, and how the policy is trained."""

    turns: int
    lengths: tuple[int, ...]
    context: int
    steps: int
    warm: int
    rate: float
    groups: int  # windows in a step
    members: int = 2  # times that each is played
    budget: int = 128
    heads: int = 3  # histories that a head is distilled from
    facts: int = 35  # of a history that is trained on, in so many turns: most chunks of a window are chatter, as they are in use
    told_in: int = 400


SIZES = {
    "small": Size(2000, (300, 1000), 2048, steps=24, warm=16, rate=2e-4, groups=24),
    "smollm2": Size(300, (100,), 8192, steps=20, warm=14, rate=1e-4, groups=24),
}


class Asked:
    """A server on the model, and what takes part: its tokenizer, its own weights, and whoever asks it."""

    def __init__(self, service: tinker.ServiceClient, name: str, folder: Path):
        tokenizer = load(folder)
        self.service, self.name = service, name
        self.chat = ChatMl(tokenizer.encode, lambda ids: tokenizer.decode(ids, skip_special=True))
        self.encode = lambda text: tokenizer.encode(tokenizer.guard(text))
        self.base = service.create_sampling_client(base_model=name).result()
        self.asking = Asking(self.base, self.chat)


class Place(NamedTuple):
    """What is examined at once: the histories of a suite, at a budget. `main`: where all hands of a policy are compared."""

    suite: str
    budget: int
    cases: list[Case]
    main: bool = False


def places(size: Size, args: argparse.Namespace) -> Iterator[Place]:
    """The most important first."""

    def own(turns: int, budget: int, main: bool = False) -> Place:
        numbers = [HELD_OUT + args.seed + len(SEEDS) * number for number in range(args.histories)]
        return Place(f"{args.model}-{turns}", budget, [synthetic(turns, number, 8 if args.smoke else 20) for number in numbers], main)

    yield own(100, 128, True) if args.smoke else own(size.turns, BUDGET, True)
    if not (args.main or args.smoke):
        yield from (own(size.turns, budget) for budget in BUDGETS)
        yield from (own(turns, BUDGET) for turns in size.lengths)
    for suite in REAL if args.data else ():
        found = cases(suite, "all", args.data, args.smoke)
        yield from (Place(f"{args.model}-{suite}", budget, found) for budget in SUITE_BUDGETS[suite])


def examined(args: argparse.Namespace, asked: Asked, made: dict[str, Any]) -> Iterator[study.Run]:
    """All methods at all places, as they are done. `made`: by label, how a method of a budget is made. Several histories are read at once,
    so that the server answers their questions in batches; what a turn takes is therefore not measured here."""
    size = SIZES[args.model]

    def run(place: Place, case: Case, label: str) -> study.Run:
        answers = asked.asking.answers if any(question.answers for question in case.questions) else None
        memory = made[label](place.budget)
        found = study.run(place.suite, case, memory, place.budget, asked.encode, args.seed, answers, size.context - 160)
        return msgspec.structs.replace(found, method=label)

    started = time.perf_counter()
    fitting = [(place, label) for place in places(size, args) for label in made if fits(size, place, label)]
    jobs = [functools.partial(run, place, case, label) for place, label in fitting for case in place.cases]
    for found in side_by_side(args.at_once, jobs):
        right = f"{np.mean(found.contains):.2f}" if found.contains else "-"
        print(f"{found.method} {found.suite} {found.turns} turns {found.budget}: kept {np.mean(found.kept):.2f}, right {right}, "
              f"after {time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip
        yield found


def fits(size: Size, place: Place, label: str) -> bool:
    """False where `overwrite` has no room to read anything, since its notes and their successors fill the model's context; and for the
    policy's other hands (it writes, or a head chooses its sentences) where they aren't compared."""
    if label.startswith(("trained", "untrained")) and not label.endswith("+extract") and not place.main:
        return False
    return label != "overwrite" or portion(size.context, place.budget) >= 128


def rules(args: argparse.Namespace, asked: Asked) -> dict[str, Any]:
    return {name: lambda budget, name=name: method(name, asked.encode, budget, seed=args.seed) for name in RULES}


def writers(args: argparse.Namespace, asked: Asked) -> dict[str, Any]:
    size, write = SIZES[args.model], asked.asking.write
    return {
        "summary": lambda budget: method("summary", asked.encode, budget, write=write),
        "overwrite": lambda budget: method("overwrite", asked.encode, budget, write=write, portion=portion(size.context, budget)),
    }


def policy(asked: Asked, sampler: tinker.SamplingClient, refill: Callable[[ByPolicy], Refill]) -> Any:
    """That decides by how sure it is. `refill` says who shortens what it doesn't keep whole."""

    def make(budget: int) -> Method:
        decided = Certain(sampler, asked.chat, once=True)
        return method("policy", asked.encode, budget, decided=decided, refill=refill(decided))

    return make


def policies(asked: Asked, sampler: tinker.SamplingClient, name: str) -> dict[str, Any]:
    return {
        name: policy(asked, sampler, lambda by: Generate(sampler, asked.chat)),
        f"{name}+extract": policy(asked, sampler, lambda by: Surest(asked.encode, by)),
        f"{name}+hand": policy(asked, sampler, lambda by: Extract(asked.encode, importance.BY_HAND.score)),
    }


def distilled(args: argparse.Namespace, asked: Asked, told: dict[str, Any]) -> importance.Head:
    size, found = SIZES[args.model], []
    for number in range(1 if args.smoke else size.heads):
        history = synthetic(300, TRAINED_ON + size.heads * args.seed + number, 4 if args.smoke else 20)
        found.append(examples(asked.base, asked.encode, history, others=7 if args.smoke else 11, seed=args.seed))
    inputs, targets = (np.concatenate(parts) for parts in zip(*found, strict=True))
    head = importance.distilled(inputs, targets, origin=f"counterfactuals of {len(targets)} chunks")
    told["head"] = {"weights": dict(head.weights), "bias": head.bias, "chunks": len(targets), "needed": float((targets > 0.5).mean())}
    return head


def steps_of(args: argparse.Namespace) -> int:
    return 2 if args.smoke else args.steps or SIZES[args.model].steps


def taught(args: argparse.Namespace, asked: Asked, told: dict[str, Any]) -> tinker.SamplingClient:
    """The policy after training, by its sampler. The curves of training go to `told`."""
    size, judge = SIZES[args.model], Judge(asked.base, asked.chat)
    steps = steps_of(args)
    warm = min(size.warm, steps - 1) if args.warm is None else args.warm
    first = TRAINED_ON * (1 + args.seed) * 10

    def tasks(start: int, batches: int, members: int) -> MemoryTasks:
        return MemoryTasks(
            lambda number: synthetic(size.told_in, start + number, size.facts), asked.chat, judge, budgets=(size.budget,),
            batches=batches, groups_per_batch=2 if args.smoke else size.groups, group_size=min(members, 3) if args.smoke else members,
            weighed=members > 1, seed=args.seed,
        )  # fmt: skip

    training = recipe(
        asked.name,
        steps,
        warm,
        args.rate or size.rate,
        rank=16,
        seed=args.seed,
        evaluate_every=max(1, steps // 2),
        save_every=steps,
    )
    started = time.perf_counter()

    def noted(row: dict[str, float]) -> None:
        print(f"step {row['step']:.0f} " + " ".join(f"{name} {row[name]:.3f}" for name in NOTED if name in row), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        mine, others = tasks(first, steps, size.members), tasks(first + 5000, 2, 1)
        done = train(asked.service, training, mine, Path(folder), others, on_step=noted)
    told["training"] = {
        "seconds": time.perf_counter() - started,
        "rows": [{name: round(value, 5) for name, value in row.items()} for row in done.rows],
    }
    return asked.service.create_sampling_client(model_path=done.path).result()


def one(args: argparse.Namespace, part: str) -> None:
    folder = args.reader or model_folder("smollm2") if args.model == "smollm2" else args.listener or args.into / "listener"
    if not (folder / "config.json").exists():
        maker, option = ("reader.py", "--reader") if args.model == "smollm2" else ("listener.py", "--listener")
        raise SystemExit(f"{folder} holds no model; make it with benchmarks/{maker}, or name another with {option}")
    started, load_before, told = time.perf_counter(), os.getloadavg(), {}
    args.into.mkdir(parents=True, exist_ok=True)
    label = args.label or part
    path = args.into / f"{args.model}_{args.seed}_{label}.json"
    runs: list[study.Run] = []
    settings = {"engine.device": args.device or ("cpu" if args.model == "small" else "auto"), "engine.kv_tokens": KV_TOKENS}
    with server(
        argparse.Namespace(model=str(folder), base_url=args.base_url, base_model="bench", threads=args.threads), **settings
    ) as live:
        asked = Asked(tinker.ServiceClient(base_url=live.url), live.model, folder)
        if part == "trained":
            made = policies(asked, taught(args, asked, told), label)
        elif part == "head":
            head = distilled(args, asked, told)
            made = {"head": lambda budget: method("extract", asked.encode, budget, head=head)}
        elif part == "untrained":
            made = policies(asked, asked.base, part)
        else:
            made = (rules if part == "rules" else writers)(args, asked)
        sys.argv[1:] = said(args, part)
        for run in examined(args, asked, made):
            runs.append(run)  # written after each: a run that is cut short has not run in vain
            facts = origin("memory-train") | {"load_before": load_before, "seconds": time.perf_counter() - started}
            path.write_bytes(msgspec.json.encode(facts | {"told": told, "runs": runs}, enc_hook=str))


def said(args: argparse.Namespace, part: str) -> list[str]:
    """The command's options without this machine's places."""
    options = ["--only", f"{args.model}/{args.seed}/{part}", "--histories", str(args.histories)]
    options += [told for name in ("reader", "data") if (path := getattr(args, name)) for told in (f"--{name}", short(str(path)))]
    for name in ("steps", "warm", "rate", "label"):
        options += [f"--{name}", str(getattr(args, name))] if getattr(args, name) is not None else []
    options += ["--base-url", "URL"] if args.base_url else []
    return options + [f"--{name}" for name in ("main", "smoke") if getattr(args, name)]


def collect(args: argparse.Namespace) -> None:
    files = [json.loads(path.read_text()) for path in sorted(args.collect.glob("*_*_*.json"))]
    if not files:
        raise SystemExit(f"{args.collect} holds no runs; make them with --only and --into")
    runs = [msgspec.convert(row, study.Run) for file in files for row in file["runs"]]
    rows = sorted(study.summed(runs), key=lambda row: (row["suite"], row["budget"], row["method"]))
    for row in rows:
        told = " ".join(f"{name} {100 * row[name]['mean']:.1f} ({100 * row[name]['low']:.0f}-{100 * row[name]['high']:.0f})"
                        for name in ("kept", "contains", "f1") if name in row)  # fmt: skip
        print(f"{row['suite']:13} {row['budget']:5} {row['method']:16} {told}")
    out = args.out or ROOT / "benchmarks" / "results" / f"{time.strftime('%F')}-memory-train.json"
    sys.argv[1:] = ["--collect", args.collect.name]
    origins = [{key: file[key] for key in ("command", "when", "commit", "hardware", "load_before", "seconds", "told")} for file in files]
    write_result(argparse.Namespace(out=out), "memory-train", {"rows": rows, "runs": msgspec.to_builtins(runs), "origins": origins})
    out.with_suffix(".svg").write_text(plot(runs), encoding="utf-8")


def plot(runs: list[study.Run]) -> str:
    """Evidence kept and right answers, over the budget at the full length and over the length at the one budget: a curve for each seed."""
    panels: dict[str, dict[str, list[list[tuple[float, float]]]]] = {}
    for model, size in SIZES.items():
        own = [run for run in runs if run.suite.startswith(f"{model}-") and run.method in ARMS]
        for what, name in (("kept", "evidence kept"), ("contains", "answers right")):
            over = {
                f"{model}: {name}, {size.turns} turns, by budget": [(run.budget, run) for run in own if run.turns == size.turns],
                f"{model}: {name}, {BUDGET} tokens, by turns": [(run.turns, run) for run in own if run.budget == BUDGET],
            }
            for title, pairs in over.items():
                panel = {arm: seeds_of([(x, run) for x, run in pairs if run.method == arm], what) for arm in ARMS}
                if any(panel.values()):
                    panels[title] = {arm: found for arm, found in panel.items() if found}
    return curves.svg(panels, "tokens or turns", "share")


def seeds_of(pairs: list[tuple[int, study.Run]], what: str) -> list[list[tuple[float, float]]]:
    """A curve for each seed that has all places: the mean over its histories and their questions."""
    found: dict[int, dict[int, list[float]]] = {}
    for x, run in pairs:
        found.setdefault(run.seed, {}).setdefault(x, []).extend(getattr(run, what))
    drawn = [[(float(x), float(np.mean(values))) for x, values in sorted(own.items()) if values] for own in found.values()]
    longest = max(map(len, drawn), default=0)
    return [curve for curve in drawn if len(curve) == longest > 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", metavar="MODEL/SEED/PART")
    parser.add_argument("--into", type=Path, default=Path("memory-train-runs"), metavar="FOLDER")
    parser.add_argument("--listener", type=Path, metavar="FOLDER", help="the small model (default: listener in the folder of --into)")
    parser.add_argument("--reader", type=Path, metavar="FOLDER", help="the embedded model as reader.py leaves it (default: as it is)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="examine on its real conversations too (memory_study.py says which)")
    parser.add_argument("--histories", type=int, default=2, metavar="N", help="examined in each run")
    parser.add_argument("--at-once", type=int, default=6, metavar="N", help="histories that are read side by side")
    parser.add_argument("--steps", type=int, help="of training (default: the model's own number)")
    parser.add_argument("--warm", type=int, help="steps of it, the first, that teach outright (default: the model's own number)")
    parser.add_argument("--label", help="what a policy that was trained otherwise is called, trained-... (default: trained)")
    parser.add_argument("--rate", type=float, help="learning rate of the later steps (default: the model's own)")
    parser.add_argument(
        "--base-url",
        metavar="URL",
        help="a server that has the model, as `bench`, for several runs at once: with threads, device and room of its own",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", help="of the server (default: cpu for the small model, auto for the embedded one)")
    parser.add_argument("--main", action="store_true", help="examine at the full length and the one budget only")
    parser.add_argument("--smoke", action="store_true", help="short histories and two steps, for a look at whether all of it works")
    parser.add_argument("--collect", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/DATE-memory-train.json)")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{model}/{seed}/{part}" for model in SIZES for part in PARTS for seed in SEEDS))
    elif args.only:
        args.model, seed, part = args.only.split("/")
        args.seed = int(seed)
        if args.model not in SIZES or part not in PARTS:
            parser.error(f"--only {args.only} is none; --list names all")
        for name, model in (("reader", "smollm2"), ("listener", "small"), ("data", "smollm2")):
            if getattr(args, name) is not None and args.model != model:
                parser.error(f"--{name} is for {model}, and --only is of {args.model}")
        if args.warm is not None and not 0 <= args.warm <= steps_of(args):
            parser.error(f"--warm {args.warm} must be 0 to the number of steps")
        if args.label is not None and (part != "trained" or not args.label.startswith("trained-")):
            parser.error(f"--label {args.label} must begin with trained-, and is for the part trained")
        one(args, part)
    elif args.collect:
        collect(args)
    else:
        parser.error("say --list, --only or --collect")


if __name__ == "__main__":
    main()
