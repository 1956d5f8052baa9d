"""The tables of learning from use: episodes, feedback, datasets, and what learned from what. everlearn/store/tables.py has them too."""

from __future__ import annotations

import sqlalchemy as sa

from everlearn.store.columns import BigId, metadata, text, time, whole

# Where a conversation stood: `digest` is of the messages of a record ("prompt"), or of these and its answer ("end"). A request whose
# messages begin with an "end" goes on with that record's conversation. Nothing of records whose content isn't kept.
trails = sa.Table(
    "trails",
    metadata,
    text("record_id", primary_key=True),
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    text("tenant"),
    text("kind"),
    text("digest"),
    text("episode_id"),
    time("created_at"),
    sa.Index("trails_digest", "digest", "tenant"),
)

# `split` ("train" or "heldout") is settled when an episode is made, and stays.
episodes = sa.Table(
    "episodes",
    metadata,
    text("tenant", primary_key=True),
    text("episode_id", primary_key=True),
    sa.Column("client_given", sa.Boolean, nullable=False),
    text("split"),
    text("user", null=True),
    text("model"),
    time("created_at"),
    time("updated_at"),
    sa.Index("episodes_time", "tenant", "created_at", "episode_id"),
)

episode_events = sa.Table(
    "episode_events",
    metadata,
    text("event_id", primary_key=True),
    text("tenant"),
    text("episode_id"),
    text("record_id", null=True),
    text("kind"),
    text("name"),
    sa.Column("value", sa.Double, nullable=True),
    text("text", null=True),
    text("source"),
    time("created_at"),
    sa.Index("episode_events_episode", "tenant", "episode_id", "event_id"),
    sa.Index("episode_events_newest", "tenant", "event_id"),
)

# `slot`: one source's words of one kind about one thing, of which the last counts (`counts`). `fingerprint` is of the request's body.
feedback = sa.Table(
    "feedback",
    metadata,
    text("feedback_id", primary_key=True),
    text("tenant"),
    text("episode_id"),
    text("record_id", null=True),
    whole("choice"),
    whole("span_start", null=True),
    whole("span_end", null=True),
    text("over_record_id", null=True),
    whole("over_choice", null=True),
    text("kind"),
    text("name"),
    sa.Column("value", sa.Double, nullable=True),
    sa.Column("noise", sa.Double, nullable=True),
    text("text", null=True),
    text("answer", null=True),
    text("reason"),
    text("source"),
    text("source_id"),
    text("key_id", null=True),
    text("slot"),
    sa.Column("counts", sa.Boolean, nullable=False),
    whole("revision"),
    text("idempotency_key", null=True),
    text("fingerprint", null=True),
    time("created_at"),
    time("updated_at"),
    sa.UniqueConstraint("tenant", "idempotency_key", name="feedback_idempotency"),
    sa.Index("feedback_tenant", "tenant", "feedback_id"),
    sa.Index("feedback_episode", "tenant", "episode_id"),
    sa.Index("feedback_record", "record_id"),
    sa.Index("feedback_over", "over_record_id"),
    sa.Index("feedback_slot", "tenant", "slot"),
)

# Append only; the row with the highest id is never dropped, since SQLite would give its id again. `before`: what an edit replaced; nothing
# once the feedback is deleted.
feedback_changes = sa.Table(
    "feedback_changes",
    metadata,
    sa.Column("id", BigId, primary_key=True, autoincrement=True),
    text("tenant"),
    text("feedback_id"),
    text("act"),
    sa.Column("before", sa.JSON(none_as_null=True), nullable=True),
    time("created_at"),
    sa.Index("feedback_changes_tenant", "tenant", "id"),
    sa.Index("feedback_changes_feedback", "feedback_id"),
)

datasets = sa.Table(
    "datasets",
    metadata,
    text("dataset_id", primary_key=True),
    text("tenant"),
    text("name"),
    text("form"),
    sa.Column("filters", sa.JSON, nullable=False),
    text("content_hash"),
    whole("train_items"),
    whole("heldout_items"),
    sa.Column("left_out", sa.JSON, nullable=False),
    text("reward_version", null=True),
    text("rebuilt_from", null=True),
    whole("bytes"),
    time("created_at"),
    sa.Index("datasets_tenant", "tenant", "dataset_id"),
)

# `body` is empty once something that the item was made of is deleted.
dataset_items = sa.Table(
    "dataset_items",
    metadata,
    text("dataset_id", primary_key=True),
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    text("tenant"),
    text("split"),
    text("episode_id"),
    sa.Column("weight", sa.Double, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    text("sha256"),
    time("deleted_at", null=True),
)

dataset_sources = sa.Table(
    "dataset_sources",
    metadata,
    text("dataset_id", primary_key=True),
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    text("kind", primary_key=True),
    text("source_id", primary_key=True),
    text("tenant"),
    sa.Index("dataset_sources_source", "source_id", "tenant", "kind"),
)

dataset_marks = sa.Table(
    "dataset_marks",
    metadata,
    text("dataset_id", primary_key=True),
    text("kind", primary_key=True),
    text("source_id", primary_key=True),
    text("tenant"),
    time("created_at"),
)

# `version` learned from the dataset, or (`inherited`) began with one that did.
version_datasets = sa.Table(
    "version_datasets",
    metadata,
    text("tenant", primary_key=True),
    text("version", primary_key=True),
    text("dataset_id", primary_key=True),
    sa.Column("inherited", sa.Boolean, nullable=False),
    time("created_at"),
    sa.Index("version_datasets_dataset", "dataset_id"),
)
