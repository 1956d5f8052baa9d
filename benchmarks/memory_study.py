#!/usr/bin/env python3
"""What each way of remembering keeps of a history, and what a model answers from it: suites x methods x budgets x histories.

    python benchmarks/memory_study.py --list --data FOLDER            # one line for each run; they may run side by side
    python benchmarks/memory_study.py --only RUN --data FOLDER --into RUNS
    python benchmarks/memory_study.py --collect RUNS                  # one result file and its plot

FOLDER holds longmemeval/longmemeval_s_multiq.json and memorybank/en/ (docs/guides/memory.md says where they come from); without it the
synthetic suite is run alone. A run is a suite, a method and a history, at all budgets of its suite; those that end in +answers start a
server of their own on the embedded model. `--smoke` makes every history short, for a look at whether all of it works.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import ROOT, model_folder, origin, server, write_result

sys.path.insert(0, str(ROOT))
import msgspec

from everlearn.memory import importance, study
from everlearn.memory.asking import Asking
from everlearn.memory.decide import Certain
from everlearn.memory.generate import Generate
from everlearn.memory.methods import RULES, WRITERS, method
from everlearn.memory.suites import Case, longmemeval, memorybank
from everlearn.memory.synthetic import synthetic
from everlearn.render.tokenizer import load
from everlearn.rl.prompts import ChatMl

BUDGETS = {"synthetic-300": (256, 512, 1024), "synthetic-2000": (256, 512, 1024), "longmemeval": (512, 2048), "memorybank": (512, 2048)}
SEEDS = (0, 1, 2)
HELD_OUT = 100  # added to a seed: the weights by hand were set while looking at histories 0 to 2
ROOM = 8192 - 128  # tokens that the embedded model takes, less its answer


def runs_of(data: Path | None) -> list[str]:
    """The names of all runs: suite/history/method@budget+answers; or suite/history/rules, all methods without a model at all budgets."""
    found = [f"{suite}/{seed}/rules" for suite in ("synthetic-300", "synthetic-2000") for seed in SEEDS]
    found += [
        f"synthetic-300/{seed}/{name}@{budget}+answers"
        for seed in SEEDS
        for name in (*RULES, *WRITERS)
        for budget in BUDGETS["synthetic-300"]
        if name != "full" or budget == 256
    ]
    if data is not None:
        found += [f"longmemeval/{number}/rules" for number in range(3)]
        found += [
            f"longmemeval/{number}/{name}@{budget}+answers"
            for number in range(3)
            for name in (*RULES[1:], "overwrite")
            for budget in BUDGETS["longmemeval"]
        ]
        found += ["memorybank/all/rules"]
        parts = ("0-5", "5-10", "10-15")
        found += [f"memorybank/{part}/{name}@{budget}+answers" for name in WRITERS for part in parts for budget in BUDGETS["memorybank"]]
    return found


def cases(suite: str, history: str, data: Path | None, smoke: bool) -> list[Case]:
    if suite.startswith("synthetic"):
        turns = int(suite.split("-")[1])
        return [synthetic(100 if smoke else turns, HELD_OUT + int(history))]
    if data is None:
        raise SystemExit(f"suite {suite} needs --data")
    if suite == "longmemeval":
        return longmemeval(data / "longmemeval" / "longmemeval_s_multiq.json")[int(history) :][:1]
    first, _, last = history.partition("-")
    found = memorybank(data / "memorybank" / "en")
    return found[:2] if smoke else found if history == "all" else found[int(first) : int(last)]


@contextmanager
def asking(args: argparse.Namespace, wanted: bool) -> Iterator[Asking | None]:
    if not wanted:
        yield None
        return
    import tinker

    with server(argparse.Namespace(model="smollm2", base_url=None, base_model=None, threads=args.threads)) as live:
        sampler = tinker.ServiceClient(base_url=live.url).create_sampling_client(base_model=live.model).result()
        tokenizer = load(model_folder("smollm2"))
        yield Asking(sampler, ChatMl(tokenizer.encode, lambda ids: tokenizer.decode(ids, skip_special=True)))


def one(args: argparse.Namespace, name: str) -> list[study.Run]:
    suite, history, what = name.split("/")
    kind, _, only = what.removesuffix("+answers").partition("@")
    methods, budgets = (RULES, BUDGETS[suite]) if what == "rules" else ((kind,), (int(only),))
    tokenizer = load(model_folder("smollm2"))
    head = importance.BY_HAND if args.head is None else importance.load(args.head)
    done = []

    def encode(text: str) -> list[int]:
        return tokenizer.encode(tokenizer.guard(text))

    with asking(args, what.endswith("+answers")) as model:
        hands: dict[str, Any] = {}
        if model is not None:
            hands = {"write": model.write, "refill": Generate(model.sampler, model.chat)}
            hands["decided"] = Certain(model.sampler, model.chat, once=True)
        for case in cases(suite, history, args.data, args.smoke):
            for budget in budgets:
                for kind in methods:
                    made = method(kind, encode, budget, seed=len(case.turns), head=head, **hands)
                    asked = any(question.answers for question in case.questions)
                    answers = model.answers if model is not None and asked else None
                    seed = int(history) if history.isdigit() else 0
                    done.append(study.run(suite, case, made, budget, encode, seed, answers, ROOM))
                    print(f"{name} {budget} {kind} {case.name}: kept {sum(done[-1].kept)} of {len(done[-1].kept)}", flush=True)
    return done


def collected(folder: Path) -> tuple[list[study.Run], list[dict[str, Any]]]:
    """All runs that were written there. Those with answers take the place of the same without."""
    found: dict[tuple[str, str, str, int], study.Run] = {}
    origins = []
    for path in sorted(folder.glob("*.json"), key=lambda path: "+answers" in path.name):
        told = json.loads(path.read_text())
        origins.append({key: told[key] for key in ("command", "when", "commit", "hardware", "load_average", "seconds")})
        for row in told["runs"]:
            run = msgspec.convert(row, study.Run)
            found[run.suite, run.case, run.method, run.budget] = run
    if not found:
        raise SystemExit(f"{folder} holds no runs; make them with --only and --into")
    return list(found.values()), origins


def plot(rows: Sequence[dict[str, Any]], width: int = 900, height: int = 300) -> str:
    """Evidence retention: a panel for each suite, a bar for each method, one group for each budget."""
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    names = [name for name in (*RULES, *WRITERS) if any(row["method"] == name for row in rows)]
    colours = dict(
        zip(names, ("#6b7280", "#94a3b8", "#cbd5e1", "#16a34a", "#2563eb", "#60a5fa", "#d97706", "#dc2626", "#9333ea"), strict=False)
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height * len(suites) + 30}" font-family="system-ui, sans-serif">'
    ]
    for number, suite in enumerate(suites):
        own = [row for row in rows if row["suite"] == suite]
        budgets = sorted({row["budget"] for row in own})
        top, base = height * number + 40, height * (number + 1) - 10
        parts.append(f'<text x="50" y="{top - 14}" font-size="14" fill="#888">{suite}: evidence kept, by budget</text>')
        for percent in (0, 50, 100):
            y = base - (base - top) * percent / 100
            parts.append(f'<path d="M50 {y:.1f}H{width - 10}" stroke="#8886" stroke-width="1"/>')
            parts.append(f'<text x="44" y="{y + 4:.1f}" font-size="11" text-anchor="end" fill="#888">{percent} %</text>')
        group = (width - 60) / len(budgets)
        for place, budget in enumerate(budgets):
            bars = [(name, row) for name in names for row in own if row["method"] == name and row["budget"] == budget]
            step = (group - 24) / max(1, len(bars))
            for index, (name, row) in enumerate(bars):
                x, kept = 56 + place * group + index * step, row["kept"]
                y = base - (base - top) * kept["mean"]
                parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{0.8 * step:.1f}" height="{base - y:.1f}" fill="{colours[name]}"/>')
                ends = [base - (base - top) * kept[end] for end in ("low", "high")]
                parts.append(f'<path d="M{x + 0.4 * step:.1f} {ends[0]:.1f}V{ends[1]:.1f}" stroke="#888"/>')
            parts.append(f'<text x="{56 + place * group}" y="{base + 14}" font-size="11" fill="#888">{budget} tokens</text>')
    for index, name in enumerate(names):
        x = 50 + index * (width - 60) / len(names)
        parts.append(f'<rect x="{x:.0f}" y="{height * len(suites) + 12}" width="10" height="10" fill="{colours[name]}"/>')
        parts.append(f'<text x="{x + 14:.0f}" y="{height * len(suites) + 21}" font-size="12" fill="#888">{name}</text>')
    return "\n".join([*parts, "</svg>"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", metavar="RUN")
    parser.add_argument("--into", type=Path, default=Path("memory-runs"), metavar="FOLDER")
    parser.add_argument("--collect", type=Path, metavar="FOLDER")
    parser.add_argument("--head", type=Path, help="weights of importance (default: by hand)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/DATE-memory-study.json)")
    args = parser.parse_args()
    if args.list:
        print("\n".join(runs_of(args.data)))
    elif args.only:
        started = time.perf_counter()
        load_before = os.getloadavg()
        runs = one(args, args.only)
        told = origin("memory-study") | {"load_average": load_before, "seconds": time.perf_counter() - started}
        told["command"] = f"python benchmarks/memory_study.py --only {args.only}"  # without the places of this machine
        args.into.mkdir(parents=True, exist_ok=True)
        path = args.into / f"{args.only.replace('/', '_')}.json"
        path.write_bytes(msgspec.json.encode(told | {"runs": runs}, enc_hook=str))
    elif args.collect:
        runs, origins = collected(args.collect)
        rows = study.summed(runs)
        out = args.out or ROOT / "benchmarks" / "results" / f"{time.strftime('%F')}-memory-study.json"
        sys.argv = [sys.argv[0], "--collect", args.collect.name]
        results = {"rows": rows, "runs": msgspec.to_builtins(runs), "origins": origins}
        write_result(argparse.Namespace(out=out), "memory-study", results)
        out.with_suffix(".svg").write_text(plot(rows) + "\n", encoding="utf-8")
        for row in rows:
            line = " ".join(f"{name} {100 * row[name]['mean']:.1f} ({100 * row[name]['low']:.0f}-{100 * row[name]['high']:.0f})"
                            for name in study.METRICS if name in row)  # fmt: skip
            print(f"{row['suite']:16} {row['budget']:5} {row['method']:10} {line}")
    else:
        parser.error("say --list, --only or --collect")


if __name__ == "__main__":
    main()
