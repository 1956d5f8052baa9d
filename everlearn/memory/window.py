"""The window: what a memory shows the model now, under a hard budget of tokens. Values and pure functions; no model, no store.

A chunk is one turn of the history or what is left of it. The window's chunks stand in the order in which their turns came. Some are
protected: those that were pinned, and the last turns. All others may be rewritten shorter, or forgotten; the turns themselves stay in the
archive, and each chunk names the turns that it came from.

A window over its budget can't be made: `Window` refuses it. What is too large for a moment is a `Plan` (everlearn/memory/plan.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from everlearn.errors import InvalidRequest, TooLarge

SYSTEM = "system"
BLOCK = "Earlier in this conversation:\n"  # what older chunks are shown under
RECENT_SHARE = 0.75  # of the budget: pins and the last turns may take so much, then the older of the last turns are no longer protected

Encode = Callable[[str], list[int]]


class Chunk(msgspec.Struct, frozen=True):
    """A piece of the history as the window shows it.

    `tokens` are those of its line (see `line`), so that they can be added up. `sources`: numbers of the archived turns that it came from.
    `born`: the turn at which it entered. `rewrites`: how often it was refilled since. `importance`: 0 (nothing is lost with it) to 1.
    `beside`: turns that a model had before its eyes when it wrote the text, besides its own: some of their words may stand in it.
    """

    role: str
    text: str
    tokens: tuple[int, ...]
    sources: tuple[int, ...]
    born: int
    rewrites: int = 0
    importance: float = 0.5
    pinned: bool = False
    beside: tuple[int, ...] = ()

    @property
    def said(self) -> tuple[str, str]:
        """Who said what: chunks of which this is the same are copies of one line."""
        return self.role, self.text

    def __post_init__(self) -> None:
        if not self.sources:
            raise InvalidRequest("a chunk without sources can't be traced; name the turns it came from", param="sources")
        if not 0.0 <= self.importance <= 1.0:
            raise InvalidRequest(f"importance is {self.importance}; it must lie in 0..1", param="importance")


class Window(msgspec.Struct, frozen=True):
    """`budget` and `frame` in tokens: `frame` is kept free for what stands around the chunks (a chat template's own tokens, say).
    `recent`: how many of the last turns are kept as they were said. `turn`: the number of the last turn that came; -1: none yet.
    `words`: how many turns held which word, as a table of fixed size (everlearn/memory/importance.py); it is no part of what is shown."""

    budget: int
    chunks: tuple[Chunk, ...] = ()
    turn: int = -1
    recent: int = 2
    frame: int = 0
    words: bytes = b""

    def __post_init__(self) -> None:
        if self.recent < 1:
            raise InvalidRequest(f"recent is {self.recent}; the newest turn is always kept as it is, so at least 1", param="recent")
        if self.frame < 0:
            raise InvalidRequest(f"frame is {self.frame}; it must be at least 0", param="frame")
        if self.size + self.frame > self.budget:
            took = f"its chunks take {self.size} tokens" + (f" and what is around them {self.frame}" if self.frame else "")
            raise TooLarge(f"a window of {self.budget} tokens is too small: {took}; raise the budget or pin less", param="budget")

    @property
    def size(self) -> int:
        """Tokens of all chunks."""
        return size_of(self.chunks)

    @property
    def room(self) -> int:
        """Tokens for chunks, in all."""
        return self.budget - self.frame


def size_of(chunks: Iterable[Chunk]) -> int:
    return sum(len(chunk.tokens) for chunk in chunks)


def others(chunks: Sequence[Chunk], place: int) -> list[Chunk]:
    """All that don't say what the chunk at `place` says: without it and its copies. To take away one of two would change nothing."""
    return [chunk for chunk in chunks if chunk.said != chunks[place].said]


def line(role: str, text: str) -> str:
    """How a chunk is spelled. Lines behind the first are indented: what somebody said can't look like another speaker's line."""
    shown = text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\n  ")
    return f"{role}: {shown}\n"


def chunk_of(
    encode: Encode, role: str, text: str, number: int, *, importance: float = 0.5, pinned: bool = False, sources: Sequence[int] = ()
) -> Chunk:
    """The chunk of turn `number`, as it was said."""
    return Chunk(role, text, tuple(encode(line(role, text))), tuple(sources) or (number,), number, 0, importance, pinned)


def protected(chunks: Sequence[Chunk], turn: int, recent: int, room: int) -> frozenset[int]:
    """Places of the chunks that nothing rewrites: pins, the newest turn, and the turns before it, the newest first, as long as all of that
    takes at most RECENT_SHARE of `room` tokens."""
    kept = {place for place, chunk in enumerate(chunks) if chunk.pinned or (chunk.born == turn and chunk.rewrites == 0)}
    taken = size_of(chunks[place] for place in kept)
    for place in range(len(chunks) - 1, -1, -1):
        chunk = chunks[place]
        if place in kept:
            continue
        if chunk.born <= turn - recent or chunk.rewrites or taken + len(chunk.tokens) > RECENT_SHARE * room:
            break
        kept.add(place)
        taken += len(chunk.tokens)
    return frozenset(kept)


def protected_of(window: Window) -> frozenset[int]:
    return protected(window.chunks, window.turn, window.recent, window.room)


def check_room(window: Window, chunk: Chunk) -> None:
    """Raises TooLarge where the chunk can't stand beside the pins."""
    pins = size_of(other for other in window.chunks if other.pinned)
    if len(chunk.tokens) + pins > window.room:
        pinned = f", of which pinned chunks take {pins}" if pins else ""
        raise TooLarge(
            f"the turn takes {len(chunk.tokens)} tokens and the window has room for {window.room}{pinned}; "
            "shorten the turn, pin less or raise the budget",
            param="budget",
        )


def shown(window: Window) -> list[dict[str, str]]:
    """The window as messages: pinned system texts, then the older chunks as lines of one user message, then the last turns as they were
    said. What others said is never shown as the system's. Two messages of one role never follow each other."""
    recent = _recent_places(window)
    older = [chunk for place, chunk in enumerate(window.chunks) if place not in recent and chunk.role != SYSTEM]
    messages: list[dict[str, str]] = []
    heads = [chunk.text for chunk in window.chunks if chunk.role == SYSTEM]
    if heads:
        messages.append({"role": SYSTEM, "content": "\n\n".join(heads)})
    if older:
        _say(messages, "user", BLOCK + "".join(line(chunk.role, chunk.text) for chunk in older).rstrip("\n"))
    for place in sorted(recent):
        _say(messages, window.chunks[place].role, window.chunks[place].text)
    return messages


def sharing(window: Window, turns: set[int]) -> set[int]:
    """These turns, and those that stand in a chunk with one of them."""
    return turns | {turn for chunk in window.chunks if turns & set(chunk.sources) for turn in chunk.sources}


def forgetting(window: Window, gone: set[int]) -> tuple[Window, set[int]]:
    """The window without the chunks that were made of these turns, and without those that were written beside them; and of which turns the
    latter were made, which the archive still has."""
    left = [chunk for chunk in window.chunks if not gone & set(chunk.sources)]
    kept = tuple(chunk for chunk in left if not gone & set(chunk.beside))
    beside = {turn for chunk in left if gone & set(chunk.beside) for turn in chunk.sources}
    return msgspec.structs.replace(window, chunks=kept), beside


def _recent_places(window: Window) -> set[int]:
    """The protected last turns: those at the end that nothing was cut from."""
    kept, places = protected_of(window), set()
    for place in range(len(window.chunks) - 1, -1, -1):
        chunk = window.chunks[place]
        if place not in kept or chunk.rewrites or chunk.born <= window.turn - window.recent or chunk.role == SYSTEM:
            break
        places.add(place)
    return places


def _say(messages: list[dict[str, str]], role: str, text: str) -> None:
    if messages and messages[-1]["role"] == role:
        messages[-1] = {"role": role, "content": messages[-1]["content"] + "\n\n" + text}
    else:
        messages.append({"role": role, "content": text})
