"""The tables. Every row that a client can reach carries its tenant.

This file is what the code queries; the schema on disk comes from migrations/, and a test compares the two. Times are Unix
seconds. Sizes stand beside blobs so that adding them up never reads one.
"""

from __future__ import annotations

import sqlalchemy as sa

from everlearn.store.columns import BigId, metadata, text, time
from everlearn.store.feedback_tables import (
    dataset_items,
    dataset_marks,
    dataset_sources,
    datasets,
    episode_events,
    episodes,
    feedback,
    feedback_changes,
    trails,
    version_datasets,
)
from everlearn.store.memory_tables import memories, memory_rewrites, memory_scrubs, memory_turns
from everlearn.store.reward_tables import doubts, reward_labels, reward_models, reward_streams
from everlearn.store.run_tables import run_rollouts, run_settings, run_steps

__all__ = [
    "dataset_items",
    "dataset_marks",
    "dataset_sources",
    "datasets",
    "doubts",
    "episode_events",
    "episodes",
    "feedback",
    "feedback_changes",
    "memories",
    "memory_rewrites",
    "memory_scrubs",
    "memory_turns",
    "metadata",
    "reward_labels",
    "reward_models",
    "reward_streams",
    "run_rollouts",
    "run_settings",
    "run_steps",
    "trails",
    "version_datasets",
]

keys = sa.Table(
    "keys",
    metadata,
    text("key_id", primary_key=True),
    text("tenant"),
    text("name"),
    sa.Column("digest", sa.Text, nullable=False, unique=True),
    text("prefix"),
    sa.Column("scopes", sa.JSON, nullable=False),
    time("created_at"),
    time("revoked_at", null=True),
    sa.Column("limits", sa.JSON, nullable=True),
    sa.Column("content", sa.Boolean, nullable=False, server_default=sa.true()),
)

sessions = sa.Table(
    "sessions",
    metadata,
    text("session_id", primary_key=True),
    text("tenant"),
    sa.Column("tags", sa.JSON, nullable=False),
    sa.Column("user_metadata", sa.JSON, nullable=True),
    text("sdk_version"),
    text("project_id", null=True),
    text("display_name", null=True),
    text("idempotency_key", null=True),
    text("state"),
    text("finish_reason", null=True),
    text("finish_detail", null=True),
    time("created_at"),
    time("last_heartbeat"),
    sa.UniqueConstraint("tenant", "idempotency_key", name="sessions_idempotency"),
    sa.Index("sessions_tenant", "tenant", "created_at"),
)

runs = sa.Table(
    "runs",
    metadata,
    text("run_id", primary_key=True),
    text("tenant"),
    text("session_id"),
    sa.Column("model_seq_id", sa.BigInteger, nullable=False),
    text("base_model"),
    sa.Column("lora", sa.JSON, nullable=False),
    sa.Column("user_metadata", sa.JSON, nullable=True),
    text("state"),
    sa.Column("corrupted", sa.Boolean, nullable=False),
    sa.Column("last_seq", sa.BigInteger, nullable=False),
    time("created_at"),
    time("last_request_time"),
    sa.Index("runs_tenant", "tenant", "created_at"),
    sa.Index("runs_session", "session_id"),
    sa.Index("runs_state", "state"),
)

# `replays`: the request changes the adapter, so a rebuild must run it again. `folder`: what a load reads, so that garbage
# collection leaves it alone as long as the load may be replayed. `key_id`, `subject` (the run or base model), `tokens_in` and
# `tokens_out` are for the usage alone.
requests = sa.Table(
    "requests",
    metadata,
    text("request_id", primary_key=True),
    text("tenant"),
    text("kind"),
    text("model_id"),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("is_sample", sa.Boolean, nullable=False),
    sa.Column("replays", sa.Boolean, nullable=False),
    text("fingerprint"),
    sa.Column("meta", sa.JSON, nullable=False),
    text("folder", null=True),
    text("status"),
    sa.Column("error", sa.JSON, nullable=True),
    sa.Column("payload_bytes", sa.BigInteger, nullable=False),
    sa.Column("result_bytes", sa.BigInteger, nullable=False),
    text("key_id", null=True),
    text("subject", null=True),
    sa.Column("tokens_in", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("tokens_out", sa.BigInteger, nullable=False, server_default="0"),
    time("created_at"),
    time("finished_at", null=True),
    sa.UniqueConstraint("model_id", "is_sample", "seq", name="requests_order"),
    sa.Index("requests_pending", "tenant", sqlite_where=sa.text("status = 'pending'"), postgresql_where=sa.text("status = 'pending'")),
    sa.Index("requests_finished", "finished_at"),
)

payloads = sa.Table(
    "payloads",
    metadata,
    text("request_id", primary_key=True),
    text("tenant"),
    sa.Column("body", sa.LargeBinary, nullable=False),
)

results = sa.Table(
    "results",
    metadata,
    text("request_id", primary_key=True),
    text("tenant"),
    sa.Column("body", sa.LargeBinary, nullable=False),
)

snapshots = sa.Table(
    "snapshots",
    metadata,
    text("model_id", primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    text("tenant"),
    text("folder"),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    text("state"),
    time("created_at"),
)

checkpoints = sa.Table(
    "checkpoints",
    metadata,
    text("uid", primary_key=True),
    text("tenant"),
    text("run_id"),
    text("kind"),
    text("name"),
    text("folder"),
    text("version"),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    text("sha256"),
    sa.Column("optimizer", sa.Boolean, nullable=False),
    sa.Column("public", sa.Boolean, nullable=False),
    sa.Column("user_metadata", sa.JSON, nullable=True),
    text("state"),
    time("created_at"),
    time("expires_at", null=True),
    sa.Index(
        "checkpoints_path",
        "run_id",
        "kind",
        "name",
        unique=True,
        sqlite_where=sa.text("state = 'complete'"),
        postgresql_where=sa.text("state = 'complete'"),
    ),
    sa.Index("checkpoints_tenant", "tenant", "created_at"),
)

versions = sa.Table(
    "versions",
    metadata,
    text("version", primary_key=True),
    text("tenant"),
    text("run_id"),
    sa.Column("seq", sa.BigInteger, nullable=False),
    text("folder"),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    text("sha256"),
    text("state"),
    time("created_at"),
    sa.Index("versions_run", "run_id", "seq"),
)

samplers = sa.Table(
    "samplers",
    metadata,
    text("sampler_id", primary_key=True),
    text("tenant"),
    text("session_id"),
    sa.Column("seq", sa.BigInteger, nullable=False),
    text("base_model"),
    text("model_path", null=True),
    text("model_id"),
    text("version"),
    text("folder"),
    text("kind"),
    sa.Column("client_counter", sa.BigInteger, nullable=False),
    time("created_at"),
    time("last_used"),
    sa.Index("samplers_session", "session_id"),
    sa.Index("samplers_version", "version"),
)

telemetry = sa.Table(
    "telemetry",
    metadata,
    sa.Column("id", BigId, primary_key=True, autoincrement=True),
    text("tenant"),
    text("session_id"),
    sa.Column("body", sa.JSON, nullable=False),
    time("created_at"),
    sa.Column("bytes", sa.BigInteger, nullable=False, server_default="0"),
    sa.Index("telemetry_tenant", "tenant", "id", "bytes"),
)

# A name of an adapter: `number` is the version that the bare name means now, `last_number` the highest ever given (never reused).
adapter_names = sa.Table(
    "adapter_names",
    metadata,
    text("tenant", primary_key=True),
    text("name", primary_key=True),
    sa.Column("number", sa.BigInteger, nullable=False),
    sa.Column("last_number", sa.BigInteger, nullable=False),
    time("created_at"),
)

# `uid`: the checkpoint behind it, which can't be deleted, expire or be overwritten as long as this row is there.
named_versions = sa.Table(
    "named_versions",
    metadata,
    text("tenant", primary_key=True),
    text("name", primary_key=True),
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    text("uid"),
    text("path"),
    text("base_model"),
    text("version"),
    text("folder"),
    text("note"),
    time("created_at"),
    sa.Index("named_versions_uid", "uid"),
)

name_moves = sa.Table(
    "name_moves",
    metadata,
    sa.Column("id", BigId, primary_key=True, autoincrement=True),
    text("tenant"),
    text("name"),
    sa.Column("number", sa.BigInteger, nullable=False),
    text("note"),
    time("created_at"),
    sa.Index("name_moves_name", "tenant", "name", "id"),
)

# `parent_id`: the record whose messages and answer this one's messages begin with, `seen_messages` of them; the rest is new.
records = sa.Table(
    "records",
    metadata,
    text("record_id", primary_key=True),
    text("tenant"),
    text("key_id", null=True),
    text("route"),
    text("model"),
    text("base_model"),
    text("version"),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("cached_tokens", sa.BigInteger, nullable=False),
    sa.Column("finish_reasons", sa.JSON, nullable=False),
    text("user", null=True),
    time("first_token_seconds", null=True),
    time("seconds"),
    sa.Column("body_bytes", sa.BigInteger, nullable=False),
    time("created_at"),
    text("episode_id", null=True),
    text("parent_id", null=True),
    sa.Column("seen_messages", sa.BigInteger, nullable=False, server_default="0"),
    sa.Index("records_episode", "tenant", "episode_id", "record_id"),
    sa.Index("records_tenant", "tenant", "record_id"),
    sa.Index("records_age", "created_at", "body_bytes"),
)

record_bodies = sa.Table(
    "record_bodies",
    metadata,
    text("record_id", primary_key=True),
    text("tenant"),
    sa.Column("body", sa.LargeBinary, nullable=False),
)

# Sums that outlive the rows they were made of; `kind` is a route ("chat.completions") or a kind of request ("forward_backward").
usage = sa.Table(
    "usage",
    metadata,
    text("tenant", primary_key=True),
    sa.Column("day", sa.BigInteger, primary_key=True, autoincrement=False),
    text("key_id", primary_key=True),
    text("subject", primary_key=True),
    text("kind", primary_key=True),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("tokens_in", sa.BigInteger, nullable=False),
    sa.Column("tokens_cached", sa.BigInteger, nullable=False),
    sa.Column("tokens_out", sa.BigInteger, nullable=False),
    time("seconds"),
)

# `champion` and `candidate` are numbers of the name's versions; champion 0 is the base model itself. `share`: of the episodes, which the
# candidate answers; `shadow`: of the requests, which it answers unseen. `cycle`: what the work on the next candidate has so far.
deployments = sa.Table(
    "deployments",
    metadata,
    text("tenant", primary_key=True),
    text("name", primary_key=True),
    text("base_model"),
    text("state"),
    sa.Column("champion", sa.BigInteger, nullable=False),
    sa.Column("candidate", sa.BigInteger, nullable=True),
    sa.Column("previous", sa.BigInteger, nullable=True),
    sa.Column("share", sa.Double, nullable=False),
    sa.Column("shadow", sa.Double, nullable=False),
    sa.Column("paused", sa.Boolean, nullable=False),
    text("salt"),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("description", sa.JSON, nullable=False),
    sa.Column("cycle", sa.JSON, nullable=False),
    time("created_at"),
    time("changed_at"),
)

deployment_events = sa.Table(
    "deployment_events",
    metadata,
    sa.Column("id", BigId, primary_key=True, autoincrement=True),
    text("tenant"),
    text("name"),
    text("kind"),
    text("was"),
    text("state"),
    sa.Column("champion", sa.BigInteger, nullable=False),
    sa.Column("candidate", sa.BigInteger, nullable=True),
    sa.Column("share", sa.Double, nullable=False),
    text("actor"),
    text("reason"),
    sa.Column("evidence", sa.JSON, nullable=False),
    time("created_at"),
    sa.Index("deployment_events_name", "tenant", "name", "id"),
)
