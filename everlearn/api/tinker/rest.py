"""Training runs, checkpoints and sessions as resources, in the shapes that the SDK's RestClient and its command line read."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Connection

from everlearn.api.auth import scope, tenant
from everlearn.api.services import services
from everlearn.api.tinker import checks, forms
from everlearn.api.tinker.paths import checkpoint_of, run_of
from everlearn.errors import InvalidRequest
from everlearn.store import checkpoints, runs
from everlearn.store.checkpoints import Checkpoint, TinkerPath

router = APIRouter(prefix="/api/v1", tags=["tinker: rest"])

TYPES = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
SCOPES = ("owned", "accessible")
CHANGES = [scope("train")]
Limit = Query(20, ge=0, le=1000)
Offset = Query(0, ge=0, le=2**31)


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def checkpoint_json(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "checkpoint_id": checkpoint.checkpoint_id,
        "checkpoint_type": TYPES[checkpoint.kind],
        "time": iso(checkpoint.created_at),
        "tinker_path": str(checkpoint.path),
        "size_bytes": checkpoint.bytes,
        "public": checkpoint.public,
        "user_metadata": checkpoint.user_metadata,
        "expires_at": None if checkpoint.expires_at is None else iso(checkpoint.expires_at),
    }


def run_json(conn: Connection, run: runs.Run) -> dict[str, Any]:
    newest = {kind: checkpoints.latest(conn, run.tenant, run.run_id, kind) for kind in ("weights", "sampler_weights")}
    last, last_sampler = (None if found is None else checkpoint_json(found) for found in newest.values())
    return {
        "training_run_id": run.run_id,
        "base_model": run.base_model,
        "model_owner": run.tenant,
        "is_lora": True,
        "corrupted": run.corrupted,
        "lora_rank": run.lora.rank,
        "last_request_time": iso(run.last_request_time),
        "last_checkpoint": last,
        "last_sampler_checkpoint": last_sampler,
        "user_metadata": run.user_metadata,
    }


def check_scope(access_scope: str) -> None:
    """Nobody shares runs here, so both scopes mean the tenant's own."""
    if access_scope not in SCOPES:
        raise InvalidRequest(f"access_scope is {access_scope!r}; it must be one of {', '.join(SCOPES)}", param="access_scope")


def cursor(limit: int, offset: int, total: int) -> dict[str, int]:
    return {"offset": offset, "limit": limit, "total_count": total}


@router.get("/training_runs")
async def list_training_runs(
    request: Request, limit: int = Limit, offset: int = Offset, access_scope: str = "owned", project_id: str | None = None
) -> dict[str, Any]:
    check_scope(access_scope)
    owner = tenant(request)

    def page(conn: Connection) -> dict[str, Any]:
        found, total = runs.list_runs(conn, owner, limit, offset, project_id)
        return {"training_runs": [run_json(conn, run) for run in found], "cursor": cursor(limit, offset, total)}

    return await services(request).read(page)


@router.get("/training_runs/{run_id}")
async def get_training_run(request: Request, run_id: str, access_scope: str = "owned") -> dict[str, Any]:
    check_scope(access_scope)
    owner = tenant(request)
    return await services(request).read(lambda conn: run_json(conn, runs.get_run(conn, owner, run_id)))


@router.get("/training_runs/{run_id}/checkpoints")
async def list_run_checkpoints(request: Request, run_id: str) -> dict[str, Any]:
    owner = tenant(request)
    found, _ = await services(request).read(lambda conn: checkpoints.list_checkpoints(conn, owner, run_id))
    return {"checkpoints": [checkpoint_json(checkpoint) for checkpoint in found], "cursor": None}


@router.get("/checkpoints")
async def list_checkpoints(request: Request, limit: int = Query(100, ge=0, le=1000), offset: int = Offset) -> dict[str, Any]:
    owner = tenant(request)
    found, total = await services(request).read(lambda conn: checkpoints.list_checkpoints(conn, owner, None, limit, offset))
    return {"checkpoints": [checkpoint_json(checkpoint) for checkpoint in found], "cursor": cursor(limit, offset, total)}


def path_of(run_id: str, checkpoint_id: str) -> TinkerPath:
    return TinkerPath(run_id, *checkpoints.parse_id(checkpoint_id))


@router.post("/training_runs/{run_id}/checkpoints/{checkpoint_id:path}/publish", status_code=204, dependencies=CHANGES)
async def publish(request: Request, run_id: str, checkpoint_id: str) -> Response:
    return await set_public(request, path_of(run_id, checkpoint_id), True)


@router.delete("/training_runs/{run_id}/checkpoints/{checkpoint_id:path}/publish", status_code=204, dependencies=CHANGES)
async def unpublish(request: Request, run_id: str, checkpoint_id: str) -> Response:
    if checkpoint_id in checkpoints.KINDS:  # a checkpoint of the name "publish" is to go
        return await delete_checkpoint(request, run_id, f"{checkpoint_id}/publish")
    return await set_public(request, path_of(run_id, checkpoint_id), False)


async def set_public(request: Request, path: TinkerPath, public: bool) -> Response:
    owner = tenant(request)
    await services(request).write(lambda conn: checkpoints.set_public(conn, owner, path, public))
    return Response(status_code=204)


@router.put("/training_runs/{run_id}/checkpoints/{checkpoint_id:path}/ttl", status_code=204, dependencies=CHANGES)
async def set_ttl(request: Request, run_id: str, checkpoint_id: str) -> Response:
    """null removes the time to live."""
    form = await forms.read(request, forms.Ttl)
    owner, path, seconds = tenant(request), path_of(run_id, checkpoint_id), checks.ttl(form.ttl_seconds)
    await services(request).write(lambda conn: checkpoints.set_ttl(conn, owner, path, seconds))
    return Response(status_code=204)


@router.delete("/training_runs/{run_id}/checkpoints/{checkpoint_id:path}", status_code=204, dependencies=CHANGES)
async def delete_checkpoint(request: Request, run_id: str, checkpoint_id: str) -> Response:
    owner, path = tenant(request), path_of(run_id, checkpoint_id)
    await services(request).write(lambda conn: checkpoints.delete(conn, owner, path))
    return Response(status_code=204)


@router.post("/weights_info")
async def weights_info(request: Request) -> dict[str, Any]:
    form = await forms.read(request, forms.WeightsInfo, strict=False)
    svc = services(request)
    run = await run_of(svc, await checkpoint_of(svc, tenant(request), form.tinker_path))
    return {
        "base_model": run.base_model,
        "optimizer_config": {"type": "adamw"},
        "is_lora": True,
        "lora_rank": run.lora.rank,
        "train_unembed": run.lora.train_unembed,
        "train_mlp": run.lora.train_mlp,
        "train_attn": run.lora.train_attn,
        "expert_lora": run.lora.expert_lora,
    }


@router.get("/sessions")
async def list_sessions(request: Request, limit: int = Limit, offset: int = Offset, access_scope: str = "owned") -> dict[str, Any]:
    check_scope(access_scope)
    owner = tenant(request)
    found, _ = await services(request).read(lambda conn: runs.list_sessions(conn, owner, limit, offset))
    return {"sessions": [session.session_id for session in found]}


@router.get("/sessions/{session_id}")
async def get_session(request: Request, session_id: str, access_scope: str = "owned") -> dict[str, Any]:
    check_scope(access_scope)
    owner = tenant(request)

    def read(conn: Connection) -> dict[str, Any]:
        session = runs.get_session(conn, owner, session_id)
        run_ids, sampler_ids = runs.session_children(conn, owner, session_id)
        return {
            "training_run_ids": run_ids,
            "sampler_ids": sampler_ids,
            "user_metadata": session.user_metadata,
            "display_name": session.display_name,
        }

    return await services(request).read(read)


@router.put("/sessions/{session_id}/project", status_code=204, dependencies=CHANGES)
async def set_project(request: Request, session_id: str) -> Response:
    form = await forms.read(request, forms.Project)
    if not form.project_id:
        raise InvalidRequest("project_id is empty; name the project", param="project_id")
    checks.text(form.project_id, "project_id")
    owner = tenant(request)
    await services(request).write(lambda conn: runs.set_project(conn, owner, session_id, form.project_id))
    return Response(status_code=204)


@router.get("/sessions/{session_id}/trace_export")
async def trace_export(request: Request, session_id: str) -> dict[str, Any]:
    owner = tenant(request)
    await services(request).read(lambda conn: runs.get_session(conn, owner, session_id))
    return {"status": "failed", "url": None, "error": "this server records no traces; /metrics has its timings"}
