"""Suites whose histories are talks of two people over many sessions: LoCoMo and MSC. A user brings the files.

Both speakers are shown as users, each line with its speaker's name, the first of a session with when it was. Golds that are known to be
wrong or can't be traced are left out, and counted by reason.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from everlearn.errors import InvalidRequest
from everlearn.memory.suites import NEAR, Case, Question, evident, read_json, share, words_of

# As LoCoMo's own scorer takes its numbers (Maharana et al., arXiv 2402.17753, task_eval/evaluation.py).
CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
ADVERSARIAL = 5
TURN_ID = re.compile(r"D:?(\d+):0*(\d+)")  # of a turn, with the slips that the file has: D:11:26, D30:05


class Suite(NamedTuple):
    """`left_out`: how many questions there would be besides, by reason."""

    cases: list[Case]
    left_out: dict[str, int]


def locomo(path: Path, audit: Path | None = None) -> Suite:
    """Of LoCoMo's `locomo10.json`: ten talks of two people over up to 35 sessions.

    Questions of category 5 are left out: their premise is false, most of them have no answer, and what memory should hold for them can't be
    said. So are questions without an answer or whose evidence names no turn that is there, and those that `audit` lists: a JSON list of
    questions with wrong golds, each as its text or as an object with `question` (and `sample_id`, where the text alone would be
    ambiguous)."""
    wrong = _audited(audit)
    cases, left_out = [], Counter[str]()
    for row in read_json(path):
        try:
            name, talk, asked = str(row["sample_id"]), row["conversation"], row["qa"]
            turns = _locomo_turns(talk)
        except (KeyError, TypeError) as error:
            raise InvalidRequest(f"{path.name} isn't of LoCoMo's form: {error} is missing", param="data") from None
        said = dict(turns)
        questions = []
        for one in asked:
            found = _locomo_question(name, one, said, wrong)
            if isinstance(found, str):
                left_out[found] += 1
            else:
                questions.append(found)
        cases.append(Case(name, [("user", text) for _, text in turns], questions))
    return Suite(cases, dict(left_out))


def msc(path: Path) -> Suite:
    """Of the multi-session chats (MSC; Xu et al., arXiv 2107.07567) with one question each, `msc_self_instruct.jsonl` of MemGPT's authors
    (arXiv 2310.08560): the four sessions before are the history. The last session, the personas and the summaries are not shown: they hold
    the answer. Questions whose answer's words no turn holds are left out."""
    cases, left_out = [], Counter[str]()
    for number, line in enumerate(_lines(path)):
        try:
            row = json.loads(line)
            turns: list[tuple[str, str]] = []
            for session in row["previous_dialogs"]:
                when = session.get("time_back") or f"{session.get('time_num', '')} {session.get('time_unit', '')} ago".strip()
                for place, turn in enumerate(session["dialog"]):
                    turns.append(("user", (f"[{when}] " if place == 0 else "") + f"Speaker {1 + place % 2}: {turn['text']}"))
            asked, answer = str(row["self_instruct"]["B"]), str(row["self_instruct"]["A"])
            name = str((row.get("metadata") or {}).get("initial_data_id", number))
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(f"line {number + 1} of {path.name} isn't of MSC's form: {error}", param="data") from None
        question = evident(asked, (answer,), answer, "session", turns)
        if question.need <= 0.0:
            left_out["whose answer no turn holds a word of"] += 1
        else:
            cases.append(Case(name, turns, [question]))
    return Suite(cases, dict(left_out))


def _locomo_turns(talk: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(id, text), in order."""
    numbers = sorted(int(found[1]) for key in talk if (found := re.fullmatch(r"session_(\d+)", key)))
    if not numbers:
        raise KeyError("session_1")
    turns = []
    for number in numbers:
        for place, turn in enumerate(talk[f"session_{number}"]):
            when = f"[{talk[f'session_{number}_date_time']}] " if place == 0 else ""
            shown = f" (shows {turn['blip_caption']})" if turn.get("blip_caption") else ""
            turns.append((_plain(turn["dia_id"])[0], f"{when}{turn['speaker']}: {turn['text']}{shown}"))
    return turns


def _locomo_question(name: str, row: Mapping[str, Any], said: Mapping[str, str], wrong: set[tuple[str, str]]) -> Question | str:
    """The question, or why it is left out."""
    text, category = str(row["question"]), int(row["category"])
    if category == ADVERSARIAL:
        return "adversarial"
    if (name, _spelled(text)) in wrong or ("", _spelled(text)) in wrong:
        return "with a gold that the audit calls wrong"
    if row.get("answer") in (None, ""):
        return "without an answer"
    evidence = [said[turn] for given in row.get("evidence") or [] for turn in _plain(given) if turn in said]
    if not evidence:
        return "whose evidence names no turn"
    answer = str(row["answer"])
    words = words_of(answer)
    need = NEAR * share(words, evidence)
    if need <= 0.0:  # a date that has to be worked out, or a conclusion: what has to be there is what it follows from
        words = words_of(evidence[0])
        need = NEAR
    return Question(text, (answer,), words, need, CATEGORIES.get(category, str(category)))


def _plain(given: Any) -> list[str]:
    """The ids of turns in an evidence field, which may hold several."""
    return [f"D{session}:{turn}" for session, turn in TURN_ID.findall(str(given))] or [str(given)]


def _audited(path: Path | None) -> set[tuple[str, str]]:
    if path is None:
        return set()
    try:
        return {
            ("", _spelled(row)) if isinstance(row, str) else (str(row.get("sample_id", "")), _spelled(row["question"]))
            for row in read_json(path)
        }
    except (KeyError, TypeError, AttributeError):
        raise InvalidRequest(f"{path.name} must be a JSON list of questions: texts, or objects with `question`", param="audit") from None


def _spelled(text: str) -> str:
    return " ".join(text.casefold().split())


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} can't be read ({error}); name the file of the data set", param="data") from None
