"""What clients do, in one line each, for the tests of the store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from sqlalchemy.engine import Connection

from everlearn.store import log, runs
from everlearn.store.db import Database
from everlearn.store.log import Entry
from everlearn.types import DoneResult, LoraSpec, SavedResult

T = TypeVar("T")
DONE = msgspec.msgpack.encode(DoneResult())
SAVED = msgspec.msgpack.encode(SavedResult(10, "ab" * 32))
ERROR = {"code": "invalid_request", "message": "loss_fn 'x' is unknown", "param": "loss_fn"}


def do(db: Database, fn: Callable[[Connection], T]) -> T:
    return db.write(fn).result(30)


def entry(model_id: str, seq: int, kind: str = "forward_backward", tenant: str = "a", body: bytes = b"payload", **meta: Any) -> Entry:
    fingerprint = hashlib.sha256(kind.encode() + body).hexdigest()
    return Entry(f"{model_id}:{seq}", tenant, kind, model_id, seq, fingerprint, meta)


def append(db: Database, request: Entry, body: bytes = b"payload") -> Entry:
    return do(db, lambda conn: log.append(conn, request, body))


def finish(db: Database, request: Entry, result: bytes | None = DONE, error: dict[str, Any] | None = None) -> Entry | None:
    return do(db, lambda conn: log.finish(conn, request.request_id, result if error is None else None, error))


def new_session(db: Database, tenant: str = "a") -> str:
    return do(db, lambda conn: runs.create_session(conn, tenant)).session_id


def create_entry(session: str, number: int = 0, tenant: str = "a", kind: str = "create", **more: Any) -> Entry:
    lora = msgspec.to_builtins(LoraSpec(8))
    meta = {"session_id": session, "model_seq_id": number, "base_model": "tiny", "lora": lora, "user_metadata": {"k": "v"}}
    return entry(runs.run_id(session, number), 0, kind, tenant, **meta, **more)


def new_run(db: Database, tenant: str = "a", session: str | None = None, number: int = 0) -> str:
    """A live training run; its creation is entry 0."""
    request = create_entry(session or new_session(db, tenant), number, tenant)
    append(db, request, b"create")
    finish(db, request)
    return request.model_id


def save_entry(run: str, seq: int, name: str, **more: Any) -> Entry:
    meta: dict[str, Any] = {"checkpoint_kind": "weights", "name": name, "folder": f"/home/{run}/{name}@{seq}", "optimizer": True}
    return entry(run, seq, "save", **{**meta, **more})


def publish_entry(run: str, seq: int, sampler: int, version: str, kind: str = "snapshot") -> Entry:
    meta = {"version": version, "folder": f"/home/{version}", "kind": kind, "sampling_session_seq_id": sampler}
    return msgspec.structs.replace(entry(run, seq, "publish"), meta=meta)
