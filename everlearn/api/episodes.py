"""/v1/episodes: the conversations and tasks that records form, with what happened in them and what was said of them, in order."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Connection

from everlearn.api import auth, bodies
from everlearn.api.auth import scope, tenant
from everlearn.api.feedback import feedback_json
from everlearn.api.openai import types
from everlearn.api.paging import After, Limit, Moment, page, refuse_unknown
from everlearn.api.records import encoded
from everlearn.api.services import services
from everlearn.api.tinker.forms import CHECK_ADDRESS
from everlearn.errors import Unsupported
from everlearn.store import episodes, feedback, records
from everlearn.store.episodes import Episode, Event

router = APIRouter(prefix="/v1/episodes", tags=["episodes"], dependencies=[CHECK_ADDRESS])
Records = Query(100, ge=1, le=1000)
MAX_FEEDBACK = 10_000  # of one page of a timeline; GET /v1/feedback pages through all of it
READS, SAYS = [scope("read")], [scope("sample")]


class EventForm(types.Form):
    kind: str
    name: str = ""
    value: bool | float | None = None
    text: str | None = None
    record_id: str | None = None
    source: str = "program"


def episode_json(episode: Episode) -> dict[str, Any]:
    return {
        "id": episode.episode_id,
        "object": "episode",
        "created_at": int(episode.created_at),
        "updated_at": int(episode.updated_at),
        "split": episode.split,
        "client_given": episode.client_given,
        "user": episode.user,
        "model": episode.model,
        "records": episode.records,
        "feedback": episode.feedback,
    }


def event_json(event: Event) -> dict[str, Any]:
    return {
        "type": "event",
        "id": event.event_id,
        "created_at": int(event.created_at),
        "kind": event.kind,
        "name": event.name,
        "value": event.value,
        "text": event.text,
        "record_id": event.record_id,
        "source": event.source,
    }


@router.get("", dependencies=READS)
async def list_episodes(
    request: Request,
    limit: int = Limit,
    after: str | None = After,
    split: Literal["train", "heldout"] | None = None,
    user: str | None = None,
    model: str | None = None,
    since: Moment = None,
    until: Moment = None,
) -> dict[str, Any]:
    """The tenant's episodes, the newest first."""
    refuse_unknown(request, "limit", "after", "split", "user", "model", "since", "until")
    owner = tenant(request)
    chosen: dict[str, Any] = {"split": split, "user": user, "model": model, "since": since, "until": until}
    found = await services(request).read(lambda conn: episodes.list_episodes(conn, owner, limit + 1, after, **chosen))
    return page(found, limit, episode_json)


@router.get("/{episode_id}", dependencies=READS)
async def get_episode(request: Request, episode_id: str, limit: int = Records, after: str | None = After) -> Response:
    """One episode with its timeline: turns of users and results of tools, answers, events and feedback, oldest first, around `limit`
    records behind the record `after`."""
    refuse_unknown(request, "limit", "after")
    owner = tenant(request)
    told = await services(request).read(lambda conn: encoded(whole(conn, owner, episode_id, after, limit)))
    return Response(told, media_type="application/json")


@router.post("/{episode_id}/events", dependencies=SAYS)
async def add_event(request: Request, episode_id: str) -> dict[str, Any]:
    """Keeps something that happened and that no record tells."""
    caller = auth.caller(request)
    form = await bodies.read(request, EventForm)
    if form.text and not caller.content:
        raise Unsupported("text: what is said with this key isn't kept (its owner wants it so); leave it out", param="text")
    given = Event(
        tenant=caller.tenant,
        episode_id=episode_id,
        record_id=form.record_id,
        kind=form.kind,
        name=form.name,
        value=None if form.value is None else float(form.value),
        text=form.text,
        source=form.source,
    )
    return event_json(await services(request).write(lambda conn: episodes.add_event(conn, given)))


@router.delete("/{episode_id}", status_code=204, dependencies=SAYS)
async def delete_episode(request: Request, episode_id: str) -> Response:
    """Forgets an episode with its records and all that was said of it; what learned from it is marked."""
    owner = tenant(request)
    await services(request).write(lambda conn: episodes.delete(conn, owner, episode_id))
    return Response(status_code=204)


def whole(conn: Connection, owner: str, episode_id: str, after: str | None, limit: int) -> dict[str, Any]:
    """A page of the timeline: what lies between its first record and the next page's."""
    found = episodes.get(conn, owner, episode_id)
    rows = episodes.records_of(conn, owner, episode_id, after, limit + 1)
    since = 0.0 if after is None or not rows else rows[0].created_at
    until = rows[limit].created_at if len(rows) > limit else None
    page_of = rows[:limit]
    entries: list[tuple[float, int, dict[str, Any]]] = []  # equal times keep the order of a conversation: asked, answered, judged
    for row in page_of:
        _, body = records.get(conn, owner, row.record_id)
        texts = json.loads(body.texts) if body is not None else {}
        said = texts.get("messages")
        for message in said[row.seen_messages :] if isinstance(said, list) else [said] if said is not None else []:
            entries.append((row.created_at, 0, turn_json(row, message)))
        answer = {"type": "answer", "created_at": int(row.created_at), "record_id": row.record_id, "model": row.model}
        answer |= {"continues": row.parent_id, "messages": texts.get("answer"), "finish_reasons": row.finish_reasons}
        entries.append((row.created_at, 1, answer))
    for event in episodes.events(conn, owner, episode_id, since, math.inf if until is None else until):
        entries.append((event.created_at, 2, event_json(event)))
    for one in feedback.of_episodes(conn, owner, [episode_id], since=since, until=until, limit=MAX_FEEDBACK):
        entries.append((one.created_at, 3, {"type": "feedback", **feedback_json(one)}))
    timeline = [entry for _, _, entry in sorted(entries, key=lambda entry: entry[:2])]
    ends = {"has_more": until is not None, "last_id": page_of[-1].record_id if page_of else None}
    return episode_json(found) | {"timeline": timeline, **ends}


def turn_json(row: records.Row, message: Any) -> dict[str, Any]:
    """A message that came with this record for the first time. A completion's prompt is text (or tokens), and its user's."""
    role = message.get("role", "user") if isinstance(message, dict) else "user"
    told = message if isinstance(message, dict) else {"role": "user", "content": message}
    return {"type": role, "created_at": int(row.created_at), "record_id": row.record_id, "message": told}
