"""What was used: requests, tokens and seconds by day, key, and what was used (an adapter's version, a base model, a training run).

Two sources, each counted exactly once. Answers are added when their record is written (everlearn/store/records.py). Requests of
the log are read from the log itself while they are in it, and added here in the transaction that deletes them, so that the hot path
of training writes no row more for it. Days are counted in UTC from 1970-01-01.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from everlearn.store import tables

table, requests = tables.usage, tables.requests
DAY = 86_400
KINDS = ("forward_backward", "optim_step", "save", "publish", "sample")  # of the log's requests, those that use something
AMOUNTS = ("requests", "tokens_in", "tokens_cached", "tokens_out", "seconds")
PLACE = ("tenant", "day", "key_id", "subject", "kind")


def _upsert(insert: Any) -> Any:
    return insert.on_conflict_do_update(index_elements=list(PLACE), set_={name: table.c[name] + insert.excluded[name] for name in AMOUNTS})


UPSERT = {"postgresql": _upsert(postgresql.insert(table)), "sqlite": _upsert(sqlite.insert(table))}


class Line(msgspec.Struct, frozen=True):
    """Sums of one day. `key_id` "": without a key. `tokens_in`: of prompts, or trained; `tokens_cached`: of those, found in the
    prefix cache; `seconds`: from acceptance to the answer, added up over requests that ran side by side."""

    tenant: str
    day: int
    key_id: str
    subject: str
    kind: str
    requests: int
    tokens_in: int
    tokens_cached: int
    tokens_out: int
    seconds: float


class Hour(msgspec.Struct, frozen=True):
    """Sums of one hour (UTC, counted from 1970-01-01) of the log's requests to one run or sampler."""

    hour: int
    kind: str
    model_id: str
    requests: int
    tokens_in: int
    tokens_out: int


def day_of(time: float) -> int:
    return int(time // DAY)


def add(conn: Connection, lines: Iterable[Line]) -> None:
    """Adds to the sums. Not idempotent: the caller's transaction must make what it counts countable only once."""
    merged: dict[tuple[object, ...], list[float]] = {}
    for line in lines:
        sums = merged.setdefault(tuple(getattr(line, name) for name in PLACE), [0] * len(AMOUNTS))
        for index, name in enumerate(AMOUNTS):
            sums[index] += getattr(line, name)
    if merged:
        conn.execute(
            UPSERT[conn.dialect.name],
            [dict(zip((*PLACE, *AMOUNTS), (*place, *sums), strict=True)) for place, sums in sorted(merged.items())],
        )


def lines(conn: Connection, tenant: str, since: int, until: int) -> list[Line]:
    """The tenant's sums of the days `since` to `until` (included), by day, key, subject and kind."""
    where = (table.c.tenant == tenant) & table.c.day.between(since, until)
    found = [Line(**row._mapping) for row in conn.execute(sa.select(table).where(where))]
    found += of_log(conn, (requests.c.tenant == tenant) & requests.c.created_at.between(since * DAY, (until + 1) * DAY))
    merged: dict[tuple[object, ...], Line] = {}
    for line in found:
        if not since <= line.day <= until:
            continue  # a request of the last day's very end
        place = tuple(getattr(line, name) for name in PLACE)
        there = merged.get(place)
        if there is not None:
            line = msgspec.structs.replace(line, **{name: getattr(line, name) + getattr(there, name) for name in AMOUNTS})
        merged[place] = line
    return sorted(merged.values(), key=lambda line: (line.day, line.key_id, line.subject, line.kind))


def of_log(conn: Connection, where: sa.ColumnElement[bool]) -> list[Line]:
    """The sums of the log's answered requests that match."""
    day = _since_1970(conn, DAY).label("day")
    key, subject = (
        sa.func.coalesce(requests.c.key_id, "").label("key"),
        sa.func.coalesce(requests.c.subject, requests.c.model_id).label("what"),
    )
    sums = [sa.func.count(), *(sa.func.sum(column) for column in (requests.c.tokens_in, requests.c.tokens_out))]
    seconds = sa.func.sum(requests.c.finished_at - requests.c.created_at)
    query = sa.select(requests.c.tenant, day, key, subject, requests.c.kind, *sums, seconds)
    query = query.where(where & requests.c.kind.in_(KINDS) & (requests.c.status == "done"))
    query = query.group_by(requests.c.tenant, day, key, subject, requests.c.kind)
    return [
        Line(tenant, int(number), key_id, what, kind, count, int(tokens_in), 0, int(tokens_out), float(took))
        for tenant, number, key_id, what, kind, count, tokens_in, tokens_out, took in conn.execute(query)
    ]


def by_hour(conn: Connection, tenant: str, kinds: tuple[str, ...], start: float, end: float) -> list[Hour]:
    """Sums of the tenant's answered requests of these kinds that are still in the log, accepted from `start` to `end`."""
    hour = _since_1970(conn, 3600).label("hour")
    sums = [sa.func.count(), *(sa.func.sum(column) for column in (requests.c.tokens_in, requests.c.tokens_out))]
    where = (requests.c.tenant == tenant) & requests.c.kind.in_(kinds) & (requests.c.status == "done")
    where &= requests.c.created_at.between(start, end)
    query = sa.select(hour, requests.c.kind, requests.c.model_id, *sums).where(where).group_by(hour, requests.c.kind, requests.c.model_id)
    return [
        Hour(int(number), kind, model_id, count, int(tokens_in), int(tokens_out))
        for number, kind, model_id, count, tokens_in, tokens_out in conn.execute(query)
    ]


def _since_1970(conn: Connection, seconds: int) -> sa.ColumnElement[int]:
    """Whole stretches of `seconds` up to a request's acceptance. A cast cuts in SQLite and rounds in PostgreSQL."""
    stretches = requests.c.created_at / seconds
    return sa.cast(sa.func.floor(stretches), sa.BigInteger) if conn.dialect.name == "postgresql" else sa.cast(stretches, sa.Integer)
