"""Refill: what is written into the holes of a plan, each under its cap.

A refill takes all holes at once and knows what stands around them, so one that writes them in parallel (a masked-diffusion model, say) has
the same place as one that writes them one by one. Which refill is used is said by name; none falls back on another by itself.

| name | what it writes |
|---|---|
| `extract` | the sentences that matter most, word for word; clauses where no sentence fits |
| `surest` | the same by a policy that is asked about each sentence (everlearn/memory/decide.py) |
| `forget` | nothing: masked chunks are dropped |
| `generate` | what a model writes (everlearn/memory/generate.py) |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol

from everlearn.memory.importance import MOST_SENTENCES, SENTENCES, SPLIT_CHARS, split
from everlearn.memory.plan import Plan
from everlearn.memory.window import Chunk, Encode, Window, line

CLAUSES = re.compile(r"(?<=[,;:])\s+|\s+(?=\b(?:and|but|because|which|while|so)\b)")

LONG = 64  # tokens of a sentence: of a longer one a clause is better than nothing

Score = Callable[[Window, str, str], float]  # (window, role, text) -> how much is lost with it


class Refill(Protocol):
    """`sees_others`: its texts may hold words of the chunks around (`orders.beside`)."""

    name: str
    sees_others: bool

    def fill(self, plan: Plan) -> list[str]:
        """A text for each of `plan.holes`, in order; "" forgets it. A hole names a place in `plan.chunks`, which stand there as they were
        before. The line of each text has at most the hole's `cap` tokens."""
        ...

    def least(self, window: Window, chunk: Chunk) -> int:
        """Tokens of the chunk's line below which there is nothing to say: it gets as much, or is forgotten."""
        ...


class Forget:
    name = "forget"
    sees_others = False

    def fill(self, plan: Plan) -> list[str]:
        return [""] * len(plan.holes)

    def least(self, window: Window, chunk: Chunk) -> int:
        return len(chunk.tokens)


class Extract:
    """`score` says what a sentence is worth (everlearn/memory/importance.py); nothing is written that wasn't said."""

    name = "extract"
    sees_others = False

    def __init__(self, encode: Encode, score: Score):
        self.encode, self.score = encode, score

    def fill(self, plan: Plan) -> list[str]:
        return [self._shorter(plan.window, plan.chunks[hole.place], hole.cap) for hole in plan.holes]

    def least(self, window: Window, chunk: Chunk) -> int:
        """The best sentence; of one that is very long, as much as a clause may take."""
        sentences, ranked = self._ranked(window, chunk.role, chunk.text[:SPLIT_CHARS], SENTENCES)
        return min(len(self.encode(line(chunk.role, sentences[ranked[0]]))), LONG) if ranked else len(chunk.tokens)

    def _shorter(self, window: Window, chunk: Chunk, cap: int) -> str:
        sentences, ranked = self._ranked(window, chunk.role, chunk.text[:SPLIT_CHARS], SENTENCES)
        kept = self._fitting(chunk.role, sentences, ranked, cap)
        if not kept and ranked:
            sentences, ranked = self._ranked(window, chunk.role, sentences[ranked[0]], CLAUSES)
            kept = self._fitting(chunk.role, sentences, ranked, cap)
        return " ".join(sentences[i] for i in sorted(kept))

    def _ranked(self, window: Window, role: str, text: str, ends: re.Pattern[str]) -> tuple[list[str], list[int]]:
        """The pieces of a text, and their places by falling score."""
        pieces = split(text, ends)[:MOST_SENTENCES]
        scores = self._scores(window, role, text, pieces)
        return pieces, sorted(range(len(pieces)), key=lambda i: (-scores[i], i))

    def _scores(self, window: Window, role: str, text: str, pieces: Sequence[str]) -> list[float]:
        """Of the pieces of a text."""
        return [self.score(window, role, piece) for piece in pieces]

    def _fitting(self, role: str, pieces: Sequence[str], ranked: Sequence[int], cap: int) -> list[int]:
        """Of the pieces in the order of their rank, those that still fit when they come."""
        kept: list[int] = []
        for i in ranked:
            if len(pieces[i]) > 16 * cap:  # no tokenizer says so much in one token; encoding it would only cost time
                continue
            tried = sorted([*kept, i])
            if len(self.encode(line(role, " ".join(pieces[j] for j in tried)))) <= cap:
                kept = tried
        return kept


def fitted(text: str, role: str, cap: int, encode: Encode) -> str:
    """As many of the text's first words as fit a line of `cap` tokens; "" where not one does."""
    words = text.split()[:cap]  # a word has at least a token
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        if len(encode(line(role, " ".join(words[:middle])))) <= cap:
            low = middle
        else:
            high = middle - 1
    return " ".join(words[:low])
