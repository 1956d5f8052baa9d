"""Memories: what each shows a model now, chunk by chunk, where every chunk came from and what was rewritten of it; pin, correct, forget.

Reads and changes by the functions of /v1/memories (everlearn/api/memories.py), with the scopes that those ask for.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from fastapi import Path, Query, Request, Response
from sqlalchemy import Connection

from everlearn.api import memories as api
from everlearn.api.auth import caller, tenant
from everlearn.api.dashboard import frame
from everlearn.api.dashboard.live import Look
from everlearn.api.memories import CHANGES, ChangeForm, CorrectForm, PinForm
from everlearn.api.paging import Limit
from everlearn.api.refilling import IMPORTANCES, REFILLS
from everlearn.api.services import Services, services
from everlearn.errors import InvalidRequest
from everlearn.store import memories, tables
from everlearn.store.memories import MAX_NUMBER

router = frame.page_router()
LEVELS = 5  # of importance, each with a colour, a pattern in the legend, and the number beside it
AGES = (2, 20, 200)  # turns: new, recent, old, ancient
AGE_NAMES = ("new", "recent", "old", "ancient")
REFRESH = {"hx-refresh": "true", **frame.PRIVATE}


def look(svc: Services, conn: Connection, owner: str) -> Any:
    table = tables.memories
    return tuple(conn.execute(sa.select(sa.func.count(), sa.func.max(table.c.updated_at)).where(table.c.tenant == owner)).one())


LIVE: dict[str, Look] = {"memories": look}


def level_of(importance: float) -> int:
    """0 to LEVELS - 1."""
    return min(int(importance * LEVELS), LEVELS - 1)


def age_of(turns: int) -> int:
    """The place in AGE_NAMES."""
    return sum(turns >= bound for bound in AGES)


@frame.twin(router, "/memory", "memories.html")
async def page(request: Request, limit: int = Limit, after: str | None = Query(None)) -> dict[str, Any]:
    """The tenant's memories, by id."""
    owner = tenant(request)
    found = await services(request).read(lambda conn: memories.list_memories(conn, owner, limit + 1, after))
    return {
        "memories": [api.memory_json(memory) for memory in found[:limit]],
        "next": found[limit - 1].memory_id if len(found) > limit else None,
    }


@frame.twin(router, "/memory/{memory_id}", "memory.html")
async def window(request: Request, memory_id: str) -> dict[str, Any]:
    """One memory's window."""
    owner = tenant(request)
    found = api.window_json(await services(request).read(lambda conn: memories.get(conn, owner, memory_id)))
    for number, chunk in enumerate(found["chunks"]):
        before = sum(other["tokens"] for other in found["chunks"][:number])
        chunk |= {"level": level_of(chunk["importance"]), "age_level": age_of(chunk["age"]), "before": before}
    return {"memory": found, "levels": LEVELS, "age_names": AGE_NAMES, "ages": AGES, "refills": REFILLS, "importances": IMPORTANCES}


@frame.twin(router, "/memory/{memory_id}/turns", "memory_archive.html")
async def archive(request: Request, memory_id: str, limit: int = Limit, after: int = Query(-1, ge=-1, le=MAX_NUMBER)) -> dict[str, Any]:
    """Every turn as it was said, with what is left of it in the window."""
    owner = tenant(request)

    def read(conn: Connection) -> dict[str, Any]:
        memory = memories.get(conn, owner, memory_id)
        chunks = {source: chunk for chunk in api.window_of(memory).chunks for source in chunk.sources}
        turns = memories.list_turns(conn, owner, memory_id, limit + 1, after)
        told = []
        for turn in turns[:limit]:
            chunk = chunks.get(turn.number)
            state = "not in the window" if chunk is None else "rewritten" if chunk.rewrites else "as it was said"
            told.append(api.turn_json(turn) | {"state": state})
        return {"memory": api.memory_json(memory), "turns": told, "next": turns[limit - 1].number if len(turns) > limit else None}

    return await services(request).read(read)


@frame.twin(router, "/memory/{memory_id}/turns/{number}", "memory_turn.html")
async def turn(request: Request, memory_id: str, number: int = Path(ge=0, le=MAX_NUMBER)) -> dict[str, Any]:
    """One turn, and every rewrite of its chunk."""
    owner = tenant(request)

    def read(conn: Connection) -> dict[str, Any]:
        memory = memories.get(conn, owner, memory_id)
        chunk = next((chunk for chunk in api.window_of(memory).chunks if number in chunk.sources), None)
        left = None if chunk is None else {"text": chunk.text, "pinned": chunk.pinned, "tokens": len(chunk.tokens)}
        return {"memory": api.memory_json(memory), "turn": api.past_json(conn, owner, memory_id, number), "chunk": left}

    return await services(request).read(read)


# ---- changes ----


@router.post("/memory/{memory_id}", dependencies=CHANGES)
async def change(request: Request, memory_id: str) -> Response:
    given = await frame.form(request)
    form = ChangeForm(refill=given.get("refill"), importance=given.get("importance"), policy=given.get("policy"))
    await api.change(services(request), caller(request), memory_id, form)
    return Response(status_code=204, headers=REFRESH)


@router.post("/memory/{memory_id}/pin", dependencies=CHANGES)
async def pin(request: Request, memory_id: str) -> Response:
    given = await frame.form(request)
    await api.pin(services(request), caller(request), memory_id, PinForm(_number(given), given.get("pinned") == "true"))
    return Response(status_code=204, headers=REFRESH)


@router.post("/memory/{memory_id}/correct", dependencies=CHANGES)
async def correct(request: Request, memory_id: str) -> Response:
    given = await frame.form(request)
    form = CorrectForm(_number(given), given.get("text", ""), given.get("pinned") == "true")
    await api.correct(services(request), caller(request), memory_id, form)
    return Response(status_code=204, headers=REFRESH)


@router.delete("/memory/{memory_id}/turns/{number}", dependencies=CHANGES)
async def forget_turn(request: Request, memory_id: str, number: int = Path(ge=0, le=MAX_NUMBER)) -> Response:
    await api.forget(services(request), caller(request), memory_id, number)
    return Response(status_code=204, headers={"hx-redirect": f"/dashboard/memory/{memory_id}", **frame.PRIVATE})


@router.delete("/memory/{memory_id}", dependencies=CHANGES)
async def forget(request: Request, memory_id: str) -> Response:
    await api.forget(services(request), caller(request), memory_id)
    return Response(status_code=204, headers={"hx-redirect": "/dashboard/memory", **frame.PRIVATE})


def _number(given: dict[str, str]) -> int:
    text = given.get("number", "")
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise InvalidRequest(f"number is {text[:20]!r}; it must be a turn's", param="number")
    return int(text)
