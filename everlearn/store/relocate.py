"""A home that stands elsewhere than it did: moved, copied, restored from a backup, or reached by another path.

Rows name folders by their whole path. Before a server reads or sweeps anything, every row that names a folder of the home by an
older path is put right, and so are the accepted commands that may still be run. The layout below the home tells where the old
one ended, so that nothing needs to remember it.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.store import tables

log = logging.getLogger(__name__)

# The home of a folder and its place there, as checkpoints.py and the engine lay them out. Of several readings the longest home is right.
FOLDER = re.compile(r"(.*)/((?:checkpoints/[^/]+/[a-z_]*weights|versions|snapshots/[^/]+)/[^/]+)", re.DOTALL)
OWNERS = (tables.checkpoints, tables.versions, tables.snapshots, tables.samplers, tables.named_versions, tables.requests)
COMMANDS = ("save", "publish", "load", "sample")  # those that name a folder


def here(folder: str, home: Path) -> str:
    """The same folder of a home that stands at `home`; what is no home's folder stays as it is."""
    found = FOLDER.fullmatch(folder)
    return folder if found is None else str(home / found[2])


def relocate(conn: Connection, home: Path) -> int:
    """Lets every row name the folder under `home` that it named elsewhere; how many rows were put right."""
    before: set[str] = set()
    for table in OWNERS:
        for folder in conn.execute(sa.select(table.c.folder).where(table.c.folder.is_not(None)).distinct()).scalars():
            if (found := FOLDER.fullmatch(folder)) and here(folder, home) != folder:
                before.add(f"{found[1]}/{found[2].split('/')[0]}/")
    if not before:
        return 0
    changed = sum(_rename(conn, old, f"{home / Path(old).name}/") for old in sorted(before)) + _commands(conn, home)
    log.warning("rows named folders under %s; they name those of this home, %s, now: %d rows", ", ".join(sorted(before)), home, changed)
    return changed


def _rename(conn: Connection, old: str, new: str) -> int:
    changed = 0
    for table in OWNERS:
        folder = table.c.folder
        elsewhere = (sa.func.substr(folder, 1, len(old)) == old) & (sa.func.substr(folder, 1, len(new)) != new)
        moved = sa.literal(new, sa.Text) + sa.func.substr(folder, len(old) + 1, type_=sa.Text)
        changed += conn.execute(table.update().where(elsewhere).values(folder=moved)).rowcount
    return changed


def _commands(conn: Connection, home: Path) -> int:
    """Puts right the requests that may still be run: what they mean for rows, and what the engine is sent."""
    requests, payloads, changed = tables.requests, tables.payloads, 0
    may_run = (requests.c.payload_bytes > 0) & requests.c.kind.in_(COMMANDS)
    for request_id, meta in conn.execute(sa.select(requests.c.request_id, requests.c.meta).where(may_run)).all():
        payload = payloads.c.request_id == request_id
        command: dict[str, Any] = msgspec.msgpack.decode(conn.execute(sa.select(payloads.c.body).where(payload)).scalar_one())
        for named in (meta, command):
            if named.get("folder"):
                named["folder"] = here(named["folder"], home)
        body = msgspec.msgpack.encode(command)
        conn.execute(requests.update().where(requests.c.request_id == request_id).values(meta=meta, payload_bytes=len(body)))
        conn.execute(payloads.update().where(payload).values(body=body))
        changed += 1
    return changed
