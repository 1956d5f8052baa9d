#!/usr/bin/env python3
"""A conversation of a thousand turns through the `openai` client in a memory: does the prompt keep to its budget, and what is still known?

    python benchmarks/memory_chat.py --model smollm2 --only 0 --into RUNS     # one seed; seeds may run side by side
    python benchmarks/memory_chat.py --model smollm2 --only 0 --into RUNS --turns 300 --refill generate
    python benchmarks/memory_chat.py --model RUNS/listener --only 0 --into RUNS    # the small model that benchmarks/listener.py makes
    python benchmarks/memory_chat.py --collect RUNS

The third user turn states a preference, nine others state facts in the first tenth; everything else is chatter
(everlearn/memory/synthetic.py). Then the window is looked at, and the model is asked. Beside it, what the last turns within the same
budget would hold. The model's answers are short: what is measured is the memory. With `--refill generate` the model writes behind each
answer, and how often it did, or why not, is counted.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import ROOT, arguments, origin, server, short, write_result

sys.path.insert(0, str(ROOT))
from everlearn.memory.asking import ANSWER_TOKENS, QUESTION
from everlearn.memory.scores import contains, interval
from everlearn.memory.suites import share, words_of
from everlearn.memory.synthetic import synthetic


def conversation(turns: int, seed: int) -> tuple[list[str], list[Any]]:
    """User turns, and the questions. Facts are taken from a short history and said early, a preference as the third turn."""
    chatter = [text for role, text in synthetic(2 * turns, seed + 500, 1).turns if role == "user"]
    facts = synthetic(200, seed, 20)
    plain = [question for question in facts.questions if question.kind in ("fact", "preference")]
    chosen = sorted(plain, key=lambda question: question.kind != "preference")[:10]
    places = [2, *sorted(random.Random(seed).sample(range(4, max(14, turns // 10)), len(chosen) - 1))]
    for question, place in zip(chosen, places, strict=True):
        chatter[place] = next(text for _, text in facts.turns if question.words <= words_of(text))
    return chatter, chosen


def one(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    import httpx
    import openai

    said, questions = conversation(args.turns, seed)
    used, times = [], []
    with server(args) as live, openai.OpenAI(base_url=live.url + "/v1", api_key="tml-bench", max_retries=0) as client:

        def say(text: str, tokens: int) -> Any:
            body = {"memory": {"id": f"seed-{seed}", "budget": args.budget, "refill": args.refill}}
            messages: Any = [{"role": "user", "content": text}]
            return client.chat.completions.create(model=live.model, messages=messages, max_tokens=tokens, temperature=0, extra_body=body)

        for text in said:
            started = time.perf_counter()
            used.append(say(text, args.answer).usage.prompt_tokens)
            times.append(time.perf_counter() - started)
        window = httpx.get(f"{live.url}/v1/memories/seed-{seed}", headers={"X-API-Key": "tml-bench"}, timeout=60).raise_for_status().json()
        hands = rewritten(f"{live.url}/v1/memories/seed-{seed}") if args.refill == "generate" else {}
        pieces = [chunk["text"] for chunk in window["chunks"]]
        kept = [float(share(question.words, pieces) == 1.0) for question in questions]
        asked = [QUESTION.format(context="", question=question.text).strip() for question in questions]
        answers = [say(text, ANSWER_TOKENS).choices[0].message.content or "" for text in asked]
    tail = said[-args.budget // 8 :]  # a turn takes at least eight tokens
    return {
        "seed": seed,
        "turns": len(said),
        "budget": args.budget,
        "refill": args.refill,
        "hands": hands,
        "prompt_tokens_max": max(used),
        "kept": kept,
        "last_k_kept": [float(share(question.words, tail) == 1.0) for question in questions],
        "answered": [contains(answer, question.answers) for answer, question in zip(answers, questions, strict=True)],
        "answers": answers,
        "seconds_per_turn": [statistics.median(times[start : start + 100]) for start in range(0, len(times), 100)],
    }


def rewritten(route: str) -> dict[str, int]:
    """How often each hand wrote: by the history of every turn, without the names of models."""
    import httpx

    found: Counter[str] = Counter()
    with httpx.Client(headers={"X-API-Key": "tml-bench"}, timeout=60) as http:
        for number in range(http.get(route).raise_for_status().json()["turns"]):
            for row in http.get(f"{route}/turns/{number}").raise_for_status().json()["rewrites"]:
                found["left the window" if row["after"] is None else re.sub(r" \([^)]*\)", "", row["refill"])] += 1
    return dict(found)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", type=int, metavar="SEED")
    parser.add_argument("--into", type=Path, default=Path("memory-chat-runs"), metavar="FOLDER")
    parser.add_argument("--collect", type=Path, metavar="FOLDER")
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--refill", choices=("extract", "generate"), default="extract")
    parser.add_argument("--answer", type=int, default=4, help="tokens of each answer")
    args = parser.parse_args()
    if args.only is not None:
        run = one(args, args.only)
        print(f"seed {args.only}: at most {run['prompt_tokens_max']} tokens, kept {sum(run['kept']):.0f} of {len(run['kept'])}, "
              f"answered {sum(run['answered']):.0f}; last turns alone keep {sum(run['last_k_kept']):.0f}")  # fmt: skip
        args.into.mkdir(parents=True, exist_ok=True)
        sys.argv[1:] = ["--model", short(args.model), "--only", str(args.only), "--turns", str(args.turns), "--refill", args.refill]
        (args.into / f"{args.only}.json").write_text(json.dumps(origin("memory-chat") | {"run": run}, default=str))
    elif args.collect is not None:
        told = [json.loads(path.read_text()) for path in sorted(args.collect.glob("*.json"))]
        runs = [row.pop("run") for row in told]
        results: dict[str, Any] = {"runs": runs, "origins": told}
        for metric in ("kept", "last_k_kept", "answered"):
            results[metric] = interval([run[metric] for run in runs])._asdict()
        first = {name: sum(run[name][0] for run in runs) for name in ("kept", "answered", "last_k_kept")}
        results["preference_of_turn_3"] = first | {"of": len(runs)}
        results["prompt_tokens_max"] = max(run["prompt_tokens_max"] for run in runs)
        sys.argv[1:] = ["--collect", args.collect.name]
        print({name: value for name, value in results.items() if name not in ("runs", "origins")})
        name = f"memory-chat-{told[0]['command'].split('--model ')[1].split()[0]}"
        write_result(args, name + ("-generate" if runs[0].get("refill") == "generate" else ""), results)
    else:
        parser.error("say --only or --collect")


if __name__ == "__main__":
    main()
