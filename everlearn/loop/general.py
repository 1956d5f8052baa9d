"""General questions with short answers: what a model goes on saying while it learns something else.

Those that are rehearsed ride along in training with the model's own answers; those that are graded are asked before and after and never
trained on. No question is in both. The graded are such as the embedded model answers rightly in each of seven wordings (the plain one and
paraphrase.py's FRAMES): where an answer hangs on a first token of 15 % against one of 14 %, any change of a weight turns it, and that says
nothing of what was forgotten.
"""

from __future__ import annotations

from pathlib import Path

import msgspec


class Graded(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A question whose answer everybody knows, and the strings that make an answer right."""

    question: str
    accept: list[str]


class General(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rehearsed: list[str]
    graded: list[Graded]


def load() -> General:
    return msgspec.json.decode((Path(__file__).parent / "general.json").read_bytes(), type=General)
