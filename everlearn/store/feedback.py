"""What people, programs and models say of answers: thumbs, figures, comments, corrections, preferences, outcomes of tools.

A word is about a record (one of its choices), a span of that choice's tokens, or a whole episode. It may come late and again: of what one
source says of one kind about one thing (a slot) the last word counts, the earlier ones are kept. It can be edited, with history, and
deleted, without. `feedback_changes` tells all of that in order, for readers who keep something that was made of feedback.

Labels of one source are many words about many things; how much they weigh together is decided by who reads them
(everlearn/loop/weights.py).
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.errors import Conflict, InvalidRequest, NotFound, TooLarge
from everlearn.faultpoints import around
from everlearn.store import forgetting, tables
from everlearn.store.feedback_checks import check

table, changes = tables.feedback, tables.feedback_changes
MAX_WORDS = 200  # of one source about one record or episode, those that were replaced included
EDITABLE = ("value", "text", "answer", "reason")
IDEMPOTENCY = "idempotency_conflict"  # an error's code


class Feedback(msgspec.Struct, frozen=True, kw_only=True):
    """One word. `record_id` None: about the whole episode. `span_start`, `span_end`: indices into the choice's token ids, the end excluded.
    `over_record_id`, `over_choice`: the worse one of a preference. `value` of a boolean is 0 or 1. `noise`: how probable it is that the
    value is wrong (implicit signals only). `answer`: the whole answer as it should have been. `counts`: the last word of its slot."""

    feedback_id: str = ""
    tenant: str
    episode_id: str = ""
    record_id: str | None = None
    choice: int = 0
    span_start: int | None = None
    span_end: int | None = None
    over_record_id: str | None = None
    over_choice: int | None = None
    kind: str
    name: str = ""
    value: float | None = None
    noise: float | None = None
    text: str | None = None
    answer: str | None = None
    reason: str = ""
    source: str = "human"
    source_id: str = ""
    key_id: str | None = None
    slot: str = ""
    counts: bool = True
    revision: int = 1
    idempotency_key: str | None = None
    fingerprint: str | None = None
    created_at: float = 0.0
    updated_at: float = 0.0


class Change(msgspec.Struct, frozen=True):
    """`act`: created, edited, superseded (a later word of its slot counts), restored (it counts again), deleted, expired. `before`: the
    fields that an edit replaced."""

    id: int
    feedback_id: str
    act: str
    before: dict[str, Any] | None
    created_at: float


class Share(msgspec.Struct, frozen=True):
    """How many words of a source count, and of which kind they are."""

    source: str
    source_id: str
    kind: str
    labels: int


def new_id(conn: Connection, now: float) -> str:
    """An id that sorts behind those of all words that were kept before, deleted ones among them, also within a millisecond and after a
    clock was set back: who reads on behind the last one misses none. (What a record implies has an id of the record's time.)"""
    last = conn.execute(sa.select(sa.func.max(changes.c.feedback_id))).scalar()  # every word has a change, deleted ones too
    moment = max(int(1000 * now), int(last[3:14], 16) + 1 if last else 0)
    return f"fb_{moment:011x}{secrets.token_hex(10)}"


def slot_of(given: Feedback) -> str:
    """Words with the same slot replace each other. A comment replaces nothing."""
    place: list[Any] = [given.record_id or given.episode_id, given.choice, given.span_start, given.span_end]
    if given.kind == "preference":
        place = sorted([[given.record_id, given.choice], [given.over_record_id, given.over_choice]], key=str)
    if given.kind == "comment":
        place = [given.feedback_id]
    said = json.dumps([given.source, given.source_id, given.kind, given.name, place])
    return hashlib.sha256(said.encode()).hexdigest()[:40]


def prepare(conn: Connection, given: Feedback) -> Feedback:
    """The word as `add` would keep it: checked, with its episode. Reads only. Raises InvalidRequest, NotFound, Unsupported, TooLarge."""
    now = given.created_at or time.time()
    given = msgspec.structs.replace(check(conn, given), feedback_id=given.feedback_id or new_id(conn, now), created_at=now, updated_at=now)
    where = (table.c.tenant == given.tenant) & (table.c.episode_id == given.episode_id) & (table.c.source == given.source)
    where &= (table.c.source_id == given.source_id) & table.c.record_id.is_not_distinct_from(given.record_id)
    if conn.execute(sa.select(sa.func.count()).select_from(table).where(where)).scalar_one() >= MAX_WORDS:
        raise TooLarge(
            f"this source has said {MAX_WORDS} things about it already, the limit; edit one of them (GET /v1/feedback lists them)",
            param="source_id",
        )
    return msgspec.structs.replace(given, slot=slot_of(given))


def replayed(conn: Connection, given: Feedback) -> Feedback | None:
    """The word that this idempotency key stands for already. Raises Conflict where that was another one."""
    if given.idempotency_key is None:
        return None
    where = (table.c.tenant == given.tenant) & (table.c.idempotency_key == given.idempotency_key)
    row = conn.execute(sa.select(table).where(where)).first()
    if row is None:
        return None
    if row.fingerprint != given.fingerprint:
        raise Conflict(
            f"idempotency_key {given.idempotency_key[:60]!r} was used for another body; use a new key for each thing that is said",
            param="idempotency_key",
            code=IDEMPOTENCY,
        )
    return Feedback(**row._mapping)


def add(conn: Connection, given: Feedback) -> Feedback:
    """Keeps a word; it counts from now on, and what the same source said in its slot before doesn't. The same idempotency key again
    gives the word that is there."""
    if (there := replayed(conn, given)) is not None:
        return there
    made = prepare(conn, given)
    with around("feedback.row"):
        conn.execute(table.insert().values(**msgspec.structs.asdict(made)))
        _change(conn, made.tenant, [made.feedback_id], "created")
        _settle(conn, made.tenant, made.slot)
    return get(conn, made.tenant, made.feedback_id)


def get(conn: Connection, tenant: str, feedback_id: str) -> Feedback:
    row = conn.execute(sa.select(table).where((table.c.tenant == tenant) & (table.c.feedback_id == feedback_id))).first()
    if row is None:
        raise NotFound(f"no feedback {feedback_id[:100]!r}; GET /v1/feedback lists yours", param="feedback_id")
    return Feedback(**row._mapping)


def edit(conn: Connection, tenant: str, feedback_id: str, **fields: Any) -> Feedback:
    """Other words in the place of these (`value`, `text`, `answer`, `reason`); what they were is kept. The edited one is its source's
    last word."""
    found = get(conn, tenant, feedback_id)
    if unknown := set(fields) - set(EDITABLE):
        raise InvalidRequest(f"{', '.join(sorted(unknown))} can't be edited; {', '.join(EDITABLE)} can", param=min(unknown))
    before = {name: getattr(found, name) for name in fields if getattr(found, name) != fields[name]}
    if not before:
        return found
    now = time.time()
    made = check(conn, msgspec.structs.replace(found, **fields))
    values = {name: getattr(made, name) for name in EDITABLE} | {"revision": found.revision + 1, "updated_at": now}
    with around("feedback.row"):
        conn.execute(table.update().where(table.c.feedback_id == feedback_id).values(**values))
        _change(conn, tenant, [feedback_id], "edited", before)
        _settle(conn, tenant, found.slot)
    return get(conn, tenant, feedback_id)


def delete(conn: Connection, tenant: str, feedback_id: str) -> None:
    """Forgets a word with its history, and marks what learned from it. The one before it in its slot counts again. Of one that
    has expired, what datasets froze goes."""
    with around("feedback.row"):
        marked = forgetting.mark(conn, tenant, "feedback", [feedback_id])
        try:
            found = get(conn, tenant, feedback_id)
        except NotFound:
            if marked:
                return
            raise
        forgetting.forget_feedback(conn, table.c.feedback_id == feedback_id, "deleted")
        _settle(conn, tenant, found.slot)


def history(conn: Connection, tenant: str, feedback_id: str) -> list[Change]:
    """What happened to a word, oldest first."""
    where = (changes.c.tenant == tenant) & (changes.c.feedback_id == feedback_id)
    return [_as_change(row) for row in conn.execute(sa.select(changes).where(where).order_by(changes.c.id))]


def changes_after(conn: Connection, tenant: str, after: int = 0, limit: int = 1000) -> list[Change]:
    """What happened to the tenant's feedback since the change `after`, oldest first."""
    where = (changes.c.tenant == tenant) & (changes.c.id > after)
    return [_as_change(row) for row in conn.execute(sa.select(changes).where(where).order_by(changes.c.id).limit(limit))]


def newest_change(conn: Connection, tenant: str) -> int:
    """Where whoever follows the tenant's changes from now on begins; 0 before the first."""
    return conn.execute(sa.select(sa.func.max(changes.c.id)).where(changes.c.tenant == tenant)).scalar_one() or 0


def list_feedback(
    conn: Connection,
    tenant: str,
    limit: int = 20,
    after: str | None = None,
    *,
    since: float | None = None,
    until: float | None = None,
    **equal: Any,
) -> list[Feedback]:
    """The tenant's words, newest first; with `after` those older than that one. `equal`: record_id, episode_id, kind, source, source_id,
    name, counts; None leaves the choice open."""
    where = table.c.tenant == tenant
    if after is not None:
        where &= table.c.feedback_id < after
    return _select(conn, where, since, until, equal, table.c.feedback_id.desc(), limit)


def labels(
    conn: Connection,
    tenant: str,
    *,
    kinds: Sequence[str] | None = None,
    split: str | None = None,
    after: str | None = None,
    since: float | None = None,
    until: float | None = None,
    limit: int = 1000,
    **equal: Any,
) -> list[Feedback]:
    """The words that count, oldest first; with `after` those behind that one. `split`: of episodes of that split only."""
    where = (table.c.tenant == tenant) & table.c.counts
    if kinds is not None:
        where &= table.c.kind.in_(list(kinds))
    if after is not None:
        where &= table.c.feedback_id > after
    if split is not None:
        episodes = tables.episodes
        here = (episodes.c.tenant == tenant) & (episodes.c.split == split)
        where &= table.c.episode_id.in_(sa.select(episodes.c.episode_id).where(here))
    return _select(conn, where, since, until, equal, table.c.feedback_id, limit)


def of_episodes(
    conn: Connection,
    tenant: str,
    episode_ids: Sequence[str],
    counts: bool | None = None,
    since: float | None = None,
    until: float | None = None,
    limit: int | None = None,
) -> list[Feedback]:
    """All that was said in these episodes, oldest first; of each 500 episodes `limit` at most."""
    found: list[Feedback] = []
    for start in range(0, len(episode_ids), 500):
        where = (table.c.tenant == tenant) & table.c.episode_id.in_(list(episode_ids[start : start + 500]))
        found += _select(conn, where, since, until, {"counts": counts}, table.c.feedback_id, limit)
    return sorted(found, key=lambda one: one.feedback_id)


def counting(conn: Connection, tenant: str, episode_ids: Sequence[str]) -> list[Feedback]:
    """The words that count in these episodes, oldest first."""
    return of_episodes(conn, tenant, episode_ids, counts=True)


def shares(conn: Connection, tenant: str, since: float | None = None, until: float | None = None) -> list[Share]:
    """How much each source has said that counts, by kind."""
    where = (table.c.tenant == tenant) & table.c.counts
    where &= table.c.created_at.between(0.0 if since is None else since, 1e18 if until is None else until)
    place = (table.c.source, table.c.source_id, table.c.kind)
    query = sa.select(*place, sa.func.count().label("labels")).where(where).group_by(*place).order_by(*place)
    return [Share(**row._mapping) for row in conn.execute(query)]


def _select(
    conn: Connection,
    where: sa.ColumnElement[bool],
    since: float | None,
    until: float | None,
    equal: dict[str, Any],
    order: Any,
    limit: int | None,
) -> list[Feedback]:
    for name, value in equal.items():
        if value is not None:
            where &= table.c[name] == value
    if since is not None:
        where &= table.c.created_at >= since
    if until is not None:
        where &= table.c.created_at < until
    query = sa.select(table).where(where).order_by(order)
    return [Feedback(**row._mapping) for row in conn.execute(query if limit is None else query.limit(limit))]


def _settle(conn: Connection, tenant: str, slot: str) -> None:
    """Lets the last word of a slot count, and no other."""
    here = (table.c.tenant == tenant) & (table.c.slot == slot)
    query = sa.select(table.c.feedback_id, table.c.counts).where(here).order_by(table.c.updated_at.desc(), table.c.feedback_id.desc())
    for index, (feedback_id, counts) in enumerate(conn.execute(query).all()):
        wanted = index == 0
        if counts != wanted:
            conn.execute(table.update().where(table.c.feedback_id == feedback_id).values(counts=wanted))
            _change(conn, tenant, [feedback_id], "restored" if wanted else "superseded")


def _change(conn: Connection, tenant: str, ids: Sequence[str], act: str, before: dict[str, Any] | None = None) -> None:
    now = time.time()
    rows = [{"tenant": tenant, "feedback_id": feedback_id, "act": act, "before": before, "created_at": now} for feedback_id in ids]
    conn.execute(changes.insert(), rows)


def _as_change(row: Any) -> Change:
    return Change(row.id, row.feedback_id, row.act, row.before, row.created_at)
