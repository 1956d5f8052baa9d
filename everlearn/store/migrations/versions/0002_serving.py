"""Names of adapters, records of answers, usage, limits of keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("keys", sa.Column("limits", sa.JSON(), nullable=True))
    op.add_column("keys", sa.Column("content", sa.Boolean(), nullable=False, server_default=sa.true()))
    op.add_column("requests", sa.Column("key_id", sa.Text(), nullable=True))
    op.add_column("requests", sa.Column("subject", sa.Text(), nullable=True))
    op.add_column("requests", sa.Column("tokens_in", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("requests", sa.Column("tokens_out", sa.BigInteger(), nullable=False, server_default="0"))
    _create_names()
    _create_records()


def downgrade() -> None:
    for name in ("usage", "record_bodies", "records", "name_moves", "named_versions", "adapter_names"):
        op.drop_table(name)
    for table, names in (("requests", ("tokens_out", "tokens_in", "subject", "key_id")), ("keys", ("content", "limits"))):
        for name in names:
            op.drop_column(table, name)


def _create_names() -> None:
    op.create_table(
        "adapter_names",
        sa.Column("tenant", sa.Text(), primary_key=True, nullable=False),
        sa.Column("name", sa.Text(), primary_key=True, nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("last_number", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
    )
    op.create_table(
        "named_versions",
        sa.Column("tenant", sa.Text(), primary_key=True, nullable=False),
        sa.Column("name", sa.Text(), primary_key=True, nullable=False),
        sa.Column("number", sa.BigInteger(), primary_key=True, autoincrement=False, nullable=False),
        sa.Column("uid", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("folder", sa.Text(), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
    )
    op.create_index("named_versions_uid", "named_versions", ["uid"])
    op.create_table(
        "name_moves",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=True, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
    )
    op.create_index("name_moves_name", "name_moves", ["tenant", "name", "id"])


def _create_records() -> None:
    op.create_table(
        "records",
        sa.Column("record_id", sa.Text(), primary_key=True, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=True),
        sa.Column("route", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("finish_reasons", sa.JSON(), nullable=False),
        sa.Column("user", sa.Text(), nullable=True),
        sa.Column("first_token_seconds", sa.Double(), nullable=True),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("body_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
    )
    op.create_index("records_age", "records", ["created_at", "body_bytes"])
    op.create_index("records_tenant", "records", ["tenant", "record_id"])
    op.create_table(
        "record_bodies",
        sa.Column("record_id", sa.Text(), primary_key=True, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
    )
    op.create_table(
        "usage",
        sa.Column("tenant", sa.Text(), primary_key=True, nullable=False),
        sa.Column("day", sa.BigInteger(), primary_key=True, autoincrement=False, nullable=False),
        sa.Column("key_id", sa.Text(), primary_key=True, nullable=False),
        sa.Column("subject", sa.Text(), primary_key=True, nullable=False),
        sa.Column("kind", sa.Text(), primary_key=True, nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("tokens_in", sa.BigInteger(), nullable=False),
        sa.Column("tokens_cached", sa.BigInteger(), nullable=False),
        sa.Column("tokens_out", sa.BigInteger(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
    )
