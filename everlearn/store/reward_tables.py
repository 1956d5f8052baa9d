"""The tables of reward models: what each has learned from, its versions, and the answers that it is too unsure of."""

from __future__ import annotations

import sqlalchemy as sa

from everlearn.store.columns import metadata, text, time, whole

# One row for each deployment that has one. `cursor`: the last row of feedback_changes that is in its labels. `changed`: labels that came,
# changed or went since the newest version; `forgets`: one of them was deleted. `asked`: the last record without a label that was looked at.
reward_streams = sa.Table(
    "reward_streams",
    metadata,
    text("tenant", primary_key=True),
    text("deployment", primary_key=True),
    text("base_model"),
    whole("cursor"),
    whole("changed"),
    sa.Column("forgets", sa.Boolean, nullable=False),
    text("asked"),
    time("created_at"),
    time("updated_at"),
)

# A label as numbers. `features`, `other`: float32, little-endian. `arrived`: the change that brought it; order of arrival is order of
# learning. What only expired stays; what is deleted goes in the same transaction as the feedback.
reward_labels = sa.Table(
    "reward_labels",
    metadata,
    text("tenant", primary_key=True),
    text("deployment", primary_key=True),
    text("feedback_id", primary_key=True),
    whole("arrived"),
    text("record_id"),
    text("over_record_id", null=True),
    text("episode_id"),
    text("kind"),
    text("name"),
    sa.Column("value", sa.Double, nullable=True),
    text("source"),
    text("source_id"),
    text("policy"),
    sa.Column("held_out", sa.Boolean, nullable=False),
    sa.Column("features", sa.LargeBinary, nullable=False),
    sa.Column("other", sa.LargeBinary, nullable=True),
    time("created_at"),
    sa.Index("reward_labels_arrived", "tenant", "deployment", "arrived"),
    sa.Index("reward_labels_feedback", "feedback_id"),
    sa.Index("reward_labels_record", "record_id"),
    sa.Index("reward_labels_over", "over_record_id"),
    sa.Index("reward_labels_episode", "tenant", "episode_id"),
)

# A version never changes, but for its weights (`manifest`, `tensors`): they go when newer ones make it superfluous, or when something that
# it learned from is deleted. `report` is what is published. `cursor`: the stream's when it was fitted.
reward_models = sa.Table(
    "reward_models",
    metadata,
    text("model_id", primary_key=True),
    text("tenant"),
    text("deployment"),
    text("base_model"),
    whole("number"),
    whole("cursor"),
    text("cause"),
    text("labels_hash"),
    whole("labels"),
    sa.Column("effective_labels", sa.Double, nullable=False),
    sa.Column("earned", sa.Boolean, nullable=False),
    text("why"),
    sa.Column("report", sa.JSON, nullable=False),
    sa.Column("seconds", sa.Double, nullable=False),
    sa.Column("manifest", sa.LargeBinary, nullable=True),
    sa.Column("tensors", sa.LargeBinary, nullable=True),
    time("created_at"),
    sa.UniqueConstraint("tenant", "deployment", "number", name="reward_models_number"),
    sa.Index("reward_models_tenant", "tenant", "model_id"),
)

# Answers that a reward model is too unsure of: they go before a person. A doubt goes when its answer is labelled, or with its record.
doubts = sa.Table(
    "doubts",
    metadata,
    text("record_id", primary_key=True),
    sa.Column("choice", sa.BigInteger, primary_key=True, autoincrement=False),
    text("tenant"),
    text("deployment"),
    text("model_id"),
    sa.Column("chance", sa.Double, nullable=False),
    sa.Column("chance_sd", sa.Double, nullable=False),
    sa.Column("disagreement", sa.Double, nullable=False),
    time("created_at"),
    sa.Index("doubts_deployment", "tenant", "deployment", "record_id"),
)
