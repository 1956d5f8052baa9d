"""What a model is asked about a memory, in words, and how its answer is read. No model, no client: the server asks the same as the library.

| order | asks | answer |
|---|---|---|
| `shorter` | a hole's line again in fewer words, with what stands around it | `refilled`: its first paragraph, cut to the cap |
| `keeping` | what becomes of a line: keep, compress, drop | `level_of`: 0 to 1 |
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from everlearn.memory.plan import Hole
from everlearn.memory.refill import fitted
from everlearn.memory.window import SYSTEM, Chunk, Encode, line

AROUND = 2  # chunks before and behind a chunk that are shown
AROUND_CHARS = 400  # of each of them
HOLE_CHARS = 6000
LINE_CHARS = 2000
UNDECIDED = 0.5
KEEP, DROP = "keep", "drop"
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
    chunk, place = chunks[hole.place], hole.place
    before = "".join(_short(other) for other in chunks[max(0, place - AROUND) : place] if other.role != SYSTEM)
    after = "".join(_short(other) for other in chunks[place + 1 : place + 1 + AROUND])
    return SHORTER.format(words=max(3, (2 * hole.cap) // 3), before=before, hole=line(chunk.role, chunk.text[:HOLE_CHARS]), after=after)


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


def _short(chunk: Chunk) -> str:
    return line(chunk.role, chunk.text[:AROUND_CHARS])
