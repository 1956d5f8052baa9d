"""What happens to a window when a turn comes: importance, plan, refill, done. Where windows and archives are kept is the caller's.

With a head and extraction (`Turns.by_rules`) a turn takes no model, which is what a server does between two
requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import msgspec

from everlearn.memory import orders
from everlearn.memory.importance import BY_HAND, Head, Importance, Surface, counted
from everlearn.memory.mask import Masking, worth
from everlearn.memory.plan import Plan, Rewrite, planned, settled, tightened
from everlearn.memory.refill import Extract, Refill
from everlearn.memory.window import SYSTEM, Chunk, Encode, Window, chunk_of, line, size_of

PINS_SHARE = 0.5  # of the room: what others than its user pin may take so much, or a memory would some day hold nothing else
REFRESHED = 8  # chunks that are weighed again with every turn
Changed = tuple[Window, list[Rewrite]]


class Turns:
    """`stays`: what a chunk was found to be worth stays so, until somebody else weighs it (a model, behind the answer)."""

    def __init__(self, encode: Encode, importance: Importance, refill: Refill, masking: Masking | None = None, stays: bool = False):
        self.encode, self.importance, self.refill, self.masking, self.stays = encode, importance, refill, masking or Masking(), stays

    @classmethod
    def by_rules(cls, encode: Encode, head: Head = BY_HAND) -> Turns:
        return cls(encode, Surface(head), Extract(encode, head.score))

    def add(
        self, window: Window, role: str, text: str, *, hold: bool = True, pinned: bool = False, sources: tuple[int, ...] = ()
    ) -> Changed:
        """A turn with the next number. See `planned` for `hold`."""
        window = msgspec.structs.replace(window, words=counted(window.words, text))
        chunk = chunk_of(self.encode, role, text, window.turn + 1, pinned=pinned, sources=sources)
        late = self.importance.late
        if not late:
            window = self._refreshed(window)
            (value,) = self.importance.of(window, (*window.chunks, chunk), [len(window.chunks)])
            chunk = msgspec.structs.replace(chunk, importance=value)
        plan = planned(window, chunk, self.masking, hold, None if late else self.refill.least)
        if plan.masked and late:
            plan = planned(*self._weighed(window, chunk, hold), self.masking, hold, self.refill.least)
        return self._settled(plan)

    def instruct(self, window: Window, text: str) -> Changed:
        """The system's text: it takes the place of the one before. The same again changes nothing."""
        if [chunk.text for chunk in window.chunks if chunk.role == SYSTEM] == [text]:
            return window, []
        rest = tuple(chunk for chunk in window.chunks if chunk.role != SYSTEM)
        return self.add(msgspec.structs.replace(window, chunks=rest), SYSTEM, text, pinned=True)

    def correct(self, window: Window, number: int, role: str, text: str, pinned: bool = False) -> Changed:
        """`text` as the newest turn in the place of what turn `number` said; pinned if that was, or on wish as long as pins then take at
        most PINS_SHARE of the room."""
        old = [chunk for chunk in window.chunks if number in chunk.sources]
        rest = tuple(chunk for chunk in window.chunks if number not in chunk.sources)
        if pinned:
            pins = size_of(chunk for chunk in rest if chunk.pinned)
            pinned = pins + len(self.encode(line(role, text))) <= PINS_SHARE * window.room
        pinned = pinned or any(chunk.pinned for chunk in old)
        sources = (*(old[0].sources if old else (number,)), window.turn + 1)
        return self.add(msgspec.structs.replace(window, chunks=rest), role, text, pinned=pinned, sources=sources)

    def tighten(self, window: Window, frame: int) -> Changed:
        """The same turns, where what is around them takes `frame` tokens."""
        return self._settled(tightened(window, frame, self.masking, self.refill.least))

    def _refreshed(self, window: Window) -> Window:
        """A few chunks weighed again, others with every turn: what was rare when it was said may have become chatter since."""
        num = 0 if self.stays else len(window.chunks)
        places = sorted({(window.turn * REFRESHED + step) % num for step in range(REFRESHED)}) if num else []
        return msgspec.structs.replace(window, chunks=_valued(self.importance, window, window.chunks, places))

    def _weighed(self, window: Window, chunk: Chunk, hold: bool) -> tuple[Window, Chunk]:
        """The window and what comes to it, with new importances of the chunks that are next to be masked."""
        places = pressed(window, self.masking, hold or chunk.pinned)
        chunks = _valued(self.importance, window, (*window.chunks, chunk), places)
        return msgspec.structs.replace(window, chunks=chunks[:-1]), chunks[-1]

    def _settled(self, plan: Plan) -> Changed:
        texts = self.refill.fill(plan) if plan.holes else []
        keeps = self.importance.late or self.stays
        score = None if keeps else partial(self._worth, plan.window)
        return settled(plan, texts, self.encode, score, orders.beside if self.refill.sees_others else None)

    def _worth(self, window: Window, role: str, text: str) -> float:
        """What a refilled text is worth by itself."""
        return self.importance.of(window, (Chunk(role, text, (), (0,), 0),), [0])[0]


def pressed(window: Window, masking: Masking, hold: bool) -> list[int]:
    """Places of the chunks that a late estimator is asked about when there is pressure, in order: twice as many as can be refilled, the
    least worth; and behind all others the one that comes, unless it is held: it could be cut at once, before anything is known of it."""
    places = [place for place, other in enumerate(window.chunks) if not other.pinned]
    places.sort(key=lambda place: (worth(window.chunks[place], window.turn, masking), window.chunks[place].born))
    return [*sorted(places[: 2 * masking.most]), *([] if hold else [len(window.chunks)])]


def _valued(importance: Importance, window: Window, chunks: tuple[Chunk, ...], places: Sequence[int]) -> tuple[Chunk, ...]:
    """The same chunks, those at these places with new importances."""
    found = dict(zip(places, importance.of(window, chunks, places), strict=True))
    return tuple(msgspec.structs.replace(chunk, importance=found[place]) if place in found else chunk for place, chunk in enumerate(chunks))
