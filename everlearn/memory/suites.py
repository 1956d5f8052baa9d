"""What memories are examined with: histories, and questions whose evidence can be looked for in a window without a judge.

`synthetic` makes histories of any length from a seed, with exact answers. `longmemeval` and `memorybank` read files that a user brings;
everlearn/memory/dialogues.py has the suites of two people who talk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from everlearn.errors import InvalidRequest
from everlearn.memory.importance import content_words

NEAR = 0.8  # of what the best turn of the whole history holds: so much must stand in one piece for the evidence to count as kept


class Question(NamedTuple):
    """`words`: those that tell that the evidence is there; `need`: the share of them that one piece of the window must hold.
    `answers` is empty where nobody wrote down what is right. `stale`: an answer that was right once."""

    text: str
    answers: tuple[str, ...]
    words: frozenset[str]
    need: float
    kind: str
    stale: str = ""


class Case(NamedTuple):
    """One history as (role, text), and what is asked at its end."""

    name: str
    turns: list[tuple[str, str]]
    questions: list[Question]


def words_of(text: str) -> frozenset[str]:
    return frozenset(content_words(text))


def share(words: frozenset[str], pieces: Iterable[str]) -> float:
    """The largest share of `words` that one piece holds."""
    return max((len(words & words_of(piece)) / len(words) for piece in pieces), default=0.0) if words else 0.0


# ---- files ----


def longmemeval(path: Path) -> list[Case]:
    """Of a JSON file of LongMemEval's form: haystack_sessions, and `question` with `answer`, or `questions` with `answers`."""
    cases = []
    for row in read_json(path):
        try:
            turns = [(turn["role"], turn["content"]) for session in row["haystack_sessions"] for turn in session]
            asked = row["questions"] if "questions" in row else [row["question"]]
            answers = row["answers"] if "answers" in row else [row["answer"]]
            name, kind = str(row["question_id"]), str(row["question_type"])
        except (KeyError, TypeError) as error:
            raise InvalidRequest(f"{path.name} isn't of LongMemEval's form: {error} is missing", param="data") from None
        pairs = zip(asked, answers, strict=True)
        cases.append(Case(name, turns, [evident(text, (str(answer),), str(answer), kind, turns) for text, answer in pairs]))
    return cases


def memorybank(folder: Path) -> list[Case]:
    """Of MemoryBank's English files, `memory_bank_en.json` and `probing_questions_en.jsonl`. Its questions come without answers: the
    evidence is looked for by the words of the question, of which one piece of the window must hold nearly as many as the best turn does."""
    bank = {name.strip(): own for name, own in read_json(folder / "memory_bank_en.json").items()}
    asked: dict[str, list[str]] = {}
    for line in (folder / "probing_questions_en.jsonl").read_text(encoding="utf-8").splitlines():
        if line.strip():
            asked |= {name.strip(): questions for name, questions in json.loads(line).items()}
    cases = []
    for name, questions in asked.items():
        if name not in bank:
            raise InvalidRequest(f"{folder.name} asks about {name!r}, of whom it has no history", param="data")
        turns = []
        for day, exchanges in bank[name]["history"].items():
            for place, exchange in enumerate(exchanges):
                turns.append(("user", (f"[{day}] " if place == 0 else "") + exchange["query"]))
                turns.append(("assistant", exchange["response"]))
        cases.append(Case(name, turns, [evident(text.strip('"'), (), text, "probing", turns) for text in questions]))
    return cases


def evident(text: str, answers: tuple[str, ...], evidence: str, kind: str, turns: Sequence[tuple[str, str]]) -> Question:
    """A question whose evidence is the words of `evidence`, as far as the best turn of the history holds them."""
    words = words_of(evidence)
    return Question(text, answers, words, NEAR * share(words, (said for _, said in turns)), kind)


def read_json(path: Path) -> Any:
    """Raises InvalidRequest for what can't be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} can't be read as JSON ({error}); name the file or folder of the data set", param="data") from None
