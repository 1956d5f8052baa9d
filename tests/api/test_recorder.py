"""Records on their way into the store: nothing waits for them, nothing is lost, and a store that fails is told."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from everlearn.api import recorder
from everlearn.api.recorder import Recorder
from everlearn.errors import NotFound, Unavailable
from everlearn.store import records, tables
from everlearn.store.db import Database, open_database
from tests.store.test_records import record


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = open_database(f"sqlite:///{tmp_path / 'x.db'}")
    yield database
    database.close()


def stored(db: Database) -> int:
    return db.read(lambda conn: conn.execute(sa.select(sa.func.count()).select_from(tables.records)).scalar_one())


def test_a_record_can_be_read_as_soon_as_it_is_settled(db: Database) -> None:
    async def run() -> None:
        made = Recorder(db)
        made.start()
        for number in range(20):
            one = record(number)
            made.add(one)
            await made.settled(one.record_id)
            assert db.read(lambda conn, one=one: records.get(conn, "a", one.record_id))[0].record_id == one.record_id
        await made.settled("rec_of-somebody-else")
        assert len(made) == 0
        made.close()

    asyncio.run(run())


def test_close_writes_what_was_added(db: Database) -> None:
    async def run() -> None:
        counts: list[int] = []
        made = Recorder(db, counts.append)
        made.start()
        for number in range(500):
            made.add(record(number))
        await asyncio.to_thread(made.close)
        made.close()
        assert sum(counts) == 500 and len(counts) > 1

    asyncio.run(run())
    assert stored(db) == 500


def test_a_store_that_can_not_be_written_holds_answers_back_and_loses_none(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(recorder, "MAX_WAITING", 50)

    async def run() -> None:
        made = Recorder(db)
        made.start()
        db.write(lambda conn: conn.exec_driver_sql("PRAGMA max_page_count = 60").all()).result()
        number = 0
        while not made.backlog():
            one = record(number, prompt=records.int32(range(10_000)))
            made.add(one)
            number += 1
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.1)
        assert "answers wait to be recorded" in made.backlog() and "full" in made.backlog()
        with pytest.raises(Unavailable, match="full"):
            await made.settled(one.record_id, timeout=0.1)
        db.write(lambda conn: conn.exec_driver_sql("PRAGMA max_page_count = 1073741823").all()).result()
        await made.settled(one.record_id)
        while len(made):
            await asyncio.sleep(0.01)
        assert not made.backlog()
        made.close()
        assert stored(db) == number

    asyncio.run(run())


def test_one_that_can_not_be_stored_takes_no_other_with_it(db: Database) -> None:
    async def run() -> None:
        lost: list[int] = []
        made = Recorder(db, lost=lost.append)
        gate = threading.Event()
        db.write(lambda conn: gate.wait(10))
        made.start()
        bad = record(3, route=None)
        unpackable = record(4, prompt=None)
        for one in (record(1), record(2), bad, record(5)):
            made.add(one)
        gate.set()
        await made.settled(bad.record_id)
        made._queue.put(unpackable)  # `add` would have seen it
        made.add(record(6))
        await asyncio.to_thread(made.close)
        assert sum(lost) == 2 and stored(db) == 4
        with pytest.raises(NotFound):
            db.read(lambda conn: records.get(conn, "a", bad.record_id))

    asyncio.run(run())


def test_adding_does_not_hold_up_the_event_loop(db: Database) -> None:
    """Under 200 records a second of 600 tokens each, `add` returns at once and the loop turns as it does without."""

    async def turns(seconds: float) -> list[float]:
        late, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            late.append(time.perf_counter() - began - 0.001)
        return late

    async def run() -> None:
        made = Recorder(db)
        made.start()
        quiet = await turns(1.0)
        adds: list[float] = []

        async def answers() -> None:
            for number in range(400):
                one = record(number, prompt=records.int32(range(500)), tokens=100)
                began = time.perf_counter()
                made.add(one)
                adds.append(time.perf_counter() - began)
                await asyncio.sleep(0.005)

        task = asyncio.create_task(answers())
        busy = await turns(2.0)
        await task
        await asyncio.to_thread(made.close)
        slow = [1e3 * statistics.quantiles(values, n=100)[98] for values in (adds, quiet, busy)]
        # Bounds for a loaded machine; benchmarks/records.py prints the figures.
        assert statistics.median(adds) < 0.0005, slow
        assert statistics.median(busy) < statistics.median(quiet) + 0.002, slow

    asyncio.run(run())
    assert stored(db) == 400
