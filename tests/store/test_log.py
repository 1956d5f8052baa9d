from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa

from everlearn.errors import Conflict, NotFound
from everlearn.store import checkpoints, log, rebuild, runs
from everlearn.store.checkpoints import TinkerPath
from everlearn.store.db import Database, open_database
from tests.store.acts import DONE, ERROR, SAVED, append, create_entry, do, entry, finish, new_run, new_session, publish_entry, save_entry


def replay_of(db: Database, run: str) -> rebuild.Rebuild:
    found = db.read(lambda conn: rebuild.rebuild(conn, run))
    assert found is not None
    return found


def seqs(entries: list[log.Entry]) -> list[int]:
    return [request.seq for request in entries]


def payload(db: Database, request: log.Entry) -> bytes | None:
    return db.read(lambda conn: log.payload(conn, request.request_id))


def test_a_request_and_its_answer_survive_a_reopen(store_url: str) -> None:
    db = open_database(store_url)
    run = new_run(db)
    append(db, entry(run, 1, body=b"\x00\xffbytes"), b"\x00\xffbytes")
    append(db, entry(run, 2, "optim_step", note="täst"))
    finish(db, entry(run, 1), b"result")
    db.close()
    db = open_database(store_url)
    request, result, error = db.read(lambda conn: log.get(conn, "a", f"{run}:1"))
    assert (request.status, result, error) == ("done", b"result", None)
    request, result, error = db.read(lambda conn: log.get(conn, "a", f"{run}:2"))
    assert (request.status, request.meta, result, error) == ("pending", {"note": "täst"}, None, None)
    replay = replay_of(db, run)
    assert seqs(replay.entries) == [0, 1, 2]
    assert [payload(db, request) for request in replay.entries] == [b"create", b"\x00\xffbytes", b"payload"]
    assert (replay.snapshot, replay.finished_seq, replay.run.state) == (None, 1, "live")
    db.close()


def test_the_same_request_twice_is_one_entry_and_another_is_a_conflict(db: Database) -> None:
    run = new_run(db)
    first = append(db, entry(run, 1))
    assert not first.existing
    finish(db, first, b"answer")
    again = append(db, entry(run, 1))
    assert (again.existing, again.status, again.request_id) == (True, "done", first.request_id)
    for other in (entry(run, 1, body=b"other"), entry(run, 1, "optim_step")):
        with pytest.raises(Conflict, match="seq_id 1"):
            append(db, other)


def test_the_first_answer_stays(db: Database) -> None:
    run = new_run(db)
    request = append(db, entry(run, 1))
    done = finish(db, request, b"first")
    assert done is not None and done.status == "done" and done.finished_at
    assert finish(db, request, b"second") is None
    assert finish(db, request, error=ERROR) is None
    assert db.read(lambda conn: log.get(conn, "a", request.request_id))[1] == b"first"
    assert do(db, lambda conn: log.finish(conn, "nobody:7", b"x", None)) is None


def test_a_failed_request_is_answered_and_never_replayed(db: Database) -> None:
    run = new_run(db)
    finish(db, append(db, entry(run, 1)), error=ERROR)
    request, result, error = db.read(lambda conn: log.get(conn, "a", f"{run}:1"))
    assert (request.status, result, error) == ("failed", None, ERROR)
    replay = replay_of(db, run)
    assert seqs(replay.entries) == [0]
    assert replay.finished_seq == 1


def test_only_requests_with_an_effect_are_replayed_and_keep_their_payload(db: Database) -> None:
    run = new_run(db)
    requests = [
        entry(run, 1, forward_only=True),
        entry(run, 2, forward_only=False),
        entry(run, 3, "optim_step"),
        save_entry(run, 4, "ck"),
        publish_entry(run, 5, 0, "v-1"),
        entry(run, 6, "load", folder="/f", path="tinker://x/weights/y", create=False),
    ]
    for request in requests:
        append(db, request)
    assert seqs(replay_of(db, run).entries) == [0, 1, 2, 3, 4, 5, 6]
    for request in requests:
        finish(db, request, SAVED if request.kind in ("save", "publish") else DONE)
    assert seqs(replay_of(db, run).entries) == [0, 2, 3, 6]
    assert [payload(db, request) is None for request in requests] == [True, False, False, True, True, False]


def test_entries_beyond_a_gap_are_kept_in_order(db: Database) -> None:
    run = new_run(db)
    for seq in (4, 2, 3):
        append(db, entry(run, seq))
    replay = replay_of(db, run)
    assert (seqs(replay.entries), replay.finished_seq) == ([0, 2, 3, 4], 0)


def test_numbers_beyond_doubles_survive(db: Database) -> None:
    run = new_run(db)
    sampler = do(db, lambda conn: runs.create_sampler(conn, "a", session_id=run.split(":")[0], seq=0, base_model="tiny")).sampler_id
    big = 10**18 + 1
    append(db, entry(sampler, big, "sample"))
    found = db.read(lambda conn: log.find(conn, "a", sampler, big, sample=True))
    assert found is not None and found.seq == big
    assert db.read(lambda conn: log.find(conn, "a", sampler, big - 1, sample=True)) is None


def test_samples_wait_in_order_and_leave_no_payload(db: Database) -> None:
    session = new_session(db)
    sampler = do(db, lambda conn: runs.create_sampler(conn, "a", session_id=session, seq=0, base_model="tiny")).sampler_id
    for seq in (2, 0, 1):
        append(db, entry(sampler, seq, "sample"))
    append(db, entry("direct:1", 0, "sample", direct=True))
    waiting = db.read(rebuild.unfinished)
    assert [request.request_id for request in waiting] == [f"{sampler}:2", f"{sampler}:0", f"{sampler}:1", "direct:1:0"]
    assert db.read(lambda conn: log.unfinished(conn, "a")) == 4
    finish(db, entry(sampler, 0, "sample"), b"tokens")
    assert db.read(lambda conn: log.payload(conn, f"{sampler}:0")) is None
    assert len(db.read(rebuild.unfinished)) == 3
    assert db.read(lambda conn: log.unfinished(conn, "a")) == 3


def test_finished_samples_are_asked_for_by_the_order_of_their_answers(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cursor in that order needs no memory: what was told isn't read again, and a clock that is set back changes nothing."""
    session = new_session(db)
    one, other = (
        do(db, lambda conn, seq=seq: runs.create_sampler(conn, "a", session_id=session, seq=seq, base_model="tiny")).sampler_id
        for seq in (0, 1)
    )

    def finished(after: int, seqs: range = range(100)) -> list[int]:
        found, upto = db.read(lambda conn: log.finished_samples(conn, "a", one, after, seqs))
        assert [request.finish_order for request in found] == sorted({request.finish_order for request in found})
        cursors.append(upto)
        return [request.seq for request in found]

    cursors: list[int] = []
    for seq in range(6):
        append(db, entry(one, seq, "sample"))
    append(db, entry(other, 0, "sample"))
    assert finished(0) == []
    finish(db, entry(one, 4, "sample"), b"x")
    finish(db, entry(one, 1, "sample"), error=ERROR)
    assert finished(0) == [4, 1]
    told = cursors[-1]
    assert finished(told) == []
    finish(db, entry(other, 0, "sample"), b"x")
    assert finished(told) == [] and cursors[-1] > told, "what others finished was looked at too"
    with monkeypatch.context() as patch:
        patch.setattr(log.time, "time", lambda: 1.0e9)
        finish(db, entry(one, 5, "sample"), b"x")
        finish(db, entry(one, 0, "sample"), b"x")
    assert finished(told) == finished(cursors[1]) == [5, 0]
    assert finished(told, range(1)) == [0]
    assert finished(cursors[-1] + 10**9) == [4, 1, 5, 0], "a cursor of another store"
    assert finished(1) == [4, 1, 5, 0]
    assert not db.read(lambda conn: log.finished_samples(conn, "b", one, 0, range(100)))[0]


def test_a_cursor_reads_only_what_is_newer(tmp_path: Path) -> None:
    """However many samples a sampler has finished before."""
    db = open_database(f"sqlite:///{tmp_path / 'everlearn.db'}")
    plans: list[str] = []

    def explain(conn: sa.Connection, cursor: object, statement: str, parameters: object, *_: object) -> None:
        if "ORDER BY requests.finished_at" in statement and not statement.startswith("EXPLAIN"):
            plans.extend(row[-1] for row in conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters))  # type: ignore[arg-type]

    finish(db, append(db, entry("direct:1", 0, "sample", direct=True)), b"x")
    sa.event.listen(db.engine, "before_cursor_execute", explain)
    _, upto = db.read(lambda conn: log.finished_samples(conn, "a", "direct:1", 0, range(9)))
    assert any("(model_id=? AND is_sample=?" in plan for plan in plans), plans
    plans.clear()
    db.read(lambda conn: log.finished_samples(conn, "a", "direct:1", upto, range(9)))
    assert any("requests_finished (finished_at>? AND finished_at<?)" in plan for plan in plans), plans
    db.close()


def test_a_snapshot_drops_what_it_covers_and_nothing_else(db: Database) -> None:
    run = new_run(db)
    for seq in range(1, 7):
        append(db, entry(run, seq, "optim_step" if seq % 2 == 0 else "forward_backward"))
    for seq in range(1, 5):
        finish(db, entry(run, seq), b"answer")
    assert not do(db, lambda conn: log.add_snapshot(conn, run, 5, "/s/5", 9)), "the answer of 5 is not durable"
    assert do(db, lambda conn: log.compact(conn, run, 4)) == 0, "nothing covers them yet"
    assert do(db, lambda conn: log.add_snapshot(conn, run, 4, "/s/4", 9))
    assert do(db, lambda conn: log.add_snapshot(conn, run, 4, "/s/4", 9)), "told twice"
    assert not do(db, lambda conn: log.add_snapshot(conn, run, 2, "/s/2", 9)), "older than the newest"
    replay = replay_of(db, run)
    assert replay.snapshot is not None and replay.snapshot.folder == "/s/4"
    assert (seqs(replay.entries), replay.finished_seq) == ([5, 6], 4)
    assert db.read(lambda conn: log.get(conn, "a", f"{run}:3"))[1] == b"answer", "its answer can still be fetched"
    assert append(db, entry(run, 3)).existing
    assert db.read(log.usage).payload_bytes == 2 * len(b"payload")
    assert not do(db, lambda conn: log.add_snapshot(conn, "nobody:train:0", 1, "/s", 1))


def test_old_answers_expire_and_an_old_seq_never_runs_twice(db: Database) -> None:
    run = new_run(db)
    for seq in (1, 2, 3):
        finish(db, append(db, entry(run, seq)), b"answer")
    do(db, lambda conn: log.add_snapshot(conn, run, 2, "/s/2", 9))
    assert do(db, lambda conn: log.expire(conn, time.time(), 3600)) == (0, 0)
    assert do(db, lambda conn: log.expire(conn, time.time() + 10, 5)) == (4, 3)
    request, result, _ = db.read(lambda conn: log.get(conn, "a", f"{run}:3"))
    assert (request.status, result) == ("expired", None)
    assert append(db, entry(run, 3)).status == "expired"
    assert seqs(replay_of(db, run).entries) == [3], "not covered by the snapshot, so still replayed"
    with pytest.raises(NotFound):
        db.read(lambda conn: log.get(conn, "a", f"{run}:1"))
    with pytest.raises(Conflict, match="ran before"):
        append(db, entry(run, 1))
    with pytest.raises(Conflict, match="exists already"):
        append(db, create_entry(run.split(":")[0]))
    append(db, entry(run, 4))


def test_usage_names_whom_a_snapshot_would_free(db: Database) -> None:
    light, heavy = new_run(db), new_run(db)
    finish(db, append(db, entry(light, 1), b"x" * 10), b"1234")
    finish(db, append(db, entry(heavy, 1), b"x" * 1000), b"1234")
    append(db, entry(light, 2), b"x" * 5000)
    usage = db.read(log.usage)
    assert (usage.payload_bytes, usage.requests, usage.pending) == (6010 + 2 * len(b"create"), 5, 1)
    assert db.read(log.heaviest) == [(heavy, 1000 + len(b"create")), (light, 10 + len(b"create"))]


def test_a_run_is_born_with_its_request(db: Database) -> None:
    session = new_session(db)
    request = create_entry(session)
    append(db, request)
    assert db.read(lambda conn: runs.get_run(conn, "a", request.model_id)).state == "creating"
    append(db, entry(request.model_id, 1))
    assert append(db, create_entry(session)).existing
    finish(db, request)
    run = db.read(lambda conn: runs.get_run(conn, "a", request.model_id))
    assert (run.state, run.lora.rank, run.user_metadata, run.last_seq) == ("live", 8, {"k": "v"}, 0)


def test_a_creation_that_failed_answers_what_waits_behind_it(db: Database) -> None:
    request = create_entry(new_session(db), kind="load", create=True, folder="/f", path="p")
    append(db, request)
    append(db, entry(request.model_id, 1))
    finish(db, request, error=ERROR)
    assert db.read(lambda conn: runs.get_run(conn, "a", request.model_id)).state == "failed"
    waiting, _, error = db.read(lambda conn: log.get(conn, "a", f"{request.model_id}:1"))
    assert waiting.status == "failed" and error is not None and "could not be created" in error["message"]
    assert db.read(lambda conn: rebuild.rebuild(conn, request.model_id)) is None
    with pytest.raises(Conflict, match="creation failed"):
        append(db, entry(request.model_id, 2))


def test_an_unloaded_run_keeps_its_checkpoints_and_takes_no_requests(db: Database) -> None:
    run = new_run(db)
    finish(db, append(db, save_entry(run, 1, "ck")), SAVED)
    append(db, save_entry(run, 2, "never"))
    do(db, lambda conn: runs.unload_run(conn, "a", run))
    assert db.read(log.usage).payload_bytes == 0
    assert db.read(lambda conn: rebuild.rebuild(conn, run)) is None
    assert [c.name for c in db.read(lambda conn: checkpoints.list_checkpoints(conn, "a", run))[0]] == ["ck"]
    assert db.read(lambda conn: log.get(conn, "a", f"{run}:2"))[0].status == "failed"
    with pytest.raises(Conflict, match="unloaded"):
        append(db, entry(run, 3))


def test_a_save_reserves_its_name_and_lists_it_when_it_is_done(db: Database) -> None:
    run = new_run(db)
    path = TinkerPath(run, "weights", "ck")
    append(db, save_entry(run, 1, "ck"))
    with pytest.raises(NotFound):
        db.read(lambda conn: checkpoints.get(conn, "a", path))
    with pytest.raises(Conflict, match="exists or is being saved"):
        append(db, save_entry(run, 2, "ck"))
    finish(db, save_entry(run, 1, "ck"), SAVED)
    saved = db.read(lambda conn: checkpoints.get(conn, "a", path))
    assert (saved.bytes, saved.sha256, saved.optimizer, str(saved.path)) == (10, "ab" * 32, True, str(path))
    finish(db, append(db, save_entry(run, 2, "ck", overwrite=True)), SAVED)
    newer = db.read(lambda conn: checkpoints.get(conn, "a", path))
    assert newer.folder != saved.folder
    assert db.read(lambda conn: checkpoints.list_checkpoints(conn, "a"))[1] == 1


def test_a_save_that_failed_gives_its_name_free(db: Database) -> None:
    run = new_run(db)
    finish(db, append(db, save_entry(run, 1, "ck")), error=ERROR)
    finish(db, append(db, save_entry(run, 2, "ck")), SAVED)
    assert db.read(lambda conn: checkpoints.list_checkpoints(conn, "a"))[1] == 1


def test_a_publish_makes_a_sampler_and_inflight_ones_follow(db: Database) -> None:
    run = new_run(db)
    session = run.split(":")[0]
    for seq, kind in ((1, "inflight"), (2, "snapshot"), (3, "inflight")):
        finish(db, append(db, publish_entry(run, seq, seq, f"v-{seq}", kind)), SAVED)
    targets = [db.read(lambda conn, n=n: runs.get_sampler(conn, "a", runs.sampler_id(session, n))) for n in (1, 2, 3)]
    assert [(sampler.version, sampler.kind) for sampler in targets] == [("v-3", "inflight"), ("v-2", "snapshot"), ("v-3", "inflight")]
    assert {sampler.model_id for sampler in targets} == {run}
    with pytest.raises(Conflict, match="sampling_session_seq_id"):
        append(db, publish_entry(run, 4, 2, "v-4"))


def test_a_persistent_publish_is_a_checkpoint_to_sample_from(db: Database) -> None:
    run = new_run(db)
    meta = {"version": "v-1", "folder": "/v/1", "kind": "snapshot", "name": "final", "ttl_seconds": 3600}
    request = msgspec.structs.replace(entry(run, 1, "publish"), meta=meta)
    finish(db, append(db, request), SAVED)
    found = db.read(lambda conn: checkpoints.get(conn, "a", TinkerPath(run, "sampler_weights", "final")))
    assert (found.version, found.folder) == ("v-1", "/v/1")
    assert found.expires_at is not None and 3500 < found.expires_at - time.time() < 3601


def test_a_tenant_sees_and_touches_only_its_own(db: Database) -> None:
    run, session = new_run(db), new_session(db)
    append(db, entry(run, 1))
    sampler = do(db, lambda conn: runs.create_sampler(conn, "a", session_id=session, seq=0, base_model="tiny")).sampler_id
    foreign = [
        lambda conn: log.get(conn, "b", f"{run}:1"),
        lambda conn: log.append(conn, entry(run, 1, tenant="b"), b"x"),
        lambda conn: log.append(conn, entry(run, 2, tenant="b"), b"x"),
        lambda conn: log.append(conn, entry(sampler, 0, "sample", tenant="b"), b"x"),
        lambda conn: log.append(conn, create_entry(session, 5, tenant="b"), b"x"),
        lambda conn: log.append(conn, msgspec.structs.replace(save_entry(run, 2, "ck"), tenant="b"), b"x"),
    ]
    for attempt in foreign:
        with pytest.raises(NotFound):
            do(db, attempt)
    assert db.read(lambda conn: log.find(conn, "b", run, 1)) is None
    assert db.read(lambda conn: log.unfinished(conn, "b")) == 0
