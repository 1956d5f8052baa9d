"""Folders that nobody needs any more, and what a crash left on the disk.

Rows come first: a folder is removed only after the row that named it was committed as deleted, and the row is forgotten only
after the folder is gone. Whatever happens in between is found again by the next call.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.errors import Unavailable
from everlearn.faultpoints import around
from everlearn.store import checkpoints, runs, tables
from everlearn.store.db import Database
from everlearn.store.folders import complete_folders, remove_folder, sweep
from everlearn.store.relocate import relocate

ROOTS = ("checkpoints", "versions", "snapshots")
OWNERS = (tables.checkpoints, tables.versions, tables.snapshots)
KEEP_VERSIONS = 64
IDLE_SECONDS = 3600.0


def collect(db: Database, now: float) -> int:
    """Expires checkpoints and idle versions, then removes every folder that this or an earlier deletion left; how many."""
    db.write(lambda conn: (checkpoints.expire(conn, now), retire_versions(conn, now))).result()
    folders = db.read(garbage)
    for folder in folders:
        remove_folder(Path(folder))
    if folders:
        db.write(lambda conn: forget(conn, folders)).result()
    return len(folders)


def boot_sweep(db: Database, home: Path, now: float) -> int:
    """What a crash left: unfinished folders, complete ones that no row names (their save will be run again or was never
    accepted), and deletions that were not carried out. Only while nobody writes. Returns how many folders went.

    Rows are led to this home first: a folder that a row names by an older path is not unknown."""
    db.write(lambda conn: relocate(conn, home)).result()
    removed = sum(len(sweep(home / root)) for root in ROOTS)
    for folder in db.read(lambda conn: unknown_folders(conn, home)):
        remove_folder(folder)
        removed += 1
    return removed + collect(db, now)


def retire_versions(conn: Connection, now: float, keep: int = KEEP_VERSIONS, idle: float = IDLE_SECONDS) -> int:
    """Marks ephemeral versions as deleted that no sampler can ask for: their session is finished, or silent for SILENCE_SECONDS as their
    sampler is, or an inflight publish replaced them, or they are beyond the newest `keep` of their run and unused for `idle` seconds. How
    many."""
    versions, samplers, sessions = tables.versions, tables.samplers, tables.sessions
    complete = versions.c.state == "complete"
    rank = sa.func.row_number().over(partition_by=versions.c.run_id, order_by=versions.c.seq.desc()).label("rank")
    ranked = sa.select(versions.c.version, rank).where(complete).subquery()
    silent = now - runs.SILENCE_SECONDS
    heard = (sessions.c.last_heartbeat >= silent) | (samplers.c.last_used >= silent)
    in_use = (sessions.c.state == "active") & heard & ((ranked.c.rank <= keep) | (samplers.c.last_used >= now - idle))
    wanted = (
        sa.select(ranked.c.version)
        .join(samplers, samplers.c.version == ranked.c.version)
        .join(sessions, sessions.c.session_id == samplers.c.session_id)
        .where(in_use)
    )
    update = versions.update().where(complete & versions.c.version.not_in(wanted))
    return conn.execute(update.values(state="deleted")).rowcount


def garbage(conn: Connection) -> list[str]:
    """Folders of deleted rows that nothing may still read: no row that lives, no name of an
    adapter, no load that may be replayed, no sample that waits."""
    deleted: set[str] = set()
    needed: set[str] = set()
    for table in OWNERS:
        deleted.update(conn.execute(sa.select(table.c.folder).where(table.c.state == "deleted")).scalars())
    if not deleted:
        return []
    for table in OWNERS:
        needed.update(conn.execute(sa.select(table.c.folder).where(table.c.state != "deleted")).scalars())
    needed.update(conn.execute(sa.select(tables.named_versions.c.folder)).scalars())
    requests, samplers = tables.requests, tables.samplers
    live = sa.select(tables.runs.c.run_id).where(tables.runs.c.state.in_(runs.LIVE_STATES))
    loads = requests.c.folder.is_not(None) & (requests.c.payload_bytes > 0) & requests.c.model_id.in_(live)
    needed.update(folder for folder in conn.execute(sa.select(requests.c.folder).where(loads)).scalars() if folder)
    waiting = requests.c.is_sample & (requests.c.status == sa.literal_column("'pending'"))
    of_waiting = samplers.c.sampler_id.in_(sa.select(requests.c.model_id).where(waiting))
    needed.update(conn.execute(sa.select(samplers.c.folder).where(of_waiting)).scalars())
    needed.update(conn.execute(sa.select(requests.c.folder).where(waiting & requests.c.folder.is_not(None))).scalars())
    return sorted(deleted - needed)


def forget(conn: Connection, folders: list[str]) -> None:
    """Removes the rows of folders that are gone."""
    with around("garbage.row"):
        for table, start in product(OWNERS, range(0, len(folders), 500)):
            conn.execute(table.delete().where((table.c.state == "deleted") & table.c.folder.in_(folders[start : start + 500])))


def unknown_folders(conn: Connection, home: Path) -> list[Path]:
    """Complete folders under `home` that no row names. Raises Unavailable where the database is not the one of this home: a save has its
    row before its folder, so checkpoints beside a database that names no folder at all are another database's."""
    named: set[str] = set()
    for table in OWNERS:
        named.update(conn.execute(sa.select(table.c.folder)).scalars())
    if not named and (lost := sum(1 for _ in complete_folders(home / "checkpoints"))):
        raise Unavailable(
            f"{home / 'checkpoints'} holds {lost} checkpoints and the database names none: it is new, or not the one of this home; "
            "set store.url to the database of this home or restore it, or move the folder away to begin anew"
        )
    return [folder for root in ROOTS for folder in complete_folders(home / root) if str(folder) not in named]
