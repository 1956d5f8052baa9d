"""Grading without a judge: an answer is right when it contains one of the accepted strings (everlearn/loop/corrected.py).

It knows nothing of models: strings in, a verdict out.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from everlearn.loop.corrected import accepted as is_right

__all__ = ["SECTIONS", "Question", "Row", "Score", "grade", "is_right", "scores"]

SECTIONS = ("taught", "paraphrase", "general")


class Question(msgspec.Struct, frozen=True):
    """What is asked before and after the lesson, and the strings that make an answer right. `section` is one of SECTIONS."""

    section: str
    text: str
    accept: list[str]


class Row(msgspec.Struct, frozen=True):
    """One question with its two answers and their verdicts."""

    section: str
    question: str
    accept: list[str]
    before: str
    after: str
    right_before: bool
    right_after: bool


class Score(msgspec.Struct, frozen=True):
    """Right answers of a section. `lost` counts those that were right before and are wrong after."""

    section: str
    asked: int
    before: int
    after: int
    lost: int


def grade(asked: Sequence[Question], before: Sequence[str], after: Sequence[str]) -> list[Row]:
    """The two answer lists run in the order of `asked`."""
    return [
        Row(item.section, item.text, item.accept, old, new, is_right(old, item.accept), is_right(new, item.accept))
        for item, old, new in zip(asked, before, after, strict=True)
    ]


def scores(rows: Sequence[Row]) -> list[Score]:
    result = []
    for section in SECTIONS:
        mine = [row for row in rows if row.section == section]
        before, after = sum(row.right_before for row in mine), sum(row.right_after for row in mine)
        result.append(Score(section, len(mine), before, after, sum(row.right_before and not row.right_after for row in mine)))
    return result
