"""Sessions and what a client asks before it works: flags, capabilities, health, telemetry."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from everlearn.api import bounds
from everlearn.api.auth import tenant
from everlearn.api.services import services
from everlearn.api.tinker import checks, forms
from everlearn.errors import Expired, InvalidRequest, TooLarge, Unsupported
from everlearn.store import runs

router = APIRouter(prefix="/api/v1", tags=["tinker: service"])

FINISH_REASONS = ("success", "errored", "interrupted")
MAX_TELEMETRY_BYTES = 2**20

# What differs from the SDK's own defaults, for clients of every age. Chunks are sent one after the other: in parallel, the SDK sends the
# first one last, and when another is refused it doesn't send it at all; then it waits for itself for ever.
CLIENT_CONFIG: dict[str, Any] = {
    "pjwt_auth_enabled": False,
    "parallel_fwdbwd_chunks": False,
    "proto_write_fwdbwd": True,
    "fwd_via_fwdbwd": True,
    "create_model_via_load_weights": True,
    "sample_join_sampling_session": True,
    "custom_loss_server_side": False,
}
DYNAMIC_CONFIG = {"refresh_interval_sec": 300, "sample_cancel_enabled": True}


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.post("/client/config")
async def client_config() -> dict[str, Any]:
    return CLIENT_CONFIG


@router.post("/client/dynamic_config")
async def client_dynamic_config() -> dict[str, Any]:
    return DYNAMIC_CONFIG


@router.get("/get_server_capabilities")
async def get_server_capabilities(request: Request) -> dict[str, Any]:
    models = [
        {"model_name": name, "max_context_length": info.max_context, "trainable": True, "sampleable": True}
        for info in services(request).catalog.list()
        for name in (info.name, *info.aliases)
    ]
    return {"supported_models": models}


@router.post("/create_session")
async def create_session(request: Request) -> dict[str, Any]:
    form = await forms.read(request, forms.CreateSession)
    metadata, tags = checks.metadata(form.user_metadata), checks.tags(form.tags)
    for name in ("sdk_version", "project_id", "display_name"):
        checks.text(getattr(form, name), name)
    owner, key = tenant(request), checks.text(request.headers.get("x-idempotency-key"), "x-idempotency-key")
    session = await services(request).write(
        lambda conn: runs.create_session(
            conn,
            owner,
            tags=tags,
            user_metadata=metadata,
            sdk_version=form.sdk_version,
            project_id=form.project_id,
            display_name=form.display_name,
            idempotency_key=key,
        )
    )
    return {"type": "create_session", "session_id": session.session_id}


@router.post("/session_heartbeat")
async def session_heartbeat(request: Request) -> dict[str, str]:
    form = await forms.read(request, forms.SessionOnly, strict=False)
    owner = tenant(request)
    session = await services(request).write(lambda conn: runs.heartbeat(conn, owner, form.session_id))
    if session.state == "finished":
        raise Expired(f"session {form.session_id} is finished; create a new one", param="session_id")
    return {"type": "session_heartbeat"}


@router.post("/sessions/{session_id}/finish", status_code=204)
async def finish_session(request: Request, session_id: str) -> Response:
    form = await forms.read(request, forms.FinishSession, strict=False)
    if form.reason.type not in FINISH_REASONS:
        raise InvalidRequest(f"reason.type is {form.reason.type!r}; it must be one of {', '.join(FINISH_REASONS)}", param="reason.type")
    checks.text(form.detail, "detail", bounds.MAX_DETAIL_CHARS)
    owner = tenant(request)
    await services(request).write(lambda conn: runs.finish_session(conn, owner, session_id, form.reason.type, form.detail))
    return Response(status_code=204)


@router.post("/telemetry")
async def telemetry(request: Request) -> dict[str, str]:
    """Kept in the local store, for the owner to read; it goes nowhere else."""
    form = await forms.read(request, forms.Telemetry, strict=False)
    svc, owner = services(request), tenant(request)
    if svc.settings.api.telemetry:
        body = {"events": form.events, "platform": form.platform, "sdk_version": form.sdk_version, "process_uuid": form.process_uuid}
        if len(await request.body()) > MAX_TELEMETRY_BYTES:
            raise TooLarge(f"a telemetry report may have {MAX_TELEMETRY_BYTES} bytes; send fewer events at once")
        await svc.write(lambda conn: runs.add_telemetry(conn, owner, form.session_id[:200], body))
    return {"status": "accepted"}


@router.post("/create_custom_loss")
async def create_custom_loss() -> None:
    raise Unsupported("this server runs no traced losses; forward_backward_custom works with a Python function, which the client runs")


@router.post("/auth/token")
async def auth_token() -> None:
    raise Unsupported("this server issues no JWTs; send the key itself as X-API-Key")
