"""Memories of a tenant: the window of each as bytes, every turn as it was said, and what was rewritten of it.

A change is one transaction and names the version that it was made from: of two at once, the second gets Conflict and is made anew. What is
forgotten is deleted here, with a note that its last bytes are to be taken from the disk, which `scrub` does then; whatever ends the process
between, the note is there for the next one. What a window is, this file doesn't know.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Collection, Sequence

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.errors import Conflict, InvalidRequest, NotFound, TooLarge
from everlearn.faultpoints import around
from everlearn.store import tables
from everlearn.store.db import Database

memories, turns, rewrites, scrubs = tables.memories, tables.memory_turns, tables.memory_rewrites, tables.memory_scrubs
TABLES = ("memories", "memory_turns", "memory_rewrites")
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")
MAX_MEMORIES = 100_000  # of a tenant
MAX_NUMBER = 2**53  # of a turn, as one may ask for it


class Memory(msgspec.Struct, frozen=True):
    """`version` counts its changes, from 1. `base_model`: whose tokens `budget` and `tokens` count. `policy`: the adapter that writes and
    weighs; "": the base model."""

    tenant: str
    memory_id: str
    version: int
    base_model: str
    budget: int
    tokens: int
    turns: int
    window: bytes
    refill: str = "extract"
    importance: str = "head"
    policy: str = ""
    created_at: float = 0.0
    updated_at: float = 0.0


class Turn(msgspec.Struct, frozen=True):
    number: int
    role: str
    text: str
    supersedes: int | None = None
    created_at: float = 0.0


class Rewrite(msgspec.Struct, frozen=True):
    source: int
    turn: int
    before: str
    after: str | None
    refill: str


def check_id(memory_id: str) -> str:
    """Itself. Raises InvalidRequest for what is no memory's id."""
    if not ID.fullmatch(memory_id):
        raise InvalidRequest(
            f"memory id {memory_id[:140]!r} must be 1 to 128 letters, digits, '.', '_', '-' or '@', a letter or digit first",
            param="memory.id",
        )
    return memory_id


def find(conn: Connection, tenant: str, memory_id: str) -> Memory | None:
    row = conn.execute(sa.select(memories).where(_mine(memories, tenant, memory_id))).first()
    return None if row is None else Memory(**row._mapping)


def get(conn: Connection, tenant: str, memory_id: str) -> Memory:
    found = find(conn, tenant, check_id(memory_id))
    if found is None:
        raise NotFound(f"no memory {memory_id!r}; GET /v1/memories lists yours", param="memory_id")
    return found


def list_memories(conn: Connection, tenant: str, limit: int = 20, after: str | None = None) -> list[Memory]:
    """By id; with `after` those behind that one."""
    where = memories.c.tenant == tenant
    if after is not None:
        where &= memories.c.memory_id > after
    rows = conn.execute(sa.select(memories).where(where).order_by(memories.c.memory_id).limit(limit))
    return [Memory(**row._mapping) for row in rows]


def commit(
    conn: Connection,
    memory: Memory,
    new_turns: Sequence[Turn] = (),
    new_rewrites: Sequence[Rewrite] = (),
    forgotten: Collection[int] = (),
    retold: Collection[int] = (),
    now: float | None = None,
    keep_turns: int = 0,
) -> Memory:
    """Makes `memory` (with the version that it was made from; 0: it is new) what is stored, with its new turns and rewrites, and without
    the `forgotten` turns; of the `retold` ones what was rewritten goes. `keep_turns`: how many of the last turns its archive holds, with
    what was rewritten of them; 0: all. Raises Conflict if it was changed meanwhile. The same change again is refused likewise: nothing
    happens twice."""
    at = time.time() if now is None else now
    mine = _mine(memories, memory.tenant, memory.memory_id)
    there = conn.execute(sa.select(memories.c.version, memories.c.created_at).where(mine)).first()
    if (0 if there is None else there.version) != memory.version:
        raise Conflict(f"memory {memory.memory_id!r} was changed meanwhile; send the request again", param="memory.id")
    stored = msgspec.structs.replace(
        memory, version=memory.version + 1, created_at=at if there is None else there.created_at, updated_at=at
    )
    values = msgspec.structs.asdict(stored)
    key = {"tenant": memory.tenant, "memory_id": memory.memory_id}
    if there is None:
        _check_room(conn, memory.tenant)
        conn.execute(memories.insert(), values)
    else:
        conn.execute(memories.update().where(mine), values)
    if new_turns:
        conn.execute(turns.insert(), [msgspec.structs.asdict(turn) | key | {"created_at": turn.created_at or at} for turn in new_turns])
    if new_rewrites:
        conn.execute(rewrites.insert(), [msgspec.structs.asdict(rewrite) | key for rewrite in new_rewrites])
    if keep_turns and new_turns:
        first = max(turn.number for turn in new_turns) - keep_turns
        conn.execute(rewrites.delete().where(_mine(rewrites, **key) & (rewrites.c.source <= first)))
        conn.execute(turns.delete().where(_mine(turns, **key) & (turns.c.number <= first)))
    if forgotten:
        _note_scrub(conn)
        with around("memory.row"):
            conn.execute(rewrites.delete().where(_mine(rewrites, **key) & rewrites.c.source.in_({*forgotten, *retold})))
            conn.execute(turns.delete().where(_mine(turns, **key) & turns.c.number.in_(forgotten)))
    return stored


def delete(conn: Connection, tenant: str, memory_id: str) -> None:
    """Forgets all of it."""
    get(conn, tenant, memory_id)
    _note_scrub(conn)
    with around("memory.row"):
        for table in (rewrites, turns, memories):
            conn.execute(table.delete().where(_mine(table, tenant, memory_id)))


def scrub(db: Database) -> bool:
    """Takes from the disk what was forgotten and still has bytes there; whether there was anything to do. Blocks for as
    long as copying takes. Raises Unavailable where somebody reads for too long: the notes stay, and it is to be tried again."""
    noted = db.read(lambda conn: list(conn.execute(sa.select(scrubs.c.scrub_id)).scalars()))
    if not noted:
        return False
    db.scrub(TABLES)
    for start in range(0, len(noted), 500):  # those that were noted before; what came since waits for its own
        done = noted[start : start + 500]
        db.write(lambda conn, done=done: conn.execute(scrubs.delete().where(scrubs.c.scrub_id.in_(done)))).result()  # type: ignore[misc]
    return True


def turn(conn: Connection, tenant: str, memory_id: str, number: int) -> Turn:
    found = list_turns(conn, tenant, memory_id, 1, number - 1) if 0 <= number <= MAX_NUMBER else []
    if not found or found[0].number != number:
        raise NotFound(f"memory {memory_id!r} has no turn {number}; it may have been forgotten", param="number")
    return found[0]


def has_turns(conn: Connection, tenant: str, memory_id: str, numbers: Collection[int]) -> bool:
    """Whether the archive has all of them."""
    where = _mine(turns, tenant, memory_id) & turns.c.number.in_(numbers)
    return len(numbers) == conn.execute(sa.select(sa.func.count()).select_from(turns).where(where)).scalar_one()


def list_turns(conn: Connection, tenant: str, memory_id: str, limit: int = 20, after: int = -1) -> list[Turn]:
    """Turns with numbers above `after`, in order."""
    get(conn, tenant, memory_id)
    where = _mine(turns, tenant, memory_id) & (turns.c.number > after)
    columns = (turns.c.number, turns.c.role, turns.c.text, turns.c.supersedes, turns.c.created_at)
    return [Turn(*row) for row in conn.execute(sa.select(*columns).where(where).order_by(turns.c.number).limit(limit))]


def list_rewrites(conn: Connection, tenant: str, memory_id: str, source: int) -> list[Rewrite]:
    """What became of a turn's chunk, the oldest change first."""
    columns = (rewrites.c.source, rewrites.c.turn, rewrites.c.before, rewrites.c.after, rewrites.c.refill)
    where = _mine(rewrites, tenant, memory_id) & (rewrites.c.source == source)
    return [Rewrite(*row) for row in conn.execute(sa.select(*columns).where(where).order_by(rewrites.c.id))]


def superseding(conn: Connection, tenant: str, memory_id: str, number: int) -> int | None:
    """The last turn that takes the place of turn `number`."""
    where = _mine(turns, tenant, memory_id) & (turns.c.supersedes == number)
    return conn.execute(sa.select(sa.func.max(turns.c.number)).where(where)).scalar_one()


def chain(conn: Connection, tenant: str, memory_id: str, numbers: Collection[int]) -> set[int]:
    """The turns with all that they superseded and were superseded by."""
    found: set[int] = set()
    todo = set(numbers)
    while todo:
        found |= todo
        where = _mine(turns, tenant, memory_id) & (turns.c.number.in_(todo) | turns.c.supersedes.in_(todo))
        rows = conn.execute(sa.select(turns.c.number, turns.c.supersedes).where(where)).all()
        todo = {value for row in rows for value in row if value is not None} - found
    return found


def _note_scrub(conn: Connection) -> None:
    conn.execute(scrubs.insert().values(scrub_id=secrets.token_hex(12), created_at=time.time()))


def _check_room(conn: Connection, tenant: str) -> None:
    count = conn.execute(sa.select(sa.func.count()).select_from(memories).where(memories.c.tenant == tenant)).scalar_one()
    if count >= MAX_MEMORIES:
        raise TooLarge(f"there are {count} memories, the limit of a tenant; delete some (DELETE /v1/memories/ID)", param="memory.id")


def _mine(table: sa.Table, tenant: str, memory_id: str) -> sa.ColumnElement[bool]:
    return (table.c.tenant == tenant) & (table.c.memory_id == memory_id)
