from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from everlearn.errors import InvalidRequest, Unavailable
from everlearn.store import keys, tables
from everlearn.store.db import Database, make_engine, migrate, open_database
from tests.store.acts import do


def count_keys(db: Database) -> int:
    return len(db.read(keys.list_keys))


def test_migrations_make_the_tables_that_the_code_queries(db: Database) -> None:
    with db.engine.connect() as conn:
        assert compare_metadata(MigrationContext.configure(conn, opts={"compare_type": True}), tables.metadata) == []


def test_migrations_go_down_to_nothing_and_up_again(store_url: str) -> None:
    open_database(store_url).close()
    engine = make_engine(store_url)
    migrate(engine, down_to="base")
    with engine.connect() as conn:
        assert set(sa.inspect(conn).get_table_names()) == {"alembic_version"}
    migrate(engine)
    engine.dispose()


def test_sqlite_is_durable_by_its_settings(tmp_path: Path) -> None:
    db = open_database(f"sqlite:///{tmp_path / 'new folder' / 'x.db'}")
    with db.engine.connect() as conn:
        values = [
            conn.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous", "foreign_keys", "auto_vacuum")
        ]
    db.close()
    assert values == ["wal", 2, 1, 2]


def test_a_failing_function_undoes_only_its_own_changes(db: Database) -> None:
    gate = threading.Event()
    db.write(lambda conn: gate.wait(10))  # the next three meet in one transaction

    def broken(conn: sa.Connection) -> None:
        keys.create(conn, "a", "half")
        raise ValueError("stop")

    before = db.write(lambda conn: keys.create(conn, "a", "before"))
    failed = db.write(broken)
    after = db.write(lambda conn: keys.create(conn, "a", "after"))
    gate.set()
    assert before.result(10)[0].name == "before"
    assert after.result(10)[0].name == "after"
    with pytest.raises(ValueError, match="stop"):
        failed.result(10)
    assert {key.name for key in db.read(keys.list_keys)} == {"before", "after"}


def test_a_failing_statement_does_not_poison_its_batch(db: Database) -> None:
    gate = threading.Event()
    db.write(lambda conn: gate.wait(10))
    failed = db.write(lambda conn: conn.execute(sa.text("SELECT * FROM nowhere")))
    after = db.write(lambda conn: keys.create(conn, "a", "after"))
    gate.set()
    with pytest.raises(sa.exc.DBAPIError):
        failed.result(10)
    assert after.result(10)[0].name == "after"


def test_waiting_writes_share_one_commit(db: Database) -> None:
    commits = []
    sa.event.listen(db.engine, "commit", lambda conn: commits.append(1))
    gate, begun = threading.Event(), threading.Event()
    first = db.write(lambda conn: (begun.set(), gate.wait(10)))
    begun.wait(10)
    waiting = [db.write(lambda conn, n=n: keys.create(conn, "a", str(n))) for n in range(50)]
    gate.set()
    for future in [first, *waiting]:
        future.result(10)
    assert count_keys(db) == 50
    assert len(commits) == 2


def test_a_future_resolves_after_its_change_can_be_read(db: Database) -> None:
    seen = []
    futures = [db.write(lambda conn, n=n: keys.create(conn, "a", str(n))) for n in range(20)]
    for future in futures:
        name = future.result(10)[0].name
        seen.append(name in {key.name for key in db.read(keys.list_keys)})
    assert all(seen)


def test_close_writes_what_is_queued_and_refuses_more(store_url: str) -> None:
    db = open_database(store_url)
    futures = [db.write(lambda conn, n=n: keys.create(conn, "a", str(n))) for n in range(30)]
    db.close()
    db.close()
    assert all(future.done() for future in futures)
    with pytest.raises(Unavailable):
        db.write(lambda conn: None)
    again = open_database(store_url)
    assert count_keys(again) == 30
    again.close()


def test_a_second_server_is_refused_and_commands_are_not(store_url: str) -> None:
    db, other = open_database(store_url), open_database(store_url)
    db.claim_server()
    with pytest.raises(Unavailable, match="another everlearn server"):
        other.claim_server()
    do(other, lambda conn: keys.create(conn, "a", "from the command line"))
    assert count_keys(db) == 1
    db.close()
    other.claim_server()
    other.close()


def test_two_processes_may_write_at_once(store_url: str) -> None:
    one, two = open_database(store_url), open_database(store_url)
    futures = [db.write(lambda conn, n=n: keys.create(conn, "a", str(n))) for n in range(40) for db in (one, two)]
    for future in futures:
        future.result(30)
    assert count_keys(one) == 80
    one.close()
    two.close()


def test_a_cut_connection_is_opened_again_and_the_write_run_again(postgres_url: str) -> None:
    db = open_database(postgres_url)
    do(db, lambda conn: keys.create(conn, "a", "one"))
    attempts = []

    def cut_once(conn: sa.Connection) -> None:
        attempts.append(1)
        if len(attempts) == 1:
            mine = conn.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
            db.read(lambda other: other.execute(sa.text("SELECT pg_terminate_backend(:pid)"), {"pid": mine}).all())
        keys.create(conn, "a", "two")

    do(db, cut_once)
    assert len(attempts) == 2
    assert count_keys(db) == 2
    db.close()


def test_a_full_disk_fails_the_write_by_name_and_the_store_goes_on(tmp_path: Path) -> None:
    db = open_database(f"sqlite:///{tmp_path / 'x.db'}")

    def fill(conn: sa.Connection) -> None:
        conn.exec_driver_sql("PRAGMA max_page_count = 60")
        conn.execute(tables.payloads.insert().values(request_id="x", tenant="a", body=b"0" * 10_000_000))

    with pytest.raises(Unavailable, match="full"):
        db.write(fill).result(10)
    do(db, lambda conn: conn.exec_driver_sql("PRAGMA max_page_count = 1073741823").all())
    do(db, lambda conn: keys.create(conn, "a", "works again"))
    db.close()


def test_what_a_database_has_no_room_for_may_come_again(postgres_url: str) -> None:
    """The statement fails and its savepoint is undone, so that others in the batch are stored; the failure is the store's, not the request's."""
    db = open_database(postgres_url)
    full = "DO $$ BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$"
    gate = threading.Event()
    db.write(lambda conn: gate.wait(10))
    failed = db.write(lambda conn: conn.exec_driver_sql(full))
    other = db.write(lambda conn: keys.create(conn, "a", "other"))
    gate.set()
    with pytest.raises(Unavailable, match="No space left"):
        failed.result(10)
    assert other.result(10)[0].name == "other"
    db.close()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://host/x", "not a url"])
def test_a_url_without_a_durable_database_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match=r"store\.url"):
        open_database(url)


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="check store.url"):
        open_database(f"postgresql+psycopg://x@/y?host={tmp_path}")


def test_reads_do_not_wait_for_the_writer(db: Database) -> None:
    gate = threading.Event()
    held = db.write(lambda conn: (keys.create(conn, "a", "held"), gate.wait(10)))
    time.sleep(0.05)
    started = time.monotonic()
    assert count_keys(db) == 0
    assert time.monotonic() - started < 2
    gate.set()
    held.result(10)


def test_a_read_sees_one_state(db: Database) -> None:
    def twice(conn: sa.Connection) -> tuple[int, int]:
        before = len(keys.list_keys(conn, "a"))
        db.write(lambda other: keys.create(other, "a", "meanwhile")).result(10)
        return before, len(keys.list_keys(conn, "a"))

    assert db.read(twice) == (0, 0) and count_keys(db) == 1


def test_a_store_of_the_first_schema_is_taken_over(store_url: str) -> None:
    open_database(store_url).close()
    engine = make_engine(store_url)
    migrate(engine, down_to="0001")
    old = {"key_id": "key-1", "tenant": "a", "name": "old", "prefix": "tml-x", "scopes": '["sample"]', "created_at": 1.0, "digest": "d"}
    with engine.begin() as conn:
        conn.execute(sa.text(f"INSERT INTO keys ({', '.join(old)}) VALUES ({', '.join(':' + name for name in old)})"), old)
    engine.dispose()
    db = open_database(store_url)
    (key,) = db.read(keys.list_keys)
    assert (key.scopes, key.limits, key.content) == (["sample"], keys.NO_LIMITS, True)
    db.close()
