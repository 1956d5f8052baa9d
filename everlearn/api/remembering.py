"""Chats in a memory: the request brings what is new, the server holds the rest, and the prompt never exceeds the memory's budget.

Before the answer the new turns are put into the window, by rules and for this prompt alone. With the answer's end, they and the answer
become part of the memory in one transaction, before the client has the last of it. A chat that breaks off before leaves the memory as it
was, so it can be sent again. Of two chats in one memory at once, each is answered from what there was before it, and both are remembered.
What a model does for the memory begins behind that (everlearn/api/refilling.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from everlearn.api import refilling
from everlearn.api.auth import Caller
from everlearn.api.calls import Call, Exchange
from everlearn.api.chatmodels import ChatModel
from everlearn.api.refilling import rules_of, window_of
from everlearn.api.services import Services
from everlearn.api.turns import Draw, Turn, encode_turn, room_of
from everlearn.errors import Conflict, InvalidRequest, Unsupported
from everlearn.memory import plan as plans
from everlearn.memory.turns import Turns
from everlearn.memory.window import SYSTEM, Window, shown
from everlearn.store import episodes, memories
from everlearn.store.memories import Memory, Rewrite
from everlearn.store.names import storable
from everlearn.store.placing import of_memory
from everlearn.types import BaseModelInfo

FRAME = 16  # tokens around the chunks of a new memory; what the template really takes is measured with every prompt
MIN_BUDGET = 64
RETRIES = 8
RECENT = 2


class Wanted(msgspec.Struct, frozen=True):
    """What a request says of its memory. `budget` None: that of the memory, which must be there. `refill`, `importance` and `policy` hold
    from this turn on; None: as it is."""

    memory_id: str
    budget: int | None = None
    recent: int | None = None
    refill: str | None = None
    importance: str | None = None
    policy: str | None = None

    def on(self, memory: Memory) -> Memory:
        """The memory as the request wants it kept."""
        given = {"refill": self.refill, "importance": self.importance, "policy": self.policy}
        return msgspec.structs.replace(memory, **{name: value for name, value in given.items() if value is not None})


class Said(msgspec.Struct, frozen=True):
    role: str
    text: str


async def open_memory(call: Call, chat: ChatModel, wanted: Wanted, turn: Turn, draw: Draw) -> Turn:
    """The turn as the model is to see it, within the budget; `call` will remember it. Raises NotFound and InvalidRequest for a memory that
    isn't there or can't be made, Conflict for one of another model, Unsupported for what can't be remembered, TooLarge for turns without
    room, and for a key whose texts aren't kept."""
    refuse_discreet(call.caller, "memory")
    said = said_in(turn, draw)
    refilling.check(wanted.refill, wanted.importance)
    memory, window = await _stored(call, wanted)
    memory, rules = wanted.on(memory), rules_of(chat, wanted.on(memory))
    if wanted.policy:
        await refilling.policy_of(call.svc, call.caller, memory)
    window, _ = await asyncio.to_thread(put, rules, window, said)
    shape = msgspec.structs.replace(turn, messages=shown(window))
    short = max(0, window.budget + 1 - room_of(call.svc, call.target.base))  # the engine may have had more memory when it was made
    for _ in range(RETRIES):
        _, prompt, _ = await encode_turn(call.svc, chat, shape)
        around = max(0, len(prompt) - window.size)  # what the template takes, as it stands around these chunks
        if len(prompt) <= window.budget - short:
            break
        window, _ = await asyncio.to_thread(rules.tighten, window, max(around + short, window.frame + 1))
        shape = msgspec.structs.replace(turn, messages=shown(window))
    else:
        raise InvalidRequest(
            f"memory {wanted.memory_id!r}: the prompt can't be brought within its {window.budget} tokens; raise the budget",
            param="memory.budget",
        )
    start = msgspec.structs.replace(memory, window=msgspec.msgpack.encode(window))
    call.memory = {"id": wanted.memory_id, "budget": window.budget, "prompt_tokens": len(prompt), "refill": memory.refill}
    # What is said in a memory is kept there, where it can be forgotten; its record has figures alone, unless the client asks for it.
    call.asked = msgspec.structs.replace(call.asked, store=call.asked.store_asked)

    async def remember(exchange: Exchange) -> None:
        if not exchange.replies[0].finish or remembered:
            return
        answer = str(exchange.replies[0].message()["content"] or "")
        told = await _commit(call, wanted, chat, start, said, answer, around, exchange.record_id)
        remembered.append(told)
        if told is not None:
            call.svc.refills.offer(call.svc, told)

    remembered: list[refilling.Job | None] = []
    call.remember = remember
    return shape


def refuse_discreet(caller: Caller, param: str, way_out: str = "leave it out") -> None:
    """A memory is nothing but texts that are kept. Raises Unsupported for a key of which none are."""
    if not caller.content:
        raise Unsupported(f"{param}: what is said with this key isn't kept (its owner wants it so); {way_out}", param=param)


def said_in(turn: Turn, draw: Draw) -> list[Said]:
    """The messages as turns of a memory."""
    if turn.offered or draw.n != 1 or turn.continue_final:
        raise Unsupported("a chat in a memory takes no tools, no n above 1 and no continue_final_message; leave them out", param="memory")
    found: list[Said] = []
    for message in turn.messages:
        content = message.get("content")
        if isinstance(content, list) and all(part["type"] == "text" for part in content):
            content = "".join(part["text"] for part in content)
        role = SYSTEM if message["role"] == "developer" else message["role"]
        if not isinstance(content, str) or role not in (SYSTEM, "user", "assistant") or message.get("tool_calls"):
            raise Unsupported("a memory holds what is said in texts: no images, no tool calls and their results", param="messages")
        if not storable(content):
            raise InvalidRequest("a message holds NUL or half a surrogate pair, which no memory takes; leave it out", param="messages")
        found.append(Said(role, content))
    if not found or found[-1].role != "user":
        raise InvalidRequest("the last message of a chat in a memory must be the user's; the others are in the memory", param="messages")
    return _with_one_system(found)


def _with_one_system(said: Sequence[Said]) -> list[Said]:
    """A window has one system's text: what all of them say, where the first stood."""
    joined = Said(SYSTEM, "\n\n".join(one.text for one in said if one.role == SYSTEM))
    first = next((place for place, one in enumerate(said) if one.role == SYSTEM), -1)
    return [joined if place == first else one for place, one in enumerate(said) if place == first or one.role != SYSTEM]


def put(rules: Turns, window: Window, said: Sequence[Said]) -> tuple[Window, list[plans.Rewrite]]:
    """The window with new turns. A system's text takes the place of the one before; what an assistant said may be shortened at once."""
    done: list[plans.Rewrite] = []
    for one in said:
        if one.role == SYSTEM:
            window, changed = rules.instruct(window, one.text)
        else:
            window, changed = rules.add(window, one.role, one.text, hold=one.role == "user")
        done += changed
    return window, done


def rewrites_of(rules: Turns, changed: Sequence[plans.Rewrite], turn: int) -> list[Rewrite]:
    """As they are stored, with the strategy that wrote them."""
    return [
        Rewrite(change.before.sources[0], turn, change.before.text, None if change.after is None else change.after.text, rules.refill.name)
        for change in changed
    ]


def with_window(memory: Memory, window: Window) -> Memory:
    return msgspec.structs.replace(
        memory, tokens=window.size, turns=window.turn + 1, budget=window.budget, window=msgspec.msgpack.encode(window)
    )


def check_budget(svc: Services, base: BaseModelInfo, budget: int) -> None:
    """Raises InvalidRequest for one that no prompt of the model can have."""
    room = room_of(svc, base)
    if not MIN_BUDGET <= budget < room:
        rule = f"it must lie in {MIN_BUDGET}..{room - 1}, for {base.name} has room for {room} tokens, its answer included"
        raise InvalidRequest(f"memory.budget is {budget}; {rule}", param="memory.budget")


async def _stored(call: Call, wanted: Wanted) -> tuple[Memory, Window]:
    svc, tenant, base = call.svc, call.caller.tenant, call.target.base
    memory_id = memories.check_id(wanted.memory_id)
    found = await svc.read(lambda conn: memories.find(conn, tenant, memory_id))
    if found is None:
        if wanted.budget is None:
            raise InvalidRequest(f"there is no memory {memory_id!r}; name its budget in tokens and it is made", param="memory.budget")
        check_budget(svc, base, wanted.budget)
        recent = RECENT if wanted.recent is None else wanted.recent
        if not 1 <= recent <= 64:
            raise InvalidRequest(f"memory.recent is {recent}; it must lie in 1..64", param="memory.recent")
        window = Window(wanted.budget, (), -1, recent, FRAME)
        return Memory(tenant, memory_id, 0, base.name, wanted.budget, 0, 0, msgspec.msgpack.encode(window)), window
    if found.base_model != base.name:
        raise Conflict(
            f"memory {memory_id!r} counts tokens of {found.base_model}, and {call.target.name} is of {base.name}; use a memory of its own",
            param="memory.id",
        )
    window = window_of(found)
    for name, value, own in (("budget", wanted.budget, window.budget), ("recent", wanted.recent, window.recent)):
        if value not in (None, own):
            raise Conflict(
                f"memory {memory_id!r} has a {name} of {own}, not {value}; leave it out, or use another memory", param=f"memory.{name}"
            )
    return found, window


async def _commit(
    call: Call, wanted: Wanted, chat: ChatModel, start: Memory, said: Sequence[Said], answer: str, frame: int, record_id: str
) -> refilling.Job | None:
    """The turns and the answer as part of the memory, whatever was added to it meanwhile; what they leave a model to do. None where the
    memory was forgotten meanwhile: an answer that was made from it doesn't bring it back."""
    text = answer.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    svc = call.svc
    episode_id = call.episode_id or of_memory(start.memory_id)
    for _ in range(RETRIES):
        stored = await svc.read(lambda conn: memories.find(conn, start.tenant, start.memory_id))
        if start.version and (stored is None or stored.created_at != start.created_at):
            call.memory = {**(call.memory or {}), "remembered": False}
            return None
        window = window_of(stored) if stored is not None else Window(start.budget, (), -1, window_of(start).recent, FRAME)
        if not start.version and stored is not None and _shape(stored) != _shape(start):
            raise Conflict(f"memory {start.memory_id!r} was made otherwise meanwhile; send the request again", param="memory.id")
        base = wanted.on(stored or msgspec.structs.replace(start, version=0))
        rules = rules_of(chat, base)
        told = await asyncio.to_thread(_told, rules, window, said, text, frame)
        after = with_window(base, told.window)

        def write(conn: Any, after: Memory = after, told: _Told = told) -> Memory | None:
            if episodes.memory_of(conn, start.tenant, episode_id, record_id) is not None:
                return None  # done, by a try whose commit nobody heard of
            most = svc.settings.store.memory_turns
            found = memories.commit(conn, after, told.turns, told.rewrites, keep_turns=most)
            episodes.note_memory(conn, start.tenant, episode_id, record_id, start.memory_id, told.window.turn)
            return found

        try:
            found = await svc.write(write)
        except Conflict:
            continue
        if found is None:
            return None
        new = tuple(turn.number for turn in told.turns)
        return refilling.Job(call.caller, chat, found, refilling.cuts_of(told.changed), new, record_id, episode_id)
    raise Conflict(f"memory {start.memory_id!r} is changed by many requests at once; send the request again", param="memory.id")


def _shape(memory: Memory) -> tuple[str, int, int]:
    """What is decided when a memory is made."""
    window = window_of(memory)
    return memory.base_model, window.budget, window.recent


class _Told(msgspec.Struct, frozen=True):
    """The window with what was said and answered, and how it came to be."""

    window: Window
    turns: list[memories.Turn]
    changed: list[plans.Rewrite]
    rewrites: list[Rewrite]


def _told(rules: Turns, window: Window, said: Sequence[Said], answer: str, frame: int) -> _Told:
    told = _Told(window, [], [], [])
    for place, one in enumerate((*said, Said("assistant", answer))):
        if place == len(said) and frame > window.frame:
            # The prompt as it was is together: from here on what is around it takes what it took there.
            window, done = rules.tighten(window, frame)
        elif place == len(said):
            window, done = msgspec.structs.replace(window, frame=frame), []
        else:
            done = []
        told.changed.extend(done)
        told.rewrites.extend(rewrites_of(rules, done, window.turn))
        before = window.turn
        window, done = put(rules, window, [one])
        told.changed.extend(done)
        told.rewrites.extend(rewrites_of(rules, done, window.turn))
        if window.turn > before:
            told.turns.append(memories.Turn(window.turn, one.role, one.text))
    return msgspec.structs.replace(told, window=window)
