"""How much of everything a tenant has, and how old the newest is: the line of the whole loop in figures.

    answers -> feedback -> episodes -> labels -> datasets -> versions -> gate -> canary -> live

`stations` counts; `mark` is cheaper: a value that differs after a change, read from the ends of indexes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.store import tables
from everlearn.store.deployments import REST

# Kinds of feedback that a reward model can learn from; comments teach nothing (everlearn/loop/labels.py).
TEACHING = ("boolean", "float", "preference", "demonstration", "outcome", "implicit")
JUDGED = ("promoted", "rejected")


class Station(msgspec.Struct, frozen=True):
    """`count` things, the newest of `newest` (Unix seconds; None: there is none). `note`: what more there is to say."""

    name: str
    count: int
    newest: float | None
    note: str = ""


def stations(conn: Connection, tenant: str) -> list[Station]:
    return [Station(name, *count(conn, tenant)) for name, count in COUNTS.items()]


def _counted(table: sa.Table, order: str, *where: sa.ColumnElement[bool]) -> Callable[[Connection, str], tuple[Any, ...]]:
    """`order`: the column whose index ends with the newest row, so that a million rows are counted and one is read."""

    def count(conn: Connection, tenant: str) -> tuple[Any, ...]:
        here = [table.c.tenant == tenant, *where]
        number = conn.execute(sa.select(sa.func.count()).select_from(table).where(*here)).scalar_one()
        newest = sa.select(table.c.created_at).where(*here).order_by(table.c[order].desc()).limit(1)
        return number, conn.execute(newest).scalar()

    return count


def _versions(conn: Connection, tenant: str) -> tuple[Any, ...]:
    table = tables.named_versions
    query = sa.select(sa.func.count(), sa.func.max(table.c.created_at), sa.func.count(table.c.name.distinct()))
    number, newest, names = conn.execute(query.where(table.c.tenant == tenant)).one()
    return number, newest, f"of {names} name{'s' if names != 1 else ''}" if names else ""


def _gate(conn: Connection, tenant: str) -> tuple[Any, ...]:
    events, table = tables.deployment_events, tables.deployments
    kinds = sa.select(events.c.kind, sa.func.count(), sa.func.max(events.c.created_at))
    found = {row[0]: row for row in conn.execute(kinds.where(events.c.tenant == tenant, events.c.kind.in_(JUDGED)).group_by(events.c.kind))}
    now = sa.select(sa.func.count()).where(table.c.tenant == tenant, table.c.state.in_(("gate", "shadow")))
    said = [f"{row[1]} {kind}" for kind, row in sorted(found.items())]
    waiting = conn.execute(now).scalar_one()
    said += [f"{waiting} being judged"] if waiting else []
    return sum(row[1] for row in found.values()), max((row[2] for row in found.values()), default=None), ", ".join(said)


def _canary(conn: Connection, tenant: str) -> tuple[Any, ...]:
    table = tables.deployments
    query = sa.select(table.c.name, table.c.candidate, table.c.share, table.c.changed_at)
    found = conn.execute(query.where(table.c.tenant == tenant, table.c.state == "canary").order_by(table.c.changed_at.desc())).all()
    said = ", ".join(f"{row.name}@{row.candidate} at {100 * row.share:g} %" for row in found[:3])
    return len(found), max((row.changed_at for row in found), default=None), said


def _live(conn: Connection, tenant: str) -> tuple[Any, ...]:
    table, events = tables.deployments, tables.deployment_events
    query = sa.select(table.c.name, table.c.champion, table.c.state).where(table.c.tenant == tenant).order_by(table.c.changed_at.desc())
    found = conn.execute(query).all()
    moved = sa.select(sa.func.max(events.c.created_at))
    newest = conn.execute(moved.where(events.c.tenant == tenant, events.c.kind.in_(("created", "promoted", "rolled_back")))).scalar()
    busy = sum(row.state != REST for row in found)
    said = ", ".join(f"{row.name}@{row.champion}" if row.champion else f"{row.name} (base model)" for row in found[:3])
    return len(found), newest if found else None, said + (f"; {busy} in a cycle" if busy else "")


COUNTS: dict[str, Callable[[Connection, str], tuple[Any, ...]]] = {
    "answers": _counted(tables.records, "record_id"),
    "feedback": _counted(tables.feedback, "feedback_id", tables.feedback.c.counts),
    "episodes": _counted(tables.episodes, "created_at"),
    "labels": _counted(tables.feedback, "feedback_id", tables.feedback.c.counts, tables.feedback.c.kind.in_(TEACHING)),
    "datasets": _counted(tables.datasets, "dataset_id"),
    "versions": _versions,
    "gate": _gate,
    "canary": _canary,
    "live": _live,
}

# The ends of what grows, by the name of a part of the dashboard.
ENDS: dict[str, list[sa.ColumnElement[Any]]] = {
    "answers": [tables.records.c.record_id],
    "episodes": [tables.records.c.record_id, tables.episode_events.c.event_id],
    "feedback": [tables.feedback.c.feedback_id, tables.feedback_changes.c.id],
    "datasets": [tables.datasets.c.dataset_id],
    "versions": [tables.name_moves.c.id],
    "deployments": [tables.deployment_events.c.id, tables.deployments.c.changed_at],
    "runs": [tables.runs.c.run_id, tables.runs.c.last_request_time],
    "steps": [tables.run_steps.c.created_at],
    "rollouts": [tables.run_rollouts.c.created_at],
}


def mark(conn: Connection, tenant: str, part: str) -> list[Any]:
    """What differs once something has been added to `part`, or changed in it."""
    return [conn.execute(sa.select(sa.func.max(column)).where(column.table.c.tenant == tenant)).scalar() for column in ENDS[part]]
