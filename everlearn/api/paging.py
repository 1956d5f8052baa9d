"""Listings in OpenAI's form: at most `limit` things behind the one whose id is `after`, and whether there are more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import Query, Request
from sqlalchemy.engine import Connection

from everlearn.api.auth import tenant
from everlearn.api.services import services
from everlearn.errors import InvalidRequest
from everlearn.store.names import storable

Limit = Query(20, ge=1, le=1000)
After = Query(None, max_length=200)
# A type, not a default: FastAPI writes a parameter's name into a default, and a second parameter with the same one would read the first.
Moment = Annotated[float | None, Query(ge=0, le=1e12, allow_inf_nan=False, description="Unix seconds")]
Find = Callable[[Connection, str, int, str | None], Sequence[Any]]  # connection, tenant, how many, behind which


def page(found: Sequence[Any], limit: int, shown: Callable[[Any], dict[str, Any]], key: str = "id") -> dict[str, Any]:
    """`found` holds one more than `limit` where there are more; `key` names the field that `after` takes."""
    data = [shown(item) for item in found[:limit]]
    ends = {"first_id": data[0][key], "last_id": data[-1][key]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ends, "has_more": len(found) > limit}


async def listing(request: Request, limit: int, after: str | None, find: Find, shown: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """A page of what the tenant has, without filters. `find(conn, tenant, limit, after)` gives the things in order."""
    refuse_unknown(request, "limit", "after")
    owner = tenant(request)
    found = await services(request).read(lambda conn: find(conn, owner, limit + 1, after))
    return page(found, limit, shown)


def refuse_unknown(request: Request, *known: str) -> None:
    """A misspelt filter must not list everything."""
    for name, value in request.query_params.multi_items():
        if not storable(value):
            raise InvalidRequest(f"query parameter {name[:60]!r} holds characters that no name has", param=name[:60])
        if name not in known:
            raise InvalidRequest(f"query parameter {name[:60]!r} is not known here; known are {', '.join(known)}", param=name[:60])
