"""Training runs: the list, one run with its curves, and how two runs differ."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import Query, Request
from sqlalchemy import Connection

from everlearn.api.auth import tenant
from everlearn.api.dashboard import frame
from everlearn.api.dashboard.live import Look
from everlearn.api.services import services
from everlearn.api.tinker.rest import checkpoint_json
from everlearn.store import checkpoints, runs, steps
from everlearn.store.runs import Run

router = frame.page_router()
LIVE: dict[str, Look] = {}  # `runs` and `steps` are looked at for the overview

PER_PAGE = 50
CHECKPOINTS = 20
# Drawn where somebody hasn't chosen: what most runs are judged by.
USUAL = (
    "loss:sum", "reward/total", "held_out/reward/total", "held_out/env/right", "kl/k3", "kl_k3:mean", "kl/base", "entropy", "ess",
    "effective_sample_fraction:mean", "tokens/mean", "groups/collapsed", "clip_fraction:mean", "tokens/second", "learning_rate",
)  # fmt: skip
# In a row of the list, the first of these that the run has told.
LIST_LOSS, LIST_REWARD = ("loss:sum", "loss/loss"), ("held_out/reward/total", "reward/total")


@frame.twin(router, "/runs", "runs.html")
async def page(request: Request, offset: int = Query(0, ge=0, le=10**6), limit: int = Query(PER_PAGE, ge=1, le=200)) -> dict[str, Any]:
    owner = tenant(request)

    def read(conn: Connection) -> dict[str, Any]:
        found, total = runs.list_runs(conn, owner, limit, offset)
        told = steps.newest(conn, owner, [run.run_id for run in found])
        return {"runs": [row_of(run, told.get(run.run_id, {})) for run in found], "total": total, "offset": offset, "limit": limit}

    return await services(request).read(read)


def row_of(run: Run, told: dict[str, float]) -> dict[str, Any]:
    shown = {field: getattr(run, field) for field in ("run_id", "base_model", "state", "corrupted", "created_at", "last_request_time")}
    figures = {
        name: next((told[key] for key in keys if key in told), None) for name, keys in (("loss", LIST_LOSS), ("reward", LIST_REWARD))
    }
    return {**shown, "rank": run.lora.rank, "requests": run.last_seq + 1, "user_metadata": run.user_metadata, **figures}


@frame.twin(router, "/runs/diff", "run_diff.html")
async def difference(request: Request, a: str = Query(max_length=200), b: str = Query(max_length=200)) -> dict[str, Any]:
    """The settings of two runs side by side; those that differ come first."""
    owner = tenant(request)
    one, other = await services(request).read(lambda conn: (config_of(conn, owner, a), config_of(conn, owner, b)))
    names = sorted(one.keys() | other.keys(), key=lambda name: (one.get(name) == other.get(name), name))
    rows = [{"name": name, "a": one.get(name), "b": other.get(name), "same": one.get(name) == other.get(name)} for name in names]
    return {"a": a, "b": b, "rows": rows, "differ": sum(not row["same"] for row in rows)}


@frame.twin(router, "/runs/{run_id}", "run.html")
async def run_page(request: Request, run_id: str, show: list[str] = Query([], max_length=500)) -> dict[str, Any]:
    """One run. `show`, repeated, names the metrics that are drawn."""
    owner = tenant(request)

    def read(conn: Connection) -> dict[str, Any]:
        run = runs.get_run(conn, owner, run_id)
        session = runs.get_session(conn, owner, run.session_id)
        saved, total = checkpoints.list_checkpoints(conn, owner, run_id, CHECKPOINTS)
        told = {source: msgspec.structs.asdict(steps.curves(conn, owner, run_id, source)) for source in (steps.CLIENT, steps.LOG)}
        return {
            "run": {**row_of(run, {}), "session": session.session_id, "session_state": session.state, "client": session.sdk_version},
            "config": config_of(conn, owner, run_id),
            "checkpoints": [checkpoint_json(one) for one in saved],
            "checkpoints_total": total,
            "curves": told,
            "groups": len(steps.list_groups(conn, owner, run_id, limit=1)),
        }

    found = await services(request).read(read)
    names = sorted({name for told in found["curves"].values() for name in told["series"]})
    chosen = [name for name in show if name in names] or [name for name in USUAL if name in names] or names[:6]
    return {**found, "names": names, "chosen": chosen}


def config_of(conn: Connection, owner: str, run_id: str) -> dict[str, Any]:
    """What a run was told to do, flat: its own row, what its requests say, and what its loop told (`settings.`)."""
    run = runs.get_run(conn, owner, run_id)
    session = runs.get_session(conn, owner, run.session_id)
    flat: dict[str, Any] = {"base_model": run.base_model}
    flatten("lora.", msgspec.to_builtins(run.lora), flat)
    flatten("user_metadata.", run.user_metadata or {}, flat)
    flat["session.tags"] = ", ".join(session.tags)
    flat["losses"] = ", ".join(steps.losses(conn, owner, run_id))
    flatten("settings.", steps.described(conn, owner, run_id), flat)
    return flat


def flatten(prefix: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            flatten(f"{prefix}{name}.", item, into)
    else:
        into[prefix.removesuffix(".")] = value
