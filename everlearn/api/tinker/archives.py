"""Checkpoints as downloads: the files of a PEFT adapter, each behind a signed link that needs no key and expires.

The export is made on the first request and kept for a while under <home>/exports; whatever wasn't asked for lately is removed.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tarfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from everlearn.api.auth import SIGNED_PREFIX, signed_url, tenant
from everlearn.api.services import Services, services
from everlearn.api.tinker.paths import base_model_of
from everlearn.api.tinker.rest import iso, path_of
from everlearn.errors import NotFound
from everlearn.models import export
from everlearn.store import checkpoints
from everlearn.store.checkpoints import Checkpoint

router = APIRouter(prefix="/api/v1", tags=["tinker: weights"])

LINK_SECONDS = 3600.0
KEEP_SECONDS = 4 * LINK_SECONDS
ARCHIVE = "archive.tar.gz"

_locks: dict[str, asyncio.Lock] = {}


@router.get("/training_runs/{run_id}/checkpoints/{checkpoint_id:path}/external_weights_urls")
async def external_weights_urls(request: Request, run_id: str, checkpoint_id: str) -> dict[str, Any]:
    svc, owner, path = services(request), tenant(request), path_of(run_id, checkpoint_id)
    checkpoint = await svc.read(lambda conn: checkpoints.get(conn, owner, path))
    folder = await exported(svc, checkpoint)
    names = sorted(file.name for file in folder.iterdir())
    return {"urls": {name: link(request, svc, owner, checkpoint, name) for name in names}, "expires": iso(time.time() + LINK_SECONDS)}


@router.get("/training_runs/{run_id}/checkpoints/{checkpoint_id:path}/archive", status_code=302)
async def archive(request: Request, run_id: str, checkpoint_id: str) -> Response:
    """Before SDK 0.26: one archive, found behind a redirect."""
    svc, owner, path = services(request), tenant(request), path_of(run_id, checkpoint_id)
    checkpoint = await svc.read(lambda conn: checkpoints.get(conn, owner, path))
    await exported(svc, checkpoint)
    expires = datetime.fromtimestamp(time.time() + LINK_SECONDS, UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    return Response(status_code=302, headers={"location": link(request, svc, owner, checkpoint, ARCHIVE), "expires": expires})


def link(request: Request, svc: Services, owner: str, checkpoint: Checkpoint, name: str) -> str:
    """Absolute, at the address by which this client reached us."""
    path = f"{SIGNED_PREFIX}{checkpoint.run_id}/{checkpoint.checkpoint_id}/{name}"
    return str(request.base_url).rstrip("/") + signed_url(svc, path, owner, LINK_SECONDS)


@router.get("/files/{run_id}/{kind}/{name}/{file}")
async def download(request: Request, run_id: str, kind: str, name: str, file: str) -> Response:
    svc, owner, path = services(request), tenant(request), path_of(run_id, f"{kind}/{name}")
    checkpoint = await svc.read(lambda conn: checkpoints.get(conn, owner, path))
    folder = await exported(svc, checkpoint)
    if file == ARCHIVE:
        return FileResponse(await asyncio.to_thread(packed, folder), media_type="application/gzip", filename=ARCHIVE)
    if file not in {entry.name for entry in folder.iterdir()}:
        raise NotFound(f"{path} has no file {file[:100]!r}")
    return FileResponse(folder / file, media_type="application/octet-stream", filename=file)


async def exported(svc: Services, checkpoint: Checkpoint) -> Path:
    """The folder with the checkpoint's PEFT files; a checkpoint's bytes never change, so one export serves all."""
    root = svc.settings.home / "exports"
    key = hashlib.sha256(f"{checkpoint.uid}\n{checkpoint.folder}".encode()).hexdigest()[:32]
    base = svc.catalog.resolve(await base_model_of(svc, checkpoint))
    async with _locks.setdefault(key, asyncio.Lock()):
        return await asyncio.to_thread(_export, root, key, Path(checkpoint.folder), base.path, base.name)


def _export(root: Path, key: str, source: Path, base_folder: str, base_name: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    _remove_old(root, keep=key)
    folder = root / key / "peft"
    if not folder.is_dir():
        shutil.rmtree(root / key, ignore_errors=True)  # what a crash left half done
        (root / key).mkdir()
        base = Path(base_folder)
        export.export_peft(export.Adapter(source), folder, base=base if base.is_dir() else None, base_name=base_name)
    os.utime(root / key)
    return folder


def _remove_old(root: Path, keep: str) -> None:
    for entry in root.iterdir():
        if entry.name != keep and entry.stat().st_mtime < time.time() - KEEP_SECONDS:
            shutil.rmtree(entry, ignore_errors=True)
            _locks.pop(entry.name, None)


def packed(folder: Path) -> Path:
    target = folder.parent / ARCHIVE
    if not target.is_file():
        unfinished = target.with_suffix(".part")
        with tarfile.open(unfinished, "w:gz", compresslevel=1) as archive_file:
            for file in sorted(folder.iterdir()):
                archive_file.add(file, arcname=file.name)
        unfinished.rename(target)
    return target
