"""What a request means for other rows: when it is accepted, when it is done, when it fails. Each runs in the same transaction as
the log entry, so a run, a checkpoint or a sampler exists if and only if the request behind it does.

Keys of `meta` that are read here and in log.py, by kind (others are the API's own):

    any               key_id, subject (the model that is used, where it isn't the run), tokens: for the usage
    create            session_id, model_seq_id, base_model, lora (a LoraSpec as a dict), user_metadata
    load              folder (what it reads; kept until a snapshot covers the load), create; those of `create` when it is set
    forward_backward  forward_only; loss (its name, for the run's curves); refused (the error of a request of any kind that was
                      refused at the door: it only takes its place)
    optim_step        learning_rate (for the run's curves)
    save              checkpoint_kind, name, folder, overwrite, ttl_seconds, user_metadata, optimizer
    publish           version, folder, kind (snapshot, inflight), ttl_seconds, user_metadata, and either name and overwrite (a
                      sampler_weights checkpoint) or sampling_session_seq_id (a sampler of the run's session)
    sample            folder (of an inflight sampler's weights, kept until the answer); direct: no sampler stands behind it, `model_id`
                      is the caller's own unique string
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.errors import Conflict, InternalError, NotFound
from everlearn.faultpoints import around
from everlearn.store import checkpoints, runs, steps, tables
from everlearn.store.checkpoints import TinkerPath
from everlearn.types import LoraSpec, Result, SavedResult

if TYPE_CHECKING:
    from everlearn.store.log import Entry

TOUCH_SECONDS = 60.0
RUN = sa.select(*tables.runs.c["tenant", "session_id", "state", "last_seq"]).where(tables.runs.c.run_id == sa.bindparam("id"))
decode_result = msgspec.msgpack.Decoder(Result).decode


def replays(entry: Entry) -> bool:
    """Whether it changes the adapter, so that a rebuild must run it again."""
    if entry.kind == "forward_backward":
        return not entry.meta.get("forward_only", False)
    return entry.kind in ("create", "load", "optim_step")


def note_step(conn: Connection, entry: Entry, metrics: Mapping[str, float]) -> None:
    """What a finished request tells of its run's progress; one without a gradient is no part of it."""
    meta = entry.meta
    if not meta.get("forward_only"):
        extra = {"learning_rate": meta["learning_rate"]} if "learning_rate" in meta else {}
        steps.note(conn, entry.tenant, entry.model_id, entry.seq, entry.kind, meta.get("loss", ""), {**metrics, **extra})


def nothing(conn: Connection, entry: Entry, body: bytes) -> None:
    """Kinds that touch no other row."""


def _admit_create(conn: Connection, entry: Entry) -> None:
    meta = entry.meta
    session = runs.get_session(conn, entry.tenant, meta["session_id"])
    if session.state != "active":
        raise Conflict(f"session {session.session_id} is finished; create a new one", param="session_id")
    if entry.model_id != runs.run_id(session.session_id, meta["model_seq_id"]):
        raise InternalError(f"model id {entry.model_id!r} must be {runs.run_id(session.session_id, meta['model_seq_id'])!r}")
    if conn.execute(sa.select(tables.runs.c.run_id).where(tables.runs.c.run_id == entry.model_id)).first() is not None:
        raise Conflict(f"training run {entry.model_id} exists already; use the next model_seq_id", param="model_seq_id")
    now = time.time()
    row = {
        "run_id": entry.model_id,
        "tenant": entry.tenant,
        "session_id": session.session_id,
        "model_seq_id": meta["model_seq_id"],
        "base_model": meta["base_model"],
        "lora": msgspec.to_builtins(msgspec.convert(meta["lora"], LoraSpec)),
        "user_metadata": meta.get("user_metadata"),
        "state": "creating",
        "corrupted": False,
        "last_seq": -1,
        "created_at": now,
        "last_request_time": now,
    }
    conn.execute(tables.runs.insert().values(**row))


def _admit_training(conn: Connection, entry: Entry) -> Any:
    run = conn.execute(RUN, {"id": entry.model_id}).first()
    if run is None or run.tenant != entry.tenant:
        raise NotFound(f"no training run {entry.model_id!r}; create one with create_model", param="model_id")
    if run.state not in runs.LIVE_STATES:
        why = "its creation failed" if run.state == "failed" else "it was unloaded; load one of its checkpoints into a new run"
        raise Conflict(f"training run {entry.model_id} takes no requests: {why}", param="model_id")
    if entry.seq <= run.last_seq:
        gone = f"seq_id {entry.seq} of {entry.model_id} ran before and its answer is no longer kept"
        raise Conflict(f"{gone}; the next is {run.last_seq + 1}", param="seq_id")
    return run


def _admit_load(conn: Connection, entry: Entry) -> None:
    (_admit_create if entry.meta.get("create") else _admit_training)(conn, entry)


def _admit_save(conn: Connection, entry: Entry) -> None:
    _admit_training(conn, entry)
    _reserve(conn, entry, entry.meta["checkpoint_kind"], version=entry.request_id)


def _admit_publish(conn: Connection, entry: Entry) -> None:
    run = _admit_training(conn, entry)
    meta = entry.meta
    if meta.get("name") is not None:
        _reserve(conn, entry, "sampler_weights", version=meta["version"])
        return
    sampler = runs.sampler_id(run.session_id, meta["sampling_session_seq_id"])
    if conn.execute(sa.select(tables.samplers.c.sampler_id).where(tables.samplers.c.sampler_id == sampler)).first() is not None:
        raise Conflict(f"sampler {sampler} exists already; use the next sampling_session_seq_id", param="sampling_session_seq_id")
    row = {"version": meta["version"], "tenant": entry.tenant, "run_id": entry.model_id, "seq": entry.seq, "folder": meta["folder"]}
    conn.execute(tables.versions.insert().values(**row, bytes=0, sha256="", state="pending", created_at=time.time()))


def _admit_sample(conn: Connection, entry: Entry) -> None:
    if entry.meta.get("direct"):
        return
    sampler = runs.get_sampler(conn, entry.tenant, entry.model_id)
    now = time.time()
    if now - sampler.last_used > TOUCH_SECONDS:  # coarse on purpose: one more row changed for every sample would double the writes
        conn.execute(tables.samplers.update().where(tables.samplers.c.sampler_id == sampler.sampler_id).values(last_used=now))


def _reserve(conn: Connection, entry: Entry, kind: str, version: str) -> None:
    meta = entry.meta
    path = TinkerPath(entry.model_id, kind, meta["name"])
    optimizer = bool(meta.get("optimizer", False))
    row = checkpoints.new(
        entry.tenant,
        path,
        uid=entry.request_id,
        folder=meta["folder"],
        version=version,
        optimizer=optimizer,
        user_metadata=meta.get("user_metadata"),
    )
    checkpoints.reserve(conn, row, overwrite=bool(meta.get("overwrite", False)))


def _complete_create(conn: Connection, entry: Entry, body: bytes) -> None:
    if entry.kind == "create" or entry.meta.get("create"):
        conn.execute(tables.runs.update().where(tables.runs.c.run_id == entry.model_id).values(state="live"))


def _complete_save(conn: Connection, entry: Entry, body: bytes) -> None:
    saved = _saved(entry, body)
    checkpoints.complete(conn, entry.request_id, saved.bytes, saved.sha256, entry.meta.get("ttl_seconds"))


def _complete_publish(conn: Connection, entry: Entry, body: bytes) -> None:
    meta = entry.meta
    if meta.get("name") is not None:
        return _complete_save(conn, entry, body)
    saved = _saved(entry, body)
    with around("sampler.row"):
        _open_sampler(conn, entry, saved)


def _open_sampler(conn: Connection, entry: Entry, saved: SavedResult) -> None:
    meta = entry.meta
    version = tables.versions.update().where(tables.versions.c.version == meta["version"])
    conn.execute(version.values(state="complete", bytes=saved.bytes, sha256=saved.sha256))
    run = runs.get_run(conn, entry.tenant, entry.model_id)
    target = {"version": meta["version"], "folder": meta["folder"]}
    if meta["kind"] == "inflight":  # all inflight samplers of a run follow its newest weights
        inflight = (tables.samplers.c.model_id == run.run_id) & (tables.samplers.c.kind == "inflight")
        conn.execute(tables.samplers.update().where(inflight).values(**target))
    runs.create_sampler(
        conn,
        entry.tenant,
        session_id=run.session_id,
        seq=meta["sampling_session_seq_id"],
        base_model=run.base_model,
        model_id=run.run_id,
        kind=meta["kind"],
        **target,
    )


def _fail_create(conn: Connection, entry: Entry, body: bytes) -> None:
    if entry.kind == "load" and not entry.meta.get("create"):
        return
    conn.execute(tables.runs.update().where(tables.runs.c.run_id == entry.model_id).values(state="failed"))
    runs.fail_pending(conn, entry.model_id, f"training run {entry.model_id} could not be created")


def _fail_save(conn: Connection, entry: Entry, body: bytes) -> None:
    checkpoints.abandon(conn, entry.request_id)
    if entry.kind == "publish":
        conn.execute(tables.versions.update().where(tables.versions.c.version == entry.meta["version"]).values(state="deleted"))


def _saved(entry: Entry, body: bytes) -> SavedResult:
    result = decode_result(body)
    if not isinstance(result, SavedResult):
        raise InternalError(f"request {entry.request_id} ({entry.kind}) was answered with {type(result).__name__} instead of SavedResult")
    return result


ADMISSIONS: dict[str, Callable[[Connection, Entry], Any]] = {
    "create": _admit_create,
    "load": _admit_load,
    "forward_backward": _admit_training,
    "optim_step": _admit_training,
    "save": _admit_save,
    "publish": _admit_publish,
    "sample": _admit_sample,
}

COMPLETIONS: dict[str, Callable[[Connection, Entry, bytes], None]] = {
    "create": _complete_create,
    "load": _complete_create,
    "save": _complete_save,
    "publish": _complete_publish,
}

FAILURES: dict[str, Callable[[Connection, Entry, bytes], None]] = {
    "create": _fail_create,
    "load": _fail_create,
    "save": _fail_save,
    "publish": _fail_save,
}
