"""Reward models: their labels as numbers, their versions, and the answers that they are too unsure of."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "reward_streams",
        sa.Column("tenant", sa.Text(), primary_key=True, nullable=False),
        sa.Column("deployment", sa.Text(), primary_key=True, nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("cursor", sa.BigInteger(), nullable=False),
        sa.Column("changed", sa.BigInteger(), nullable=False),
        sa.Column("forgets", sa.Boolean(), nullable=False),
        sa.Column("asked", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
    )
    op.create_table(
        "reward_labels",
        sa.Column("tenant", sa.Text(), primary_key=True, nullable=False),
        sa.Column("deployment", sa.Text(), primary_key=True, nullable=False),
        sa.Column("feedback_id", sa.Text(), primary_key=True, nullable=False),
        sa.Column("arrived", sa.BigInteger(), nullable=False),
        sa.Column("record_id", sa.Text(), nullable=False),
        sa.Column("over_record_id", sa.Text(), nullable=True),
        sa.Column("episode_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Double(), nullable=True),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("source_id", sa.Text(), nullable=False),
        sa.Column("policy", sa.Text(), nullable=False),
        sa.Column("held_out", sa.Boolean(), nullable=False),
        sa.Column("features", sa.LargeBinary(), nullable=False),
        sa.Column("other", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
    )
    op.create_index("reward_labels_arrived", "reward_labels", ["tenant", "deployment", "arrived"])
    op.create_index("reward_labels_feedback", "reward_labels", ["feedback_id"])
    op.create_index("reward_labels_record", "reward_labels", ["record_id"])
    op.create_index("reward_labels_over", "reward_labels", ["over_record_id"])
    op.create_index("reward_labels_episode", "reward_labels", ["tenant", "episode_id"])
    op.create_table(
        "reward_models",
        sa.Column("model_id", sa.Text(), primary_key=True, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("deployment", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("cursor", sa.BigInteger(), nullable=False),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("labels_hash", sa.Text(), nullable=False),
        sa.Column("labels", sa.BigInteger(), nullable=False),
        sa.Column("effective_labels", sa.Double(), nullable=False),
        sa.Column("earned", sa.Boolean(), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("report", sa.JSON(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("manifest", sa.LargeBinary(), nullable=True),
        sa.Column("tensors", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.UniqueConstraint("tenant", "deployment", "number", name="reward_models_number"),
    )
    op.create_index("reward_models_tenant", "reward_models", ["tenant", "model_id"])
    op.create_table(
        "doubts",
        sa.Column("record_id", sa.Text(), primary_key=True, nullable=False),
        sa.Column("choice", sa.BigInteger(), primary_key=True, autoincrement=False, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("deployment", sa.Text(), nullable=False),
        sa.Column("model_id", sa.Text(), nullable=False),
        sa.Column("chance", sa.Double(), nullable=False),
        sa.Column("chance_sd", sa.Double(), nullable=False),
        sa.Column("disagreement", sa.Double(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
    )
    op.create_index("doubts_deployment", "doubts", ["tenant", "deployment", "record_id"])


def downgrade() -> None:
    op.drop_index("doubts_deployment", "doubts")
    op.drop_table("doubts")
    op.drop_index("reward_models_tenant", "reward_models")
    op.drop_table("reward_models")
    for name in ("episode", "over", "record", "feedback", "arrived"):
        op.drop_index(f"reward_labels_{name}", "reward_labels")
    op.drop_table("reward_labels")
    op.drop_table("reward_streams")
