"""What the next turn says about the answer before it, without anybody having pressed a button: weak labels, each with its own noise.

Pure functions of the messages of one request. `seen` of them were known from the record before, the last of which is that record's
answer; the rest is new. The noises are assumptions, not measurements: a thumb that somebody gave is trusted more than any of these, and
a label whose noise nears one half says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple


class Signal(NamedTuple):
    """`value` 1: the earlier answer was good, 0: it wasn't. `noise`: how probable the opposite is."""

    name: str
    value: int
    noise: float


RETRY = Signal("retry", 0, 0.35)  # asked again: also for a second opinion, or by a client that lost the answer
REPEAT = Signal("repeat", 0, 0.30)  # the same question in other words
CORRECTION = Signal("correction", 0, 0.20)  # "no, I meant ..."
THANKS = Signal("thanks", 1, 0.25)  # also out of politeness

SIMILAR = 0.8  # of the characters of both texts, so large a part has to match in order
SHORT_WORDS = 4  # what is shorter repeats by chance ("and then?")
MAX_CHARS = 2_000  # of a text are looked at: matching takes the square of it

CORRECTS = re.compile(
    r"^\W*(no\b(?! (problem|worries|need|thanks|thank you|more)\b)|nope\b|wrong\b|incorrect\b|not (quite|right|correct|true|what i)\b"
    r"|(that|this|it)('s| is| was) (wrong|incorrect|not (right|correct|true|what i (asked|meant|wanted)))"
    r"|that isn'?t (right|correct|true|what i)|you('re| are) (wrong|mistaken)|you (misunderstood|forgot|missed|ignored|didn'?t)"
    r"|i (meant|said|asked (for|about|you))\b|actually,? (it|the|i|that|no)\b)",
    re.IGNORECASE,
)
PRAISES = re.compile(
    r"^\W*(thanks|thank you|thx|perfect|great|awesome|excellent|brilliant|exactly|that('s| is) (right|correct|perfect|great|it)"
    r"|(that|this|it) (works|worked|helps|helped)|works? (now|perfectly)|well done|good (job|answer))\b",
    re.IGNORECASE,
)
BUT = re.compile(r"\b(but|however|except|although|still (not|doesn'?t|isn'?t|wrong))\b", re.IGNORECASE)


def signals(messages: Sequence[dict[str, Any]], seen: int) -> list[Signal]:
    """What the new messages of a request say about the answer in front of them: nothing, or one signal, the surest."""
    following = next((message for message in messages[seen:] if message.get("role") == "user"), None)
    if seen == 0 or following is None or any(message.get("role") == "tool" for message in messages[seen:]):
        return []  # the results of tools go between: what the user says next is about more than that answer
    said = text_of(following)
    if corrects(said):
        return [CORRECTION]
    asked = next((message for message in reversed(messages[:seen]) if message.get("role") == "user"), None)
    if asked is not None and repeats(text_of(asked), said):
        return [REPEAT]
    return [THANKS] if praises(said) else []


def corrects(said: str) -> bool:
    """Whether a user's turn begins as one that corrects does."""
    return CORRECTS.search(said) is not None


def praises(said: str) -> bool:
    """Whether a user's turn begins with praise, and takes nothing of it back."""
    return PRAISES.search(said) is not None and BUT.search(said) is None


def repeats(asked: str, said: str) -> bool:
    """Whether a user's turn asks once more what the one before asked."""
    first, second = plain(asked), plain(said)
    if min(len(first.split()), len(second.split())) < SHORT_WORDS:
        return first == second != ""
    return SequenceMatcher(None, first, second, autojunk=False).ratio() >= SIMILAR


def plain(text: str) -> str:
    """A text without case, punctuation and superfluous space."""
    return " ".join(re.findall(r"\w+", text[:MAX_CHARS].casefold()))


def text_of(message: dict[str, Any]) -> str:
    """The text of a message, whether it is one or parts."""
    content = message.get("content")
    if isinstance(content, list):
        return " ".join(str(part["text"]) for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return content if isinstance(content, str) else ""
