#!/usr/bin/env python3
"""What each way of remembering keeps of a history, and what a model answers from it: suites x methods x budgets x histories.

    python benchmarks/memory_study.py --list --data FOLDER            # one line for each run; they may run side by side
    python benchmarks/memory_study.py --only RUN --data FOLDER --into RUNS
    python benchmarks/memory_study.py --collect RUNS                  # one result file and its plot

FOLDER holds longmemeval/longmemeval_s_multiq.json and memorybank/en/ (docs/guides/memory.md says where they come from); without it the
synthetic suite is run alone. A run is SUITE/HISTORY/METHOD[@BUDGET], or of several: METHOD,METHOD; `rules` are those without a model,
`writers` the others and `methods` all; `all` are the suite's histories, and no budget means all of them. Those that end in +answers start
a server of their own on the embedded model, which is also who writes and decides, as it is; `--at-once` reads so many histories side by
side, which a server answers in batches (what a turn takes is then that of all of them). `--smoke` makes every history short, for a look
at whether all of it works.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import ROOT, model_folder, origin, server, side_by_side, write_result

sys.path.insert(0, str(ROOT))
import msgspec

from everlearn.memory import importance, study
from everlearn.memory.asking import Asking
from everlearn.memory.decide import Certain
from everlearn.memory.generate import Generate
from everlearn.memory.methods import PORTION, RULES, WRITERS, method
from everlearn.memory.suites import Case, Question, longmemeval, memorybank, share
from everlearn.memory.synthetic import synthetic
from everlearn.render.tokenizer import load
from everlearn.rl.prompts import ChatMl

BUDGETS = {
    "synthetic-300": (256, 512, 1024),
    "synthetic-2000": (256, 512, 1024),
    "longmemeval": (512, 2048),
    "longmemeval-2k": (256, 512),
    "memorybank": (512, 2048),
}
PIECE = 2_000  # tokens of a piece of longmemeval-2k
ORDER = (*RULES, *WRITERS)
COLOURS = dict(
    zip(
        ORDER,
        ("#6b7280", "#94a3b8", "#cbd5e1", "#16a34a", "#2563eb", "#60a5fa", "#d97706", "#dc2626", "#9333ea", "#0891b2", "#be185d"),
        strict=True,
    )
)
SEEDS = (0, 1, 2)
HELD_OUT = 100  # added to a seed: the weights by hand were set while looking at histories 0 to 2
ASKED_ELSEWHERE = ("synthetic-2000", "methods+answers")  # by memory_train.py
CONTEXT = 8192  # tokens that the embedded model takes
ROOM = CONTEXT - 128  # less its answer


def runs_of(data: Path | None) -> list[str]:
    suites = [suite for suite in BUDGETS if data is not None or suite.startswith("synthetic")]
    return [f"{suite}/all/{what}" for what in ("rules", "methods+answers") for suite in suites if (suite, what) != ASKED_ELSEWHERE]


def cases(suite: str, history: str, data: Path | None, smoke: bool) -> list[Case]:
    if suite.startswith("synthetic"):
        turns = 100 if smoke else int(suite.split("-")[1])
        found = [synthetic(turns, HELD_OUT + seed) for seed in SEEDS]
    elif data is None:
        raise SystemExit(f"suite {suite} needs --data")
    elif suite.startswith("longmemeval"):
        found = longmemeval(data / "longmemeval" / "longmemeval_s_multiq.json")
        found = pieces(found) if suite.endswith("2k") else found
        found = [case._replace(turns=case.turns[:40]) for case in found] if smoke else found
    else:
        found = memorybank(data / "memorybank" / "en")[: 2 if smoke else None]
    if history == "all":
        return found
    if not history.isdigit() or int(history) >= len(found):
        raise SystemExit(f"{suite} has no history {history!r}; it has 0 to {len(found) - 1}, or all")
    return [found[int(history)]]


def pieces(histories: list[Case]) -> list[Case]:
    """Long histories in pieces of PIECE tokens, each with the questions whose evidence stands in it: in the turn that holds most of their
    words. Pieces without questions are left out. What a model writes takes hours over the whole, one word after another."""
    tokenizer = load(model_folder("smollm2"))
    found = []
    for case in histories:
        sizes = [len(tokenizer.encode(tokenizer.guard(text))) for _, text in case.turns]
        piece_of = [before // PIECE for before in itertools.accumulate(sizes, initial=0)][:-1]
        asked: dict[int, list[Question]] = {}
        for question in case.questions:
            held = [share(question.words, [text]) for _, text in case.turns]
            asked.setdefault(piece_of[held.index(max(held))], []).append(question)
        for number, own in sorted(asked.items()):
            turns = [turn for turn, piece in zip(case.turns, piece_of, strict=True) if piece == number]
            found.append(Case(f"{case.name}-{number}", turns, own))
    return found


def portion(context: int, budget: int) -> int:
    """Tokens that `overwrite` reads at once: twice its notes and PORTION at least, as far as a model's context has room for them beside the
    order, the notes, and the notes to be written."""
    return min(max(PORTION, 2 * budget), context - 2 * budget - 128)


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


def one(args: argparse.Namespace, name: str) -> Iterator[study.Run]:
    """Each as it is done."""
    suite, history, what = name.split("/")
    kind, _, only = what.removesuffix("+answers").partition("@")
    several = {"rules": RULES, "writers": WRITERS, "methods": ORDER}
    methods, budgets = several.get(kind) or kind.split(","), (int(only),) if only else BUDGETS[suite]
    tokenizer = load(model_folder("smollm2"))
    head = importance.BY_HAND if args.head is None else importance.load(args.head)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(tokenizer.guard(text))

    with asking(args, what.endswith("+answers")) as model:

        def run(case: Case, budget: int, kind: str) -> study.Run:
            hands: dict[str, Any] = {}
            if model is not None:
                hands = {"write": model.write, "refill": Generate(model.sampler, model.chat)}
                hands["decided"] = Certain(model.sampler, model.chat, once=True)
            made = method(kind, encode, budget, seed=len(case.turns), head=head, portion=portion(CONTEXT, budget), **hands)
            asked = model is not None and any(question.answers for question in case.questions)
            return study.run(suite, case, made, budget, encode, 0, model.answers if model is not None and asked else None, ROOM)

        found = cases(suite, history, args.data, args.smoke)
        # Those that a model writes first: they take longest. `full` knows no budget.
        places = [(kind, budget) for kind in reversed(methods) for budget in (budgets[:1] if kind == "full" else budgets)]
        jobs = [functools.partial(run, case, budget, kind) for kind, budget in places for case in found]
        for done in side_by_side(args.at_once, jobs):
            print(f"{suite} {done.budget} {done.method} {done.case}: kept {sum(done.kept)} of {len(done.kept)}", flush=True)
            yield done


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
    names = [name for name in ORDER if any(row["method"] == name for row in rows)]
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
                parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{0.8 * step:.1f}" height="{base - y:.1f}" fill="{COLOURS[name]}"/>')
                ends = [base - (base - top) * kept[end] for end in ("low", "high")]
                parts.append(f'<path d="M{x + 0.4 * step:.1f} {ends[0]:.1f}V{ends[1]:.1f}" stroke="#888"/>')
            parts.append(f'<text x="{56 + place * group}" y="{base + 14}" font-size="11" fill="#888">{budget} tokens</text>')
    for index, name in enumerate(names):
        x = 50 + index * (width - 60) / len(names)
        parts.append(f'<rect x="{x:.0f}" y="{height * len(suites) + 12}" width="10" height="10" fill="{COLOURS[name]}"/>')
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
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="histories that are read side by side")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/DATE-memory-study.json)")
    args = parser.parse_args()
    if args.list:
        print("\n".join(runs_of(args.data)))
    elif args.only:
        started = time.perf_counter()
        load_before = os.getloadavg()
        command = f"python benchmarks/memory_study.py --only {args.only} --at-once {args.at_once}"  # without the places of this machine
        args.into.mkdir(parents=True, exist_ok=True)
        path = args.into / f"{args.only.replace('/', '_')}.json"
        runs = []
        for run in one(args, args.only):
            runs.append(run)  # written after each: what is cut short has not run in vain
            told = origin("memory-study") | {"load_average": load_before, "seconds": time.perf_counter() - started, "command": command}
            path.write_bytes(msgspec.json.encode(told | {"runs": runs}, enc_hook=str))
    elif args.collect:
        runs, origins = collected(args.collect)
        rows = sorted(study.summed(runs), key=lambda row: (list(BUDGETS).index(row["suite"]), row["budget"], ORDER.index(row["method"])))
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
