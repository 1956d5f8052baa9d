"""copy_weights: a checkpoint of one's own, made from one's own, a published one, or one whose owner gave a key."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy import Connection

from everlearn.api.auth import tenant
from everlearn.api.services import services
from everlearn.api.tinker import checks, forms
from everlearn.api.tinker.paths import checkpoint_of, run_of
from everlearn.api.tinker.weights import check_room
from everlearn.errors import InvalidRequest
from everlearn.store import checkpoints, copies, runs
from everlearn.store.checkpoints import TinkerPath

router = APIRouter(prefix="/api/v1", tags=["tinker: weights"])


@router.post("/copy_weights")
async def copy_weights(request: Request) -> dict[str, str]:
    """Into a run of its own that can't be trained on. The folder is copied, so that the source may be deleted."""
    form = await forms.read(request, forms.CopyWeights)
    svc, owner = services(request), tenant(request)
    by_session = form.session_id is not None and form.model_seq_id is not None
    if by_session == bool(form.destination_project_id) or (form.session_id is None) != (form.model_seq_id is None):
        raise InvalidRequest("send either destination_project_id, or session_id and model_seq_id", param="destination_project_id")
    ttl, project_id = checks.ttl(form.ttl_seconds), checks.text(form.destination_project_id, "destination_project_id")
    token = request.headers.get("x-tinker-weights-access-token") or form.weights_access_token
    checkpoint = await checkpoint_of(svc, owner, form.source_path, token)
    source = await run_of(svc, checkpoint)
    await check_room(svc, checkpoint.bytes)
    manifest = await asyncio.to_thread(checkpoints.verify_folder, Path(checkpoint.folder))  # before a run is made for the copy
    key = checks.text(request.headers.get("x-idempotency-key"), "x-idempotency-key")

    def reserve(conn: Connection) -> runs.Run:
        session_id, number = form.session_id, form.model_seq_id
        if session_id is None or number is None:
            session = runs.create_session(
                conn,
                owner,
                project_id=project_id,
                display_name="copied weights",
                idempotency_key=None if key is None else f"copy:{key}",
            )
            runs.finish_session(conn, owner, session.session_id, "success", "holds a copy of weights")
            session_id, number = session.session_id, 0
        return copies.add_run(conn, owner, source, session_id, checks.whole(number, "model_seq_id"))

    run = await svc.write(reserve)
    path = TinkerPath(run.run_id, checkpoint.kind, checkpoint.name)
    folder = checkpoints.checkpoint_folder(svc.settings.home, run.run_id, path.kind, path.name, 0)
    size, digest = await asyncio.to_thread(copy_folder, Path(checkpoint.folder), manifest, folder)
    await svc.write(
        lambda conn: checkpoints.add(
            conn,
            owner,
            path,
            folder=str(folder),
            version=checkpoints.new_version(),
            bytes=size,
            sha256=digest,
            optimizer=checkpoint.optimizer,
            user_metadata=checkpoint.user_metadata,
            ttl_seconds=ttl,
        )
    )
    return {"tinker_path": str(path)}


def copy_folder(source: Path, manifest: dict[str, Any], target: Path) -> tuple[int, str]:
    files = {name: source / name for name in manifest.get("files", {})}
    return checkpoints.write_folder(target, files, {key: value for key, value in manifest.items() if key != "files"})
