"""Which answers want a person: those of which somebody said that they were wrong and nobody what would be right, and those that are
disagreed about.

Nothing is kept here: the queue is what the feedback says now. An answer leaves it when it is corrected, or when a person says something
of it under the name `review`; it comes back when that is deleted.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.store import records, tables

table, rows, doubts = tables.feedback, tables.records, tables.doubts
NAME = "review"  # of the words with which a person settles an answer
GOOD = 0.5  # a value from here on is a good one
MOST = 5_000  # answers that a queue holds
VALUED = ("boolean", "float", "outcome", "implicit")  # kinds whose value says good or bad
Why = Literal["wrong", "disagreed", "unsure", "sign"]
# In the order in which they are shown: a person said that it was wrong; some said so and some the contrary; the reward model can't tell;
# only a program, a model or the next turn says that it was wrong.
ORDER: tuple[Why, ...] = ("wrong", "disagreed", "unsure", "sign")


class Waiting(msgspec.Struct, frozen=True):
    """One answer (a choice of a record) that wants a person, why, and when the last word about it was said."""

    record_id: str
    choice: int
    why: Why
    said_at: float

    @property
    def key(self) -> str:
        return f"{self.record_id}:{self.choice}"


def waiting(conn: Connection, tenant: str, model: str | None = None) -> list[Waiting]:
    """The queue, in the order of `ORDER`, the newest first in each; `MOST` at most. A `model` without a number takes in
    all its versions."""
    counted = _judged(tenant)
    bad = sa.or_(counted.c.wrong > 0, counted.c.signs > 0)
    rank = sa.case((counted.c.wrong > 0, 0), (counted.c.good > 0, 1), else_=3).label("rank")
    here = (rows.c.record_id == counted.c.record_id) & (rows.c.tenant == tenant) & (rows.c.route != records.UNSEEN)
    query = sa.select(counted.c.record_id, counted.c.choice, rank, counted.c.said_at).join(rows, here)
    query = query.where(bad & (counted.c.settled == 0))
    if model is not None:
        query = query.where(_of(model))
    query = query.order_by(rank, counted.c.said_at.desc(), counted.c.record_id.desc(), counted.c.choice).limit(MOST)
    return [Waiting(row.record_id, row.choice, ORDER[row.rank], row.said_at) for row in conn.execute(query)]


def unsure(conn: Connection, tenant: str, model: str | None = None) -> list[Waiting]:
    """Answers that a reward model is too unsure of and of which nobody has said anything that settles them, the most unsure first."""
    same = (table.c.tenant == tenant) & (table.c.record_id == doubts.c.record_id) & (table.c.choice == doubts.c.choice)
    known = sa.exists(sa.select(table.c.feedback_id).where(same & table.c.counts & _settles()))
    query = sa.select(doubts.c.record_id, doubts.c.choice, doubts.c.created_at).join(rows, rows.c.record_id == doubts.c.record_id)
    query = query.where((doubts.c.tenant == tenant) & (rows.c.tenant == tenant) & ~known)
    if model is not None:
        query = query.where(_of(model))
    query = query.order_by(doubts.c.chance_sd.desc(), doubts.c.record_id.desc(), doubts.c.choice).limit(MOST)
    return [Waiting(row.record_id, row.choice, "unsure", row.created_at) for row in conn.execute(query)]


def _of(model: str) -> sa.ColumnElement[bool]:
    return (rows.c.model == model) | rows.c.model.startswith(f"{model}@", autoescape=True)


def _settles() -> sa.ColumnElement[bool]:
    return (table.c.kind == "demonstration") | ((table.c.name == NAME) & (table.c.source == "human"))


def _judged(tenant: str) -> sa.Subquery:
    """For each answer: how many people say that it was wrong, how many others or signs do, how many say that it was good."""
    valued, bad = table.c.kind.in_(VALUED), table.c.value < GOOD
    person = (table.c.source == "human") & (table.c.kind != "implicit")

    def num(what: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
        return sa.func.sum(sa.case((what, 1), else_=0))

    columns = [
        table.c.record_id,
        table.c.choice,
        num(valued & bad & person).label("wrong"),
        num(valued & bad & ~person).label("signs"),
        num(valued & ~bad).label("good"),
        num(_settles()).label("settled"),
        sa.func.max(table.c.created_at).label("said_at"),
    ]
    where = (table.c.tenant == tenant) & table.c.counts & table.c.record_id.is_not(None)
    return sa.select(*columns).where(where).group_by(table.c.record_id, table.c.choice).subquery()
