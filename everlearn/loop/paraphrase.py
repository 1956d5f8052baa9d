"""Other wordings of a question, sampled from the model itself and filtered, so that a fact is learned and not a sentence.

Small models rephrase badly: they answer the question, lose the name in it, or repeat it. What is kept asks, names what the original named
(capitalised words and numbers), shares enough of its words, the last one among them, and is not one of those that are there. Pure; who
samples is elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from everlearn.loop.corrected import EMPTY, negated, words

ASK = 'Say this question in other words: "{}"'
# Shown as a conversation: a small model that has seen three rephrases a fourth, and one that was only told to answers the question.
SHOWN = (
    ("What time does the shop close on Sunday?", "When does the shop close on Sunday?"),
    ("Who wrote the song Blue Lake?", "Which person is the author of the song Blue Lake?"),
    ("How many rooms does the hotel have?", "What is the number of rooms in the hotel?"),
)
NAME = re.compile(r"(?<![.!?]\s)(?<!^)\b[A-Z][\w'-]+(?: [A-Z][\w'-]+)*|\d+(?:[.,:/-]\d+)*")  # a run of names is one
LEAST_SHARED, LENGTHS = 0.5, (0.4, 2.5)
# What is asked for. "Which town" may become "where", and "what time" "when", but who founded a firm is not when it was founded.
ASKING = {"who": "who", "whom": "who", "whose": "who", "when": "when", "where": "where", "why": "why", "how": "how"}
OPEN = dict.fromkeys(("what", "which"), "what")
MAX_TOKENS = 48
# Where the model gives too few: frames that change no meaning.
FRAMES = ("{} Please tell me.", "I would like to know: {}", "Quick question. {}", "Can you help me? {}", "Hello! {}", "{} Thank you.")


def requests(question: str, number: int) -> list[list[dict[str, Any]]]:
    """Conversations that end with asking for another wording. What is shown first differs, so answers do too; each is to be answered often
    enough that there are two texts for each of `number` (`each`)."""
    made = []
    for place in range(min(len(SHOWN), 2 * number)):
        shown = [SHOWN[(place + step) % len(SHOWN)] for step in range(len(SHOWN))]
        turns = [turn for asked, said in shown for turn in (_turn("user", ASK.format(asked)), _turn("assistant", said))]
        made.append([*turns, _turn("user", ASK.format(question))])
    return made


def each(number: int) -> int:
    """How many answers to each of the `requests` for `number` wordings."""
    return -(-2 * number // min(len(SHOWN), 2 * number))


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def cleaned(text: str) -> str:
    """The first line that asks something, without quotes and list marks; "" if none does."""
    for line in text.strip().splitlines():
        line = re.sub(r"^\s*(?:[-*\d.)]+\s+|(?:new )?question:\s*)", "", line, flags=re.IGNORECASE).strip().strip("\"'“”` ")
        if "?" in line:
            return line[: line.index("?") + 1]
    return ""


def same_question(question: str, other: str) -> bool:
    """Whether `other` asks what `question` asks, as far as words can tell. The last word of weight is what a question is mostly about: "the
    name of the office dog" without the dog asks something else."""
    names = {name.lower() for name in NAME.findall(question)}
    told = [word for word in words(question) if word not in EMPTY]
    own, theirs = set(told), set(words(other)) - EMPTY
    if not _may_ask_for(asked_for(question), asked_for(other)) or negated(question) != negated(other):
        return False
    if not own or told[-1] not in theirs or not all(re.search(rf"\b{re.escape(name)}\b", other.lower()) for name in names):
        return False
    shared = len(own & theirs) / len(own)
    return shared >= LEAST_SHARED and LENGTHS[0] <= len(other) / len(question) <= LENGTHS[1]


def asked_for(question: str) -> str:
    """The first of its words that says what it asks for: who, when, where, why or how, "what" for an open one, "" for none."""
    return next(filter(None, (ASKING.get(word) or OPEN.get(word) for word in words(question))), "")


def _may_ask_for(own: str, theirs: str) -> bool:
    return own in ("", theirs) or (bool(theirs) and "what" in (own, theirs))


def chosen(question: str, sampled: Sequence[str], number: int) -> list[str]:
    """Up to `number` wordings: those of the model that pass, in their order, then frames around the original. No words twice."""
    known = {tuple(words(question))}
    kept: list[str] = []
    passed = [text for text in map(cleaned, sampled) if same_question(question, text)]
    for text in [*passed, *(frame.format(question) for frame in FRAMES)]:
        if len(kept) < number and tuple(words(text)) not in known:
            known.add(tuple(words(text)))
            kept.append(text)
    return kept
