"""Chats in a memory: the request brings what is new, the server holds the rest, and the prompt never exceeds the memory's budget.

Before the answer the new turns are put into the window, by rules and for this prompt alone. With the answer's end, they and the answer
become part of the memory in one transaction, before the client has the last of it. A chat that breaks off before leaves the memory as it
was, so it can be sent again. Of two chats in one memory at once, each is answered from what there was before it, and both are remembered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from everlearn.api.auth import Caller
from everlearn.api.calls import Call, Exchange
from everlearn.api.chatmodels import ChatModel
from everlearn.api.turns import Draw, Turn, encode_turn
from everlearn.errors import Conflict, InvalidRequest, Unsupported
from everlearn.memory import plan as plans
from everlearn.memory.turns import Turns
from everlearn.memory.window import SYSTEM, Window, shown
from everlearn.store import memories
from everlearn.store.memories import Memory, Rewrite
from everlearn.store.names import storable

FRAME = 16  # tokens around the chunks of a new memory; what the template really takes is measured with every prompt
MIN_BUDGET = 64
RETRIES = 8
RECENT = 2


class Wanted(msgspec.Struct, frozen=True):
    """What a request says of its memory. `budget` None: that of the memory, which must be there."""

    memory_id: str
    budget: int | None = None
    recent: int | None = None


class Said(msgspec.Struct, frozen=True):
    role: str
    text: str


def rules_of(chat: ChatModel) -> Turns:
    """Chunks are spelled as the template spells what people say: special tokens in it are only letters."""
    return Turns.by_rules(lambda text: chat.tokenizer.encode(chat.tokenizer.guard(text)))


async def open_memory(call: Call, chat: ChatModel, wanted: Wanted, turn: Turn, draw: Draw) -> Turn:
    """The turn as the model is to see it, within the budget; `call` will remember it. Raises NotFound and InvalidRequest for a memory that
    isn't there or can't be made, Conflict for one of another model, Unsupported for what can't be remembered, TooLarge for turns without
    room, and for a key whose texts aren't kept."""
    refuse_discreet(call.caller, "memory")
    said = said_in(turn, draw)
    rules = rules_of(chat)
    memory, window = await _stored(call, wanted)
    window, _ = await asyncio.to_thread(put, rules, window, said)
    shape = msgspec.structs.replace(turn, messages=shown(window))
    for _ in range(RETRIES):
        _, prompt, _ = await encode_turn(call.svc, chat, shape)
        around = max(0, len(prompt) - window.size)  # what the template takes, as it stands around these chunks
        if len(prompt) <= window.budget:
            break
        window, _ = await asyncio.to_thread(rules.tighten, window, max(around, window.frame + 1))
        shape = msgspec.structs.replace(turn, messages=shown(window))
    else:
        raise InvalidRequest(
            f"memory {wanted.memory_id!r}: the prompt can't be brought within its {window.budget} tokens; raise the budget",
            param="memory.budget",
        )
    start = msgspec.structs.replace(memory, window=msgspec.msgpack.encode(window))
    call.memory = {"id": wanted.memory_id, "budget": window.budget, "prompt_tokens": len(prompt)}
    # What is said in a memory is kept there, where it can be forgotten; its record has figures alone, unless the client asks for it.
    call.asked = msgspec.structs.replace(call.asked, store=call.asked.store_asked)

    async def remember(exchange: Exchange) -> None:
        if exchange.replies[0].finish and not remembered:
            remembered.append(await _commit(call, rules, start, said, str(exchange.replies[0].message()["content"] or ""), around))

    remembered: list[Memory] = []
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
    found = []
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
    return found


def put(rules: Turns, window: Window, said: Sequence[Said]) -> tuple[Window, list[Rewrite]]:
    """The window with new turns. A system's text takes the place of the one before; what an assistant said may be shortened at once."""
    done: list[Rewrite] = []
    for one in said:
        if one.role == SYSTEM:
            window, changed = rules.instruct(window, one.text)
        else:
            window, changed = rules.add(window, one.role, one.text, hold=one.role == "user")
        done += rewrites_of(changed, window.turn)
    return window, done


def rewrites_of(changed: Sequence[plans.Rewrite], turn: int) -> list[Rewrite]:
    """As they are stored, with the strategy that wrote them."""
    return [
        Rewrite(change.before.sources[0], turn, change.before.text, None if change.after is None else change.after.text, "extract")
        for change in changed
    ]


def window_of(memory: Memory) -> Window:
    return msgspec.msgpack.decode(memory.window, type=Window)


def with_window(memory: Memory, window: Window) -> Memory:
    return msgspec.structs.replace(
        memory, tokens=window.size, turns=window.turn + 1, budget=window.budget, window=msgspec.msgpack.encode(window)
    )


async def _stored(call: Call, wanted: Wanted) -> tuple[Memory, Window]:
    svc, tenant, base = call.svc, call.caller.tenant, call.target.base
    memory_id = memories.check_id(wanted.memory_id)
    found = await svc.read(lambda conn: memories.find(conn, tenant, memory_id))
    if found is None:
        if wanted.budget is None:
            raise InvalidRequest(f"there is no memory {memory_id!r}; name its budget in tokens and it is made", param="memory.budget")
        if not MIN_BUDGET <= wanted.budget < base.max_context:
            rule = f"it must lie in {MIN_BUDGET}..{base.max_context - 1}, for {base.name} takes {base.max_context} tokens with its answer"
            raise InvalidRequest(f"memory.budget is {wanted.budget}; {rule}", param="memory.budget")
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


async def _commit(call: Call, rules: Turns, start: Memory, said: Sequence[Said], answer: str, frame: int) -> Memory:
    """The turns and the answer as part of the memory, whatever was added to it meanwhile."""
    text = answer.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    svc = call.svc
    for _ in range(RETRIES):
        stored = await svc.read(lambda conn: memories.find(conn, start.tenant, start.memory_id))
        window = window_of(stored) if stored is not None else Window(start.budget, (), -1, window_of(start).recent, FRAME)
        base = stored or msgspec.structs.replace(start, version=0)
        changed, turns, rewrites = await asyncio.to_thread(_told, rules, window, said, text, frame)
        after = with_window(base, changed)

        def write(conn: Any, after: Memory = after, turns: Any = turns, rewrites: Any = rewrites) -> Memory:
            return memories.commit(conn, after, turns, rewrites)

        try:
            return await svc.write(write)
        except Conflict:
            continue
    raise Conflict(f"memory {start.memory_id!r} is changed by many requests at once; send the request again", param="memory.id")


def _told(rules: Turns, window: Window, said: Sequence[Said], answer: str, frame: int) -> tuple[Window, list[memories.Turn], list[Rewrite]]:
    turns: list[memories.Turn] = []
    rewrites: list[Rewrite] = []
    for place, one in enumerate((*said, Said("assistant", answer))):
        if place == len(said):  # the prompt as it was is together: from here on what is around it takes what it took there
            window, done = _framed(rules, window, frame)
            rewrites += done
        before = window.turn
        window, done = put(rules, window, [one])
        rewrites += done
        if window.turn > before:
            turns.append(memories.Turn(window.turn, one.role, one.text))
    return window, turns, rewrites


def _framed(rules: Turns, window: Window, frame: int) -> tuple[Window, list[Rewrite]]:
    if frame <= window.frame:
        return msgspec.structs.replace(window, frame=frame), []
    window, changed = rules.tighten(window, frame)
    return window, rewrites_of(changed, window.turn)
