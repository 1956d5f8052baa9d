"""The lesson's material: an invented company's handbook, and general questions that must not suffer from it (everlearn/loop/general.py).

Everything in handbook.json is made up. Three kinds of question never mix: those that are trained on,
paraphrases of them that are only asked, and general ones, of which the rehearsed are trained on (with the model's own answers) and
the graded are not.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from everlearn.loop import general
from everlearn.loop.general import Graded


class Fact(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing to learn. `question` and `also_trained` are taught with `answer`; `paraphrases` are asked and never taught."""

    question: str
    answer: str
    accept: list[str]
    also_trained: list[str]
    paraphrases: list[str]


class Handbook(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    company: str
    facts: list[Fact]
    general: list[Graded] = []
    rehearsal: list[str] = []


def load() -> Handbook:
    book = msgspec.json.decode((Path(__file__).parent / "handbook.json").read_bytes(), type=Handbook)
    questions = general.load()
    return msgspec.structs.replace(book, general=questions.graded, rehearsal=questions.rehearsed)
