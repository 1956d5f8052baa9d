"""/v1/records: what was answered, with the token ids and log-probabilities as they were sampled."""

from __future__ import annotations

import json
from array import array
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from sqlalchemy import Connection

from everlearn.api.auth import scope, tenant
from everlearn.api.paging import After, Limit, Moment, page, refuse_unknown
from everlearn.api.services import services
from everlearn.store import records
from everlearn.store.records import Body, Row

router = APIRouter(prefix="/v1/records", tags=["records"])

# Other people's conversations: a key that may only sample doesn't read them. One that only reads changes nothing: what a key's
# answers left is forgotten with the scope that made them, by an id that its answers named.
READS, FORGETS = [scope("read")], [scope("sample")]


def row_json(row: Row) -> dict[str, Any]:
    return {
        "id": row.record_id,
        "object": "record",
        "created_at": int(row.created_at),
        "route": row.route,
        "model": row.model,
        "base_model": row.base_model,
        "version": row.version,
        "episode_id": row.episode_id,
        "continues": None if row.route == records.UNSEEN else row.parent_id,
        "key_id": row.key_id,
        "user": row.user,
        "finish_reasons": row.finish_reasons,
        "usage": {
            "prompt_tokens": row.prompt_tokens,
            "completion_tokens": row.completion_tokens,
            "cached_tokens": row.cached_tokens,
        },
        "first_token_seconds": row.first_token_seconds,
        "seconds": row.seconds,
        "has_content": row.body_bytes > 0,
    }


def body_json(body: Body | None) -> dict[str, Any] | None:
    """None: the content of this record isn't kept."""
    if body is None:
        return None
    choices = [
        {
            "token_ids": array("i", choice.tokens.data).tolist(),
            "logprobs": array("f", choice.logprobs.data).tolist(),
            "finish_reason": choice.finish_reason,
        }
        for choice in body.choices
    ]
    return json.loads(body.texts) | {"prompt_token_ids": array("i", body.prompt.data).tolist(), "choices": choices}


@router.get("", dependencies=READS)
async def list_records(
    request: Request,
    limit: int = Limit,
    after: str | None = After,
    model: str | None = None,
    key_id: str | None = None,
    user: str | None = None,
    since: Moment = None,
    until: Moment = None,
) -> dict[str, Any]:
    """Figures without content, newest first; of one model (all versions of a bare name), one key, one user; of answers that were given at
    `since` or later, and before `until`."""
    refuse_unknown(request, "limit", "after", "model", "key_id", "user", "since", "until")
    owner = tenant(request)
    found = await services(request).read(
        lambda conn: records.list_rows(conn, owner, limit + 1, after, model, key_id, user, since=since, until=until)
    )
    return page(found, limit, row_json)


@router.get("/{record_id}", dependencies=READS)
async def get_record(request: Request, record_id: str) -> Response:
    """One record with its content. An answer that came a moment ago is waited for."""
    svc, owner = services(request), tenant(request)
    await svc.records.settled(record_id)

    def read(conn: Connection) -> bytes:
        row, body = records.get(conn, owner, record_id)
        return encoded(row_json(row) | {"content": body_json(body)})

    return Response(await svc.read(read), media_type="application/json")


@router.delete("/{record_id}", status_code=204, dependencies=FORGETS)
async def delete_record(request: Request, record_id: str) -> Response:
    svc, owner = services(request), tenant(request)
    await svc.records.settled(record_id)
    await svc.write(lambda conn: records.delete(conn, owner, record_id))
    return Response(status_code=204)


def encoded(value: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:  # half a surrogate pair in what the client had sent
        return json.dumps(value).encode()
