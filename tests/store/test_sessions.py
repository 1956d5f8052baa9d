"""Searching sessions: what matches, in which order, on both databases; and that no search reads all that a tenant has."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import sqlalchemy as sa

from everlearn.store import checkpoints, runs, sessions, tables, usage
from everlearn.store.checkpoints import TinkerPath
from everlearn.store.db import Database
from everlearn.store.runs import Session
from everlearn.store.sessions import Status, Wanted
from tests.store.acts import DONE, append, do, entry, finish, new_run, new_session

NAMES = (None, "", "First run", "ÄRGER im Haus", "100 % of _it_", "first straße")
KEYS = ("plain", 'a"b', "with.dot", "ключ", "$", "[0]", "")


def fill(db: Database, number: int, tenant: str = "a") -> list[Session]:
    """Sessions of every kind, some created in the same moment; newest first."""
    draw, now = random.Random(number), time.time()

    def insert(conn: Any) -> None:
        for i in range(number):
            made = runs.create_session(
                conn,
                tenant,
                user_metadata=draw.choice((None, {}, {key: draw.choice("xy") for key in draw.sample(KEYS, 3)})),
                project_id=draw.choice((None, "p", "q")),
                display_name=draw.choice(NAMES),
            )
            beat = now - draw.choice((0, 1_000))
            values: dict[str, Any] = {"created_at": now - i // 3, "last_heartbeat": beat}
            if draw.random() < 0.5:
                values |= {"state": "finished", "finish_reason": draw.choice(("success", "errored"))}
            conn.execute(tables.sessions.update().where(tables.sessions.c.session_id == made.session_id).values(**values))

    do(db, insert)
    found, _ = db.read(lambda conn: runs.list_sessions(conn, tenant, number))
    return sorted(found, key=lambda item: (item.created_at, item.session_id), reverse=True)


def matches(item: Session, wanted: Wanted) -> bool:
    have = item.user_metadata or {}
    named = bool(wanted.words) and all(word in (item.display_name or "").lower() for word in wanted.words or ())
    return (
        (wanted.project_ids is None or item.project_id in wanted.project_ids)
        and all(have.get(key) == value for key, value in wanted.user_metadata.items())
        and ((wanted.words is None and wanted.session_id is None) or named or item.session_id == wanted.session_id)
        and (wanted.statuses is None or any(fits(item, status) for status in wanted.statuses))
    )


def fits(item: Session, status: Status) -> bool:
    if status.finished:
        return item.state == "finished" and (not status.reasons or item.finish_reason in status.reasons)
    return item.state != "finished" and item.last_heartbeat > status.alive_since


def test_a_search_finds_what_matches_newest_first(db: Database) -> None:
    everything = fill(db, 200)
    fill(db, 20, "b")
    alive = Status(False, time.time() - 100)
    asked = [
        Wanted(),
        Wanted(project_ids=("p",)),
        Wanted(project_ids=()),
        *(Wanted(user_metadata={key: "x"}) for key in KEYS),
        Wanted(user_metadata={"plain": "x", 'a"b': "y"}),
        Wanted(session_id=everything[7].session_id),
        Wanted(session_id="sess-none"),
        *(Wanted(words=words) for words in ((), ("first",), ("run", "first"), ("ärger",), ("straße",), ("%",), ("_it_",), ("\\",))),
        Wanted(words=("first",), session_id=everything[9].session_id),
        Wanted(statuses=()),
        Wanted(statuses=(alive,)),
        Wanted(statuses=(Status(True, reasons=("errored",)), alive), words=("first",), project_ids=("q", "p")),
        Wanted(statuses=(Status(True),)),
    ]
    for wanted in asked:
        expected = [item for item in everything if matches(item, wanted)]
        assert db.read(lambda conn, wanted=wanted: sessions.search(conn, "a", wanted, 500)) == expected, wanted
        assert in_pages(db, wanted) == expected, wanted


def in_pages(db: Database, wanted: Wanted) -> list[Session]:
    paged: list[Session] = []
    while page := db.read(lambda conn, after=place_of(paged): sessions.search(conn, "a", wanted, 7, after)):
        paged += page
    return paged


def place_of(found: list[Session]) -> sessions.Place | None:
    """As a client's cursor has it: rounded to the microsecond."""
    return (round(found[-1].created_at, 6), found[-1].session_id) if found else None


def test_a_cursor_holds_where_its_session_is_gone(db: Database) -> None:
    everything = fill(db, 30)
    gone = everything[10]
    do(db, lambda conn: conn.execute(tables.sessions.delete().where(tables.sessions.c.session_id == gone.session_id)))
    found = db.read(lambda conn: sessions.search(conn, "a", Wanted(), 50, (gone.created_at, gone.session_id)))
    assert found == everything[11:]


@pytest.mark.parametrize("words", [None, ("first",), ("ärger",)])
def test_a_search_reads_no_more_than_it_shows(db: Database, words: tuple[str, ...] | None) -> None:
    fill(db, 1_200)
    rows = []

    def count(conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if statement.startswith("SELECT"):
            assert " LIMIT " in statement.replace("\n", " "), statement
            rows.append(statement)

    sa.event.listen(db.engine, "after_cursor_execute", count)
    assert len(db.read(lambda conn: sessions.search(conn, "a", Wanted(words=words), 20))) == 20
    sa.event.remove(db.engine, "after_cursor_execute", count)
    assert 1 <= len(rows) <= 10


def test_what_sessions_saved_is_added_up(db: Database) -> None:
    run, other = new_run(db), new_run(db, "b")
    session, empty = run.split(":")[0], new_session(db)
    for name, size, ttl in (("one", 10, None), ("two", 32, None), ("old", 64, 5.0)):
        for owner, of in (("a", run), ("b", other)):
            fields: dict[str, Any] = {"folder": f"/{of}/{name}", "version": f"{of}{name}", "bytes": size, "sha256": "", "optimizer": True}
            path = TinkerPath(of, "weights", name)
            do(
                db,
                lambda conn, owner=owner, path=path, fields=fields, ttl=ttl: checkpoints.add(conn, owner, path, **fields, ttl_seconds=ttl),
            )
    ids = [session, empty, other.split(":")[0], *(f"sess-{i}" for i in range(1_000))]
    assert db.read(lambda conn: sessions.saved_of(conn, "a", ids, time.time() + 10)) == {session: (2, 42)}
    assert db.read(lambda conn: sessions.metadata_of(conn, "a", ids)) == {session: None, empty: None}


def test_usage_by_hour_is_added_up_in_the_database(db: Database) -> None:
    run, hour = new_run(db), 1_800_000_000.0 // 3600
    for seq, moment in enumerate((0.0, 0.4999, 0.9999, 1.0, 1.0001), 1):
        request = append(db, entry(run, seq))
        finish(db, request, DONE)
        update = tables.requests.update().where(tables.requests.c.request_id == request.request_id)
        do(db, lambda conn, made=update.values(created_at=(hour + moment) * 3600, tokens_in=10**seq): conn.execute(made))
    found = db.read(lambda conn: usage.by_hour(conn, "a", ("forward_backward", "sample"), hour * 3600, (hour + 2) * 3600))
    assert sorted((line.hour - hour, line.kind, line.model_id, line.requests, line.tokens_in) for line in found) == [
        (0, "forward_backward", run, 3, 1_110),
        (1, "forward_backward", run, 2, 110_000),
    ]
    assert db.read(lambda conn: usage.by_hour(conn, "b", ("forward_backward",), 0, 4e9)) == []


def test_sessions_that_nothing_refers_to_go(db: Database) -> None:
    now = time.time()
    with_run = new_run(db).split(":")[0]
    idle, silent, sampled, drawn = (new_session(db) for _ in range(4))
    ids = {}
    for session in (silent, sampled, drawn):
        ids[session] = do(
            db, lambda conn, session=session: runs.create_sampler(conn, "a", session_id=session, seq=0, base_model="tiny")
        ).sampler_id
    finish(db, append(db, entry(ids[drawn], 1, "sample")))

    def age(table: sa.Table, **values: Any) -> None:
        do(db, lambda conn: conn.execute(table.update().values(**values)))

    age(tables.sessions, created_at=now - 100, last_heartbeat=now - 100)
    age(tables.samplers, last_used=now - 100)
    do(
        db,
        lambda conn: conn.execute(tables.samplers.update().where(tables.samplers.c.sampler_id == ids[sampled]).values(last_used=now - 5)),
    )
    young = new_session(db)
    assert do(db, lambda conn: sessions.expire(conn, now - 1_000)) == 0
    assert do(db, lambda conn: sessions.expire(conn, now - 50, limit=1)) == 1
    assert do(db, lambda conn: sessions.expire(conn, now - 50)) == 1
    left, _ = db.read(lambda conn: runs.list_sessions(conn, "a", 100))
    assert {item.session_id for item in left} == {with_run, sampled, drawn, young} and not {idle, silent} & {
        item.session_id for item in left
    }
    samplers = db.read(lambda conn: conn.execute(sa.select(tables.samplers.c.sampler_id)).scalars().all())
    assert sorted(samplers) == sorted((ids[sampled], ids[drawn]))
    do(db, lambda conn: conn.execute(tables.requests.delete()))  # its answer has expired
    assert do(db, lambda conn: sessions.expire(conn, now - 50)) == 1
    assert do(db, lambda conn: sessions.expire(conn, now - 1)) == 1
    left, _ = db.read(lambda conn: runs.list_sessions(conn, "a", 100))
    assert {item.session_id for item in left} == {with_run, young}
