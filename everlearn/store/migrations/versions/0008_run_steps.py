"""What training runs report: metrics by step, rollouts, settings."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "run_steps",
        sa.Column("run_id", sa.Text(), primary_key=True, nullable=False),
        sa.Column("source", sa.Text(), primary_key=True, nullable=False),
        sa.Column("number", sa.BigInteger(), primary_key=True, autoincrement=False, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
    )
    op.create_index("run_steps_tenant", "run_steps", ["tenant", "created_at"])
    op.create_table(
        "run_rollouts",
        sa.Column("run_id", sa.Text(), primary_key=True, nullable=False),
        sa.Column("step", sa.BigInteger(), primary_key=True, autoincrement=False, nullable=False),
        sa.Column("number", sa.BigInteger(), primary_key=True, autoincrement=False, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("summary", sa.JSON(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
    )
    op.create_index("run_rollouts_tenant", "run_rollouts", ["tenant", "created_at"])
    op.create_index("run_rollouts_age", "run_rollouts", ["created_at"])
    op.create_table(
        "run_settings",
        sa.Column("run_id", sa.Text(), primary_key=True, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
    )
    op.create_index("episode_events_newest", "episode_events", ["tenant", "event_id"])


def downgrade() -> None:
    op.drop_index("episode_events_newest", "episode_events")
    op.drop_table("run_settings")
    op.drop_index("run_rollouts_age", "run_rollouts")
    op.drop_index("run_rollouts_tenant", "run_rollouts")
    op.drop_table("run_rollouts")
    op.drop_index("run_steps_tenant", "run_steps")
    op.drop_table("run_steps")
