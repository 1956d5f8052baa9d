"""POST /chat/completions: a conversation in, what the model says next out, whole or as it is drawn."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from everlearn.api import auth, remembering
from everlearn.api.calls import Call, Exchange
from everlearn.api.openai import checks, shapes, types
from everlearn.api.openai.shapes import encode
from everlearn.api.replies import ContentDelta, Delta, ReasoningDelta, ScoredToken, Step
from everlearn.api.routing import episode_of
from everlearn.api.services import services
from everlearn.api.sse import DONE, EventStream
from everlearn.api.target import resolve
from everlearn.api.turns import open_turn
from everlearn.store.placing import of_memory

router = APIRouter(tags=["openai: chat"])


@router.post("/chat/completions", dependencies=[auth.scope("sample")])
async def create_chat_completion(request: Request) -> Response:
    svc, caller = services(request), auth.caller(request)
    form = await types.read(request, types.ChatForm)
    draw = checks.chat_draw(form)
    memory = checks.memory(form, request.headers)
    episode = episode_of(request, form.user, form.messages, None if memory is None else memory.memory_id)
    target = await resolve(svc, caller, form.model, episode)
    chat = await svc.chat_models.get(target.base)
    turn = checks.chat_turn(form, chat.thinking, len(await request.body()))
    call = Call(svc, caller, target, checks.asked(form, caller, "chat.completions", turn.messages, "messages"))
    if memory is not None:
        call.episode_id = of_memory(memory.memory_id)  # a header's takes its place
        turn = await remembering.open_memory(call, chat, memory, turn, draw)
    opened = await open_turn(svc, caller.tenant, target, turn, draw, stream=bool(form.stream))
    await call.start(request, [opened])
    if form.stream:
        await call.begun()
        include_usage = form.stream_options is not None and bool(form.stream_options.include_usage)
        return EventStream(Chunks(call, include_usage).events(), call.headers, shapes.error_event, call.end)
    steps = await call.whole()
    return Response(encode(body(call, steps[0])), media_type="application/json", headers=call.headers)


# ---- whole ----


def body(call: Call, steps: list[Step]) -> dict[str, Any]:
    exchange = call.exchanges[0]
    return {
        "id": shapes.public_id("chatcmpl-", exchange.record_id),
        "object": "chat.completion",
        "created": int(call.created_at),
        "model": call.target.name,
        "choices": [choice(exchange, index, step) for index, step in enumerate(steps)],
        "usage": shapes.usage(call.exchanges),
        "system_fingerprint": call.target.fingerprint,
        "everlearn": shapes.ours(call),
    }


def choice(exchange: Exchange, index: int, step: Step) -> dict[str, Any]:
    reply = exchange.replies[index]
    message = reply.message()
    if reply.calls and not message["content"]:
        message["content"] = None
    message["refusal"] = None
    logprobs = None
    if exchange.opened.scored:
        logprobs = {"content": shapes.scored(exchange.opened.chat.tokenizer, step.scored), "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": shapes.finish_reason(reply.finish)}


# ---- streamed ----


class Chunks:
    """Events of one answer. Everything that its chunks share is encoded once: a chunk costs a few microseconds."""

    def __init__(self, call: Call, include_usage: bool):
        self.call, self.exchange, self.include_usage = call, call.exchanges[0], include_usage
        shared = {
            "id": shapes.public_id("chatcmpl-", self.exchange.record_id),
            "object": "chat.completion.chunk",
            "created": int(call.created_at),
            "model": call.target.name,
            "system_fingerprint": call.target.fingerprint,
        }
        self._head = b"data: " + encode(shared)[:-1]
        self._tail = b"}\n\n"
        if include_usage:
            self._tail = b',"usage":null}\n\n'

    async def events(self) -> AsyncIterator[bytes]:
        replies = self.exchange.replies
        yield b"".join(
            self._chunk(index, b'{"role":"assistant","content":"","refusal":null}', None, b"null") for index in range(len(replies))
        )
        unfinished = len(replies)
        async for steps in self.exchange.steps():
            out: list[bytes] = []
            for index, step in steps:
                unfinished -= bool(step.finish)
                self._write(out, index, step, last=unfinished == 0)
            if out:
                yield b"".join(out)
        if self.include_usage:
            told = {"choices": [], "usage": shapes.usage(self.call.exchanges), "everlearn": shapes.ours(self.call)}
            yield self._head + b"," + encode(told)[1:] + b"\n\n"
        yield DONE

    def _write(self, out: list[bytes], index: int, step: Step, last: bool) -> None:
        for part in step.parts or [step]:
            scored: list[ScoredToken] | None = part.scored
            if part.scored and not part.deltas:
                out.append(self._chunk(index, b'{"content":""}', scored, b"null"))
            for delta in part.deltas:
                out.append(self._chunk(index, delta_of(delta), scored, b"null"))
                scored = None  # a part's tokens are told once
        if step.finish:
            ours = b',"everlearn":' + encode(shapes.ours(self.call)) if last and not self.include_usage else b""
            out.append(self._chunk(index, b"{}", None, b'"' + shapes.finish_reason(step.finish).encode() + b'"', ours))

    def _chunk(self, index: int, delta: bytes, tokens: list[ScoredToken] | None, finish: bytes, more: bytes = b"") -> bytes:
        logprobs = b"null"
        if tokens:
            logprobs = encode({"content": shapes.scored(self.exchange.opened.chat.tokenizer, tokens), "refusal": None})
        return b'%b,"choices":[{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}]%b%b' % (
            self._head, index, delta, logprobs, finish, more, self._tail,
        )  # fmt: skip


def delta_of(delta: Delta) -> bytes:
    if isinstance(delta, ContentDelta):
        return b'{"content":' + encode(delta.text) + b"}"
    if isinstance(delta, ReasoningDelta):
        return b'{"reasoning_content":' + encode(delta.text) + b"}"
    call: dict[str, Any] = {"index": delta.index, "function": {"arguments": delta.arguments}}
    if delta.id is not None:
        call = {
            "index": delta.index,
            "id": delta.id,
            "type": "function",
            "function": {"name": delta.name, "arguments": delta.arguments},
        }
    return encode({"tool_calls": [call]})
