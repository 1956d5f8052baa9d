"""Ways to remember a history within a budget of tokens, all behind one protocol: ours under several settings, and the baselines.

| name | what it shows when it is asked |
|---|---|
| `full` | the whole history, however long: what there was to know |
| `last` | the last turns |
| `random` | turns that chance left |
| `bm25` | pieces that BM25 finds for the question in the whole history, which it keeps: the one that looks something up |
| `summary` | a summary that a model writes again whenever the turns behind it grow too long, and those turns |
| `overwrite` | notes that a model writes anew after each portion of the history (MemAgent, arXiv 2507.02259, untrained) |
| `extract` | the window: importance by a head, sentences kept word for word |
| `forget` | the window: importance by a head, chunks whole or gone |
| `generate` | the window: importance by a head, chunks rewritten by a model |
| `decided` | the window: importance by how sure a policy is of keeping, sentences kept word for word |
| `policy` | the window: the same policy rewrites chunks too |

None shows more than the budget, but for `full`.
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

from everlearn.errors import InvalidRequest
from everlearn.memory.importance import BY_HAND, Head, Importance, Surface, content_words
from everlearn.memory.refill import Extract, Forget, Refill, fitted
from everlearn.memory.suites import words_of
from everlearn.memory.turns import Turns
from everlearn.memory.window import Encode, Window, line

Write = Callable[[str, int], str]  # (order, most tokens) -> what a model writes

RULES = ("full", "last", "random", "bm25", "extract", "forget")
WRITERS = ("summary", "overwrite", "generate", "decided", "policy")
BY_HEAD = ("extract", "forget", "generate", "decided")  # of them, those whose chunks or sentences a head weighs
PIECE = 96  # tokens: what BM25 finds is a turn, or a part of one that isn't longer than this
PORTION = 1024  # tokens of the history that `overwrite` reads at once, if not said otherwise
SUMMARY = (
    "Summarise what has to be remembered of this conversation in at most {words} words. Keep names, numbers, wishes and decisions."
    "\n\n{text}"
)
NOTES = (
    "You keep notes of at most {words} words about a conversation. Write them anew so that they hold what has to be remembered of the old "
    "notes and of what was said since. Keep names, numbers, wishes and decisions.\n\nOld notes:\n{notes}\n\nSaid since:\n{text}"
)


class Method(Protocol):
    name: str

    def read(self, role: str, text: str) -> None:
        """The next turn."""
        ...

    def pieces(self, question: str) -> list[str]:
        """What would stand in the prompt if this were asked now, piece by piece."""
        ...


class Full:
    name = "full"

    def __init__(self) -> None:
        self.lines: list[str] = []

    def read(self, role: str, text: str) -> None:
        self.lines.append(line(role, text))

    def pieces(self, question: str) -> list[str]:
        return self.lines


class Last:
    """`drop` chooses which line goes while they are too long: the first, or one by chance."""

    def __init__(self, encode: Encode, budget: int, chance: random.Random | None = None):
        self.encode, self.budget, self.chance = encode, budget, chance
        self.name = "last" if chance is None else "random"
        self.lines: deque[tuple[str, int]] = deque()
        self.size = 0

    def read(self, role: str, text: str) -> None:
        said = line(role, text)
        tokens = len(self.encode(said))
        if tokens > self.budget:
            said = line(role, fitted(text, role, self.budget, self.encode))
            tokens = len(self.encode(said))
        self.lines.append((said, tokens))
        self.size += tokens
        while self.size > self.budget:
            place = 0 if self.chance is None else self.chance.randrange(len(self.lines))
            self.size -= self.lines[place][1]
            del self.lines[place]

    def pieces(self, question: str) -> list[str]:
        return [said for said, _ in self.lines]


class Bm25:
    """Okapi BM25 (Robertson and Zaragoza, 2009) with k1 1.5 and b 0.75 over pieces of at most PIECE tokens; the best that fit, in order."""

    name = "bm25"

    def __init__(self, encode: Encode, budget: int):
        self.encode, self.budget = encode, budget
        self.rows: list[tuple[str, int, Counter[str], int]] = []
        self.holders: Counter[str] = Counter()

    def read(self, role: str, text: str) -> None:
        words = text.split()
        start = 0
        while start < len(words):
            part = fitted(" ".join(words[start : start + PIECE]), role, PIECE, self.encode) or words[start]
            start += len(part.split())
            counts = Counter(content_words(part))
            self.holders.update(counts.keys())
            said = line(role, part)
            self.rows.append((said, len(self.encode(said)), counts, sum(counts.values())))

    def pieces(self, question: str) -> list[str]:
        wanted, total = words_of(question), len(self.rows)
        mean = sum(row[3] for row in self.rows) / max(total, 1)
        weights = {word: math.log(1 + (total - held + 0.5) / (held + 0.5)) for word in wanted if (held := self.holders[word])}

        def score(place: int) -> float:
            _, _, counts, length = self.rows[place]
            damp = 1.5 * (0.25 + 0.75 * length / max(mean, 1e-9))
            return sum(weight * counts[word] * 2.5 / (counts[word] + damp) for word, weight in weights.items() if word in counts)

        ranked = sorted(((score(place), place) for place in range(total)), key=lambda pair: (-pair[0], -pair[1]))
        found, left = [], self.budget
        for value, place in ranked:
            if value > 0.0 and self.rows[place][1] <= left:
                found.append(place)
                left -= self.rows[place][1]
        return [self.rows[place][0] for place in sorted(found)]


class Windowed:
    """The window of everlearn/memory/window.py, without an archive behind it."""

    def __init__(self, encode: Encode, budget: int, refill: Refill, importance: Importance, name: str):
        self.turns, self.name = Turns(encode, importance, refill), name
        self.window = Window(budget)

    def read(self, role: str, text: str) -> None:
        self.window, _ = self.turns.add(self.window, role, text, hold=False)

    def pieces(self, question: str) -> list[str]:
        return [line(chunk.role, chunk.text) for chunk in self.window.chunks]


class Summary:
    """Recursive: half of the budget for the summary, the rest for the turns behind it; both are summarised when that is full."""

    name = "summary"

    def __init__(self, encode: Encode, budget: int, write: Write):
        self.encode, self.budget, self.write = encode, budget, write
        self.text = ""
        self.recent = Last(encode, budget - budget // 2)

    def read(self, role: str, text: str) -> None:
        said = line(role, text)
        if self.recent.size + len(self.encode(said)) > self.recent.budget and self.recent.lines:
            told = self.text + "\n" + "".join(self.recent.pieces(""))
            most = self.budget // 2
            self.text = cut(self.write(SUMMARY.format(words=most // 2, text=told.strip()), most), most, self.encode)
            self.recent = Last(self.encode, self.recent.budget)
        self.recent.read(role, text)

    def pieces(self, question: str) -> list[str]:
        return [self.text, *self.recent.pieces(question)] if self.text else self.recent.pieces(question)


class Overwrite:
    name = "overwrite"

    def __init__(self, encode: Encode, budget: int, write: Write, portion: int = PORTION):
        self.encode, self.budget, self.write, self.portion = encode, budget, write, portion
        self.notes = ""
        self.unread = Last(encode, portion)

    def read(self, role: str, text: str) -> None:
        if self.unread.size + len(self.encode(line(role, text))) > self.portion:
            self._take()
        self.unread.read(role, text)

    def pieces(self, question: str) -> list[str]:
        if self.unread.lines:
            self._take()
        return [self.notes] if self.notes else []

    def _take(self) -> None:
        order = NOTES.format(words=self.budget // 2, notes=self.notes or "(none)", text="".join(self.unread.pieces("")).strip())
        self.notes = cut(self.write(order, self.budget), self.budget, self.encode)
        self.unread = Last(self.encode, self.portion)


def cut(text: str, most: int, encode: Encode) -> str:
    """A model's text within `most` tokens."""
    return text.strip() if len(encode(text.strip())) <= most else fitted(text, "", most, encode)


def method(
    name: str,
    encode: Encode,
    budget: int,
    *,
    seed: int = 0,
    head: Head = BY_HAND,
    write: Write | None = None,
    refill: Refill | None = None,
    decided: Importance | None = None,
    portion: int = PORTION,
) -> Method:
    """The method of that name. `write` is asked for by `summary` and `overwrite`, `refill` by `generate`, `decided` by `decided` and both
    by `policy`; `portion` is what `overwrite` reads at once, in tokens."""
    if name in ("extract", "forget"):
        return Windowed(encode, budget, Extract(encode, head.score) if name == "extract" else Forget(), Surface(head), name)
    if name == "generate" and refill is not None:
        return Windowed(encode, budget, refill, Surface(head), name)
    if name == "decided" and decided is not None:
        return Windowed(encode, budget, Extract(encode, head.score), decided, name)
    if name == "policy" and decided is not None and refill is not None:
        return Windowed(encode, budget, refill, decided, name)
    if name == "summary" and write is not None:
        return Summary(encode, budget, write)
    if name == "overwrite" and write is not None:
        return Overwrite(encode, budget, write, portion)
    simple: dict[str, Callable[[], Method]] = {
        "full": Full,
        "last": lambda: Last(encode, budget),
        "random": lambda: Last(encode, budget, random.Random(seed)),
        "bm25": lambda: Bm25(encode, budget),
    }
    if name not in simple:
        why = "needs a model" if name in WRITERS else f"is none; there are {', '.join((*RULES, *WRITERS))}"
        raise InvalidRequest(f"method {name!r} {why}", param="methods")
    return simple[name]()
