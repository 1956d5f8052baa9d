"""What goes when something goes: feedback with its record, an episode with its last record, and a mark on every dataset made of it.

Two ways to go. What was *deleted* was unwanted: datasets lose the items that were made of it and are marked, and with them every
version that learned from them. What *expired* was only old: datasets keep what they froze.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.store import reward_models, tables

Way = Literal["deleted", "expired"]
feedback, changes, events, episodes = tables.feedback, tables.feedback_changes, tables.episode_events, tables.episodes
sources, marks, items = tables.dataset_sources, tables.dataset_marks, tables.dataset_items


def forget_records(conn: Connection, ids: Sequence[str], way: Way) -> None:
    """Everything that hangs on these records, which are there still or are gone already: 1,000 at most."""
    rows = tables.records
    conn.execute(tables.trails.delete().where(tables.trails.c.record_id.in_(ids)))
    conn.execute(tables.doubts.delete().where(tables.doubts.c.record_id.in_(ids)))
    conn.execute(events.delete().where(events.c.record_id.in_(ids)))
    about = feedback.c.record_id.in_(ids) | feedback.c.over_record_id.in_(ids)
    forget_feedback(conn, about, way)
    touched = conn.execute(
        sa.select(rows.c.tenant, rows.c.episode_id).where(rows.c.record_id.in_(ids) & rows.c.episode_id.is_not(None)).distinct()
    ).all()
    conn.execute(rows.delete().where(rows.c.record_id.in_(ids)))
    of: dict[str, list[str]] = {}
    for tenant, episode_id in touched:
        of.setdefault(tenant, []).append(episode_id)
    for tenant, episode_ids in of.items():
        _forget_empty(conn, tenant, episode_ids, way)


def _forget_empty(conn: Connection, tenant: str, episode_ids: Sequence[str], way: Way) -> None:
    """Those of these episodes without records go, with what was said of them as a whole."""
    rows = tables.records
    left = sa.select(rows.c.episode_id).where((rows.c.tenant == tenant) & rows.c.episode_id.in_(episode_ids)).distinct()
    full = set(conn.execute(left).scalars())
    empty = [episode_id for episode_id in episode_ids if episode_id not in full]
    conn.execute(events.delete().where((events.c.tenant == tenant) & events.c.episode_id.in_(empty)))
    forget_feedback(conn, (feedback.c.tenant == tenant) & feedback.c.episode_id.in_(empty), way)
    conn.execute(episodes.delete().where((episodes.c.tenant == tenant) & episodes.c.episode_id.in_(empty)))


def forget_feedback(conn: Connection, where: sa.ColumnElement[bool], way: Way) -> None:
    """The feedback with what it was before its edits. That it went stays in the changes, for those who follow them."""
    gone = conn.execute(sa.select(feedback.c.tenant, feedback.c.feedback_id).where(where)).all()
    if not gone:
        return
    now = time.time()
    for start in range(0, len(gone), 500):
        ids = [feedback_id for _, feedback_id in gone[start : start + 500]]
        conn.execute(changes.update().where(changes.c.feedback_id.in_(ids)).values(before=None))
        conn.execute(feedback.delete().where(feedback.c.feedback_id.in_(ids)))
    conn.execute(changes.insert(), [{"tenant": tenant, "feedback_id": key, "act": way, "created_at": now} for tenant, key in gone])


def mark(conn: Connection, tenant: str, kind: str, ids: Sequence[str]) -> list[str]:
    """The datasets that were made of these records, feedback or episodes lose those items and are marked, and reward models lose their
    labels; which datasets, and the deployments of which reward models."""
    found: set[str] = set()
    models: set[str] = set()
    now = time.time()
    for start in range(0, len(ids), 500):
        some = ids[start : start + 500]
        models.update(reward_models.forget(conn, tenant, kind, some))
        where = (sources.c.tenant == tenant) & (sources.c.kind == kind) & sources.c.source_id.in_(some)
        for dataset_id, number, source_id in conn.execute(
            sa.select(sources.c.dataset_id, sources.c.number, sources.c.source_id).where(where)
        ).all():
            here = (items.c.dataset_id == dataset_id) & (items.c.number == number)
            conn.execute(items.update().where(here & items.c.deleted_at.is_(None)).values(body=b"", deleted_at=now))
            place = {"dataset_id": dataset_id, "kind": kind, "source_id": source_id}
            there = sa.select(marks.c.dataset_id).where(sa.and_(*(marks.c[name] == value for name, value in place.items())))
            if conn.execute(there).first() is None:
                conn.execute(marks.insert().values(tenant=tenant, created_at=now, **place))
            found.add(dataset_id)
    return [*sorted(found), *sorted(models)]


def forgotten_feedback(conn: Connection, before: float, limit: int = 1000) -> list[str]:
    """Feedback whose history nobody needs any longer: it went before that time, so whoever follows the changes has seen it go. Not that
    of the newest change, which stays."""
    gone = changes.c.act.in_(("deleted", "expired")) & (changes.c.created_at < before) & _not_newest()
    return list(conn.execute(sa.select(changes.c.feedback_id).where(gone).order_by(changes.c.id).limit(limit)).scalars())


def drop_history(conn: Connection, feedback_ids: Sequence[str]) -> None:
    """The changes of feedback that is gone, but for the newest change of all."""
    conn.execute(changes.delete().where(changes.c.feedback_id.in_(feedback_ids) & _not_newest()))


def _not_newest() -> sa.ColumnElement[bool]:
    """SQLite gives the highest number that is there plus one: without the newest change, later ones would get numbers that whoever
    follows them has passed."""
    newest = changes.alias()
    return changes.c.id < sa.select(sa.func.max(newest.c.id)).scalar_subquery()
