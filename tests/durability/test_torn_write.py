"""The last write before a crash, cut off at any byte: what was acknowledged before it is there, and the run goes on as if nothing
had happened."""

from __future__ import annotations

import shutil
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from everlearn.store import tables
from everlearn.store.db import open_database
from tests.durability.checker import check_history
from tests.durability.killer import Kill, Killer
from tests.durability.test_kills import same_bits
from tests.durability.workload import Plan, play

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

PLAN = Plan(seed=41, steps=12)
# What the dead server was writing: one more transaction of several pages, by a process that ends without closing the database.
UNACKNOWLEDGED = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA wal_autocheckpoint = 0")
connection.execute("BEGIN IMMEDIATE")
connection.execute("INSERT INTO telemetry (tenant, session_id, created_at, body) VALUES ('torn', 'torn', 0, ?)", ('"' + "x" * 30000 + '"',))
connection.execute("COMMIT")
os._exit(9)
"""


def valid_length(wal: Path) -> int:
    """Bytes of a write-ahead log up to the end of its last committed transaction (frames of an older round have other salts)."""
    data = wal.read_bytes()
    if len(data) < 32:
        return 0
    page = struct.unpack(">I", data[8:12])[0]
    end = 32
    for at in range(32, len(data) - page - 23, 24 + page):
        if data[at + 8 : at + 16] != data[16:24]:
            break
        if struct.unpack(">I", data[at + 4 : at + 8])[0]:  # the size of the database: set in the frame that commits
            end = at + 24 + page
    return end


def torn_ends(database: Path, count: int) -> list[bytes]:
    """Versions of the log in which a further transaction is cut off at one of its bytes."""
    wal = Path(f"{database}-wal")
    whole = valid_length(wal)
    killed = subprocess.run([sys.executable, "-c", UNACKNOWLEDGED, str(database)], check=False, timeout=60)
    assert killed.returncode == 9
    data, end = wal.read_bytes(), valid_length(wal)
    assert end > whole, "the last transaction is not in the log"
    return [data[: whole + (end - whole) * (2 * i + 1) // (2 * count)] for i in range(count)]


def test_every_cut_of_the_last_write_keeps_what_came_before(tmp_path: Path) -> None:
    database = tmp_path / "everlearn.db"
    db = open_database(f"sqlite:///{database}")
    try:
        db.write(
            lambda conn: conn.execute(tables.telemetry.insert().values(tenant="kept", session_id="s", created_at=0.0, body={}))
        ).result()
        ends = torn_ends(database, 40)
        for number, end in enumerate(ends):
            copy = tmp_path / f"copy-{number}" / "everlearn.db"
            copy.parent.mkdir()
            shutil.copy(database, copy)
            Path(f"{copy}-wal").write_bytes(end)
            with sqlite3.connect(copy) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                assert connection.execute("SELECT tenant FROM telemetry").fetchall() == [("kept",)]
            connection.close()
    finally:
        db.close()


@pytest.mark.timeout(600)
def test_a_run_goes_on_after_a_torn_write(new_server, undisturbed) -> None:
    """The server is killed in the middle of a step and finds its log with half a transaction at the end."""
    expected = undisturbed(PLAN)
    server = new_server()
    killer = TearingKiller(server, [Kill(5, "training", 0.01, "server"), Kill(9, "before", 0.0, "server")])
    trace = play(PLAN, server.url, server.model, killer.on_phase)
    killer.finish()
    assert killer.torn == 2
    url = f"sqlite:///{server.home / 'everlearn.db'}"
    check_history(server, url, trace)
    same_bits((server, [trace]), expected)
    engine = sa.create_engine(url)
    with engine.connect() as conn:
        assert conn.execute(sa.select(tables.telemetry).where(tables.telemetry.c.tenant == "torn")).first() is None
    engine.dispose()


class TearingKiller(Killer):
    """Cuts the write-ahead log between death and restart."""

    torn = 0

    def _run(self, kill: Kill) -> None:
        restart = self.server.restart

        def torn_restart() -> None:
            database = self.server.home / "everlearn.db"
            Path(f"{database}-wal").write_bytes(torn_ends(database, 3)[self.torn])
            Path(f"{database}-shm").unlink(missing_ok=True)
            self.torn += 1
            restart()

        self.server.restart = torn_restart  # type: ignore[method-assign]
        try:
            super()._run(kill)
        finally:
            self.server.restart = restart  # type: ignore[method-assign]
