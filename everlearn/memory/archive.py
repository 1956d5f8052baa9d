"""The archive: every turn as it was said, in one SQLite file, with the window and what was rewritten of it. Nothing of it goes into a
prompt.

The form for agent code that has no server; a server keeps the same in its store. One process writes at a time (SQLite sees to it). The turn
and the window that has it are one transaction: killed at any moment, the file holds both or neither.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from everlearn.errors import Conflict, InvalidRequest, NotFound, Unavailable
from everlearn.memory.plan import Rewrite
from everlearn.memory.window import Window

SCHEMA = """
CREATE TABLE IF NOT EXISTS turns (number INTEGER PRIMARY KEY, role TEXT NOT NULL, text TEXT NOT NULL, supersedes INTEGER, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS rewrites (
    id INTEGER PRIMARY KEY, turn INTEGER NOT NULL, source INTEGER NOT NULL, before TEXT NOT NULL, after TEXT, refill TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS rewrites_source ON rewrites (source);
CREATE TABLE IF NOT EXISTS state (id INTEGER PRIMARY KEY CHECK (id = 1), version INTEGER NOT NULL, window BLOB NOT NULL);
"""
UNSCRUBBED = 1  # SQLite's user_version while bytes of what was forgotten may still be in the file


class Turn(NamedTuple):
    """`supersedes`: the turn that this one corrects."""

    number: int
    role: str
    text: str
    supersedes: int | None
    at: float


class PastRewrite(NamedTuple):
    """What became of a chunk of turn `source` when turn `turn` came. `after` None: it left the window."""

    turn: int
    source: int
    before: str
    after: str | None
    refill: str


class Archive:
    """`path`: the file; made where it isn't."""

    def __init__(self, path: Path):
        self.path = path
        self._db = sqlite3.connect(path, isolation_level=None)
        # What is deleted is overwritten, here and in the file of what isn't in it yet: to forget means that no byte stays.
        self._db.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA secure_delete = ON;" + SCHEMA)
        if self._db.execute("PRAGMA user_version").fetchone()[0] == UNSCRUBBED:  # whoever forgot was killed before the last bytes were gone
            with suppress(Unavailable):
                self.scrub()

    def close(self) -> None:
        self._db.close()

    def window(self) -> tuple[Window | None, int]:
        """The last window and its version; None and 0 before the first."""
        row = self._db.execute("SELECT window, version FROM state").fetchone()
        return (None, 0) if row is None else (msgspec.msgpack.decode(row[0], type=Window), row[1])

    def commit(
        self,
        version: int,
        window: Window,
        turns: Sequence[Turn] = (),
        rewrites: Sequence[Rewrite] = (),
        refill: str = "",
        forgotten: Collection[int] = (),
        retold: Collection[int] = (),
    ) -> int:
        """All of it in one transaction; the new version. Of `retold` turns what was rewritten goes. Raises Conflict where the
        window isn't at `version` any more."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            if self.window()[1] != version:
                raise Conflict(f"the memory in {self.path.name} was changed meanwhile; open it again", param="version")
            self._db.executemany("INSERT INTO turns VALUES (?, ?, ?, ?, ?)", turns)
            self._db.executemany(
                "INSERT INTO rewrites (turn, source, before, after, refill) VALUES (?, ?, ?, ?, ?)",
                [(window.turn, r.before.sources[0], r.before.text, None if r.after is None else r.after.text, refill) for r in rewrites],
            )
            if forgotten:
                self._db.execute(f"PRAGMA user_version = {UNSCRUBBED}")  # part of the transaction
            self._db.executemany("DELETE FROM rewrites WHERE source = ?", [(number,) for number in (*forgotten, *retold)])
            self._db.executemany("DELETE FROM turns WHERE number = ?", [(number,) for number in forgotten])
            packed = msgspec.msgpack.encode(window)
            self._db.execute("INSERT OR REPLACE INTO state VALUES (1, ?, ?)", (version + 1, packed))
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        return version + 1

    def scrub(self) -> None:
        """Writes the file anew from what is left in it: pages that were split may still hold bytes of what was deleted. What a kill keeps
        from it is done when the archive is opened again. Raises Unavailable where another connection is reading, so that its log must stay;
        call it again."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.execute("VACUUM")
        busy, *_ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise Unavailable("somebody reads the archive, so what was forgotten is still in its log; scrub again when that's over")
        self._db.execute("PRAGMA user_version = 0")

    def turn(self, number: int) -> Turn:
        row = self._db.execute("SELECT * FROM turns WHERE number = ?", (number,)).fetchone()
        if row is None:
            raise NotFound(f"the archive has no turn {number}; it may have been forgotten", param="number")
        return Turn(*row)

    def turns(self, first: int = 0, most: int = 100) -> list[Turn]:
        """Turns from number `first` on."""
        if most < 1:
            raise InvalidRequest(f"most is {most}; it must be at least 1", param="most")
        rows = self._db.execute("SELECT * FROM turns WHERE number >= ? ORDER BY number LIMIT ?", (first, most))
        return [Turn(*row) for row in rows]

    def chain(self, number: int) -> set[int]:
        """The turn with all that it superseded and was superseded by."""
        found, todo = set(), {number}
        while todo:
            found |= todo
            marks = ", ".join("?" * len(todo))
            rows = self._db.execute(
                f"SELECT number, supersedes FROM turns WHERE number IN ({marks}) OR supersedes IN ({marks})", [*todo, *todo]
            ).fetchall()
            todo = {value for row in rows for value in row if value is not None} - found
        return found

    def rewrites(self, source: int) -> list[PastRewrite]:
        """What became of a turn's chunk, the oldest change first."""
        rows = self._db.execute("SELECT turn, source, before, after, refill FROM rewrites WHERE source = ? ORDER BY id", (source,))
        return [PastRewrite(*row) for row in rows]


def now() -> float:
    return time.time()
