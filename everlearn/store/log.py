"""The request log: the truth of which adapter state is a cache.

`append` makes a request durable before it is acknowledged; `finish` makes its answer durable before the client sees it, together
with every row that the answer implies. After a crash rebuild.py says what to send to the engine again. A payload is dropped only
when its request can never be run again: at once for requests without effect on the adapter, behind a snapshot for the others.

All functions are idempotent and take a connection of `Database.write` or `Database.read`.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.errors import Conflict, NotFound
from everlearn.faultpoints import around
from everlearn.store import effects, tables
from everlearn.store import usage as totals

TICKS = 1_000_000  # of a second: the steps of `finished_at`, which a double holds exactly
NOTHING = b"\xc0"  # msgpack nil: what an answer without content is stored as
VACUUM_PAGES = 512  # 2 MiB a call: giving space back blocks the writer
requests, payloads, results, snapshots = tables.requests, tables.payloads, tables.results, tables.snapshots

# Statements of the hot path are built once: building one costs ten times as much as running it.
AT_PLACE = sa.select(requests).where(
    requests.c.model_id == sa.bindparam("model_id"),
    requests.c.is_sample == sa.bindparam("sample"),
    requests.c.seq == sa.bindparam("seq"),
)
BY_ID = sa.select(requests).where(requests.c.request_id == sa.bindparam("id"))
INSERT_REQUEST, INSERT_PAYLOAD, INSERT_RESULT = requests.insert(), payloads.insert(), results.insert()
ANSWER = (
    requests.update()
    .where(requests.c.request_id == sa.bindparam("id"))
    .values(
        {name: sa.bindparam(f"new_{name}") for name in ("status", "error", "finished_at", "result_bytes", "payload_bytes", "tokens_out")}
    )
)
DROP_PAYLOAD = payloads.delete().where(payloads.c.request_id == sa.bindparam("id"))
NEWEST = sa.select(sa.func.max(requests.c.finished_at))
RESULT = sa.select(results.c.body).where(results.c.request_id == sa.bindparam("id"))
ADVANCE_RUN = (
    tables.runs.update()
    .where(tables.runs.c.run_id == sa.bindparam("id"))
    .values(
        last_seq=sa.case((tables.runs.c.last_seq < sa.bindparam("seq"), sa.bindparam("seq")), else_=tables.runs.c.last_seq),
        last_request_time=sa.bindparam("now"),
    )
)


class Entry(msgspec.Struct, frozen=True):
    """One request. `seq` orders a run's requests (creation is 0) and a sampler's samples; `fingerprint` is the sha256 of what the
    client sent. `status`: pending, done, failed, or expired (done, and the answer is no longer kept). `existing`: append found it.
    What `meta` must hold for each kind stands in effects.py."""

    request_id: str
    tenant: str
    kind: str
    model_id: str
    seq: int
    fingerprint: str
    meta: dict[str, Any]
    status: str = "pending"
    created_at: float = 0.0
    finished_at: float | None = None
    existing: bool = False

    @property
    def finish_order(self) -> int:
        """Where it stands among all finished requests: each one that finishes gets a higher number than all before it."""
        return round((self.finished_at or 0.0) * TICKS)


class Snapshot(msgspec.Struct, frozen=True):
    """A folder with the effect of every request of `model_id` up to `seq`."""

    model_id: str
    seq: int
    folder: str
    bytes: int
    created_at: float


class Usage(msgspec.Struct, frozen=True):
    payload_bytes: int
    result_bytes: int
    requests: int
    pending: int


def append(conn: Connection, entry: Entry, payload: bytes) -> Entry:
    """Stores a request, with the rows that it implies from now on (a run that is being created, a reserved checkpoint name).
    The same (model_id, seq) with the same fingerprint gives the entry that is there, marked `existing`; with another it is a
    Conflict, as is a seq that ran so long ago that its entry is gone. NotFound: no such run, sampler or session of this tenant."""
    sample = entry.kind == "sample"
    there = conn.execute(AT_PLACE, {"model_id": entry.model_id, "sample": sample, "seq": entry.seq}).first()
    if there is not None:
        return _same(there, entry)
    effects.ADMISSIONS[entry.kind](conn, entry)
    entry = msgspec.structs.replace(entry, status="pending", created_at=entry.created_at or time.time(), finished_at=None, existing=False)
    values = {name: getattr(entry, name) for name in STORED}
    values |= {"is_sample": sample, "replays": effects.replays(entry), "payload_bytes": len(payload), "result_bytes": 0}
    values |= {"folder": entry.meta.get("folder") if entry.kind in ("load", "sample") else None, "error": None}
    values |= {
        "key_id": entry.meta.get("key_id"),
        "subject": entry.meta.get("subject"),
        "tokens_in": entry.meta.get("tokens", 0),
        "tokens_out": 0,
    }
    with around("log.append"):
        conn.execute(INSERT_REQUEST, values)
        conn.execute(INSERT_PAYLOAD, {"request_id": entry.request_id, "tenant": entry.tenant, "body": payload})
    return entry


def finish(
    conn: Connection,
    request_id: str,
    result: bytes | None,
    error: dict[str, Any] | None,
    tokens_out: int = 0,
    metrics: dict[str, float] | None = None,
) -> Entry | None:
    """Stores the answer (`result`: an encoded types.Result, with `tokens_out` sampled tokens; or `error`: code, message, param) and
    what follows from it; `metrics`, of a training step, go to its run's curves. The first answer stays: None means that there was one
    already (a replay answers again), or no such request."""
    row = conn.execute(BY_ID, {"id": request_id}).first()
    if row is None or row.status != "pending":
        return None
    now = _next_moment(conn)
    status, body = ("done", result or NOTHING) if error is None else ("failed", b"")
    keep_payload = row.replays and error is None
    values = {"status": status, "error": error, "finished_at": now, "result_bytes": len(body), "tokens_out": tokens_out}
    values["payload_bytes"] = row.payload_bytes if keep_payload else 0
    entry = msgspec.structs.replace(entry_of(row), status=status, finished_at=now)
    with around("log.finish"):
        conn.execute(ANSWER, {"id": request_id, **{f"new_{name}": value for name, value in values.items()}})
        if error is None:
            conn.execute(INSERT_RESULT, {"request_id": request_id, "tenant": row.tenant, "body": body})
        if not keep_payload:
            conn.execute(DROP_PAYLOAD, {"id": request_id})
        if not row.is_sample:
            conn.execute(ADVANCE_RUN, {"id": row.model_id, "seq": row.seq, "now": now})
        follow = effects.COMPLETIONS if error is None else effects.FAILURES
        follow.get(entry.kind, effects.nothing)(conn, entry, body)
        if metrics is not None:
            effects.note_step(conn, entry, metrics)
    return entry


def get(conn: Connection, tenant: str, request_id: str) -> tuple[Entry, bytes | None, dict[str, Any] | None]:
    """A request of this tenant with its answer or error, both None while it is pending or when it has expired."""
    row = conn.execute(BY_ID, {"id": request_id}).first()
    if row is None or row.tenant != tenant:
        raise NotFound(f"no request {request_id!r}", param="request_id")
    entry = entry_of(row)
    if entry.status != "done":
        return entry, None, row.error
    return entry, conn.execute(RESULT, {"id": request_id}).scalar_one(), None


def find(conn: Connection, tenant: str, model_id: str, seq: int, sample: bool = False) -> Entry | None:
    """The entry at one place of a run's or sampler's order."""
    row = conn.execute(AT_PLACE, {"model_id": model_id, "sample": sample, "seq": seq}).first()
    return None if row is None or row.tenant != tenant else entry_of(row)


def finished_samples(conn: Connection, tenant: str, sampler_id: str, after: int, seqs: range) -> tuple[list[Entry], int]:
    """The samples of a sampler, with a seq in `seqs`, that finished after `after` (a finish_order; 0: ever), in the order in which they
    did, and up to which finish_order the log was read. An `after` that the log hasn't reached yet counts as 0: it is not ours."""
    upto = round((conn.execute(NEWEST).scalar() or 0.0) * TICKS)
    after = after if 0 < after <= upto else 0
    # From a known place on, few rows are newer; without the detour databases prefer to read all rows of the sampler.
    sampler = requests.c.model_id if after == 0 else requests.c.model_id + ""
    where = (sampler == sampler_id) & (requests.c.tenant == tenant) & requests.c.is_sample & (requests.c.status != "pending")
    where &= (requests.c.finished_at > (after + 0.5) / TICKS) & (requests.c.finished_at < (upto + 0.5) / TICKS)
    where &= (requests.c.seq >= seqs.start) & (requests.c.seq <= seqs.stop - 1)
    return [entry_of(row) for row in conn.execute(sa.select(requests).where(where).order_by(requests.c.finished_at))], upto


def payload(conn: Connection, request_id: str) -> bytes | None:
    """What was appended, while it is still needed."""
    return conn.execute(sa.select(payloads.c.body).where(payloads.c.request_id == request_id)).scalar()


def unfinished(conn: Connection, tenant: str) -> int:
    """How many requests of the tenant were accepted and have no answer yet."""
    where = (requests.c.tenant == tenant) & (requests.c.status == sa.literal_column("'pending'"))
    return conn.execute(sa.select(sa.func.count()).select_from(requests).where(where)).scalar_one()


def newest_snapshot(conn: Connection, model_id: str) -> Snapshot | None:
    where = (snapshots.c.model_id == model_id) & (snapshots.c.state == "complete")
    row = conn.execute(sa.select(snapshots).where(where).order_by(snapshots.c.seq.desc()).limit(1)).first()
    return None if row is None else Snapshot(row.model_id, row.seq, row.folder, row.bytes, row.created_at)


def add_snapshot(conn: Connection, model_id: str, seq: int, folder: str, size: int) -> bool:
    """Lists a complete snapshot folder and drops what it replaces: older snapshots, payloads up to its seq. False: it must not be
    used (a request up to `seq` has no durable answer yet, a newer snapshot is listed, the run is gone); remove the folder."""
    run = conn.execute(sa.select(tables.runs).where(tables.runs.c.run_id == model_id)).first()
    if run is None or run.state != "live" or not 0 <= seq <= run.last_seq:
        return False
    open_before = (requests.c.model_id == model_id) & ~requests.c.is_sample & (requests.c.seq <= seq) & (requests.c.status == "pending")
    if conn.execute(sa.select(requests.c.request_id).where(open_before).limit(1)).first() is not None:
        return False
    newest = newest_snapshot(conn, model_id)
    if newest is not None and newest.seq >= seq:
        return newest.seq == seq and newest.folder == folder
    row = {"model_id": model_id, "seq": seq, "tenant": run.tenant, "folder": folder, "bytes": size}
    with around("snapshot.row"):
        conn.execute(snapshots.insert().values(**row, state="complete", created_at=time.time()))
        conn.execute(snapshots.update().where((snapshots.c.model_id == model_id) & (snapshots.c.seq < seq)).values(state="deleted"))
    compact(conn, model_id, seq)
    return True


def compact(conn: Connection, model_id: str, seq: int) -> int:
    """Drops the payloads of answered requests up to `seq`, as far as a snapshot covers them; how many."""
    newest = newest_snapshot(conn, model_id)
    if newest is None:
        return 0
    covered = (requests.c.model_id == model_id) & ~requests.c.is_sample & (requests.c.seq <= min(seq, newest.seq))
    covered &= (requests.c.status != "pending") & (requests.c.payload_bytes > 0)
    ids = sa.select(requests.c.request_id).where(covered)
    with around("payloads.drop"):
        dropped = conn.execute(payloads.delete().where(payloads.c.request_id.in_(ids))).rowcount
        conn.execute(requests.update().where(covered).values(payload_bytes=0))
    return dropped


def expire(conn: Connection, now: float, retention: float) -> tuple[int, int]:
    """Forgets answers older than `retention` seconds, and entries that are needed neither for an answer nor for a rebuild (the usage
    keeps their sums). Returns how many answers and entries went."""
    old = requests.c.finished_at <= now - retention
    stale = sa.select(requests.c.request_id).where(old & (requests.c.result_bytes > 0))
    gone = conn.execute(results.delete().where(results.c.request_id.in_(stale))).rowcount
    conn.execute(requests.update().where(old & (requests.c.result_bytes > 0)).values(result_bytes=0))
    over = old & (requests.c.payload_bytes == 0) & (requests.c.status != "pending")
    totals.add(conn, totals.of_log(conn, over))
    entries = conn.execute(requests.delete().where(over)).rowcount
    if conn.dialect.name == "sqlite":
        _give_space_back(conn)
    return gone, entries


def usage(conn: Connection) -> Usage:
    """Size of the log, all tenants together."""
    totals = [sa.func.coalesce(sa.func.sum(column), 0) for column in (requests.c.payload_bytes, requests.c.result_bytes)]
    open_ones = sa.func.coalesce(sa.func.sum(sa.case((requests.c.status == "pending", 1), else_=0)), 0)
    return Usage(*(int(value) for value in conn.execute(sa.select(*totals, sa.func.count(), open_ones)).one()))


def heaviest(conn: Connection, limit: int = 8) -> list[tuple[str, int]]:
    """Runs by the bytes that a snapshot would free, most first."""
    total = sa.func.sum(requests.c.payload_bytes).label("total")
    droppable = ~requests.c.is_sample & (requests.c.payload_bytes > 0) & (requests.c.status != "pending")
    query = sa.select(requests.c.model_id, total).where(droppable).group_by(requests.c.model_id).order_by(total.desc()).limit(limit)
    return [(row.model_id, int(row.total)) for row in conn.execute(query)]


STORED = [name for name in Entry.__struct_fields__ if name != "existing"]


def _next_moment(conn: Connection) -> float:
    """Now, or just after the last answer where the clock was set back: the times of answers are also their order."""
    last = round((conn.execute(NEWEST).scalar() or 0.0) * TICKS)
    return max(round(time.time() * TICKS), last + 1) / TICKS


def _give_space_back(conn: Connection) -> None:
    """Cuts free pages off an SQLite file. The driver runs the pragma for one page only, whatever its argument."""
    cursor = conn.connection.cursor()
    free = cursor.execute("PRAGMA freelist_count").fetchone()[0]
    for _ in range(min(free, VACUUM_PAGES)):
        cursor.execute("PRAGMA incremental_vacuum(1)")
    cursor.close()


def entry_of(row: Any) -> Entry:
    values = {name: getattr(row, name) for name in STORED}
    if row.status == "done" and row.result_bytes == 0:
        values["status"] = "expired"
    return Entry(**values)


def _same(row: Any, entry: Entry) -> Entry:
    if row.tenant != entry.tenant:
        raise NotFound(f"no model {entry.model_id!r}", param="model_id")
    refused = "refused" in row.meta or "refused" in entry.meta  # whatever kind it is, it is this request
    if not row.fingerprint:
        raise Conflict(row.meta["refused"]["message"], param="seq_id")
    if row.fingerprint != entry.fingerprint or not (refused or row.kind == entry.kind):
        raise Conflict(
            f"seq_id {entry.seq} of {entry.model_id} was used before for another request ({row.kind}); use the next number", param="seq_id"
        )
    return msgspec.structs.replace(entry_of(row), existing=True)
