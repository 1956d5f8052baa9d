"""Memories: who refills and weighs their chunks, and which deletions wait for their bytes to go."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

COLUMNS = {"refill": "extract", "importance": "head", "policy": ""}


def upgrade() -> None:
    for name, value in COLUMNS.items():
        op.add_column("memories", sa.Column(name, sa.Text(), nullable=False, server_default=value))
    op.create_table(
        "memory_scrubs",
        sa.Column("scrub_id", sa.Text(), primary_key=True, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("memory_scrubs")
    for name in COLUMNS:
        op.drop_column("memories", name)
