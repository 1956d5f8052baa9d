#!/usr/bin/env python3
"""Why a window keeps little of LongMemEval: how much stands before the evidence where all sentences are ordered by importance.

    python benchmarks/memory_ranks.py --data longmemeval_s.json

Every sentence of a whole history is weighed by the head by hand, with the word counts of its end, and the best come first.
`tokens_before` are those of the better sentences (repetitions counted once): a window that ranked perfectly by this head, and never
forgot, would need as many to hold a question's evidence. Questions whose evidence no single sentence holds have null.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, model_folder, write_result

sys.path.insert(0, str(ROOT))
from everlearn.memory.importance import BY_HAND, MOST_SENTENCES, SENTENCES, SPLIT_CHARS, counted, features, split
from everlearn.memory.suites import Case, longmemeval, words_of
from everlearn.memory.window import Window, line
from everlearn.render.tokenizer import load

BUDGETS = (512, 2048, 8192, 32768)


def ranks(case: Case, tokenizer: Any) -> dict[str, Any]:
    words = b""
    for _, text in case.turns:
        words = counted(words, text)
    window = Window(10**9, words=words)
    said = {(role, piece): None for role, text in case.turns for piece in split(text[:SPLIT_CHARS], SENTENCES)[:MOST_SENTENCES]}
    pieces = list(said)
    scores_N = BY_HAND.scores(np.stack([features(window, role, piece) for role, piece in pieces]))
    order_N = np.argsort(-scores_N, kind="stable")
    lengths_N = np.array([len(tokenizer.encode(tokenizer.guard(line(role, piece)))) for role, piece in pieces])
    before_N = np.empty(len(pieces), dtype=np.int64)
    before_N[order_N] = np.cumsum(lengths_N[order_N])
    held = [words_of(piece) for _, piece in pieces]
    questions = []
    for question in case.questions:
        if question.need <= 0.0:
            continue
        found = [int(before_N[i]) for i, own in enumerate(held) if len(question.words & own) >= question.need * len(question.words)]
        at = min(range(len(pieces)), key=lambda i: before_N[i] if before_N[i] == min(found, default=-1) else 10**12)
        told = {"kind": question.kind, "question": question.text[:120], "tokens_before": min(found, default=None)}
        questions.append(told | ({"said_by": pieces[at][0]} if found else {}))
    sizes = {"turns": len(case.turns), "sentences": len(pieces), "tokens": int(lengths_N.sum())}
    return {"history": case.name, **sizes, "questions": questions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a file of LongMemEval's form")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/DATE-memory-ranks.json)")
    args = parser.parse_args()
    tokenizer = load(model_folder("smollm2"))
    histories = [ranks(case, tokenizer) for case in longmemeval(args.data)]
    before = [question["tokens_before"] for history in histories for question in history["questions"]]
    found = [tokens for tokens in before if tokens is not None]
    results = {
        "questions": len(before),
        "in_one_sentence": len(found),
        "median_tokens_before": statistics.median(found),
        "within": {budget: sum(tokens <= budget for tokens in found) for budget in BUDGETS},
        "histories": histories,
    }
    print({name: value for name, value in results.items() if name != "histories"})
    sys.argv[1:] = ["--data", args.data.name]
    write_result(args, "memory-ranks", results)


if __name__ == "__main__":
    main()
