"""/v1/memories: what a memory shows a model now, where each piece came from, and how to pin, correct and forget."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Connection

from everlearn.api import refilling
from everlearn.api.auth import Caller, caller, scope, tenant
from everlearn.api.paging import After, Limit, listing, page, refuse_unknown
from everlearn.api.refilling import rules_of, window_of
from everlearn.api.remembering import Wanted, check_budget, refuse_discreet, rewrites_of, with_window
from everlearn.api.services import Services, services
from everlearn.api.tinker import forms
from everlearn.errors import Conflict, InvalidRequest, NotFound
from everlearn.memory.window import Chunk, Window, forgetting, protected_of, sharing, shown
from everlearn.store import episodes, memories
from everlearn.store.memories import MAX_NUMBER, Memory, Turn
from everlearn.store.names import storable

router = APIRouter(prefix="/v1/memories", tags=["memories"])

# As with records: a key that may only sample doesn't read what others said, and one that only reads changes nothing.
READS, CHANGES = [scope("read")], [scope("sample")]


class PinForm(forms.Form):
    number: int
    pinned: bool = True


class ChangeForm(forms.Form):
    """`budget`: more tokens than it has. `policy` "": the base model."""

    budget: int | None = None
    refill: str | None = None
    importance: str | None = None
    policy: str | None = None


class CorrectForm(forms.Form):
    """`pinned`: what is right is pinned, as long as pins then take at most half of the window. `record_id`: the answer that is corrected;
    where the memory that it was given in was forgotten, another one of that name isn't changed."""

    number: int
    text: str
    pinned: bool = False
    record_id: str | None = None


def memory_json(memory: Memory) -> dict[str, Any]:
    return {
        "id": memory.memory_id,
        "object": "memory",
        "version": memory.version,
        "base_model": memory.base_model,
        "budget": memory.budget,
        "tokens": memory.tokens,
        "turns": memory.turns,
        "refill": memory.refill,
        "importance": memory.importance,
        "policy": memory.policy or None,
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


def window_json(memory: Memory) -> dict[str, Any]:
    window = window_of(memory)
    kept = protected_of(window)
    chunks = [chunk_json(chunk, window, place in kept) for place, chunk in enumerate(window.chunks)]
    return memory_json(memory) | {"frame": window.frame, "recent": window.recent, "chunks": chunks, "messages": shown(window)}


def turn_json(turn: Turn) -> dict[str, Any]:
    return msgspec.structs.asdict(turn) | {"created_at": int(turn.created_at)}


def check_answer(conn: Connection, memory: Memory, number: int, record_id: str | None) -> None:
    """Raises NotFound if the answer isn't this turn of this memory."""
    if record_id is None:
        return
    if not episodes.answered_in(conn, memory.tenant, record_id, memory.memory_id, number, memory.created_at):
        raise NotFound(
            f"answer {record_id} isn't turn {number} of memory {memory.memory_id!r}; the one that it was given in may have been forgotten",
            param="record_id",
        )


def past_json(conn: Connection, owner: str, memory_id: str, number: int, record_id: str | None = None) -> dict[str, Any]:
    """A turn with what became of its chunk."""
    check_answer(conn, memories.get(conn, owner, memory_id), number, record_id)
    told = turn_json(memories.turn(conn, owner, memory_id, number))
    past = memories.list_rewrites(conn, owner, memory_id, number)
    later = memories.superseding(conn, owner, memory_id, number)
    return told | {"superseded_by": later, "rewrites": [msgspec.structs.asdict(rewrite) for rewrite in past]}


@router.get("", dependencies=READS)
async def list_memories(request: Request, limit: int = Limit, after: str | None = After) -> dict[str, Any]:
    """The caller's memories, by id."""
    return await listing(request, limit, after, memories.list_memories, memory_json)


@router.get("/{memory_id}", dependencies=READS)
async def get_memory(request: Request, memory_id: str) -> dict[str, Any]:
    """The window: its chunks with where they came from, and the messages that a model sees."""
    owner = tenant(request)
    return window_json(await services(request).read(lambda conn: memories.get(conn, owner, memory_id)))


@router.get("/{memory_id}/turns", dependencies=READS)
async def list_turns(request: Request, memory_id: str, limit: int = Limit, after: int = Query(-1, ge=-1, le=MAX_NUMBER)) -> dict[str, Any]:
    """The archive: every turn as it was said, in order; behind the turn `after`."""
    refuse_unknown(request, "limit", "after")
    owner = tenant(request)
    found = await services(request).read(lambda conn: memories.list_turns(conn, owner, memory_id, limit + 1, after))
    return page(found, limit, turn_json, "number")


@router.get("/{memory_id}/turns/{number}", dependencies=READS)
async def get_turn(request: Request, memory_id: str, number: int, record_id: str | None = None) -> dict[str, Any]:
    """One turn, what became of its chunk in the window since, and the turn that corrects it. With `record_id` only if it is that answer."""
    refuse_unknown(request, "record_id")
    owner = tenant(request)
    return await services(request).read(lambda conn: past_json(conn, owner, memory_id, number, record_id))


@router.patch("/{memory_id}", dependencies=CHANGES)
async def change_memory(request: Request, memory_id: str) -> dict[str, Any]:
    """Who writes and who weighs its chunks from the next turn on; a larger budget."""
    return await change(services(request), caller(request), memory_id, await forms.read(request, ChangeForm))


@router.post("/{memory_id}/pin", dependencies=CHANGES)
async def pin_turn(request: Request, memory_id: str) -> dict[str, Any]:
    """The chunk of turn `number` is no longer rewritten, or with `pinned` false is again."""
    return await pin(services(request), caller(request), memory_id, await forms.read(request, PinForm))


@router.post("/{memory_id}/correct", dependencies=CHANGES)
async def correct_turn(request: Request, memory_id: str) -> dict[str, Any]:
    """`text` takes the place of what turn `number` said, as the newest turn, which supersedes it: both at once, or neither."""
    return await correct(services(request), caller(request), memory_id, await forms.read(request, CorrectForm))


@router.delete("/{memory_id}/turns/{number}", status_code=204, dependencies=CHANGES)
async def forget_turn(request: Request, memory_id: str, number: int) -> Response:
    """Forgets a turn, what it superseded or was superseded by, and every chunk and rewrite made of those. Answers when no byte of them is
    left in the store, which takes as long as copying it."""
    await forget(services(request), caller(request), memory_id, number)
    return Response(status_code=204)


@router.delete("/{memory_id}", status_code=204, dependencies=CHANGES)
async def forget_memory(request: Request, memory_id: str) -> Response:
    """Forgets all of it, in the same way."""
    await forget(services(request), caller(request), memory_id)
    return Response(status_code=204)


# ---- what the routes do, and the dashboard's page as well ----


async def change(svc: Services, who: Caller, memory_id: str, form: ChangeForm) -> dict[str, Any]:
    refilling.check(form.refill, form.importance)
    wanted = Wanted(memory_id, refill=form.refill, importance=form.importance, policy=form.policy)
    there = await svc.read(lambda conn: memories.get(conn, who.tenant, memory_id))
    await refilling.policy_of(svc, who, wanted.on(there))
    if form.budget is not None:
        check_budget(svc, svc.catalog.resolve(there.base_model), form.budget)

    def write(conn: Connection, memory: Memory, window: Window) -> Memory:
        budget = window.budget if form.budget is None else form.budget
        if budget < window.budget:
            raise InvalidRequest(
                f"budget is {budget} and memory {memory_id!r} has {window.budget}; it can be raised, and a smaller one needs a new memory",
                param="budget",
            )
        return memories.commit(conn, with_window(wanted.on(memory), msgspec.structs.replace(window, budget=budget)))

    return await _changed(svc, who.tenant, memory_id, write)


async def pin(svc: Services, who: Caller, memory_id: str, form: PinForm) -> dict[str, Any]:
    def write(conn: Connection, memory: Memory, window: Window) -> Memory:
        chunks = list(window.chunks)
        place = next((i for i, chunk in enumerate(chunks) if form.number in chunk.sources), None)
        if place is None:
            raise NotFound(f"the window has no chunk of turn {form.number}; it left it under pressure, or was never there", param="number")
        chunks[place] = msgspec.structs.replace(chunks[place], pinned=form.pinned)
        return memories.commit(conn, with_window(memory, msgspec.structs.replace(window, chunks=tuple(chunks))))

    return await _changed(svc, who.tenant, memory_id, write)


async def correct(svc: Services, who: Caller, memory_id: str, form: CorrectForm) -> dict[str, Any]:
    refuse_discreet(who, "text", "correct it with another key")
    if not form.text.strip() or not storable(form.text):
        raise InvalidRequest("text is empty or holds NUL; say what is right", param="text")
    memory = await svc.read(lambda conn: memories.get(conn, who.tenant, memory_id))
    rules = rules_of(await svc.chat_models.get(svc.catalog.resolve(memory.base_model)), memory)

    def write(conn: Connection, memory: Memory, window: Window) -> Memory:
        check_answer(conn, memory, form.number, form.record_id)
        role = _role_of(conn, memory, window, form.number)
        window, changed = rules.correct(window, form.number, role, form.text, form.pinned)
        new = Turn(window.turn, role, form.text, form.number)
        return memories.commit(conn, with_window(memory, window), [new], rewrites_of(rules, changed, window.turn))

    return await _changed(svc, who.tenant, memory_id, write)


async def forget(svc: Services, who: Caller, memory_id: str, number: int | None = None) -> None:
    """A turn with all that hangs on it, or without `number` the whole memory; done when its bytes are gone."""

    def write(conn: Connection, memory: Memory, window: Window) -> Memory:
        assert number is not None
        _role_of(conn, memory, window, number)  # raises for what is nowhere
        gone = memories.chain(conn, who.tenant, memory_id, {number})
        while more := sharing(window, gone) - gone:  # the archive may no longer have what links them
            gone |= memories.chain(conn, who.tenant, memory_id, more)
        window, beside = forgetting(window, gone)
        return memories.commit(conn, with_window(memory, window), forgotten=gone, retold=beside)

    if number is None:
        await _scrubbed(svc, svc.write(lambda conn: memories.delete(conn, who.tenant, memory_id)))
    else:
        await _scrubbed(svc, _changed(svc, who.tenant, memory_id, write))


def _role_of(conn: Connection, memory: Memory, window: Window, number: int) -> str:
    """Who said a turn: of one that the archive no longer has, its chunk knows. Raises NotFound where neither has it."""
    said = next((chunk.role for chunk in window.chunks if number in chunk.sources), None)
    return said or memories.turn(conn, memory.tenant, memory.memory_id, number).role


async def _scrubbed(svc: Services, forget: Awaitable[object]) -> None:
    """Waits for `forget`, and until its last bytes are gone. Of what isn't there as well: an earlier request may have deleted it and broken
    off before its bytes were overwritten. What nobody waits for any more ends with the next sweep, or when the server starts
    (everlearn/api/housekeeping.py)."""
    try:
        await forget
    except NotFound:
        await asyncio.to_thread(memories.scrub, svc.db)
        raise
    await asyncio.to_thread(memories.scrub, svc.db)


async def _changed(svc: Services, owner: str, memory_id: str, change: Callable[[Connection, Memory, Window], Memory]) -> dict[str, Any]:
    """The memory after `change`, which sees it as it is stored: nothing comes between."""

    def write(conn: Connection) -> Memory:
        memory = memories.get(conn, owner, memory_id)
        return change(conn, memory, window_of(memory))

    try:
        return memory_json(await svc.write(write))
    except Conflict as error:
        raise Conflict(error.message, param="memory_id") from None
