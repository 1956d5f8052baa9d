"""Keys, usage and the audit log, as far as the store knows them. Nothing here has a price: it is your machine."""

from __future__ import annotations

import zlib
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Request, Response
from sqlalchemy import Connection

from everlearn.api.auth import scope, secret_of, tenant
from everlearn.api.services import services
from everlearn.api.tinker import forms
from everlearn.api.tinker.rest import iso
from everlearn.errors import InvalidRequest, NotFound
from everlearn.store import checkpoints, keys, runs, tables

router = APIRouter(prefix="/api/v1", tags=["tinker: account"])

READS = [scope("read")]
MAX_WINDOW = timedelta(days=14)
LIVE_SECONDS = 120.0
EVENT_TYPES = ("all", "checkpoints", "projects", "teams", "organizations")
EVENT_OF = {"forward_backward": "training", "sample": "sampling_prefill", "save": "checkpoint", "publish": "checkpoint"}
STATUSES = ("active", "cancelled", "failed", "client_finished")


@router.get("/auth/apikey/me")
async def key_info(request: Request) -> dict[str, Any]:
    """The key that the request came with; without keys, the local owner."""
    secret, owner = secret_of(request), tenant(request)
    key = await services(request).read(lambda conn: keys.find(conn, secret)) if secret else None
    return {
        "key_id": 0 if key is None else zlib.crc32(key.key_id.encode()),
        "name": "local (no keys needed)" if key is None else key.name,
        "note": None,
        "details": {"org_details": {"name": owner}, "user_details": {"email": f"{owner}@localhost"}},
    }


@router.delete("/auth/apikey/me", status_code=204)
async def revoke_key(request: Request) -> Response:
    svc, secret = services(request), secret_of(request)
    key = await svc.read(lambda conn: keys.find(conn, secret)) if secret else None
    if key is None:
        raise NotFound("this request came without a key of this server, so there is none to revoke")
    await svc.write(lambda conn: keys.revoke(conn, key.key_id))
    return Response(status_code=204)


@router.get("/billing/usage/events", dependencies=READS)
async def usage_events(request: Request, starting_on: datetime, ending_before: datetime) -> dict[str, Any]:
    """Tokens by hour, session and kind, of requests that are still in the log (older ones are behind snapshots and gone)."""
    start, end = (moment if moment.tzinfo else moment.replace(tzinfo=UTC) for moment in (starting_on, ending_before))
    if not start < end <= start + MAX_WINDOW:
        raise InvalidRequest("ending_before must be after starting_on, by 14 days at most", param="ending_before")
    owner = tenant(request)
    return await services(request).read(lambda conn: _usage(conn, owner, start.timestamp(), end.timestamp()))


def _usage(conn: Connection, owner: str, start: float, end: float) -> dict[str, Any]:
    table = tables.requests
    where = (table.c.tenant == owner) & table.c.kind.in_(EVENT_OF) & (table.c.status == "done")
    query = sa.select(*table.c["kind", "model_id", "tokens_in", "tokens_out", "created_at"])
    amounts: Counter[tuple[float, str, str]] = Counter()
    for kind, model_id, tokens_in, tokens_out, created_at in conn.execute(query.where(where & table.c.created_at.between(start, end))):
        place = (created_at - created_at % 3600, model_id.split(":", 1)[0])
        amounts[*place, EVENT_OF[kind]] += 1 if EVENT_OF[kind] == "checkpoint" else tokens_in
        if kind == "sample":
            amounts[*place, "sampling_sample"] += tokens_out
    sessions = {session_id: _session_attributes(conn, owner, session_id) for _, session_id, _ in amounts}
    events = [_event(hour, session_id, kind, amount) for (hour, session_id, kind), amount in sorted(amounts.items())]
    return {"data": events, "sessions": sessions, "cost_data_through": None}


def _session_attributes(conn: Connection, owner: str, session_id: str) -> dict[str, Any]:
    try:
        return {"user_metadata": runs.get_session(conn, owner, session_id).user_metadata}
    except NotFound:
        return {"user_metadata": None}


def _event(hour: float, session_id: str, kind: str, amount: int) -> dict[str, Any]:
    info: dict[str, Any] = {"type": kind, "count" if kind == "checkpoint" else "token_count": amount}
    if kind == "sampling_prefill":
        info["cached"] = False
    return {"bucket_start": iso(hour), "bucket_end": iso(hour + 3600), "session_id": session_id, "event_info": info}


@router.get("/billing/usage/checkpoints/current", dependencies=READS)
async def checkpoint_storage(request: Request, project_id: str | None = None) -> dict[str, Any]:
    owner = tenant(request)

    def read(conn: Connection) -> dict[str, Any]:
        found, _ = checkpoints.list_checkpoints(conn, owner)
        if project_id is not None:
            mine = {run.run_id for run in runs.list_runs(conn, owner, 2**31 - 1, 0, project_id)[0]}
            found = [checkpoint for checkpoint in found if checkpoint.run_id in mine]
        size = sum(checkpoint.bytes for checkpoint in found)
        item = {
            "project_id": project_id,
            "user_name": owner,
            "checkpoint_count": len(found),
            "size_bytes": size,
            "size_gigabytes": size / 1e9,
        }
        return {"effective_rate_usd_per_gigabyte_month": None, "data": [item] if found else []}

    return await services(request).read(read)


@router.get("/audit", dependencies=READS)
async def audit(request: Request, event_type: str = "all", day: date | None = None) -> dict[str, Any]:
    """The creation of checkpoints that are still there; other events are not recorded."""
    if event_type not in EVENT_TYPES:
        raise InvalidRequest(f"event_type is {event_type!r}; it must be one of {', '.join(EVENT_TYPES)}", param="event_type")
    owner = tenant(request)
    wanted = day or datetime.now(UTC).date()
    found, _ = await services(request).read(lambda conn: checkpoints.list_checkpoints(conn, owner))
    entries = [
        {"timestamp": iso(item.created_at), "event": "checkpoint_create", "event_details": {"tinker_path": str(item.path), "owner": owner}}
        for item in reversed(found)
        if datetime.fromtimestamp(item.created_at, UTC).date() == wanted and event_type in ("all", "checkpoints")
    ]
    return {"entries": entries}


@router.post("/sessions/search", dependencies=READS)
async def search_sessions(request: Request) -> dict[str, Any]:
    form = await forms.read(request, forms.SearchSessions)
    if not 1 <= form.limit <= 200:
        raise InvalidRequest(f"limit is {form.limit}; it must lie in 1..200", param="limit")
    if unknown := [status.type for status in form.statuses or [] if status.type not in STATUSES]:
        raise InvalidRequest(f"statuses holds {unknown[0]!r}; each must be one of {', '.join(STATUSES)}", param="statuses")
    owner = tenant(request)
    return await services(request).read(lambda conn: _search(conn, owner, form))


def _search(conn: Connection, owner: str, form: forms.SearchSessions) -> dict[str, Any]:
    found, _ = runs.list_sessions(conn, owner, 2**31 - 1)
    found = sorted((item for item in found if _matches(item, form)), key=_place, reverse=True)
    if form.cursor is not None:
        after = (_moment(form.cursor.last_created_at), form.cursor.last_session_id)
        found = [item for item in found if _place(item) < after]
    page = found[: form.limit]
    following = None
    if len(found) > len(page):
        following = {"last_created_at": iso(page[-1].created_at), "last_session_id": page[-1].session_id}
    return {"sessions": [_summary(conn, owner, item) for item in page], "next_cursor": following}


def _place(session: runs.Session) -> tuple[datetime, str]:
    """Where it stands in the order, to the microsecond that a cursor can carry."""
    return datetime.fromtimestamp(session.created_at, UTC), session.session_id


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(f"cursor.last_created_at {text[:60]!r} is no time; pass next_cursor back unchanged", param="cursor") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _matches(session: runs.Session, form: forms.SearchSessions) -> bool:
    if form.project_ids is not None and session.project_id not in form.project_ids:
        return False
    have = session.user_metadata or {}
    if any(have.get(key) != value for key, value in form.user_metadata.items()):
        return False
    if form.session_id is not None or form.display_name is not None:
        words = (form.display_name or "").lower().split()
        by_name = bool(words) and all(word in (session.display_name or "").lower() for word in words)
        if not (by_name or session.session_id == form.session_id):
            return False
    status = _status(session)
    return form.statuses is None or any(
        status is not None and wanted.type == status["type"] and (not wanted.reasons or session.finish_reason in wanted.reasons)
        for wanted in form.statuses
    )


def _status(session: runs.Session) -> dict[str, Any] | None:
    """None: neither finished nor heard of lately."""
    if session.state == "finished":
        return {"type": "client_finished", "reason": {"type": session.finish_reason}, "detail": session.finish_detail}
    alive = datetime.now(UTC).timestamp() - session.last_heartbeat < LIVE_SECONDS
    return {"type": "active"} if alive else None


def _summary(conn: Connection, owner: str, session: runs.Session) -> dict[str, Any]:
    run_ids, _ = runs.session_children(conn, owner, session.session_id)
    saved = [item for run_id in run_ids for item in checkpoints.list_checkpoints(conn, owner, run_id)[0]]
    return {
        "session_id": session.session_id,
        "created_at": iso(session.created_at),
        "owner": owner,
        "project_id": session.project_id or "",
        "status": _status(session),
        "checkpoints_count": len(saved),
        "display_name": session.display_name,
        "user_metadata": session.user_metadata,
        "checkpoint_storage_bytes": sum(item.bytes for item in saved),
    }
