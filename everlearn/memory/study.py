"""An examination of memories: every method reads every history, then all questions are asked, and what comes out is scored.

Evidence retention needs no model. Answers need one that samples; all questions of a history are sent at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from everlearn.memory import scores
from everlearn.memory.methods import Method
from everlearn.memory.suites import Case, Question
from everlearn.memory.window import Encode

Answers = Callable[[Sequence[tuple[Sequence[str], str]]], list[str]]  # (pieces, question) of each -> what the model answers
METRICS = ("kept", "exact", "contains", "f1", "stale")


class Run(msgspec.Struct, frozen=True):
    """One method on one history. Lists have a value for each question, in order; those of answers are empty where nobody answered.
    `tokens`: the mean size of what was shown. `seconds_per_turn`: of reading, without the answers."""

    suite: str
    case: str
    method: str
    budget: int
    seed: int
    turns: int
    kinds: list[str]
    kept: list[float]
    tokens: float
    seconds_per_turn: float
    exact: list[float] = []
    contains: list[float] = []
    f1: list[float] = []
    stale: list[float] = []
    answers: list[str] = []


def run(
    suite: str, case: Case, method: Method, budget: int, encode: Encode, seed: int = 0, answers: Answers | None = None, most: int = 0
) -> Run:
    """`most`: tokens of a context that the model can take; where what is shown is longer, nobody answers. 0: no limit."""
    started = time.perf_counter()
    for role, text in case.turns:
        method.read(role, text)
    seconds = (time.perf_counter() - started) / max(1, len(case.turns))
    shown = [method.pieces(question.text) for question in case.questions]
    sizes = [sum(len(encode(piece)) for piece in pieces) for pieces in shown]
    found = Run(
        suite=suite,
        case=case.name,
        method=method.name,
        budget=budget,
        seed=seed,
        turns=len(case.turns),
        kinds=[question.kind for question in case.questions],
        kept=[scores.kept(question, pieces) for question, pieces in zip(case.questions, shown, strict=True)],
        tokens=sum(sizes) / max(1, len(sizes)),
        seconds_per_turn=seconds,
    )
    if answers is None or (most and max(sizes, default=0) > most):
        return found
    said = answers([(pieces, question.text) for question, pieces in zip(case.questions, shown, strict=True)])
    return _judged(found, case.questions, said)


def _judged(found: Run, questions: Sequence[Question], said: list[str]) -> Run:
    pairs = [(answer, question) for answer, question in zip(said, questions, strict=True) if question.answers]
    return msgspec.structs.replace(
        found,
        answers=said,
        exact=[scores.exact(answer, question.answers) for answer, question in pairs],
        contains=[scores.contains(answer, question.answers) for answer, question in pairs],
        f1=[scores.token_f1(answer, question.answers) for answer, question in pairs],
        stale=[scores.contains(answer, (question.stale,)) for answer, question in pairs if question.stale],
    )


def summed(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each suite, budget and method: means with 95 % intervals over histories and questions, in the order of the runs."""
    groups: dict[tuple[str, int, str], list[Run]] = {}
    for one in runs:
        groups.setdefault((one.suite, one.budget, one.method), []).append(one)
    rows = []
    for (suite, budget, method), own in groups.items():
        row: dict[str, Any] = {"suite": suite, "budget": budget, "method": method, "histories": len(own)}
        row["questions"] = sum(len(one.kept) for one in own)
        for metric in METRICS:
            values = [getattr(one, metric) for one in own if getattr(one, metric)]
            if values:
                row[metric] = scores.interval(values)._asdict()
        row["tokens"] = sum(one.tokens for one in own) / len(own)
        row["seconds_per_turn"] = sum(one.seconds_per_turn for one in own) / len(own)
        rows.append(row)
    return rows
