"""Episodes: the records of one conversation or task, what happened around them, and what was said about them.

An episode is made by its first record (everlearn/store/placing.py) and goes with its last. What users and tools said is in the records
themselves; an event is what a client tells besides: how it ended, what a tool did elsewhere, that the answer was copied.
"""

from __future__ import annotations

import math
import re
import secrets
import time

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.errors import InvalidRequest, TooLarge, Unsupported
from everlearn.store import forgetting, records, tables
from everlearn.store.feedback_checks import MAX_TEXT, NAME, SOURCES, keeps_content, no_episode
from everlearn.store.names import storable
from everlearn.store.placing import ID

table, rows, event_rows = tables.episodes, tables.records, tables.episode_events
EVENT_KINDS = ("outcome", "tool", "user", "act")
MEMORY = "memory"  # the kind of events that the server keeps of chats in a memory; no client tells them
MAX_EVENTS = 10_000  # of one episode
FAR = 1e18  # a time that no row has


class Episode(msgspec.Struct, frozen=True):
    """`split`: "train" or "heldout", the same for ever. `model`: who answered last. `records` and `feedback`: how many there are."""

    tenant: str
    episode_id: str
    client_given: bool
    split: str
    user: str | None
    model: str
    created_at: float
    updated_at: float
    records: int = 0
    feedback: int = 0


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened: `outcome` (how it ended), `tool` (a tool's result), `user` (a turn outside of any request), `act` (what a
    user did with an answer: copied, opened, ...), `memory` (what became of a memory with an answer: see `note_memory`)."""

    event_id: str = ""
    tenant: str
    episode_id: str
    record_id: str | None = None
    kind: str
    name: str = ""
    value: float | None = None
    text: str | None = None
    source: str = "program"
    created_at: float = 0.0


def get(conn: Connection, tenant: str, episode_id: str) -> Episode:
    where = (table.c.tenant == tenant) & (table.c.episode_id == episode_id)
    row = conn.execute(_counted().where(where)).first() if ID.fullmatch(episode_id) else None
    if row is None:
        raise no_episode(episode_id)
    return Episode(**row._mapping)


def list_episodes(
    conn: Connection,
    tenant: str,
    limit: int = 20,
    after: str | None = None,
    *,
    split: str | None = None,
    user: str | None = None,
    model: str | None = None,
    since: float | None = None,
    until: float | None = None,
    judged: bool | None = None,
) -> list[Episode]:
    """The tenant's episodes, the newest first; with `after` those behind that one. A `model` without a number takes all its versions in.
    `judged`: those of which something was said, or of which nothing was."""
    where = table.c.tenant == tenant
    if after is not None:
        edge = get(conn, tenant, after)
        where &= sa.tuple_(table.c.created_at, table.c.episode_id) < (edge.created_at, edge.episode_id)
    if model is not None:
        where &= (table.c.model == model) | table.c.model.startswith(f"{model}@", autoescape=True)
    for column, value in ((table.c.split, split), (table.c.user, user)):
        if value is not None:
            where &= column == value
    if since is not None:
        where &= table.c.created_at >= since
    if until is not None:
        where &= table.c.created_at < until
    if judged is not None:
        said = (tables.feedback.c.tenant == table.c.tenant) & (tables.feedback.c.episode_id == table.c.episode_id)
        there = sa.exists(sa.select(tables.feedback.c.feedback_id).where(said))
        where &= there if judged else ~there
    query = _counted().where(where).order_by(table.c.created_at.desc(), table.c.episode_id.desc()).limit(limit)
    return [Episode(**row._mapping) for row in conn.execute(query)]


def records_of(conn: Connection, tenant: str, episode_id: str, after: str | None = None, limit: int | None = None) -> list[records.Row]:
    """The episode's records, oldest first; with `after` those behind that one. What nobody saw isn't part of it."""
    where = (rows.c.tenant == tenant) & (rows.c.episode_id == episode_id) & (rows.c.route != records.UNSEEN)
    if after is not None:
        where &= rows.c.record_id > after
    query = sa.select(rows).where(where).order_by(rows.c.record_id)
    return [records.Row(**row._mapping) for row in conn.execute(query if limit is None else query.limit(limit))]


def add_event(conn: Connection, given: Event) -> Event:
    """Keeps what happened. Raises InvalidRequest, NotFound; Unsupported for text in an episode whose content isn't kept."""
    get(conn, given.tenant, given.episode_id)
    _check(given)
    if given.record_id is not None and records.get(conn, given.tenant, given.record_id)[0].episode_id != given.episode_id:
        raise records.missing(given.record_id)
    if given.text and not keeps_content(conn, given.tenant, given.episode_id):
        raise Unsupported("text: the content of this episode isn't kept; leave it out", param="text")
    here = (event_rows.c.tenant == given.tenant) & (event_rows.c.episode_id == given.episode_id) & (event_rows.c.kind != MEMORY)
    if conn.execute(sa.select(sa.func.count()).select_from(event_rows).where(here)).scalar_one() >= MAX_EVENTS:
        raise TooLarge(f"episode {given.episode_id} has {MAX_EVENTS} events, the limit; begin another episode", param="episode_id")
    now = time.time()
    made = msgspec.structs.replace(given, event_id=f"ev_{int(1000 * now):011x}{secrets.token_hex(10)}", created_at=now)
    conn.execute(event_rows.insert().values(**msgspec.structs.asdict(made)))
    return made


def note_memory(conn: Connection, tenant: str, episode_id: str, record_id: str, memory_id: str, turn: int, act: str | None = None) -> None:
    """Keeps which turn of which memory an answer has become, or with `act` what a model did with the chunk of a turn behind the answer. Its
    record comes a moment later, and takes the event with it when it goes."""
    at = time.time()
    made = Event(
        event_id=f"ev_{int(1000 * at):011x}{secrets.token_hex(10)}",
        tenant=tenant, episode_id=episode_id, record_id=record_id, kind=MEMORY, name=memory_id, value=float(turn), text=act, created_at=at,
    )  # fmt: skip
    conn.execute(event_rows.insert().values(**msgspec.structs.asdict(made)))


def memory_of(conn: Connection, tenant: str, episode_id: str, record_id: str) -> tuple[str, int] | None:
    """The memory that an answer was given in, and the number of the turn that it is there; None for one in no memory."""
    row = conn.execute(
        sa.select(event_rows.c.name, event_rows.c.value).where(
            (event_rows.c.tenant == tenant)
            & (event_rows.c.episode_id == episode_id)
            & (event_rows.c.record_id == record_id)
            & (event_rows.c.kind == MEMORY)
            & event_rows.c.text.is_(None)
        )
    ).first()
    return None if row is None else (row.name, int(row.value))


def answered_in(conn: Connection, tenant: str, record_id: str, memory_id: str, turn: int, made_at: float) -> bool:
    """Whether the answer is this turn of the memory that was made at `made_at`: not of one of that name that was forgotten before."""
    row, _ = records.get(conn, tenant, record_id)
    where = (event_rows.c.tenant == tenant) & (event_rows.c.episode_id == (row.episode_id or "")) & (event_rows.c.record_id == record_id)
    where &= (event_rows.c.kind == MEMORY) & event_rows.c.text.is_(None) & (event_rows.c.created_at >= made_at)
    where &= (event_rows.c.name == memory_id) & (event_rows.c.value == float(turn))
    return conn.execute(sa.select(event_rows.c.event_id).where(where)).first() is not None


def events(conn: Connection, tenant: str, episode_id: str, since: float = 0.0, until: float = math.inf) -> list[Event]:
    """What happened from `since` to before `until`, oldest first."""
    where = (event_rows.c.tenant == tenant) & (event_rows.c.episode_id == episode_id)
    where &= (event_rows.c.created_at >= since) & (event_rows.c.created_at < min(until, FAR))
    return [Event(**row._mapping) for row in conn.execute(sa.select(event_rows).where(where).order_by(event_rows.c.event_id))]


def delete(conn: Connection, tenant: str, episode_id: str) -> None:
    """Forgets an episode with its records, events and feedback, and marks what learned from it. Of one that has expired, what
    datasets froze goes."""
    if not ID.fullmatch(episode_id) or not forgetting.mark(conn, tenant, "episode", [episode_id]):
        get(conn, tenant, episode_id)
    records.delete_of_episode(conn, tenant, episode_id)


def _check(given: Event) -> None:
    if given.kind not in EVENT_KINDS:
        raise InvalidRequest(f"kind {given.kind[:60]!r} of an event is one of {', '.join(EVENT_KINDS)}", param="kind")
    if given.source not in SOURCES:
        raise InvalidRequest(f"source {given.source[:60]!r} is one of {', '.join(SOURCES)}", param="source")
    if given.name and not re.fullmatch(NAME, given.name):
        raise InvalidRequest(f"name {given.name[:80]!r} must be 1 to 64 letters, digits, spaces or any of . _ : / -", param="name")
    if given.value is not None and not math.isfinite(given.value):
        raise InvalidRequest(f"value {given.value} must be a number", param="value")
    if given.text is not None and (len(given.text) > MAX_TEXT or not storable(given.text)):
        raise InvalidRequest(f"text must have {MAX_TEXT} characters at most, without NUL and half surrogate pairs", param="text")


def _counted() -> sa.Select[tuple[object, ...]]:
    """Rows with the fields of Episode."""
    feedback = tables.feedback
    counts = []
    for name, other in (("records", rows), ("feedback", feedback)):
        here = (other.c.tenant == table.c.tenant) & (other.c.episode_id == table.c.episode_id)
        if other is rows:
            here &= rows.c.route != records.UNSEEN
        counts.append(sa.select(sa.func.count()).select_from(other).where(here).scalar_subquery().label(name))
    return sa.select(table, *counts)
