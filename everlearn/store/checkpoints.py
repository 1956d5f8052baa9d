"""Rows of checkpoints and sampler versions: names, paths, time to live, deletion, and which folders nobody needs any more.

A row is `pending` from the moment a save is accepted, `complete` when its folder is whole and the answer is durable (only then is
it listed), `deleted` when its folder may go. A folder's name ends in the seq that wrote it, so an overwrite makes a new folder
and the bytes of an old one never change under whoever still reads it.
"""

from __future__ import annotations

import re
import secrets
import time
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.errors import Conflict, InvalidRequest, NotFound
from everlearn.faultpoints import around
from everlearn.store import runs, tables
from everlearn.store.folders import read_manifest, remove_folder, sweep, verify_folder, write_folder

__all__ = ["read_manifest", "remove_folder", "sweep", "verify_folder", "write_folder"]

KINDS = ("weights", "sampler_weights", "external_weights")
NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
RUN = re.compile(r"[A-Za-z0-9._:-]{1,200}")
table = tables.checkpoints


class TinkerPath(msgspec.Struct, frozen=True):
    """`tinker://<run_id>/<kind>/<name>`."""

    run_id: str
    kind: str
    name: str

    def __str__(self) -> str:
        return f"tinker://{self.run_id}/{self.kind}/{self.name}"

    @property
    def checkpoint_id(self) -> str:
        return f"{self.kind}/{self.name}"


class Checkpoint(msgspec.Struct, frozen=True):
    """`version` is the id to sample it under; `sha256` is that of its manifest. Listed ones have state `complete`."""

    uid: str
    tenant: str
    run_id: str
    kind: str
    name: str
    folder: str
    version: str
    bytes: int
    sha256: str
    optimizer: bool
    public: bool
    user_metadata: dict[str, Any] | None
    state: str
    created_at: float
    expires_at: float | None

    @property
    def path(self) -> TinkerPath:
        return TinkerPath(self.run_id, self.kind, self.name)

    @property
    def checkpoint_id(self) -> str:
        return f"{self.kind}/{self.name}"


def check_name(name: str) -> str:
    """The name, if it can be one part of a path; InvalidRequest otherwise."""
    if not NAME.fullmatch(name) or name in (".", ".."):
        rule = "must be 1 to 128 letters, digits, '.', '_' or '-', and not '.' or '..'"
        raise InvalidRequest(f"checkpoint name {name[:140]!r} {rule}", param="path")
    return name


def parse_path(path: str) -> TinkerPath:
    """The parts of `tinker://<run>/<kind>/<name>`."""
    scheme, _, rest = path.partition("://")
    run, _, checkpoint_id = rest.partition("/")
    if scheme != "tinker" or not RUN.fullmatch(run):
        raise InvalidRequest(f"path {path[:200]!r} must look like tinker://<training run>/weights/<name>", param="path")
    return TinkerPath(run, *parse_id(checkpoint_id))


def parse_id(checkpoint_id: str) -> tuple[str, str]:
    """Kind and name of `weights/<name>`."""
    kind, _, name = checkpoint_id.partition("/")
    if kind not in KINDS:
        raise InvalidRequest(f"checkpoint {checkpoint_id[:200]!r} must begin with one of {', '.join(k + '/' for k in KINDS)}", param="path")
    return kind, check_name(name)


def checkpoint_folder(home: Path, run_id: str, kind: str, name: str, seq: int) -> Path:
    """Where the save of `run_id` at `seq` writes. '@' is in no name, so no other name can give this folder."""
    return home / "checkpoints" / _folder_name(run_id) / kind / f"{check_name(name)}@{seq}"


def version_folder(home: Path, version: str) -> Path:
    return home / "versions" / _folder_name(version)


def snapshot_folder(home: Path, run_id: str, seq: int) -> Path:
    return home / "snapshots" / _folder_name(run_id) / str(seq)


def new_version() -> str:
    """An id for a sampler version that no other has had."""
    return f"v-{secrets.token_hex(10)}"


def get(conn: Connection, tenant: str, path: TinkerPath, public: bool = False) -> Checkpoint:
    """The complete checkpoint at `path`; with `public` also another tenant's published one."""
    where = _at(path.run_id, path.kind, path.name) & (table.c.state == "complete") & ~_expired(time.time())
    mine = table.c.tenant == tenant
    row = conn.execute(sa.select(table).where(where & (mine | table.c.public if public else mine))).first()
    if row is None:
        raise NotFound(f"no checkpoint {path}; `everlearn checkpoint list` shows yours", param="path")
    return Checkpoint(**row._mapping)


def list_checkpoints(
    conn: Connection, tenant: str, run_id: str | None = None, limit: int | None = None, offset: int = 0
) -> tuple[list[Checkpoint], int]:
    """Complete checkpoints, newest first, and how many there are in all; of one run or of all of the tenant's."""
    where = (table.c.tenant == tenant) & (table.c.state == "complete") & ~_expired(time.time())
    if run_id is not None:
        runs.get_run(conn, tenant, run_id)
        where &= table.c.run_id == run_id
    query = sa.select(table).where(where).order_by(table.c.created_at.desc(), table.c.uid).offset(max(0, offset))
    if limit is not None or offset:
        query = query.limit(2**31 if limit is None else max(0, limit))  # SQLite has no OFFSET without LIMIT
    total = conn.execute(sa.select(sa.func.count()).select_from(table).where(where)).scalar_one()
    return [Checkpoint(**row._mapping) for row in conn.execute(query)], total


def latest(conn: Connection, tenant: str, run_id: str, kind: str) -> Checkpoint | None:
    """The newest complete checkpoint of one kind of a run."""
    where = (table.c.tenant == tenant) & (table.c.run_id == run_id) & (table.c.kind == kind) & (table.c.state == "complete")
    row = conn.execute(sa.select(table).where(where & ~_expired(time.time())).order_by(table.c.created_at.desc()).limit(1)).first()
    return None if row is None else Checkpoint(**row._mapping)


def reserve(conn: Connection, checkpoint: Checkpoint, overwrite: bool) -> Checkpoint:
    """Inserts a pending row, unless the name is taken. Done again with the same uid it changes nothing."""
    check_name(checkpoint.name)
    if checkpoint.kind not in KINDS:
        raise InvalidRequest(f"checkpoint kind {checkpoint.kind!r} must be one of {', '.join(KINDS)}", param="path")
    same = _at(checkpoint.run_id, checkpoint.kind, checkpoint.name)
    taken = sa.select(table.c.uid).where(same & table.c.state.in_(("pending", "complete")) & ~_expired(time.time()))
    uids = set(conn.execute(taken).scalars())
    if checkpoint.uid in uids:
        return checkpoint
    if uids and not overwrite:
        raise Conflict(f"checkpoint {checkpoint.path} exists or is being saved; choose another name, or set overwrite", param="path")
    for uid in uids:
        _check_unnamed(conn, uid, str(checkpoint.path), "overwritten")
    conn.execute(table.insert().values(**msgspec.structs.asdict(checkpoint)))
    return checkpoint


def complete(conn: Connection, uid: str, size: int, sha256: str, ttl_seconds: float | None) -> None:
    """Lists a pending checkpoint; what had its path before becomes garbage."""
    now = time.time()
    row = conn.execute(sa.select(table).where((table.c.uid == uid) & (table.c.state == "pending"))).first()
    if row is None:
        return
    older = _at(row.run_id, row.kind, row.name) & (table.c.state == "complete")
    expires = None if ttl_seconds is None else now + ttl_seconds
    values = {"state": "complete", "bytes": size, "sha256": sha256, "created_at": now, "expires_at": expires}
    with around("checkpoint.row"):
        conn.execute(table.update().where(older).values(state="deleted"))
        conn.execute(table.update().where(table.c.uid == uid).values(**values))


def abandon(conn: Connection, uid: str) -> None:
    """Gives a reserved name free again after its save failed."""
    conn.execute(table.update().where((table.c.uid == uid) & (table.c.state == "pending")).values(state="deleted"))


def add(
    conn: Connection,
    tenant: str,
    path: TinkerPath,
    *,
    folder: str,
    version: str,
    bytes: int,
    sha256: str,
    optimizer: bool,
    user_metadata: dict[str, Any] | None = None,
    ttl_seconds: float | None = None,
    overwrite: bool = False,
) -> Checkpoint:
    """Lists a folder that is complete already and was not saved by a request (a copy)."""
    runs.get_run(conn, tenant, path.run_id)
    row = new(tenant, path, uid=f"add:{folder}", folder=folder, version=version, optimizer=optimizer, user_metadata=user_metadata)
    reserve(conn, row, overwrite)
    complete(conn, row.uid, bytes, sha256, ttl_seconds)
    return get(conn, tenant, path)


def new(
    tenant: str, path: TinkerPath, *, uid: str, folder: str, version: str, optimizer: bool, user_metadata: dict[str, Any] | None
) -> Checkpoint:
    """A pending checkpoint, not stored."""
    parts = (path.run_id, path.kind, path.name)
    return Checkpoint(uid, tenant, *parts, folder, version, 0, "", optimizer, False, user_metadata, "pending", time.time(), None)


def set_public(conn: Connection, tenant: str, path: TinkerPath, public: bool) -> Checkpoint:
    """Lets every tenant load it, or not."""
    return _change(conn, tenant, path, public=public)


def set_ttl(conn: Connection, tenant: str, path: TinkerPath, ttl_seconds: float | None) -> Checkpoint:
    """It disappears `ttl_seconds` from now; None: never."""
    if ttl_seconds is not None:
        _check_unnamed(conn, get(conn, tenant, path).uid, str(path), "given a time to live")
    return _change(conn, tenant, path, expires_at=None if ttl_seconds is None else time.time() + ttl_seconds)


def delete(conn: Connection, tenant: str, path: TinkerPath) -> Checkpoint:
    """Unlists a checkpoint at once; its folder goes with the next garbage collection."""
    checkpoint = get(conn, tenant, path)
    _check_unnamed(conn, checkpoint.uid, str(path), "deleted")
    conn.execute(table.update().where(table.c.uid == checkpoint.uid).values(state="deleted"))
    return checkpoint


def total_bytes(conn: Connection, tenant: str | None = None) -> int:
    """Bytes of complete checkpoints, of one tenant or of all."""
    where = table.c.state == "complete"
    if tenant is not None:
        where &= table.c.tenant == tenant
    return int(conn.execute(sa.select(sa.func.coalesce(sa.func.sum(table.c.bytes), 0)).where(where)).scalar_one())


def expire(conn: Connection, now: float) -> int:
    """Deletes what is past its time to live; how many."""
    return conn.execute(table.update().where((table.c.state == "complete") & _expired(now)).values(state="deleted")).rowcount


def _check_unnamed(conn: Connection, uid: str, path: str, what: str) -> None:
    """Refuses where an adapter's name counts on the checkpoint (everlearn/store/names.py)."""
    named = tables.named_versions
    row = conn.execute(sa.select(named.c.name, named.c.number).where(named.c.uid == uid)).first()
    if row is not None:
        version = f"{row.name}@{row.number}"
        raise Conflict(f"{path} is {version} and can't be {what}; first `everlearn adapter delete {version}`, or the name", param="path")


def _change(conn: Connection, tenant: str, path: TinkerPath, **values: Any) -> Checkpoint:
    checkpoint = get(conn, tenant, path)
    conn.execute(table.update().where(table.c.uid == checkpoint.uid).values(**values))
    return get(conn, tenant, path)


def _at(run_id: str, kind: str, name: str) -> sa.ColumnElement[bool]:
    return (table.c.run_id == run_id) & (table.c.kind == kind) & (table.c.name == name)


def _expired(now: float) -> sa.ColumnElement[bool]:
    return table.c.expires_at.is_not(None) & (table.c.expires_at <= now)


def _folder_name(text: str) -> str:
    name = text.replace(":", "_")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,200}", name) or name in (".", ".."):
        raise InvalidRequest(f"id {text[:200]!r} can't name a folder", param="model_id")
    return name
