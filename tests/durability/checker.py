"""Did the log keep every request, once, in order? Compares what the client saw with what the store holds."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from everlearn.api.ledger import decode_result
from everlearn.store import tables
from everlearn.store.checkpoints import parse_path, verify_folder
from everlearn.store.db import make_engine
from everlearn.types import ForwardBackwardResult, OptimStepResult
from tests.durability.workload import Trace, checkpoint_folder
from tests.live import LiveServer


def check_history(server: LiveServer, store_url: str, trace: Trace, optimizer_steps: list[int] | None = None) -> None:
    """Nothing acknowledged was lost, applied twice, reordered, or answered differently from what is stored. `optimizer_steps`: what each
    step must have counted, where loading has set the count back."""
    counted = optimizer_steps or list(range(1, len(trace.losses) + 1))
    assert trace.optimizer_steps == counted, "an optimizer step was lost or applied twice"
    rows = _rows(store_url, trace.run_id)
    assert [row.seq for row in rows] == list(range(trace.requests)), "the log has other requests than the client sent"
    assert {row.status for row in rows} == {"done"}
    losses, steps = [], []
    for row in rows:
        result = decode_result(row.body)
        if isinstance(result, ForwardBackwardResult):
            losses.append(result.metrics["loss:sum"])
        if isinstance(result, OptimStepResult):
            steps.append(int(result.metrics["optimizer_step:max"]))
    assert losses == pytest.approx(trace.losses, rel=1e-12, abs=0), "an answer belongs to another request"
    assert steps == trace.optimizer_steps
    _check_checkpoints(server, store_url, trace)


def _check_checkpoints(server: LiveServer, store_url: str, trace: Trace) -> None:
    """Listed if and only if saved, and every listed folder is whole."""
    engine = make_engine(store_url)
    with engine.connect() as conn:
        table = tables.checkpoints
        listed = conn.execute(sa.select(table).where((table.c.run_id == trace.run_id) & (table.c.state == "complete"))).all()
    engine.dispose()
    path = parse_path(trace.final)
    assert {f"{row.kind}/{row.name}" for row in listed} == {*trace.saved, path.checkpoint_id}
    for row in listed:
        verify_folder(checkpoint_folder(server.home, f"tinker://{trace.run_id}/{row.kind}/{row.name}"))


def _rows(store_url: str, run_id: str) -> list[sa.Row]:
    engine = make_engine(store_url)
    requests, results = tables.requests, tables.results
    query = sa.select(requests, results.c.body).outerjoin(results, results.c.request_id == requests.c.request_id)
    with engine.connect() as conn:
        rows = list(conn.execute(query.where((requests.c.model_id == run_id) & ~requests.c.is_sample).order_by(requests.c.seq)))
    engine.dispose()
    return rows
