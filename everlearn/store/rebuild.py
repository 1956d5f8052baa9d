"""What a server asks the log when it, or its engine, has started: run by run and without payloads, so that neither a long log nor
many runs have to fit in memory. Payloads are fetched one by one with `log.payload`.
"""

from __future__ import annotations

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.store import tables
from everlearn.store.log import Entry, Snapshot, entry_of, newest_snapshot
from everlearn.store.runs import LIVE_STATES, Run, run_of

requests = tables.requests
IS_PENDING = requests.c.status == sa.literal_column("'pending'")


class Rebuild(msgspec.Struct, frozen=True):
    """How to rebuild one run: restore `snapshot` (None: nothing, the first entry creates it), send the entries with seq <=
    `finished_seq` in order, then go on from finished_seq + 1 without gaps."""

    run: Run
    snapshot: Snapshot | None
    finished_seq: int
    entries: list[Entry]


def rebuild(conn: Connection, model_id: str) -> Rebuild | None:
    """None if the run is gone, failed or unloaded."""
    live = (tables.runs.c.run_id == model_id) & tables.runs.c.state.in_(LIVE_STATES)
    row = conn.execute(sa.select(tables.runs).where(live)).first()
    if row is None:
        return None
    run, snapshot = run_of(row), newest_snapshot(conn, model_id)
    after = -1 if snapshot is None else snapshot.seq
    to_run = (requests.c.status == "pending") | (requests.c.replays & (requests.c.status == "done"))
    where = (requests.c.model_id == model_id) & ~requests.c.is_sample & (requests.c.seq > after) & to_run
    entries = [entry_of(row) for row in conn.execute(sa.select(requests).where(where).order_by(requests.c.seq))]
    return Rebuild(run, snapshot, max(after, run.last_seq), entries)


def unfinished(conn: Connection) -> list[Entry]:
    """Accepted requests without an answer, of all tenants, oldest first."""
    query = sa.select(requests).where(IS_PENDING).order_by(requests.c.created_at, requests.c.seq)
    return [entry_of(row) for row in conn.execute(query)]
