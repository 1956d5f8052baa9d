from __future__ import annotations

import time

import pytest
import sqlalchemy as sa

from everlearn.errors import Conflict, NotFound
from everlearn.store import runs, tables
from everlearn.store.db import Database
from tests.store.acts import do, new_run, new_session


def test_a_session_lives_beats_and_ends_once(db: Database) -> None:
    session = do(
        db, lambda conn: runs.create_session(conn, "a", tags=["x"], user_metadata={"k": 1}, sdk_version="0.38.0", display_name="n")
    )
    beat = do(db, lambda conn: runs.heartbeat(conn, "a", session.session_id))
    assert beat.last_heartbeat >= session.created_at
    assert (beat.tags, beat.user_metadata, beat.state) == (["x"], {"k": 1}, "active")
    ended = do(db, lambda conn: runs.finish_session(conn, "a", session.session_id, "errored", "why"))
    again = do(db, lambda conn: runs.finish_session(conn, "a", session.session_id, "success"))
    assert (ended.state, ended.finish_reason, again.finish_reason, again.finish_detail) == ("finished", "errored", "errored", "why")


def test_the_same_idempotency_key_is_the_same_session(db: Database) -> None:
    one, two, other = (do(db, lambda conn, t=t: runs.create_session(conn, t, idempotency_key="k")).session_id for t in "aab")
    assert one == two != other


def test_listing_is_by_tenant_and_project(db: Database) -> None:
    session = new_session(db)
    mine = [new_run(db, session=session, number=n) for n in range(3)]
    new_run(db, tenant="b")
    page, total = db.read(lambda conn: runs.list_runs(conn, "a", limit=2, offset=1))
    assert ([run.run_id for run in page], total) == (mine[1::-1], 3)
    assert db.read(lambda conn: runs.list_runs(conn, "a", project_id="p")) == ([], 0)
    do(db, lambda conn: runs.set_project(conn, "a", session, "p"))
    assert db.read(lambda conn: runs.list_runs(conn, "a", project_id="p"))[1] == 3
    assert db.read(lambda conn: runs.list_sessions(conn, "a"))[1] == 1
    sampler = do(db, lambda conn: runs.create_sampler(conn, "a", session_id=session, seq=0, base_model="tiny")).sampler_id
    assert db.read(lambda conn: runs.session_children(conn, "a", session)) == (mine, [sampler])


def test_everything_of_another_tenant_looks_absent(db: Database) -> None:
    run = new_run(db)
    session = run.split(":")[0]
    sampler = do(db, lambda conn: runs.create_sampler(conn, "a", session_id=session, seq=0, base_model="tiny")).sampler_id
    attempts = [
        lambda conn: runs.get_session(conn, "b", session),
        lambda conn: runs.heartbeat(conn, "b", session),
        lambda conn: runs.finish_session(conn, "b", session, "success"),
        lambda conn: runs.set_project(conn, "b", session, "p"),
        lambda conn: runs.session_children(conn, "b", session),
        lambda conn: runs.get_run(conn, "b", run),
        lambda conn: runs.unload_run(conn, "b", run),
        lambda conn: runs.mark_corrupted(conn, "b", run),
        lambda conn: runs.create_sampler(conn, "b", session_id=session, seq=1, base_model="tiny"),
        lambda conn: runs.get_sampler(conn, "b", sampler),
        lambda conn: runs.join_sampler(conn, "b", sampler),
    ]
    for attempt in attempts:
        with pytest.raises(NotFound):
            do(db, attempt)
    assert db.read(lambda conn: runs.get_session(conn, "a", session)).state == "active"
    assert db.read(lambda conn: runs.list_sessions(conn, "b")) == ([], 0)


def test_a_sampler_is_made_once_and_counts_its_holders(db: Database) -> None:
    session = new_session(db)

    def make(path: str | None) -> runs.Sampler:
        kind = "persistent" if path else "base"
        return do(db, lambda conn: runs.create_sampler(conn, "a", session_id=session, seq=4, base_model="tiny", model_path=path, kind=kind))

    assert make(None) == make(None)
    with pytest.raises(Conflict, match="sampling_session_seq_id 4"):
        make("tinker://x/weights/y")
    assert [do(db, lambda conn: runs.join_sampler(conn, "a", f"{session}:sample:4")) for _ in range(3)] == [1, 2, 3]


def test_idle_runs_are_those_that_nobody_waits_for(db: Database) -> None:
    busy, ended = new_run(db), new_run(db)
    do(db, lambda conn: runs.finish_session(conn, "a", ended.split(":")[0], "success"))
    assert db.read(lambda conn: runs.idle_runs(conn, time.time() - 60)) == []
    do(db, lambda conn: conn.execute(tables.runs.update().values(last_request_time=time.time() - 100)))
    assert [run.run_id for run in db.read(lambda conn: runs.idle_runs(conn, time.time() - 60))] == [ended]
    do(db, lambda conn: conn.execute(tables.sessions.update().values(last_heartbeat=time.time() - 100)))
    assert {run.run_id for run in db.read(lambda conn: runs.idle_runs(conn, time.time() - 60))} == {busy, ended}


def test_telemetry_is_bounded(db: Database) -> None:
    futures = [db.write(lambda conn, n=n: runs.add_telemetry(conn, "a", "s", {"n": n}, keep=20)) for n in range(210)]
    for future in futures:
        future.result(30)
    count = db.read(lambda conn: conn.execute(sa.select(sa.func.count()).select_from(tables.telemetry)).scalar_one())
    assert 20 <= count < 120


def test_telemetry_is_bounded_by_bytes_too(db: Database) -> None:
    def held(tenant: str) -> tuple[int, int]:
        table = tables.telemetry
        return tuple(
            db.read(lambda conn: conn.execute(sa.select(sa.func.count(), sa.func.sum(table.c.bytes)).where(table.c.tenant == tenant)).one())
        )

    do(db, lambda conn: runs.add_telemetry(conn, "b", "s", {"n": 0}))
    for n in range(30):
        do(db, lambda conn, n=n: runs.add_telemetry(conn, "a", "s", {"n": n, "text": "x" * 10_000}, keep_bytes=100_000))
    count, size = held("a")
    assert count == 9 and 90_000 < size <= 100_000 and held("b") == (1, 7)
    newest = db.read(lambda conn: conn.execute(sa.select(tables.telemetry.c.body).where(tables.telemetry.c.tenant == "a")).scalars().all())
    assert sorted(body["n"] for body in newest) == list(range(21, 30))
    for n in range(1_000):
        db.write(lambda conn, n=n: runs.add_telemetry(conn, "a", "s", {"n": n, "text": "x" * 100}, keep_bytes=100_000))
    do(db, lambda conn: None)
    assert held("a")[1] <= 100_000 + 100 * 1_000
