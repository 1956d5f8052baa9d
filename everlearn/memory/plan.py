"""One turn of a memory: a chunk comes, others are masked, allotted and refilled. Two pure functions with the refill between them.

    plan = planned(window, chunk)              # mask and allocate
    texts = refill.fill(plan)
    window, rewrites = settled(plan, texts, encode)

Who refills (a model, a rule, a server's queue) and how long that takes is the caller's; the window in between is the old one.
A turn costs what the window holds, however long the history is: at most `budget` chunks are looked at, and at most `most` refilled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from everlearn.errors import InternalError, TooLarge
from everlearn.memory.allocate import allocate
from everlearn.memory.mask import Masking, select, worth
from everlearn.memory.window import Chunk, Encode, Window, check_room, line, protected, size_of

FLOOR = 8  # tokens: a line with a role and a few words
Least = Callable[[Window, Chunk], int]  # tokens of a chunk's line below which a refill has nothing to say


class Hole(msgspec.Struct, frozen=True):
    """A masked chunk that is to be written anew. `place` in the plan's chunks; `cap` in tokens of its line, role and line end included."""

    place: int
    cap: int


class Plan(msgspec.Struct, frozen=True):
    """What shall become of the window. `budgets` has a number of tokens for each masked place: 0 is forgotten."""

    window: Window
    chunks: tuple[Chunk, ...]
    turn: int
    masked: tuple[int, ...] = ()
    budgets: tuple[int, ...] = ()

    @property
    def holes(self) -> tuple[Hole, ...]:
        """What has to be refilled: budgets that are neither 0 nor the whole chunk."""
        pairs = zip(self.masked, self.budgets, strict=True)
        return tuple(Hole(place, budget) for place, budget in pairs if 0 < budget < len(self.chunks[place].tokens))


class Rewrite(NamedTuple):
    """One change of a chunk: `after` None means that it was forgotten. `cap`: the tokens that a refill had for its line; 0: none."""

    before: Chunk
    after: Chunk | None
    cap: int = 0


def planned(
    window: Window, chunk: Chunk, masking: Masking = Masking(), hold: bool = True, least: Least | None = None
) -> Plan:  # it never changes
    """The plan for a window to which `chunk` comes as its newest turn. With `hold` it stays as it was said, and TooLarge is raised where
    it has no room beside the pins; without (an answer that was given, however long) it may be rewritten at once."""
    if hold:
        check_room(window, chunk)
    chunks = (*window.chunks, chunk)
    return _pressed(window, chunks, max(window.turn, chunk.born), masking, hold, least)


def tightened(window: Window, frame: int, masking: Masking = Masking(), least: Least | None = None) -> Plan:  # it never changes
    """The plan for the same window with another `frame`: where what is around the chunks takes more than was thought."""
    pins = size_of(chunk for chunk in window.chunks if chunk.pinned or (chunk.born == window.turn and not chunk.rewrites))
    if pins + frame > window.budget:
        raise TooLarge(
            f"a window of {window.budget} tokens has no room for its newest turn and its pins ({pins} tokens, {frame} around them); "
            "shorten them or raise the budget",
            param="budget",
        )
    squeezed = msgspec.structs.replace(window, chunks=(), frame=frame)
    return _pressed(squeezed, window.chunks, window.turn, masking, True, least)


def _pressed(window: Window, chunks: tuple[Chunk, ...], turn: int, masking: Masking, hold: bool, least: Least | None) -> Plan:
    over = size_of(chunks) - window.room
    if over <= 0:
        return Plan(window, chunks, turn)
    valued = _once(chunks)
    kept = protected(chunks, turn, window.recent, window.room)
    if not hold:
        last = len(chunks) - 1
        kept = kept - {last} if not chunks[last].pinned else kept
    need = over + int(masking.slack * window.room)
    masked = select(valued, kept, need, turn, masking)
    held = size_of(chunks[place] for place in masked)
    if held < over:  # the last turns themselves are too long: only pins and the newest are beyond reach
        kept = frozenset(place for place in kept if chunks[place].pinned or (hold and chunks[place].born == turn))
        masked = select(valued, kept, need, turn, masking)
        held = size_of(chunks[place] for place in masked)
    free = max(held - need, 0) if held > need else max(held - over, 0)
    worths = [worth(valued[place], turn, masking) for place in masked]
    lengths = [len(chunks[place].tokens) for place in masked]
    floors = [FLOOR if least is None else max(1, least(window, chunks[place])) for place in masked]
    budgets = _at_most(allocate(worths, lengths, free, floors), worths, lengths, masking.most)
    return Plan(window, chunks, turn, tuple(masked), budgets)


def _once(chunks: tuple[Chunk, ...]) -> tuple[Chunk, ...]:
    """The same, valued for one plan: of a line that stands there several times the newest copy, or a pinned one, stands for all, with the
    highest of their importances, and the others are worth nothing. Else whoever is mistaken about a line is mistaken about each of its
    copies, and these fill the window."""
    copies: dict[tuple[str, str], list[int]] = {}
    for place, chunk in enumerate(chunks):
        copies.setdefault(chunk.said, []).append(place)
    valued = list(chunks)
    for places in copies.values():
        if len(places) > 1:
            stays = max(places, key=lambda place: (chunks[place].pinned, place))
            most = max(chunks[place].importance for place in places)
            for place in places:
                valued[place] = msgspec.structs.replace(chunks[place], importance=most if place == stays else 0.0)
    return tuple(valued)


def _at_most(budgets: list[int], worths: Sequence[float], lengths: Sequence[int], most: int) -> tuple[int, ...]:
    """The same, with at most `most` refills: of more, those of least worth are forgotten."""
    holes = [i for i, budget in enumerate(budgets) if 0 < budget < lengths[i]]
    for i in sorted(holes, key=lambda i: (-worths[i], -i))[most:]:
        budgets[i] = 0
    return tuple(budgets)


def settled(
    plan: Plan,
    texts: Sequence[str],
    encode: Encode,
    score: Callable[[str, str], float] | None = None,
    beside: Callable[[Sequence[Chunk], int], tuple[int, ...]] | None = None,
) -> tuple[Window, list[Rewrite]]:
    """The window after the plan, and what became of the masked chunks. `texts`: one for each of `plan.holes`, in order; an empty one
    forgets its chunk. `score` says what a text of a role is worth that was refilled; without, it is worth what it was.
    `beside` says which turns whoever wrote the text of a place had in sight; without, none. Raises InternalError where a text is over its
    cap: a refill that does that is broken."""
    fills = dict(zip((hole.place for hole in plan.holes), texts, strict=True))
    caps = {hole.place: hole.cap for hole in plan.holes}
    forgotten = {place for place, budget in zip(plan.masked, plan.budgets, strict=True) if budget == 0}
    chunks: list[Chunk] = []
    rewrites: list[Rewrite] = []
    for place, chunk in enumerate(plan.chunks):
        after: Chunk | None = chunk
        if place in forgotten or (place in fills and not fills[place].strip()):
            after = None
        elif place in fills:
            tokens = tuple(encode(line(chunk.role, fills[place])))
            if len(tokens) > caps[place]:
                raise InternalError(f"a refill has {len(tokens)} tokens, above its cap of {caps[place]}")
            importance = chunk.importance if score is None else score(chunk.role, fills[place])
            after = msgspec.structs.replace(chunk, text=fills[place], tokens=tokens, rewrites=chunk.rewrites + 1, importance=importance)
            after = after if beside is None else msgspec.structs.replace(after, beside=beside(plan.chunks, place))
        if after is not chunk:
            rewrites.append(Rewrite(chunk, after, caps.get(place, 0)))
        if after is not None:
            chunks.append(after)
    return msgspec.structs.replace(plan.window, chunks=tuple(chunks), turn=plan.turn), rewrites
