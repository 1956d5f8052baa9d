"""Episodes, feedback, datasets, and which version learned from what."""

from __future__ import annotations

import hashlib

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TABLES = (
    "version_datasets",
    "dataset_marks",
    "dataset_sources",
    "dataset_items",
    "datasets",
    "feedback_changes",
    "feedback",
    "episode_events",
    "episodes",
    "trails",
)


def upgrade() -> None:
    op.add_column("records", sa.Column("episode_id", sa.Text(), nullable=True))
    op.add_column("records", sa.Column("parent_id", sa.Text(), nullable=True))
    op.add_column("records", sa.Column("seen_messages", sa.BigInteger(), nullable=False, server_default="0"))
    op.create_index("records_episode", "records", ["tenant", "episode_id", "record_id"])
    _create_episodes()
    _create_feedback()
    _create_datasets()
    _adopt_records()


def downgrade() -> None:
    for name in TABLES:
        op.drop_table(name)
    op.drop_index("records_episode", "records")
    for name in ("seen_messages", "parent_id", "episode_id"):
        op.drop_column("records", name)


def _adopt_records() -> None:
    """Each record that is there becomes an episode of its own, a fifth of them held out."""
    conn = op.get_bind()
    op.execute("UPDATE records SET episode_id = 'ep_' || substr(record_id, 5)")
    names = ("tenant", "episode_id", "client_given", "split", "user", "model", "created_at", "updated_at")
    columns: list[sa.ColumnClause[object]] = [sa.column(name) for name in names]
    episodes = sa.table("episodes", *columns)
    found = conn.execute(sa.text('SELECT tenant, episode_id, "user", model, created_at FROM records ORDER BY record_id')).all()
    for start in range(0, len(found), 1000):
        rows = []
        for tenant, episode_id, user, model, created_at in found[start : start + 1000]:
            digest = hashlib.sha256(f"split\n{tenant}\n{episode_id}".encode("utf-8", "surrogatepass")).digest()
            split = "heldout" if int.from_bytes(digest[:8], "big") < 0.2 * 2**64 else "train"
            row = {"tenant": tenant, "episode_id": episode_id, "client_given": False, "split": split, "user": user, "model": model}
            rows.append(row | {"created_at": created_at, "updated_at": created_at})
        conn.execute(episodes.insert(), rows)


def _text(name: str, null: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=null)


def _id(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), primary_key=True, nullable=False)


def _number(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), primary_key=True, autoincrement=False, nullable=False)


def _whole(name: str, null: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=null)


def _double(name: str, null: bool = False) -> sa.Column[float]:
    return sa.Column(name, sa.Double(), nullable=null)


def _flag(name: str) -> sa.Column[bool]:
    return sa.Column(name, sa.Boolean(), nullable=False)


def _create_episodes() -> None:
    op.create_table(
        "trails",
        *(_id("record_id"), _number("number"), _text("tenant"), _text("kind"), _text("digest"), _text("episode_id"), _double("created_at")),
    )
    op.create_index("trails_digest", "trails", ["digest", "tenant"])
    op.create_table(
        "episodes",
        *(_id("tenant"), _id("episode_id"), _flag("client_given"), _text("split"), _text("user", null=True), _text("model")),
        *(_double("created_at"), _double("updated_at")),
    )
    op.create_index("episodes_time", "episodes", ["tenant", "created_at", "episode_id"])
    op.create_table(
        "episode_events",
        *(_id("event_id"), _text("tenant"), _text("episode_id"), _text("record_id", null=True), _text("kind"), _text("name")),
        *(_double("value", null=True), _text("text", null=True), _text("source"), _double("created_at")),
    )
    op.create_index("episode_events_episode", "episode_events", ["tenant", "episode_id", "event_id"])


def _create_feedback() -> None:
    op.create_table(
        "feedback",
        *(_id("feedback_id"), _text("tenant"), _text("episode_id"), _text("record_id", null=True)),
        *(_whole("choice"), _whole("span_start", null=True), _whole("span_end", null=True)),
        *(_text("over_record_id", null=True), _whole("over_choice", null=True), _text("kind"), _text("name")),
        *(_double("value", null=True), _double("noise", null=True), _text("text", null=True), _text("answer", null=True)),
        *(_text("reason"), _text("source"), _text("source_id"), _text("key_id", null=True), _text("slot"), _flag("counts")),
        *(_whole("revision"), _text("idempotency_key", null=True), _text("fingerprint", null=True)),
        *(_double("created_at"), _double("updated_at")),
        sa.UniqueConstraint("tenant", "idempotency_key", name="feedback_idempotency"),
    )
    for name, columns in (
        ("feedback_tenant", ["tenant", "feedback_id"]),
        ("feedback_episode", ["tenant", "episode_id"]),
        ("feedback_record", ["record_id"]),
        ("feedback_over", ["over_record_id"]),
        ("feedback_slot", ["tenant", "slot"]),
    ):
        op.create_index(name, "feedback", columns)
    big_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "feedback_changes",
        sa.Column("id", big_id, primary_key=True, autoincrement=True, nullable=False),
        *(_text("tenant"), _text("feedback_id"), _text("act"), sa.Column("before", sa.JSON(), nullable=True), _double("created_at")),
    )
    op.create_index("feedback_changes_tenant", "feedback_changes", ["tenant", "id"])
    op.create_index("feedback_changes_feedback", "feedback_changes", ["feedback_id"])


def _create_datasets() -> None:
    op.create_table(
        "datasets",
        *(_id("dataset_id"), _text("tenant"), _text("name"), _text("form"), sa.Column("filters", sa.JSON(), nullable=False)),
        *(_text("content_hash"), _whole("train_items"), _whole("heldout_items"), sa.Column("left_out", sa.JSON(), nullable=False)),
        *(_text("reward_version", null=True), _text("rebuilt_from", null=True), _whole("bytes"), _double("created_at")),
    )
    op.create_index("datasets_tenant", "datasets", ["tenant", "dataset_id"])
    op.create_table(
        "dataset_items",
        *(_id("dataset_id"), _number("number"), _text("tenant"), _text("split"), _text("episode_id"), _double("weight")),
        *(sa.Column("body", sa.LargeBinary(), nullable=False), _text("sha256"), _double("deleted_at", null=True)),
    )
    op.create_table("dataset_sources", _id("dataset_id"), _number("number"), _id("kind"), _id("source_id"), _text("tenant"))
    op.create_index("dataset_sources_source", "dataset_sources", ["source_id", "tenant", "kind"])
    op.create_table("dataset_marks", _id("dataset_id"), _id("kind"), _id("source_id"), _text("tenant"), _double("created_at"))
    op.create_table("version_datasets", _id("tenant"), _id("version"), _id("dataset_id"), _flag("inherited"), _double("created_at"))
    op.create_index("version_datasets_dataset", "version_datasets", ["dataset_id"])
