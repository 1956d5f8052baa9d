"""Sessions of a tenant by what they carry: a search that reads no more rows than it shows, whatever a tenant has; and the end of
those that nothing refers to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.store import runs, tables
from everlearn.store.runs import Session

table = tables.sessions
PIECE = 500  # rows that a search reads at once, ids that one statement names

Place = tuple[float, str]  # created_at, session_id: where a session stands in the order, newest first


class Status(msgspec.Struct, frozen=True):
    """Active: not finished, and heard of since `alive_since`. Finished: for one of `reasons`, or any where there are none."""

    finished: bool
    alive_since: float = 0.0
    reasons: tuple[str, ...] = ()


class Wanted(msgspec.Struct, frozen=True):
    """What a session must be or have; None asks for nothing. Either its id is `session_id` or its display name has all `words`."""

    session_id: str | None = None
    words: tuple[str, ...] | None = None
    project_ids: tuple[str, ...] | None = None
    user_metadata: Mapping[str, str] = {}
    statuses: tuple[Status, ...] | None = None


def search(conn: Connection, tenant: str, wanted: Wanted, limit: int, after: Place | None = None) -> list[Session]:
    """The newest `limit` sessions that match, of those behind `after`."""
    where = (table.c.tenant == tenant) & sa.and_(sa.true(), *_conditions(conn.dialect.name, wanted))
    query = sa.select(table).order_by(table.c.created_at.desc(), table.c.session_id.desc())
    if after is not None:
        after = _exact(conn, tenant, after)
    found: list[Session] = []
    while len(found) < limit:
        rows = conn.execute(query.where(where if after is None else where & _behind(after)).limit(min(PIECE, limit))).all()
        found += [session for session in map(runs.session_of, rows) if _named(session, wanted)]
        if len(rows) < min(PIECE, limit):
            break
        after = rows[-1].created_at, rows[-1].session_id
    return found[:limit]


def expire(conn: Connection, before: float, limit: int = PIECE) -> int:
    """Forgets the oldest sessions, with their samplers, that were silent since `before` and that nothing refers to: no training run,
    no sampler that drew since then, no sample whose answer is kept. At most `limit`; how many."""
    held, samplers, requests = tables.runs, tables.samplers, tables.requests
    of_session = samplers.c.session_id == table.c.session_id
    ids = conn.execute(
        sa.select(table.c.session_id)
        .where((table.c.last_heartbeat < before) & (table.c.created_at < before))
        .where(~sa.exists().where(held.c.session_id == table.c.session_id))
        .where(~sa.exists().where(of_session & (samplers.c.last_used >= before)))
        .where(~sa.exists().where(of_session & (requests.c.model_id == samplers.c.sampler_id) & requests.c.is_sample))
        .order_by(table.c.last_heartbeat)
        .limit(limit)
    ).scalars()
    gone = list(ids)
    for piece in _pieces(gone):
        conn.execute(samplers.delete().where(samplers.c.session_id.in_(piece)))
        conn.execute(table.delete().where(table.c.session_id.in_(piece)))
    return len(gone)


def saved_of(conn: Connection, tenant: str, session_ids: Iterable[str], now: float) -> dict[str, tuple[int, int]]:
    """How many complete checkpoints each session's runs have, and their bytes; sessions without any are left out."""
    held = tables.checkpoints
    fresh = held.c.expires_at.is_(None) | (held.c.expires_at > now)
    query = (
        sa.select(tables.runs.c.session_id, sa.func.count(), sa.func.sum(held.c.bytes))
        .join(held, held.c.run_id == tables.runs.c.run_id)
        .where((held.c.tenant == tenant) & (held.c.state == "complete") & fresh)
        .group_by(tables.runs.c.session_id)
    )
    return {
        session_id: (int(count), int(size))
        for piece in _pieces(session_ids)
        for session_id, count, size in conn.execute(query.where(tables.runs.c.session_id.in_(piece)))
    }


def metadata_of(conn: Connection, tenant: str, session_ids: Iterable[str]) -> dict[str, dict[str, Any] | None]:
    """The user_metadata of those sessions that are there."""
    query = sa.select(table.c.session_id, table.c.user_metadata).where(table.c.tenant == tenant)
    rows = (row for piece in _pieces(session_ids) for row in conn.execute(query.where(table.c.session_id.in_(piece))))
    return {row.session_id: row.user_metadata for row in rows}


def _pieces(ids: Iterable[str]) -> Iterator[list[str]]:
    every = list(ids)
    return (every[start : start + PIECE] for start in range(0, len(every), PIECE))


def _exact(conn: Connection, tenant: str, place: Place) -> Place:
    """A client's cursor carries microseconds; the row, as long as it is there, knows the moment as it was stored."""
    row = conn.execute(sa.select(table.c.created_at).where((table.c.session_id == place[1]) & (table.c.tenant == tenant))).first()
    return (place[0] if row is None else row.created_at), place[1]


def _behind(place: Place) -> sa.ColumnElement[bool]:
    created_at, session_id = place
    return (table.c.created_at < created_at) | ((table.c.created_at == created_at) & (table.c.session_id < session_id))


def _conditions(dialect: str, wanted: Wanted) -> Iterable[sa.ColumnElement[bool]]:
    if wanted.project_ids is not None:
        yield table.c.project_id.in_(wanted.project_ids)
    for key, value in wanted.user_metadata.items():
        yield _has_pair(dialect, key, value)
    either = []
    if wanted.session_id is not None:
        either.append(table.c.session_id == wanted.session_id)
    if wanted.words:
        # Databases differ in what they call lower case beyond ASCII; `_named` looks at those words.
        name = sa.func.lower(table.c.display_name)
        plain = [name.contains(word, autoescape=True) for word in wanted.words if word.isascii()]
        either.append(sa.and_(table.c.display_name.is_not(None), *plain))
    if wanted.session_id is not None or wanted.words is not None:
        yield sa.or_(sa.false(), *either)
    if wanted.statuses is not None:
        yield sa.or_(sa.false(), *map(_has_status, wanted.statuses))


def _has_pair(dialect: str, key: str, value: str) -> sa.ColumnElement[bool]:
    if dialect == "postgresql":
        return sa.func.json_extract_path_text(table.c.user_metadata, key) == value
    pairs = sa.func.json_each(table.c.user_metadata).table_valued("key", "value")  # a path of JSON has no way to write every key
    return sa.exists(sa.select(1).select_from(pairs).where((pairs.c.key == key) & (pairs.c.value == value)).correlate(table))


def _has_status(status: Status) -> sa.ColumnElement[bool]:
    if not status.finished:
        return (table.c.state != "finished") & (table.c.last_heartbeat > status.alive_since)
    finished = table.c.state == "finished"
    return finished & table.c.finish_reason.in_(status.reasons) if status.reasons else finished


def _named(session: Session, wanted: Wanted) -> bool:
    if wanted.words is None or session.session_id == wanted.session_id:
        return True
    return all(word in (session.display_name or "").lower() for word in wanted.words)
