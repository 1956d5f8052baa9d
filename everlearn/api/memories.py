"""/v1/memories: what a memory shows a model now, where each piece came from, and how to pin, correct and forget."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Connection

from everlearn.api.auth import caller, scope, tenant
from everlearn.api.paging import After, Limit, listing, page, refuse_unknown
from everlearn.api.remembering import refuse_discreet, rewrites_of, rules_of, window_of, with_window
from everlearn.api.services import Services, services
from everlearn.api.tinker import forms
from everlearn.errors import Conflict, InvalidRequest, NotFound
from everlearn.memory.window import Chunk, Window, protected_of, shown
from everlearn.store import memories
from everlearn.store.memories import Memory, Turn
from everlearn.store.names import storable

router = APIRouter(prefix="/v1/memories", tags=["memories"])

# As with records: a key that may only sample doesn't read what others said, and one that only reads changes nothing.
READS, CHANGES = [scope("read")], [scope("sample")]


class PinForm(forms.Form):
    number: int
    pinned: bool = True


class CorrectForm(forms.Form):
    number: int
    text: str


def memory_json(memory: Memory) -> dict[str, Any]:
    return {
        "id": memory.memory_id,
        "object": "memory",
        "version": memory.version,
        "base_model": memory.base_model,
        "budget": memory.budget,
        "tokens": memory.tokens,
        "turns": memory.turns,
        "created_at": int(memory.created_at),
        "updated_at": int(memory.updated_at),
    }


def chunk_json(chunk: Chunk, window: Window, kept: bool) -> dict[str, Any]:
    return {
        "role": chunk.role,
        "text": chunk.text,
        "tokens": len(chunk.tokens),
        "sources": list(chunk.sources),
        "age": window.turn - chunk.born,
        "rewrites": chunk.rewrites,
        "importance": round(chunk.importance, 4),
        "pinned": chunk.pinned,
        "protected": kept,
    }


def turn_json(turn: Turn) -> dict[str, Any]:
    return msgspec.structs.asdict(turn) | {"created_at": int(turn.created_at)}


@router.get("", dependencies=READS)
async def list_memories(request: Request, limit: int = Limit, after: str | None = After) -> dict[str, Any]:
    """The caller's memories, by id."""
    return await listing(request, limit, after, memories.list_memories, memory_json)


@router.get("/{memory_id}", dependencies=READS)
async def get_memory(request: Request, memory_id: str) -> dict[str, Any]:
    """The window: its chunks with where they came from, and the messages that a model sees."""
    owner = tenant(request)
    found = await services(request).read(lambda conn: memories.get(conn, owner, memory_id))
    window = window_of(found)
    kept = protected_of(window)
    chunks = [chunk_json(chunk, window, place in kept) for place, chunk in enumerate(window.chunks)]
    return memory_json(found) | {"frame": window.frame, "recent": window.recent, "chunks": chunks, "messages": shown(window)}


@router.get("/{memory_id}/turns", dependencies=READS)
async def list_turns(request: Request, memory_id: str, limit: int = Limit, after: int = Query(-1, ge=-1)) -> dict[str, Any]:
    """The archive: every turn as it was said, in order; behind the turn `after`."""
    refuse_unknown(request, "limit", "after")
    owner = tenant(request)
    found = await services(request).read(lambda conn: memories.list_turns(conn, owner, memory_id, limit + 1, after))
    return page(found, limit, turn_json, "number")


@router.get("/{memory_id}/turns/{number}", dependencies=READS)
async def get_turn(request: Request, memory_id: str, number: int) -> dict[str, Any]:
    """One turn, and what became of its chunk in the window since."""
    owner = tenant(request)

    def read(conn: Connection) -> dict[str, Any]:
        turn = memories.turn(conn, owner, memory_id, number)
        past = memories.list_rewrites(conn, owner, memory_id, number)
        return turn_json(turn) | {"rewrites": [msgspec.structs.asdict(rewrite) for rewrite in past]}

    return await services(request).read(read)


@router.post("/{memory_id}/pin", dependencies=CHANGES)
async def pin(request: Request, memory_id: str) -> dict[str, Any]:
    """The chunk of turn `number` is no longer rewritten, or with `pinned` false is again."""
    form = await forms.read(request, PinForm)

    def change(conn: Connection, memory: Memory, window: Window) -> Memory:
        chunks = list(window.chunks)
        place = next((i for i, chunk in enumerate(chunks) if form.number in chunk.sources), None)
        if place is None:
            raise NotFound(f"the window has no chunk of turn {form.number}; it left it under pressure, or was never there", param="number")
        chunks[place] = msgspec.structs.replace(chunks[place], pinned=form.pinned)
        return memories.commit(conn, with_window(memory, msgspec.structs.replace(window, chunks=tuple(chunks))))

    return await _changed(services(request), tenant(request), memory_id, change)


@router.post("/{memory_id}/correct", dependencies=CHANGES)
async def correct(request: Request, memory_id: str) -> dict[str, Any]:
    """`text` takes the place of what turn `number` said, as the newest turn, which supersedes it: both at once, or neither."""
    refuse_discreet(caller(request), "text", "correct it with another key")
    form = await forms.read(request, CorrectForm)
    svc, owner = services(request), tenant(request)
    if not form.text.strip() or not storable(form.text):
        raise InvalidRequest("text is empty or holds NUL; say what is right", param="text")
    memory = await svc.read(lambda conn: memories.get(conn, owner, memory_id))
    rules = rules_of(await svc.chat_models.get(svc.catalog.resolve(memory.base_model)))

    def change(conn: Connection, memory: Memory, window: Window) -> Memory:
        old = memories.turn(conn, owner, memory_id, form.number)
        window, changed = rules.correct(window, form.number, old.role, form.text)
        new = Turn(window.turn, old.role, form.text, form.number)
        return memories.commit(conn, with_window(memory, window), [new], rewrites_of(changed, window.turn))

    return await _changed(svc, owner, memory_id, change)


@router.delete("/{memory_id}/turns/{number}", status_code=204, dependencies=CHANGES)
async def forget_turn(request: Request, memory_id: str, number: int) -> Response:
    """Forgets a turn, what it superseded or was superseded by, and every chunk and rewrite made of those. Answers when no byte of them is
    left in the store, which takes as long as copying it."""
    svc, owner = services(request), tenant(request)

    def change(conn: Connection, memory: Memory, window: Window) -> Memory:
        memories.turn(conn, owner, memory_id, number)
        gone = memories.chain(conn, owner, memory_id, number)
        chunks = tuple(chunk for chunk in window.chunks if not gone & set(chunk.sources))
        return memories.commit(conn, with_window(memory, msgspec.structs.replace(window, chunks=chunks)), forgotten=gone)

    await _scrubbed(svc, _changed(svc, owner, memory_id, change))
    return Response(status_code=204)


@router.delete("/{memory_id}", status_code=204, dependencies=CHANGES)
async def forget_memory(request: Request, memory_id: str) -> Response:
    """Forgets all of it, in the same way."""
    svc, owner = services(request), tenant(request)
    await _scrubbed(svc, svc.write(lambda conn: memories.delete(conn, owner, memory_id)))
    return Response(status_code=204)


async def _scrubbed(svc: Services, forget: Awaitable[object]) -> None:
    """Waits for `forget`, and until its last bytes are gone. Of what isn't there as well: an earlier request may have deleted it and broken
    off before its bytes were overwritten, and its retry finds nothing else to do."""
    try:
        await forget
    except NotFound:
        await asyncio.to_thread(svc.db.scrub, memories.TABLES)
        raise
    await asyncio.to_thread(svc.db.scrub, memories.TABLES)


async def _changed(svc: Services, owner: str, memory_id: str, change: Callable[[Connection, Memory, Window], Memory]) -> dict[str, Any]:
    """The memory after `change`, which sees it as it is stored: nothing comes between."""

    def write(conn: Connection) -> Memory:
        memory = memories.get(conn, owner, memory_id)
        return change(conn, memory, window_of(memory))

    try:
        return memory_json(await svc.write(write))
    except Conflict as error:
        raise Conflict(error.message, param="memory_id") from None
