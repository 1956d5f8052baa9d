"""The tables of memories. everlearn/store/tables.py has them too."""

from __future__ import annotations

import sqlalchemy as sa

from everlearn.store.columns import BigId, metadata, text, time

# A memory: `window` is what it shows now (everlearn/memory/window.py packs it), `tokens` its size, `turns` how many have come. `refill`,
# `importance` and `policy`: who writes and who weighs its chunks (everlearn/api/refilling.py).
memories = sa.Table(
    "memories",
    metadata,
    text("tenant", primary_key=True),
    text("memory_id", primary_key=True),
    sa.Column("version", sa.BigInteger, nullable=False),
    text("base_model"),
    sa.Column("budget", sa.BigInteger, nullable=False),
    sa.Column("tokens", sa.BigInteger, nullable=False),
    sa.Column("turns", sa.BigInteger, nullable=False),
    sa.Column("window", sa.LargeBinary, nullable=False),
    sa.Column("refill", sa.Text, nullable=False, server_default="extract"),
    sa.Column("importance", sa.Text, nullable=False, server_default="head"),
    sa.Column("policy", sa.Text, nullable=False, server_default=""),
    time("created_at"),
    time("updated_at"),
)

memory_turns = sa.Table(
    "memory_turns",
    metadata,
    text("tenant", primary_key=True),
    text("memory_id", primary_key=True),
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    text("role"),
    text("text"),
    sa.Column("supersedes", sa.BigInteger, nullable=True),
    time("created_at"),
)

# What became of the chunk of turn `source` when turn `turn` came; `after` null: it left the window.
memory_rewrites = sa.Table(
    "memory_rewrites",
    metadata,
    sa.Column("id", BigId, primary_key=True, autoincrement=True),
    text("tenant"),
    text("memory_id"),
    sa.Column("source", sa.BigInteger, nullable=False),
    sa.Column("turn", sa.BigInteger, nullable=False),
    text("before"),
    text("after", null=True),
    text("refill"),
    sa.Index("memory_rewrites_source", "tenant", "memory_id", "source", "id"),
)

# Rows were deleted whose bytes may still be on the disk; it goes when they are gone.
memory_scrubs = sa.Table(
    "memory_scrubs",
    metadata,
    text("scrub_id", primary_key=True),
    time("created_at"),
)
