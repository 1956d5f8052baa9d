"""Sessions, and what lives in them: training runs and samplers.

Ids are formed here: clients of the Tinker protocol derive `<session>:train:<n>` on their own, so that form is part of the
contract. Session ids are random, so an id says nothing about other tenants; every function asks for the tenant all the same.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.errors import Conflict, NotFound
from everlearn.store import tables
from everlearn.types import LoraSpec

LIVE_STATES = ("creating", "live")
SILENCE_SECONDS = 7 * 86_400.0  # a session without a heartbeat for so long is taken to be over
TELEMETRY_SWEEP = 100  # small reports between two looks at how many there are
SAMPLER = sa.select(tables.samplers).where(tables.samplers.c.sampler_id == sa.bindparam("id"))


class Session(msgspec.Struct, frozen=True):
    """One client process's stay. `state` is active or finished; `finish_reason` is success, errored or interrupted."""

    session_id: str
    tenant: str
    tags: list[str]
    user_metadata: dict[str, Any] | None
    sdk_version: str
    project_id: str | None
    display_name: str | None
    state: str
    finish_reason: str | None
    finish_detail: str | None
    created_at: float
    last_heartbeat: float


class Run(msgspec.Struct, frozen=True):
    """A training run: one adapter on one base model. `state` is creating, live, failed (never came to be) or unloaded (its
    training state is gone, its checkpoints stay). `last_seq` is the highest finished request, -1 before the first."""

    run_id: str
    tenant: str
    session_id: str
    model_seq_id: int
    base_model: str
    lora: LoraSpec
    user_metadata: dict[str, Any] | None
    state: str
    corrupted: bool
    last_seq: int
    created_at: float
    last_request_time: float


class Sampler(msgspec.Struct, frozen=True):
    """What a sampling client points at. `kind`: base, persistent (a checkpoint), snapshot (an ephemeral version) or inflight
    (follows the newest inflight publish of run `model_id`). `version` and `folder` are empty for a base model."""

    sampler_id: str
    tenant: str
    session_id: str
    seq: int
    base_model: str
    model_path: str | None
    model_id: str
    version: str
    folder: str
    kind: str
    client_counter: int
    created_at: float
    last_used: float


def run_id(session_id: str, model_seq_id: int) -> str:
    return f"{session_id}:train:{model_seq_id}"


def sampler_id(session_id: str, seq: int) -> str:
    return f"{session_id}:sample:{seq}"


def create_session(
    conn: Connection,
    tenant: str,
    *,
    tags: Sequence[str] = (),
    user_metadata: dict[str, Any] | None = None,
    sdk_version: str = "",
    project_id: str | None = None,
    display_name: str | None = None,
    idempotency_key: str | None = None,
) -> Session:
    """A new session; the same `idempotency_key` gives the one that is there."""
    if idempotency_key is not None:
        same = (tables.sessions.c.tenant == tenant) & (tables.sessions.c.idempotency_key == idempotency_key)
        row = conn.execute(sa.select(tables.sessions).where(same)).first()
        if row is not None:
            return session_of(row)
    now = time.time()
    session = Session(
        f"sess-{secrets.token_hex(12)}",
        tenant,
        list(tags),
        user_metadata,
        sdk_version,
        project_id,
        display_name,
        "active",
        None,
        None,
        now,
        now,
    )
    conn.execute(tables.sessions.insert().values(idempotency_key=idempotency_key, **msgspec.structs.asdict(session)))
    return session


def get_session(conn: Connection, tenant: str, session_id: str) -> Session:
    where = (tables.sessions.c.session_id == session_id) & (tables.sessions.c.tenant == tenant)
    row = conn.execute(sa.select(tables.sessions).where(where)).first()
    if row is None:
        raise NotFound(f"no session {session_id!r}; create one with create_session", param="session_id")
    return session_of(row)


def heartbeat(conn: Connection, tenant: str, session_id: str) -> Session:
    """Notes that the client lives. A finished session stays finished: look at the state that comes back."""
    return _change_session(conn, tenant, session_id, last_heartbeat=time.time())


def finish_session(conn: Connection, tenant: str, session_id: str, reason: str, detail: str | None = None) -> Session:
    """Ends a session; the first reason stays."""
    session = get_session(conn, tenant, session_id)
    if session.state == "finished":
        return session
    return _change_session(conn, tenant, session_id, state="finished", finish_reason=reason, finish_detail=detail)


def set_project(conn: Connection, tenant: str, session_id: str, project_id: str | None) -> Session:
    return _change_session(conn, tenant, session_id, project_id=project_id)


def list_sessions(conn: Connection, tenant: str, limit: int = 20, offset: int = 0) -> tuple[list[Session], int]:
    """Newest first, and how many there are in all."""
    rows, total = _page(conn, tables.sessions, tables.sessions.c.tenant == tenant, limit, offset)
    return [session_of(row) for row in rows], total


def session_children(conn: Connection, tenant: str, session_id: str) -> tuple[list[str], list[str]]:
    """Ids of the session's training runs and samplers, in the order in which they were made."""
    get_session(conn, tenant, session_id)
    run_ids = sa.select(tables.runs.c.run_id).where(tables.runs.c.session_id == session_id).order_by(tables.runs.c.model_seq_id)
    sampler_ids = sa.select(tables.samplers.c.sampler_id).where(tables.samplers.c.session_id == session_id).order_by(tables.samplers.c.seq)
    return list(conn.execute(run_ids).scalars()), list(conn.execute(sampler_ids).scalars())


def get_run(conn: Connection, tenant: str, run_id: str) -> Run:
    where = (tables.runs.c.run_id == run_id) & (tables.runs.c.tenant == tenant)
    row = conn.execute(sa.select(tables.runs).where(where)).first()
    if row is None:
        raise NotFound(f"no training run {run_id!r}; `everlearn run list` shows yours", param="model_id")
    return run_of(row)


def list_runs(conn: Connection, tenant: str, limit: int = 20, offset: int = 0, project_id: str | None = None) -> tuple[list[Run], int]:
    """Newest first, and how many there are in all. Runs whose creation failed are left out."""
    where = (tables.runs.c.tenant == tenant) & (tables.runs.c.state != "failed")
    if project_id is not None:
        of_project = sa.select(tables.sessions.c.session_id).where(
            (tables.sessions.c.tenant == tenant) & (tables.sessions.c.project_id == project_id)
        )
        where &= tables.runs.c.session_id.in_(of_project)
    rows, total = _page(conn, tables.runs, where, limit, offset)
    return [run_of(row) for row in rows], total


def mark_corrupted(conn: Connection, tenant: str, run_id: str) -> Run:
    """Says that a run's adapter could not be rebuilt; its checkpoints are untouched."""
    get_run(conn, tenant, run_id)
    conn.execute(tables.runs.update().where(tables.runs.c.run_id == run_id).values(corrupted=True))
    return get_run(conn, tenant, run_id)


def unload_run(conn: Connection, tenant: str, run_id: str) -> Run:
    """Gives up a run's training state: its log payloads go, its snapshots become garbage, later requests are refused.
    Checkpoints stay. For runs whose client is gone."""
    get_run(conn, tenant, run_id)
    fail_pending(conn, run_id, f"training run {run_id} was unloaded before this request ran")
    of_run = (tables.requests.c.model_id == run_id) & ~tables.requests.c.is_sample
    ids = sa.select(tables.requests.c.request_id).where(of_run)
    conn.execute(tables.payloads.delete().where(tables.payloads.c.request_id.in_(ids)))
    conn.execute(tables.requests.update().where(of_run).values(payload_bytes=0))
    conn.execute(tables.snapshots.update().where(tables.snapshots.c.model_id == run_id).values(state="deleted"))
    conn.execute(tables.runs.update().where(tables.runs.c.run_id == run_id).values(state="unloaded"))
    return get_run(conn, tenant, run_id)


def fail_pending(conn: Connection, run_id: str, message: str) -> None:
    """Answers every waiting request of a run that will never run them. A save's reserved name is given free."""
    waiting = (tables.requests.c.model_id == run_id) & ~tables.requests.c.is_sample & (tables.requests.c.status == "pending")
    ids = sa.select(tables.requests.c.request_id).where(waiting)
    conn.execute(tables.payloads.delete().where(tables.payloads.c.request_id.in_(ids)))
    reserved = (tables.checkpoints.c.run_id == run_id) & (tables.checkpoints.c.state == "pending")
    conn.execute(tables.checkpoints.update().where(reserved).values(state="deleted"))
    unpublished = (tables.versions.c.run_id == run_id) & (tables.versions.c.state == "pending")
    conn.execute(tables.versions.update().where(unpublished).values(state="deleted"))
    values = {"status": "failed", "error": {"code": "not_found", "message": message, "param": "model_id"}, "payload_bytes": 0}
    conn.execute(tables.requests.update().where(waiting).values(**values, finished_at=time.time()))


def idle_runs(conn: Connection, before: float) -> list[Run]:
    """Live runs of all tenants that nobody can be waiting for: no request since `before`, and the session finished or without a
    heartbeat since then. Candidates for `unload_run`."""
    over = (tables.sessions.c.state == "finished") | (tables.sessions.c.last_heartbeat < before)
    query = (
        sa.select(tables.runs)
        .join(tables.sessions, tables.sessions.c.session_id == tables.runs.c.session_id)
        .where(tables.runs.c.state.in_(LIVE_STATES) & (tables.runs.c.last_request_time < before) & over)
    )
    return [run_of(row) for row in conn.execute(query)]


def create_sampler(
    conn: Connection,
    tenant: str,
    *,
    session_id: str,
    seq: int,
    base_model: str,
    model_path: str | None = None,
    model_id: str = "",
    version: str = "",
    folder: str = "",
    kind: str = "base",
) -> Sampler:
    """A sampler, or the one that (session, seq) made before; another target under the same seq is a conflict."""
    get_session(conn, tenant, session_id)
    now = time.time()
    target = (base_model, model_path, model_id, version, folder, kind)
    wanted = Sampler(sampler_id(session_id, seq), tenant, session_id, seq, *target, 0, now, now)
    row = conn.execute(sa.select(tables.samplers).where(tables.samplers.c.sampler_id == wanted.sampler_id)).first()
    if row is None:
        conn.execute(tables.samplers.insert().values(**msgspec.structs.asdict(wanted)))
        return wanted
    there = Sampler(**row._mapping)
    if (there.base_model, there.model_path, there.kind) != (base_model, model_path, kind):
        raise Conflict(
            f"sampling_session_seq_id {seq} of session {session_id} already made a sampler of "
            f"{there.model_path or there.base_model}; use the next number",
            param="sampling_session_seq_id",
        )
    return there


def get_sampler(conn: Connection, tenant: str, sampler_id: str) -> Sampler:
    row = conn.execute(SAMPLER, {"id": sampler_id}).first()
    if row is None or row.tenant != tenant:
        raise NotFound(f"no sampler {sampler_id!r}; create one with create_sampling_session", param="sampling_session_id")
    return Sampler(**row._mapping)


def join_sampler(conn: Connection, tenant: str, sampler_id: str) -> int:
    """A number that no other holder of this sampler has (1, 2, ...): clients build disjoint seq ranges on it. Run twice for
    one request it skips a number, which does no harm."""
    get_sampler(conn, tenant, sampler_id)
    counter = tables.samplers.c.client_counter
    conn.execute(tables.samplers.update().where(tables.samplers.c.sampler_id == sampler_id).values(client_counter=counter + 1))
    return get_sampler(conn, tenant, sampler_id).client_counter


def add_telemetry(
    conn: Connection, tenant: str, session_id: str, body: dict[str, Any], keep: int = 10_000, keep_bytes: int = 64 * 2**20
) -> None:
    """Stores what a client reported, and forgets all but about the newest `keep` reports of that tenant, `keep_bytes` together."""
    table, size = tables.telemetry, len(msgspec.json.encode(body))
    key = conn.execute(
        table.insert().values(tenant=tenant, session_id=session_id, body=body, bytes=size, created_at=time.time())
    ).inserted_primary_key
    number = int(key[0]) if key else 0
    if number % TELEMETRY_SWEEP and size <= keep_bytes // TELEMETRY_SWEEP:
        return
    mine = table.c.tenant == tenant
    newest_first = table.c.id.desc()
    newer = sa.func.sum(table.c.bytes).over(order_by=newest_first).label("newer")
    place = sa.func.row_number().over(order_by=newest_first).label("place")
    counted = sa.select(table.c.id, newer, place).where(mine).subquery()
    beyond = sa.select(sa.func.max(counted.c.id)).where((counted.c.newer > keep_bytes) | (counted.c.place > keep))
    conn.execute(table.delete().where(mine & (table.c.id <= beyond.scalar_subquery())))


def run_of(row: Any) -> Run:
    """A Run from a row of the table."""
    return Run(**{**row._mapping, "lora": msgspec.convert(row.lora, LoraSpec)})


def _change_session(conn: Connection, tenant: str, session_id: str, **values: Any) -> Session:
    where = (tables.sessions.c.session_id == session_id) & (tables.sessions.c.tenant == tenant)
    conn.execute(tables.sessions.update().where(where).values(**values))
    return get_session(conn, tenant, session_id)


def session_of(row: Any) -> Session:
    return Session(**{name: value for name, value in row._mapping.items() if name != "idempotency_key"})


def _page(conn: Connection, table: sa.Table, where: sa.ColumnElement[bool], limit: int, offset: int) -> tuple[Sequence[Any], int]:
    query = sa.select(table).where(where).order_by(table.c.created_at.desc(), *table.primary_key.columns)
    rows = conn.execute(query.limit(max(0, limit)).offset(max(0, offset))).all()
    return rows, conn.execute(sa.select(sa.func.count()).select_from(table).where(where)).scalar_one()
