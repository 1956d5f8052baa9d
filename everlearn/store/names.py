"""Names of adapters: `support` means `support@3` until somebody moves it, and `support@3` means the same bytes for ever.

A name belongs to a tenant. Giving a name to a checkpoint makes the next numbered version; the first one is what the name means,
later ones only when they are moved to. Numbers are never used twice. While a version is there, its checkpoint is kept: it doesn't
expire and can't be deleted or overwritten (everlearn/store/checkpoints.py asks `tables.named_versions`).
"""

from __future__ import annotations

import re
import time

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.errors import Conflict, InvalidRequest, NotFound
from everlearn.faultpoints import around
from everlearn.store import checkpoints, runs, tables
from everlearn.store.checkpoints import TinkerPath

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_NUMBER = 2**31 - 1
MAX_NOTE = 500
SAMPLED = ("sampler_weights", "weights")  # kinds of checkpoints that can be sampled
names, table, moves = tables.adapter_names, tables.named_versions, tables.name_moves


class NamedVersion(msgspec.Struct, frozen=True):
    """One version of a name. `version` and `folder` are what the engine samples; `base_model` is what its run was created on;
    `current`: the bare name means this one now."""

    tenant: str
    name: str
    number: int
    path: str
    base_model: str
    version: str
    folder: str
    note: str
    created_at: float
    current: bool

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"


class Move(msgspec.Struct, frozen=True):
    """From `created_at` on, the name meant `number`."""

    name: str
    number: int
    note: str
    created_at: float


def parse(text: str) -> tuple[str, int | None]:
    """`support` or `support@8` as name and number. InvalidRequest where it can be neither."""
    name, at, number = text.partition("@")
    if not NAME.fullmatch(name):
        rule = "must be 1 to 64 letters, digits, '.', '_' or '-', and begin with a letter or digit"
        raise InvalidRequest(f"adapter name {name[:80]!r} {rule}", param="name")
    if not at:
        return name, None
    if not re.fullmatch(r"[1-9][0-9]{0,9}", number) or int(number) > MAX_NUMBER:
        raise InvalidRequest(f"version {number[:40]!r} of adapter {name!r} must be a whole number from 1 on, as in {name}@1", param="name")
    return name, int(number)


def check_note(note: str) -> str:
    """The note, if it can be kept; InvalidRequest otherwise."""
    if len(note) > MAX_NOTE or not storable(note):
        raise InvalidRequest(f"note must be text of {MAX_NOTE} characters at most, without NUL and half surrogate pairs", param="note")
    return note


def storable(text: str) -> bool:
    """Whether both databases take it."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def give(conn: Connection, tenant: str, name: str, path: TinkerPath, note: str = "") -> NamedVersion:
    """Makes the tenant's own checkpoint at `path` the next version of `name`. The same checkpoint again gives the version that it
    has. A new name means this version; one that is there goes on meaning what it means."""
    if parse(name)[1] is not None:
        raise InvalidRequest(f"{name!r} names a version; give the bare name, the next number is chosen here", param="name")
    checkpoint = checkpoints.get(conn, tenant, path)
    if checkpoint.kind not in SAMPLED:
        raise InvalidRequest(f"{path} is an export; a name is for weights of kind sampler_weights or weights", param="path")
    here = (table.c.tenant == tenant) & (table.c.name == name)
    there = conn.execute(sa.select(table.c.number).where(here & (table.c.uid == checkpoint.uid))).scalar()
    if there is not None:
        return get(conn, tenant, name, there)
    now, number = time.time(), _next_number(conn, tenant, name)
    row = {"tenant": tenant, "name": name, "number": number, "uid": checkpoint.uid, "path": str(path), "note": check_note(note)}
    base = runs.get_run(conn, tenant, path.run_id).base_model
    row |= {"base_model": base, "version": checkpoint.version, "folder": checkpoint.folder, "created_at": now}
    with around("name.row"):
        conn.execute(table.insert().values(**row))
    conn.execute(tables.checkpoints.update().where(tables.checkpoints.c.uid == checkpoint.uid).values(expires_at=None))
    given = get(conn, tenant, name, number)
    if given.current:
        _note_move(conn, given, note)
    return given


def move(conn: Connection, tenant: str, name: str, number: int, note: str = "", expected: int | None = None) -> NamedVersion:
    """From now on the bare name means version `number`, newer or older than the present one. With `expected`, only if it means
    that one now: two who move at once then don't undo each other's move unseen."""
    check_note(note)
    wanted = get(conn, tenant, name, number)
    if wanted.current:
        return wanted
    if expected is not None and (now := get(conn, tenant, name).number) != expected:
        raise Conflict(f"{name} means {name}@{now}, not {name}@{expected}: somebody moved it; look at it again", param="expected")
    with around("name.row"):
        conn.execute(names.update().where((names.c.tenant == tenant) & (names.c.name == name)).values(number=number))
    _note_move(conn, wanted, note)
    return get(conn, tenant, name, number)


def get(conn: Connection, tenant: str, name: str, number: int | None = None) -> NamedVersion:
    """Version `number` of a name, or the one that the name means now."""
    where = (table.c.tenant == tenant) & (table.c.name == name)
    where &= table.c.number == (names.c.number if number is None else number)
    row = conn.execute(_versions().where(where)).first() if NAME.fullmatch(name) else None
    if row is None:
        said = name if number is None else f"{name}@{number}"
        raise NotFound(f"no adapter {said[:100]!r}; `everlearn adapter list` shows yours", param="model")
    return NamedVersion(**row._mapping)


def list_names(conn: Connection, tenant: str, limit: int | None = None, after: str | None = None) -> list[NamedVersion]:
    """What each name means now, by name; with `after`, those behind that name."""
    where = (table.c.tenant == tenant) & (table.c.number == names.c.number)
    if after is not None:
        where &= table.c.name > after
    query = _versions().where(where).order_by(table.c.name)
    return [NamedVersion(**row._mapping) for row in conn.execute(query if limit is None else query.limit(limit))]


def versions(conn: Connection, tenant: str, name: str) -> list[NamedVersion]:
    """Every version of a name, newest first."""
    get(conn, tenant, name)
    query = _versions().where((table.c.tenant == tenant) & (table.c.name == name)).order_by(table.c.number.desc())
    return [NamedVersion(**row._mapping) for row in conn.execute(query)]


def history(conn: Connection, tenant: str, name: str, limit: int = 100) -> list[Move]:
    """What the name meant and since when, newest first."""
    get(conn, tenant, name)
    where = (moves.c.tenant == tenant) & (moves.c.name == name)
    query = sa.select(*moves.c["name", "number", "note", "created_at"]).where(where).order_by(moves.c.id.desc()).limit(limit)
    return [Move(**row._mapping) for row in conn.execute(query)]


def delete(conn: Connection, tenant: str, name: str, number: int | None = None) -> None:
    """Gives up one version that the name doesn't mean now, or the name with all of them. Their checkpoints stay, and may be deleted
    from now on. A name that is given again later goes on counting where it stopped."""
    found = get(conn, tenant, name, number)
    here = (table.c.tenant == tenant) & (table.c.name == name)
    if number is None:
        conn.execute(table.delete().where(here))
        conn.execute(names.update().where((names.c.tenant == tenant) & (names.c.name == name)).values(number=0))
        return
    if found.current:
        raise Conflict(f"{name} means {found} now; move it to another version first, or delete the whole name", param="name")
    conn.execute(table.delete().where(here & (table.c.number == number)))


def _versions() -> sa.Select[tuple[object, ...]]:
    """Rows of named versions with the fields of NamedVersion."""
    current = (table.c.number == names.c.number).label("current")
    columns = [table.c[field] for field in NamedVersion.__struct_fields__ if field != "current"]
    return sa.select(*columns, current).join(names, (names.c.tenant == table.c.tenant) & (names.c.name == table.c.name))


def _next_number(conn: Connection, tenant: str, name: str) -> int:
    here = (names.c.tenant == tenant) & (names.c.name == name)
    row = conn.execute(sa.select(names.c.number, names.c.last_number).where(here)).first()
    if row is None:
        conn.execute(names.insert().values(tenant=tenant, name=name, number=1, last_number=1, created_at=time.time()))
        return 1
    number = row.last_number + 1
    current = number if row.number == 0 else row.number  # a deleted name begins anew, behind its old numbers
    conn.execute(names.update().where(here).values(number=current, last_number=number))
    return number


def _note_move(conn: Connection, to: NamedVersion, note: str) -> None:
    row = {"tenant": to.tenant, "name": to.name, "number": to.number, "note": note, "created_at": time.time()}
    conn.execute(moves.insert().values(**row))
