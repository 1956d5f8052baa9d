"""POST /messages and /messages/count_tokens: a conversation in blocks, and what the model says next, whole or as events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from everlearn.api import auth
from everlearn.api.anthropic import conversation, types
from everlearn.api.anthropic.blocks import Blocks, encode, event
from everlearn.api.calls import Asked, Call, Exchange
from everlearn.api.errors import STATUS, anthropic_envelope
from everlearn.api.openai import checks, shapes
from everlearn.api.openai.types import read
from everlearn.api.replies import Step
from everlearn.api.routing import episode_of
from everlearn.api.services import services
from everlearn.api.sse import EventStream
from everlearn.api.target import resolve
from everlearn.api.turns import encode_turn, open_turn
from everlearn.errors import EverlearnError, Unsupported

PREFIX = "/anthropic/api/v1"  # the SDK puts /v1/messages behind its base_url
router = APIRouter(tags=["anthropic: messages"])
# Of the API, as the header anthropic-version says it. The later takes less than the earlier, and answers alike; here both are read alike.
VERSIONS = ("2023-06-01", "2026-10-21")
REFUSED_HEADERS = {
    "anthropic-user-profile-id": "there are no profiles here; leave it out",
    "anthropic-workspace-id": "a key belongs to one tenant; leave it out",
}
PING = event("ping")


@router.post("/messages", dependencies=[auth.scope("sample")])
async def create_message(request: Request) -> Response:
    svc, caller = services(request), auth.caller(request)
    check_headers(request)
    form = await read(request, types.MessagesForm)
    draw = types.draw_of(form)
    user = form.metadata.user_id if form.metadata else None
    target = await resolve(svc, caller, form.model, episode_of(request, user, form.messages))
    chat = await svc.chat_models.get(target.base)
    turn = conversation.turn_of(form, chat, len(await request.body()))
    call = Call(svc, caller, target, asked(form, turn.messages))
    with own_names(form):
        opened = await open_turn(svc, caller.tenant, target, turn, draw, stream=bool(form.stream))
        await call.start(request, [opened])
        answer = Answer(call, form)
        if form.stream:
            await call.begun()
            return EventStream(answer.events(), call.headers, answer.failed, call.end, PING)
        steps = await call.whole()
    return Response(encode(answer.whole(steps[0][0])), media_type="application/json", headers=call.headers)


@router.post("/messages/count_tokens", dependencies=[auth.scope("sample")])
async def count_tokens(request: Request) -> dict[str, int]:
    """How long the prompt of such a message is; nothing is drawn."""
    svc, caller = services(request), auth.caller(request)
    check_headers(request)
    form = await read(request, types.CountForm)
    target = await resolve(svc, caller, form.model)
    svc.limiter.check_model(caller, target.name)
    chat = await svc.chat_models.get(target.base)
    _, prompt, _ = await encode_turn(svc, chat, conversation.turn_of(form, chat, len(await request.body())))
    return {"input_tokens": len(prompt)}


def check_headers(request: Request) -> None:
    """What headers may ask for. `anthropic-beta` asks for nothing by itself: the fields that it opens are known here or refused."""
    version = request.headers.get("anthropic-version", VERSIONS[-1])
    if version not in VERSIONS:
        raise Unsupported(f"anthropic-version {version[:40]!r} is not offered; {' and '.join(VERSIONS)} are", param="anthropic-version")
    for name, why in REFUSED_HEADERS.items():
        if name in request.headers:
            raise Unsupported(f"{name} is not offered: {why}", param=name)


def asked(form: types.MessagesForm, said: list[dict[str, Any]]) -> Asked:
    def params() -> Any:
        return {name: value for name, value in msgspec.to_builtins(form).items() if name not in ("messages", "system", "metadata")}

    user = form.metadata.user_id if form.metadata else None
    return Asked(route="messages", messages=said, params=params, user=checks.label(user, "metadata.user_id"))


@contextmanager
def own_names(form: types.MessagesForm) -> Iterator[None]:
    """Errors from below name the fields of the pipeline; here they have those of this API."""
    try:
        yield
    except EverlearnError as error:
        error.param = name_of(form, error.param)
        raise


def name_of(form: types.MessagesForm, param: str | None) -> str | None:
    if param != "response_format":
        return param
    return "output_config.format" if form.output_config is not None and form.output_config.format is not None else "tools"


class Answer:
    """One message, whole or as events."""

    def __init__(self, call: Call, form: types.MessagesForm):
        self.call, self.form = call, form
        self.exchange: Exchange = call.exchanges[0]
        held = self.exchange.opened.spec.params.grammar is not None  # then every call is what its schema says
        wishes = {tool.get("name"): tool.get("eager_input_streaming") for tool in form.tools or []}

        def eager(name: str) -> bool:
            wish = wishes.get(name)
            return held if wish is None else bool(wish)

        self.blocks = Blocks(self.exchange.record_id, eager)

    def whole(self, step: Step) -> dict[str, Any]:
        self.blocks.take(step)
        self.blocks.end()
        return {**self.body(), **self.ended(), "usage": self.usage(), "everlearn": shapes.ours(self.call)}

    async def events(self) -> AsyncIterator[bytes]:
        begun = {**self.body(), "stop_reason": None, "stop_sequence": None, "stop_details": None, "usage": self.usage()}
        yield event("message_start", message=begun) + PING
        async for steps in self.exchange.steps():
            out = b"".join(told for _, step in steps for told in self.blocks.take(step))
            if out:
                yield out
        last = event("message_delta", delta=self.ended(), usage=self.usage())
        yield b"".join(self.blocks.end()) + last + event("message_stop", everlearn=shapes.ours(self.call))

    def failed(self, error: EverlearnError) -> bytes:
        """An error after the headers."""
        message = error.message.encode("utf-8", "backslashreplace").decode()
        told = anthropic_envelope(STATUS.get(error.code, 500), error.code, message, name_of(self.form, error.param))
        return b"event: error\ndata: %b\n\n" % encode(told)

    def body(self) -> dict[str, Any]:
        return {
            "id": shapes.public_id("msg_", self.exchange.record_id),
            "type": "message",
            "role": "assistant",
            "model": self.call.target.name,
            "content": self.blocks.content,
        }

    def ended(self) -> dict[str, Any]:
        """Why it ended. Time that is over has no word here either: `everlearn.finish` tells."""
        reply = self.exchange.replies[0]
        reason, stop = "max_tokens", None
        if reply.finish == "tool_calls":
            reason = "tool_use"
        elif reply.finish == "stop":
            reason, stop = ("end_turn", None) if reply.stop_string is None else ("stop_sequence", reply.stop_string)
        elif reply.finish == "length" and self.exchange.opened.spec.params.max_tokens < self.form.max_tokens:
            reason = "model_context_window_exceeded"
        return {"stop_reason": reason, "stop_sequence": stop, "stop_details": None}

    def usage(self) -> dict[str, Any]:
        """As Anthropic counts: what was read from the cache is not among the input tokens."""
        exchange = self.exchange
        return {
            "input_tokens": exchange.prompt_tokens - exchange.cached_tokens,
            "cache_read_input_tokens": exchange.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": exchange.completion_tokens,
            "output_tokens_details": {"thinking_tokens": exchange.replies[0].reasoning_tokens},
        }
