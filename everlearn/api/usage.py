"""/v1/usage: requests, tokens and seconds by day, key, and what was used."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any

from fastapi import APIRouter, Request

from everlearn.api.auth import scope, tenant
from everlearn.api.paging import refuse_unknown
from everlearn.api.services import services
from everlearn.errors import InvalidRequest
from everlearn.store import usage
from everlearn.store.usage import Line

router = APIRouter(prefix="/v1/usage", tags=["usage"], dependencies=[scope("read")])

EPOCH = date(1970, 1, 1)
DEFAULT_DAYS = 30
MAX_DAYS = 731


@router.get("")
async def get_usage(request: Request, since: date | None = None, until: date | None = None) -> dict[str, Any]:
    """Of the days `since` to `until` (both included, UTC; default: the last 30 days), one line for each day, key, model and kind."""
    refuse_unknown(request, "since", "until")
    last = until or datetime.now(UTC).date()
    first = since or last - timedelta(days=DEFAULT_DAYS - 1)
    if not EPOCH <= first <= last or (last - first).days >= MAX_DAYS:
        raise InvalidRequest(f"since {first} must lie before until {last}, by {MAX_DAYS} days at most", param="since")
    owner = tenant(request)
    found = await services(request).read(lambda conn: usage.lines(conn, owner, (first - EPOCH).days, (last - EPOCH).days))
    return {"object": "list", "since": str(first), "until": str(last), "data": [line_json(line) for line in found]}


def line_json(line: Line) -> dict[str, Any]:
    return {
        "day": str(EPOCH + timedelta(days=line.day)),
        "key_id": line.key_id or None,
        "model": line.subject,
        "kind": line.kind,
        "requests": line.requests,
        "tokens_in": line.tokens_in,
        "tokens_cached": line.tokens_cached,
        "tokens_out": line.tokens_out,
        "seconds": round(line.seconds, 3),
    }
