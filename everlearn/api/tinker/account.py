"""Keys, usage and the audit log, as far as the store knows them. Nothing here has a price: it is your machine."""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Sized
from datetime import UTC, date, datetime, timedelta
from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy import Connection

from everlearn.api.auth import scope, secret_of, tenant
from everlearn.api.services import services
from everlearn.api.tinker import forms
from everlearn.api.tinker.rest import iso
from everlearn.errors import InvalidRequest, NotFound
from everlearn.store import checkpoints, keys, runs, sessions
from everlearn.store import usage as totals
from everlearn.store.sessions import Status, Wanted

router = APIRouter(prefix="/api/v1", tags=["tinker: account"])

READS = [scope("read")]
MAX_WINDOW = timedelta(days=14)
LIVE_SECONDS = 120.0
EVENT_TYPES = ("all", "checkpoints", "projects", "teams", "organizations")
EVENT_OF = {"forward_backward": "training", "sample": "sampling_prefill", "save": "checkpoint", "publish": "checkpoint"}
STATUSES = ("active", "cancelled", "failed", "client_finished")
OWNERS = ("own", "accessible", "user")
MAX_OWNERS = 10
MAX_TERMS = 64  # projects, pairs of metadata, words, or states with their reasons, of one search


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
    amounts: Counter[tuple[int, str, str]] = Counter()
    for line in totals.by_hour(conn, owner, tuple(EVENT_OF), start, end):
        place = (line.hour, line.model_id.split(":", 1)[0])
        amounts[*place, EVENT_OF[line.kind]] += line.requests if EVENT_OF[line.kind] == "checkpoint" else line.tokens_in
        if line.kind == "sample":
            amounts[*place, "sampling_sample"] += line.tokens_out
    ids = {session_id for _, session_id, _ in amounts}
    known = sessions.metadata_of(conn, owner, ids)
    attributes = {session_id: {"user_metadata": known.get(session_id)} for session_id in sorted(ids)}
    events = [_event(hour * 3600, session_id, kind, amount) for (hour, session_id, kind), amount in sorted(amounts.items())]
    return {"data": events, "sessions": attributes, "cost_data_through": None}


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
    owner = tenant(request)
    wanted, after = _wanted(form), None
    if form.cursor is not None:
        after = (_moment(form.cursor.last_created_at).timestamp(), form.cursor.last_session_id)
    if not _own(form.owner, owner):
        return {"sessions": [], "next_cursor": None}
    return await services(request).read(lambda conn: _search(conn, owner, wanted, form.limit, after))


def _search(conn: Connection, owner: str, wanted: Wanted, limit: int, after: sessions.Place | None) -> dict[str, Any]:
    found = sessions.search(conn, owner, wanted, limit + 1, after)
    page, following = found[:limit], None
    if len(found) > limit:
        following = {"last_created_at": iso(page[-1].created_at), "last_session_id": page[-1].session_id}
    saved = sessions.saved_of(conn, owner, (item.session_id for item in page), time.time())
    return {"sessions": [_summary(item, *saved.get(item.session_id, (0, 0))) for item in page], "next_cursor": following}


def _own(form: forms.SearchOwner | None, owner: str) -> bool:
    """Whether the tenant's own sessions are among those that are asked for. Nobody is shown others' sessions, so "accessible" means
    one's own, and of a list of owners one's own alone, which is called as in every answer."""
    if form is None or form.type in ("own", "accessible"):
        if form is not None and form.owner_urns:
            raise InvalidRequest(
                f"owner.owner_urns belongs to owner.type 'user', not to {form.type!r}; leave it out", param="owner.owner_urns"
            )
        return True
    if form.type != "user":
        raise InvalidRequest(f"owner.type is {form.type[:60]!r}; it must be one of {', '.join(OWNERS)}", param="owner.type")
    if not 1 <= len(form.owner_urns) <= MAX_OWNERS:
        raise InvalidRequest(f"owner.owner_urns names {len(form.owner_urns)}; it must be 1 to {MAX_OWNERS}", param="owner.owner_urns")
    return owner in form.owner_urns


def _wanted(form: forms.SearchSessions) -> Wanted:
    if not 1 <= form.limit <= 200:
        raise InvalidRequest(f"limit is {form.limit}; it must lie in 1..200", param="limit")
    if unknown := [status.type for status in form.statuses or [] if status.type not in STATUSES]:
        raise InvalidRequest(f"statuses holds {unknown[0][:60]!r}; each must be one of {', '.join(STATUSES)}", param="statuses")
    words = None if form.display_name is None else tuple(form.display_name.lower().split())
    given: dict[str, Sized | None] = {"project_ids": form.project_ids, "user_metadata": form.user_metadata, "display_name": words}
    given["statuses"] = [reason for status in form.statuses or () for reason in (status.type, *(status.reasons or ()))]
    for name, items in given.items():
        if len(items or ()) > MAX_TERMS:
            raise InvalidRequest(f"{name} asks for {len(items or ())} things; a search takes {MAX_TERMS} at most", param=name)
    statuses = None
    if form.statuses is not None:
        alive_since = time.time() - LIVE_SECONDS
        statuses = tuple(
            Status(status.type == "client_finished", alive_since, tuple(status.reasons or ()))
            for status in form.statuses
            if status.type == "client_finished" or (status.type == "active" and not status.reasons)
        )
    projects = None if form.project_ids is None else tuple(form.project_ids)
    return Wanted(form.session_id, words, projects, form.user_metadata, statuses)


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(f"cursor.last_created_at {text[:60]!r} is no time; pass next_cursor back unchanged", param="cursor") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _status(session: runs.Session) -> dict[str, Any] | None:
    """None: neither finished nor heard of lately."""
    if session.state == "finished":
        return {"type": "client_finished", "reason": {"type": session.finish_reason}, "detail": session.finish_detail}
    alive = datetime.now(UTC).timestamp() - session.last_heartbeat < LIVE_SECONDS
    return {"type": "active"} if alive else None


def _summary(session: runs.Session, checkpoints_count: int, checkpoint_bytes: int) -> dict[str, Any]:
    return {
        "session_id": session.session_id,
        "created_at": iso(session.created_at),
        "owner": session.tenant,
        "project_id": session.project_id or "",
        "status": _status(session),
        "checkpoints_count": checkpoints_count,
        "display_name": session.display_name,
        "user_metadata": session.user_metadata,
        "checkpoint_storage_bytes": checkpoint_bytes,
    }
