"""A memory for agent code: a window over an archive, one call for each turn.

    memory = Memory.open(Path("alice.memory"), tokenizer.encode, budget=2048, system="You are a helpful assistant.")
    memory.add("user", "I moved to Lisbon.")
    prompt = memory.messages()              # for any chat model; at most `budget` tokens
    memory.add("assistant", answer)

Who estimates importance and who refills is said when it is opened. It knows nothing of the server, which keeps memories of its own.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import msgspec

from everlearn.errors import Conflict, InvalidRequest, NotFound
from everlearn.memory.archive import Archive, Turn, now
from everlearn.memory.importance import BY_HAND, Importance, Surface
from everlearn.memory.mask import Masking
from everlearn.memory.refill import Extract, Refill
from everlearn.memory.turns import Changed, Turns
from everlearn.memory.window import SYSTEM, Encode, Window, forgetting, shown

ROLES = ("system", "user", "assistant", "tool")


class Memory:
    """`open` makes one. Not for several threads at once."""

    def __init__(self, archive: Archive, turns: Turns, window: Window):
        self.archive, self.turns, self.window = archive, turns, window
        self.version = archive.window()[1]

    @classmethod
    def open(
        cls,
        path: Path,
        encode: Encode,
        budget: int,
        *,
        system: str = "",
        recent: int = 2,
        frame: int = 0,
        importance: Importance | None = None,
        refill: Refill | None = None,
        masking: Masking | None = None,
    ) -> Memory:
        """The memory in the file `path`, new or as it was left. `budget`, `recent` and `system` are those of a new one; one that is there
        keeps its own and must have been made with the same budget."""
        archive = Archive(path)
        try:
            window, _ = archive.window()
            if window is None:
                window = Window(budget, (), -1, recent, frame)
            elif window.budget != budget:
                raise Conflict(f"the memory in {path.name} has a budget of {window.budget} tokens, not {budget}", param="budget")
            turns = Turns(encode, importance or Surface(), refill or Extract(encode, BY_HAND.score), masking)
            memory = cls(archive, turns, window)
            if system and window.turn < 0:
                memory.add(SYSTEM, system, pinned=True)
        except BaseException:
            archive.close()
            raise
        return memory

    def close(self) -> None:
        self.archive.close()

    def messages(self) -> list[dict[str, str]]:
        """What the model is to see now."""
        return shown(self.window)

    def add(self, role: str, text: str, *, pinned: bool = False, hold: bool | None = None) -> Window:
        """A turn. `hold`: it must stay as it was said, and is refused where it can't (the default for all but an assistant's, which was
        said already and may be shortened at once)."""
        if role not in ROLES:
            raise InvalidRequest(f"role {role!r} is none; roles are {', '.join(ROLES)}", param="role")
        changed = self.turns.add(self.window, role, text, hold=role != "assistant" if hold is None else hold, pinned=pinned)
        return self._told(changed, Turn(changed[0].turn, role, text, None, now()))

    def pin(self, number: int, pinned: bool = True) -> Window:
        """The chunk of turn `number` is no longer rewritten (or is again). Raises NotFound where it left the window."""
        place = self._place(number)
        chunks = list(self.window.chunks)
        chunks[place] = msgspec.structs.replace(chunks[place], pinned=pinned)
        return self._commit(msgspec.structs.replace(self.window, chunks=tuple(chunks)))

    def correct(self, number: int, text: str) -> Window:
        """What was said in turn `number` leaves the window and `text` comes as its newest chunk: both at once, or neither. The old turn
        stays in the archive; `forget` takes it from there too."""
        old = self.archive.turn(number)
        changed = self.turns.correct(self.window, number, old.role, text)
        return self._told(changed, Turn(changed[0].turn, old.role, text, number, now()))

    def forget(self, number: int) -> Window:
        """Takes turn `number`, what it superseded or was superseded by, and every chunk made of those, out of the window and the archive.
        What a model wrote with one of them in sight leaves the window too. No byte of them stays."""
        self.archive.turn(number)
        gone = self.archive.chain(number)
        window, beside = forgetting(self.window, gone)
        self._commit(window, gone, beside)
        self.archive.scrub()
        return window

    def _told(self, changed: Changed, turn: Turn) -> Window:
        window, rewrites = changed
        self.version = self.archive.commit(self.version, window, [turn], rewrites, self.turns.refill.name)
        self.window = window
        return window

    def _commit(self, window: Window, forgotten: Collection[int] = (), retold: Collection[int] = ()) -> Window:
        self.version = self.archive.commit(self.version, window, forgotten=forgotten, retold=retold)
        self.window = window
        return window

    def _place(self, number: int) -> int:
        for place, chunk in enumerate(self.window.chunks):
            if number in chunk.sources:
                return place
        raise NotFound(f"the window has no chunk of turn {number}; it may have been forgotten under pressure", param="number")
