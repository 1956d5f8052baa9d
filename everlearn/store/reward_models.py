"""Reward models of a tenant's deployments: the labels that each has learned from, as numbers; its versions; what it is too unsure of.

A stream follows the changes of the tenant's feedback with a cursor, which moves in the same transaction as the labels that it brought: a
label is in it once, whatever ends a process between. Versions are fitted from the labels that are there and from nothing else. When
feedback is deleted, its label goes in that very transaction (`forget`), and the weights of every version that had learned from it with it;
figures stay. What only expired stays a label: numbers, no words. How features are computed and models fitted, this file doesn't know.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Collection, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.errors import Conflict, NotFound
from everlearn.faultpoints import around
from everlearn.store import tables

streams, label_rows, model_rows, doubt_rows = tables.reward_streams, tables.reward_labels, tables.reward_models, tables.doubts
KEPT_VERSIONS = 3  # of a deployment, with their weights
KEPT_FIGURES = 200  # of a deployment, versions that are listed with what they were worth
MAX_LABELS = 10_000  # of a deployment, the newest
MAX_DOUBTS = 500  # of a deployment, the newest


class Stream(msgspec.Struct, frozen=True):
    """Where a deployment's reward model stands; see everlearn/store/reward_tables.py."""

    tenant: str
    deployment: str
    base_model: str
    cursor: int
    changed: int
    forgets: bool
    asked: str
    created_at: float
    updated_at: float


class StoredLabel(msgspec.Struct, frozen=True):
    """A piece of feedback as numbers: `features` and `other` are little-endian float32 [D]."""

    feedback_id: str
    arrived: int
    record_id: str
    over_record_id: str | None
    episode_id: str
    kind: str
    name: str
    value: float | None
    source: str
    source_id: str
    policy: str
    held_out: bool
    features: bytes
    other: bytes | None
    created_at: float


class RewardVersion(msgspec.Struct, frozen=True):
    """A version as it is listed. `has_weights`: it can still score."""

    model_id: str
    tenant: str
    deployment: str
    base_model: str
    number: int
    cursor: int
    cause: str  # labels, deleted
    labels_hash: str
    labels: int
    effective_labels: float
    earned: bool
    why: str
    report: dict[str, Any]
    seconds: float
    created_at: float
    has_weights: bool = True


class Doubt(msgspec.Struct, frozen=True):
    record_id: str
    choice: int
    tenant: str
    deployment: str
    model_id: str
    chance: float
    chance_sd: float
    disagreement: float
    created_at: float


def stream(conn: Connection, tenant: str, deployment: str) -> Stream | None:
    row = conn.execute(sa.select(streams).where(_here(streams, tenant, deployment))).first()
    return None if row is None else Stream(**row._mapping)


def open_stream(conn: Connection, tenant: str, deployment: str, base_model: str) -> Stream:
    """The deployment's stream; where there is none it begins with the first feedback that the tenant has."""
    there = stream(conn, tenant, deployment)
    if there is not None:
        return there
    rows = tables.deployments
    if conn.execute(sa.select(rows.c.name).where((rows.c.tenant == tenant) & (rows.c.name == deployment))).first() is None:
        raise NotFound(f"deployment {deployment!r} was given up", param="deployment")
    now = time.time()
    made = Stream(tenant, deployment, base_model, 0, 0, False, "", now, now)
    conn.execute(streams.insert().values(**msgspec.structs.asdict(made)))
    return made


def take(conn: Connection, was: Stream, cursor: int, came: Sequence[StoredLabel], went: Collection[str]) -> Stream:
    """Moves the stream to `cursor` with the labels that came and went up to there. Raises Conflict where somebody moved it meanwhile. A
    label whose feedback was deleted since it was read isn't taken."""
    now = _same(conn, was)
    ids = [one.feedback_id for one in came]
    there = set(conn.execute(sa.select(tables.feedback.c.feedback_id).where(tables.feedback.c.feedback_id.in_(ids))).scalars())
    gone = {*ids, *went}
    with around("reward.labels"):
        here = _here(label_rows, was.tenant, was.deployment)
        dropped = conn.execute(label_rows.delete().where(here & label_rows.c.feedback_id.in_(gone))).rowcount if gone else 0
        kept = [one for one in came if one.feedback_id in there]
        if kept:
            place = {"tenant": was.tenant, "deployment": was.deployment}
            conn.execute(label_rows.insert(), [msgspec.structs.asdict(one) | place for one in kept])
            labelled = [one.record_id for one in kept]
            conn.execute(doubt_rows.delete().where((doubt_rows.c.tenant == was.tenant) & doubt_rows.c.record_id.in_(labelled)))
        changed = now.changed + max(len(kept), dropped)
        return _moved(conn, now, cursor=cursor, changed=changed)


def labels(conn: Connection, tenant: str, deployment: str, behind: int = 0) -> list[StoredLabel]:
    """Those that arrived behind that change, the newest MAX_LABELS of them, in order of arrival."""
    columns = [label_rows.c[name] for name in StoredLabel.__struct_fields__]
    where = _here(label_rows, tenant, deployment) & (label_rows.c.arrived > behind)
    order = (label_rows.c.arrived.desc(), label_rows.c.feedback_id.desc())
    query = sa.select(*columns).where(where).order_by(*order).limit(MAX_LABELS)
    return [StoredLabel(**row._mapping) for row in conn.execute(query)][::-1]


def unheard(conn: Connection, tenant: str, deployment: str, found: Sequence[StoredLabel], upto: int) -> list[StoredLabel]:
    """Those of these labels whose feedback is newer than the change `upto`: the others are of words that were edited, or count again."""
    changes = tables.feedback_changes
    place = _here(label_rows, tenant, deployment) & (label_rows.c.arrived > upto)
    ids = sa.select(label_rows.c.feedback_id).where(place)
    known = sa.select(changes.c.feedback_id).where((changes.c.tenant == tenant) & (changes.c.id <= upto) & changes.c.feedback_id.in_(ids))
    heard = set(conn.execute(known).scalars())
    return [one for one in found if one.feedback_id not in heard]


def num_labels(conn: Connection, tenant: str, deployment: str) -> int:
    return int(conn.execute(sa.select(sa.func.count()).select_from(label_rows).where(_here(label_rows, tenant, deployment))).scalar_one())


def hash_of(found: Sequence[StoredLabel]) -> str:
    """The same for the same labels in the same order."""
    digest = hashlib.sha256()
    for one in found:
        digest.update(msgspec.msgpack.encode(one))
    return digest.hexdigest()


def publish(
    conn: Connection, was: Stream, found: Sequence[StoredLabel], labels_hash: str, report: dict[str, Any], manifest: bytes, tensors: bytes,
    seconds: float,
) -> RewardVersion | None:  # fmt: skip
    """A version fitted from these labels, which are those of the stream `was` and have the hash `hash_of` (made before: it takes long for
    a transaction); of older ones the weights of the newest few and the figures of some more stay. None, and nothing is kept, where
    something that it was fitted from was deleted meanwhile, or somebody moved the stream: then it is to be fitted again."""
    now = stream(conn, was.tenant, was.deployment)
    if now is None or (now.cursor, now.changed, now.forgets) != (was.cursor, was.changed, was.forgets):
        return None
    if num_labels(conn, was.tenant, was.deployment) != len(found) and len(found) < MAX_LABELS:
        return None
    newest = latest(conn, was.tenant, was.deployment)
    at = time.time()
    made = RewardVersion(
        f"rm_{int(1000 * at):011x}{secrets.token_hex(6)}", was.tenant, was.deployment, was.base_model, newest.number + 1 if newest else 1,
        was.cursor, "deleted" if was.forgets else "labels", labels_hash, int(report["labels"]), float(report["effective_labels"]),
        bool(report["earned"]), str(report["why"]), report, seconds, at,
    )  # fmt: skip
    row = {name: getattr(made, name) for name in RewardVersion.__struct_fields__ if name != "has_weights"}
    with around("reward.version"):
        conn.execute(model_rows.insert().values(**row, manifest=manifest, tensors=tensors))
        _drop_weights(conn, was.tenant, was.deployment, model_rows.c.number <= made.number - KEPT_VERSIONS)
        here = _here(model_rows, was.tenant, was.deployment)
        conn.execute(model_rows.delete().where(here & (model_rows.c.number <= made.number - KEPT_FIGURES)))
        if len(found) >= MAX_LABELS:
            old = _here(label_rows, was.tenant, was.deployment) & (label_rows.c.arrived < found[0].arrived)
            conn.execute(label_rows.delete().where(old))
        _moved(conn, now, changed=0, forgets=False)
    return made


def emptied(conn: Connection, was: Stream) -> None:
    """All labels were deleted: there is nothing to fit, and no version that can score."""
    now = _same(conn, was)
    if not num_labels(conn, was.tenant, was.deployment):
        _drop_weights(conn, was.tenant, was.deployment, sa.true())
        _moved(conn, now, changed=0, forgets=False)


def get(conn: Connection, tenant: str, model_id: str) -> RewardVersion:
    where = (model_rows.c.tenant == tenant) & (model_rows.c.model_id == model_id)
    row = conn.execute(sa.select(*_listed()).where(where)).first()
    if row is None:
        raise NotFound(f"no reward model {model_id[:100]!r}; GET /v1/reward-models lists yours", param="model_id")
    return RewardVersion(**row._mapping)


def latest(conn: Connection, tenant: str, deployment: str) -> RewardVersion | None:
    query = sa.select(*_listed()).where(_here(model_rows, tenant, deployment)).order_by(model_rows.c.number.desc()).limit(1)
    row = conn.execute(query).first()
    return None if row is None else RewardVersion(**row._mapping)


def list_versions(
    conn: Connection, tenant: str, limit: int = 20, after: str | None = None, deployment: str | None = None
) -> list[RewardVersion]:
    """Newest first; with `after` those older than that one."""
    where = model_rows.c.tenant == tenant
    if after is not None:
        where &= model_rows.c.model_id < after
    if deployment is not None:
        where &= model_rows.c.deployment == deployment
    rows = conn.execute(sa.select(*_listed()).where(where).order_by(model_rows.c.model_id.desc()).limit(limit))
    return [RewardVersion(**row._mapping) for row in rows]


def weights(conn: Connection, tenant: str, model_id: str) -> tuple[bytes, bytes]:
    """Manifest and tensors. Raises NotFound for a version that has none any more."""
    found = get(conn, tenant, model_id)
    row = conn.execute(sa.select(model_rows.c.manifest, model_rows.c.tensors).where(model_rows.c.model_id == model_id)).one()
    if row.manifest is None:
        told = "newer versions took its place, or something that it learned from was deleted"
        raise NotFound(f"reward model {model_id} has only its figures: {told}; use the newest of {found.deployment}", param="model_id")
    return row.manifest, row.tensors


def doubt(conn: Connection, tenant: str, deployment: str, asked: str, found: Sequence[Doubt]) -> None:
    """Keeps what was found to be too unsure among the records up to `asked`, but what was labelled or went meanwhile; nothing where
    the deployment was given up."""
    if stream(conn, tenant, deployment) is None:
        return
    ids = [one.record_id for one in found]
    rows, said = tables.records, tables.feedback
    there = set(conn.execute(sa.select(rows.c.record_id).where(rows.c.record_id.in_(ids))).scalars())
    there -= set(conn.execute(sa.select(said.c.record_id).where(said.c.record_id.in_(ids))).scalars())
    conn.execute(doubt_rows.delete().where(doubt_rows.c.record_id.in_(ids)))
    if kept := [msgspec.structs.asdict(one) for one in found if one.record_id in there]:
        conn.execute(doubt_rows.insert(), kept)
    here = _here(doubt_rows, tenant, deployment)
    edge = sa.select(doubt_rows.c.record_id).where(here).order_by(doubt_rows.c.record_id.desc()).offset(MAX_DOUBTS).limit(1)
    oldest = conn.execute(edge).scalar()
    if oldest is not None:
        conn.execute(doubt_rows.delete().where(here & (doubt_rows.c.record_id <= oldest)))
    conn.execute(streams.update().where(_here(streams, tenant, deployment)).values(asked=asked))


def list_doubts(conn: Connection, tenant: str, limit: int = 20, after: str | None = None, deployment: str | None = None) -> list[Doubt]:
    """Newest answers first; with `after` those older than that record."""
    where = doubt_rows.c.tenant == tenant
    if after is not None:
        where &= doubt_rows.c.record_id < after
    if deployment is not None:
        where &= doubt_rows.c.deployment == deployment
    query = sa.select(doubt_rows).where(where).order_by(doubt_rows.c.record_id.desc(), doubt_rows.c.choice).limit(limit)
    return [Doubt(**row._mapping) for row in conn.execute(query)]


def drop(conn: Connection, tenant: str, deployment: str) -> None:
    """All of a deployment that was given up."""
    for table in (doubt_rows, model_rows, label_rows, streams):
        conn.execute(table.delete().where(_here(table, tenant, deployment)))


def forget(conn: Connection, tenant: str, kind: str, ids: Sequence[str]) -> list[str]:
    """Deletes the labels of this feedback, or about these records or episodes, and the weights of every version that learned from one of
    them: what is left is to be fitted again. Which deployments that concerns."""
    fields = {"feedback": ("feedback_id",), "record": ("record_id", "over_record_id"), "episode": ("episode_id",)}[kind]
    where = (label_rows.c.tenant == tenant) & sa.or_(*(label_rows.c[name].in_(ids) for name in fields))
    query = sa.select(label_rows.c.deployment, sa.func.min(label_rows.c.arrived)).where(where)
    touched = conn.execute(query.group_by(label_rows.c.deployment)).all()
    if touched:
        conn.execute(label_rows.delete().where(where))
    for deployment, first in touched:
        _drop_weights(conn, tenant, deployment, model_rows.c.cursor >= first)
        here = _here(streams, tenant, deployment)
        conn.execute(streams.update().where(here).values(forgets=True, changed=streams.c.changed + 1))
    return sorted(deployment for deployment, _ in touched)


def _drop_weights(conn: Connection, tenant: str, deployment: str, which: sa.ColumnElement[bool]) -> None:
    where = _here(model_rows, tenant, deployment) & which & model_rows.c.manifest.is_not(None)
    conn.execute(model_rows.update().where(where).values(manifest=None, tensors=None))


def _same(conn: Connection, was: Stream) -> Stream:
    now = stream(conn, was.tenant, was.deployment)
    if now is None or now.cursor != was.cursor:
        raise Conflict(f"the labels of {was.deployment} were moved meanwhile; read them again", param="cursor")
    return now


def _moved(conn: Connection, now: Stream, **values: Any) -> Stream:
    values["updated_at"] = time.time()
    conn.execute(streams.update().where(_here(streams, now.tenant, now.deployment)).values(**values))
    return msgspec.structs.replace(now, **values)


def _listed() -> list[sa.ColumnElement[Any]]:
    """The columns of RewardVersion."""
    columns: list[sa.ColumnElement[Any]] = [model_rows.c[name] for name in RewardVersion.__struct_fields__ if name != "has_weights"]
    return [*columns, model_rows.c.manifest.is_not(None).label("has_weights")]


def _here(table: sa.Table, tenant: str, deployment: str) -> sa.ColumnElement[bool]:
    return (table.c.tenant == tenant) & (table.c.deployment == deployment)
