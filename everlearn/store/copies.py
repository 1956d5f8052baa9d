"""The run that stands behind a copied checkpoint. It has no training state and takes no requests."""

from __future__ import annotations

import time

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.errors import Conflict
from everlearn.store import runs, tables


def add_run(conn: Connection, tenant: str, source: runs.Run, session_id: str, model_seq_id: int) -> runs.Run:
    """A run `<session>:train:<model_seq_id>` shaped like `source`; the same one again when asked twice."""
    runs.get_session(conn, tenant, session_id)
    run_id = runs.run_id(session_id, model_seq_id)
    table = tables.runs
    row = conn.execute(sa.select(table).where(table.c.run_id == run_id)).first()
    if row is not None:
        there = runs.run_of(row)
        if there.tenant != tenant or there.state != "unloaded":
            raise Conflict(f"training run {run_id} exists already; use the next model_seq_id", param="model_seq_id")
        return there
    now = time.time()
    run = msgspec.structs.replace(
        source,
        run_id=run_id,
        tenant=tenant,
        session_id=session_id,
        model_seq_id=model_seq_id,
        state="unloaded",
        corrupted=False,
        last_seq=-1,
        created_at=now,
        last_request_time=now,
    )
    conn.execute(table.insert().values(**msgspec.structs.asdict(run) | {"lora": msgspec.to_builtins(run.lora)}))
    return run
