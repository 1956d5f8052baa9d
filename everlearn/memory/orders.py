"""What a model is asked about a memory, in words, and how its answer is read. No model, no client: the server asks the same as the library.

| order | asks | answer |
|---|---|---|
| `shorter` | a hole's line again in fewer words, with what stands around it | `refilled`: its first paragraph, cut to the cap |
| `keeping` | what becomes of a line: keep, compress, drop | `level_of`: 0 to 1; or `sure_of`, of how the answer would begin |
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from everlearn.memory.plan import Hole
from everlearn.memory.refill import fitted
from everlearn.memory.window import SYSTEM, Chunk, Encode, line

AROUND = 2  # chunks before and behind a chunk that are shown
AROUND_CHARS = 400  # of each of them
BESIDE = 256  # turns that a chunk remembers to have been written beside; the newest
HOLE_CHARS = 6000
LINE_CHARS = 2000
UNDECIDED = 0.5
KEEP, DROP = "keep", "drop"
ALTERNATIVES = 20  # likeliest first tokens of an answer that are looked at
LEVEL_TOKENS = 6
LEVEL = re.compile(r"\W*(keep|drop|compress(?:\W*([1-9]))?)\b", re.IGNORECASE)
SHORTER = (
    "Below is a part of a conversation. One line of it is too long for the memory. Write that line again in at most {words} words. "
    "Keep names, numbers, dates, wishes and decisions word for word; leave out the rest. Write nothing else.\n\n"
    "Before it:\n{before}\nThe line:\n{hole}\nBehind it:\n{after}"
)
KEEPING = (
    "A memory has room for few lines. Say what becomes of the marked line: keep, compress 1 (almost nothing stays) to compress 9 (almost "
    "all stays), or drop.\n\n{before}>>> {line}{after}\nAnswer with keep, compress and a number, or drop."
)


def shorter(chunks: Sequence[Chunk], hole: Hole) -> str:
    """The order to write the chunk in the hole again; the answer is to begin with `begun`."""
    chunk, (ahead, behind) = chunks[hole.place], _around(chunks, hole.place)
    before, after = ("".join(map(_short, others)) for others in (ahead, behind))
    return SHORTER.format(words=max(3, (2 * hole.cap) // 3), before=before, hole=line(chunk.role, chunk.text[:HOLE_CHARS]), after=after)


def _around(chunks: Sequence[Chunk], place: int) -> tuple[list[Chunk], Sequence[Chunk]]:
    """What `shorter` shows before and behind a hole."""
    return [chunk for chunk in chunks[max(0, place - AROUND) : place] if chunk.role != SYSTEM], chunks[place + 1 : place + 1 + AROUND]


def neighbours(chunks: Sequence[Chunk], place: int) -> set[int]:
    """The turns whose chunks whoever answers `shorter` has before its eyes, besides the hole's own."""
    return {turn for chunks in _around(chunks, place) for chunk in chunks for turn in chunk.sources}


def beside(chunks: Sequence[Chunk], place: int) -> tuple[int, ...]:
    """What the chunk's `beside` is once it is answered: also what those in sight, and it itself, were written beside."""
    seen = {turn for chunks in _around(chunks, place) for chunk in chunks for turn in chunk.beside}
    return tuple(sorted(seen | neighbours(chunks, place) | {*chunks[place].beside})[-BESIDE:])


def begun(chunk: Chunk) -> str:
    """How the answer to `shorter` begins, so that a model goes on with the line and says nothing before it."""
    return f"{chunk.role}:"


def refilled(said: str, chunk: Chunk, cap: int, encode: Encode) -> str:
    """What an answer to `shorter` says in the hole, cut to `cap` tokens of its line; "" where it says nothing."""
    return fitted(written(said, chunk), chunk.role, cap, encode)


def written(said: str, chunk: Chunk) -> str:
    """The same, however long: the answer's first paragraph."""
    return said.strip().split("\n\n")[0].strip().removeprefix(begun(chunk)).strip()


def keeping(chunks: Sequence[Chunk], place: int) -> str:
    """The question what becomes of the chunk at `place`."""
    before = "".join(_short(other) for other in chunks[max(0, place - AROUND) : place])
    after = "".join(_short(other) for other in chunks[place + 1 : place + 1 + AROUND])
    return KEEPING.format(before=before, line=line(chunks[place].role, chunks[place].text[:LINE_CHARS]), after=after)


def level_of(answer: str) -> float | None:
    """keep: 1, drop: 0, compress N: N / 10 (5 without a number); None for anything else."""
    found = LEVEL.match(answer)
    if found is None:
        return None
    word = found[1].lower()
    if word == "keep":
        return 1.0
    return 0.0 if word == "drop" else int(found[2] or 5) / 10.0


def sure_of(likely: Mapping[int, float], keep: int, drop: int) -> float | None:
    """How sure a model is that a line is to be kept rather than dropped: p(keep) / (p(keep) + p(drop)), from the log-probabilities of the
    likeliest first tokens of its answer, `keep` and `drop` being those of the two words. One that isn't among them is taken to be as likely
    as the last of them; None if neither is."""
    if not (keep in likely or drop in likely):
        return None
    least = min(likely.values())
    return 1.0 / (1.0 + math.exp(min(likely.get(drop, least) - likely.get(keep, least), 700.0)))


def _short(chunk: Chunk) -> str:
    return line(chunk.role, chunk.text[:AROUND_CHARS])
