"""The lesson's material: an invented company's handbook, and general questions that must not suffer from it.

Everything in handbook.json is made up except the general knowledge. Three kinds of question never mix: those that are trained on,
paraphrases of them that are only asked, and general ones, of which the rehearsed are trained on (with the model's own answers) and
the graded are not.
"""

from __future__ import annotations

from pathlib import Path

import msgspec


class Fact(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing to learn. `question` and `also_trained` are taught with `answer`; `paraphrases` are asked and never taught."""

    question: str
    answer: str
    accept: list[str]
    also_trained: list[str]
    paraphrases: list[str]


class General(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A question whose answer everybody knows; it is asked before and after and never taught."""

    question: str
    accept: list[str]


class Handbook(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    company: str
    facts: list[Fact]
    general: list[General]
    rehearsal: list[str]


def load() -> Handbook:
    return msgspec.json.decode((Path(__file__).parent / "handbook.json").read_bytes(), type=Handbook)
