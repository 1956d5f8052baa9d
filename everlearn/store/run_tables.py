"""The tables of what training runs report of their steps. everlearn/store/tables.py has them too."""

from __future__ import annotations

import sqlalchemy as sa

from everlearn.store.columns import metadata, text, time, whole

# `source`: "log" (a finished request of the run, `number` is its seq) or "client" (what the loop that drives the run tells, `number` is its
# step). `kind`: the request's kind, or "step"; `name`: the loss of a request. `metrics`: finite numbers by name.
run_steps = sa.Table(
    "run_steps",
    metadata,
    text("run_id", primary_key=True),
    text("source", primary_key=True),
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    text("tenant"),
    text("kind"),
    text("name"),
    sa.Column("metrics", sa.JSON, nullable=False),
    time("created_at"),
    sa.Index("run_steps_tenant", "tenant", "created_at"),
)

# Group `number` of a step as its loop recorded it: `body` is zlib-compressed JSON, `summary` what a list shows of it, `bytes`
# the size of both.
run_rollouts = sa.Table(
    "run_rollouts",
    metadata,
    text("run_id", primary_key=True),
    sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    text("tenant"),
    sa.Column("summary", sa.JSON, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    whole("bytes"),
    time("created_at"),
    sa.Index("run_rollouts_tenant", "tenant", "created_at"),
    sa.Index("run_rollouts_age", "created_at"),
)

# What a run's loop says that it was told to do.
run_settings = sa.Table(
    "run_settings",
    metadata,
    text("run_id", primary_key=True),
    text("tenant"),
    sa.Column("settings", sa.JSON, nullable=False),
    time("created_at"),
)
