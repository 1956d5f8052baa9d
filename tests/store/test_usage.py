from __future__ import annotations

import time

import msgspec

from everlearn.store import log, runs, usage
from everlearn.store.db import Database
from tests.store.acts import DONE, ERROR, append, do, entry, finish, new_run


def lines(db: Database, tenant: str = "a") -> list[usage.Line]:
    today = usage.day_of(time.time())
    return db.read(lambda conn: usage.lines(conn, tenant, today - 2, today))


def sums(db: Database, tenant: str = "a") -> list[tuple[object, ...]]:
    return [(line.key_id, line.subject, line.kind, line.requests, line.tokens_in, line.tokens_out) for line in lines(db, tenant)]


def sampled(db: Database, run: str, seq: int, tokens_out: int) -> None:
    session = run.split(":", maxsplit=1)[0]
    sampler = runs.sampler_id(session, 0)
    do(db, lambda conn: runs.create_sampler(conn, "a", session_id=session, seq=0, base_model="tiny"))
    request = append(db, entry(sampler, seq, "sample", tokens=5, subject="tiny", key_id="key-1"))
    do(db, lambda conn: log.finish(conn, request.request_id, DONE, None, tokens_out))


def test_requests_of_the_log_are_counted_by_key_and_run(db: Database) -> None:
    run = new_run(db)
    for seq in (1, 2):
        finish(db, append(db, entry(run, seq, tokens=100, key_id="key-1")))
    finish(db, append(db, entry(run, 3, tokens=10)))
    finish(db, append(db, entry(run, 4, tokens=1000)), error=ERROR)
    append(db, entry(run, 5, tokens=1000))
    sampled(db, run, 0, 7)
    assert sums(db) == [
        ("", run, "forward_backward", 1, 10, 0),
        ("key-1", run, "forward_backward", 2, 200, 0),
        ("key-1", "tiny", "sample", 1, 5, 7),
    ]
    assert sums(db, "b") == []


def test_what_leaves_the_log_is_still_counted_once(db: Database) -> None:
    run = new_run(db)
    for seq in (1, 2, 3):
        finish(db, append(db, entry(run, seq, tokens=100, forward_only=True, key_id="key-1")))
    sampled(db, run, 0, 7)
    before = lines(db)
    assert do(db, lambda conn: log.expire(conn, time.time() + 10, 0))[1] == 4
    assert do(db, lambda conn: log.expire(conn, time.time() + 10, 0))[1] == 0
    after = lines(db)
    assert sums(db) and [msgspec.structs.replace(line, seconds=0) for line in after] == [
        msgspec.structs.replace(line, seconds=0) for line in before
    ]
    finish(db, append(db, entry(run, 4, tokens=1, key_id="key-1")))
    assert sums(db)[0] == ("key-1", run, "forward_backward", 4, 301, 0), "the log and the sums together"


def test_days_are_told_apart(db: Database) -> None:
    run, now = new_run(db), time.time()
    today = usage.day_of(now)
    for seq, created in ((1, now), (2, now - 86_400), (3, today * 86_400.0), (4, today * 86_400.0 - 0.001), (5, now - 40 * 86_400)):
        finish(db, append(db, msgspec.structs.replace(entry(run, seq, tokens=seq), created_at=created)))
    assert [(line.day, line.tokens_in) for line in lines(db)] == [(today - 1, 6), (today, 4)]
    assert all(line.seconds >= 0 for line in lines(db))
