"""Where a correction belongs: in the memory of the user who gave it, or in the weights, where all users have it. Pure.

| a correction | goes into | why |
|---|---|---|
| of an answer in no memory | the weights | there is nowhere else |
| that several memories' users gave alike | the weights | it is no matter of one user |
| about the user: in the first person, or addressed to them | that memory | others mustn't learn it, and it holds from the next turn on |
| about anything else | the weights | it is so for everybody |

Two corrections are alike where their answers have the same words that carry meaning and their questions share at least half of theirs
(the Jaccard index of Jaccard, 1901). The table is looked at from its top. It is a rule about words: it doesn't know what is true of whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from everlearn.memory.importance import FIRST_PERSON, WORD, content_words

Place = Literal["memory", "weights"]
ALIKE = 0.5
SEVERAL = 2
ADDRESSED = frozenset(["you", "your", "yours", "you're", "you've", "you'll", "yourself"])


class Case(msgspec.Struct, frozen=True):
    """A correction: what was asked and what is right. `memory`: of which memory the answer was a turn; "": of none."""

    key: str
    question: str
    answer: str
    memory: str = ""


class Remedy(msgspec.Struct, frozen=True):
    key: str
    place: Place
    reason: str


def remedies(cases: Sequence[Case], several: int = SEVERAL) -> list[Remedy]:
    """One for each case, in order. `several`: from how many memories on a correction is everybody's."""
    return [_remedy(case, cases, several) for case in cases]


def _remedy(case: Case, cases: Sequence[Case], several: int) -> Remedy:
    if not case.memory:
        return Remedy(case.key, "weights", "the answer was given in no memory")
    memories = {other.memory for other in cases if other.memory and alike(case, other)}
    if len(memories) >= several:
        return Remedy(case.key, "weights", f"the users of {len(memories)} memories say the same")
    if word := personal(case):
        return Remedy(case.key, "memory", f"it is about the user ({word!r}), and one memory's alone")
    return Remedy(case.key, "weights", "it isn't about the user")


def personal(case: Case) -> str:
    """The word by which it is about the user: one of the question's in the first person, or one of the answer's that addresses somebody."""
    for text, known in ((case.question, FIRST_PERSON), (case.answer, ADDRESSED | FIRST_PERSON)):
        for word in WORD.findall(text):
            if word.lower().replace("’", "'") in known:
                return str(word)
    return ""


def alike(one: Case, other: Case) -> bool:
    if set(content_words(one.answer)) != set(content_words(other.answer)):
        return False
    asked, also = set(content_words(one.question)), set(content_words(other.question))
    return len(asked & also) >= ALIKE * len(asked | also)


def told(case: Case) -> str:
    """The correction as it stands in a memory: with its question, without which an answer of one word says nothing."""
    return f"{case.question.strip()} {case.answer.strip()}".strip()
