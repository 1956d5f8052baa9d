"""/responses: what agents use of it (text, functions, streaming, previous_response_id). A response is kept as a record, and told from it.

`previous_response_id` continues the conversation of a record. It needs the record's content: `store: false`, or a key whose content
isn't kept, ends the chain. A response is there for the key that made it, and for keys that may read all records; to others of the tenant
it doesn't exist.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from everlearn.api import auth
from everlearn.api.calls import Call, Exchange
from everlearn.api.errors import STATUS
from everlearn.api.openai import checks, items, shapes, types
from everlearn.api.openai import responses_types as forms
from everlearn.api.openai.responses_events import Growing
from everlearn.api.openai.shapes import encode
from everlearn.api.replies import Step
from everlearn.api.routing import episode_of
from everlearn.api.services import Services, services
from everlearn.api.sse import EventStream
from everlearn.api.target import resolve
from everlearn.api.turns import Turn, open_turn
from everlearn.errors import EverlearnError, InvalidRequest, NotFound
from everlearn.store import records

router = APIRouter(tags=["openai: responses"])
ROUTE = "responses"
READERS = ("read", "admin")  # scopes with which everybody's are read, as in /v1/records
MISSING = "previous_response_not_found"  # OpenAI's word


@router.post("/responses", dependencies=[auth.scope("sample")])
async def create_response(request: Request) -> Response:
    svc, caller = services(request), auth.caller(request)
    form = await types.read(request, forms.ResponsesForm)
    draw = forms.draw_of(form)
    said = [*await earlier(svc, caller, form.previous_response_id), *items.messages_of(form.input)]
    target = await resolve(svc, caller, form.model, episode_of(request, form.user, said))
    chat = await svc.chat_models.get(target.base)
    forms.check(form, chat.format.thinks)
    offered, choice = forms.tools_and_choice(form)
    effort = form.reasoning.effort if form.reasoning else None
    turn = Turn(
        messages=[{"role": "system", "content": form.instructions}, *said] if form.instructions else said,
        tools=offered,
        tool_choice=choice,
        parallel_calls=form.parallel_tool_calls is not False,
        answer_schema=forms.answer_schema(form),
        switches=chat.thinking(effort) if effort else {},
        chars=len(await request.body()) + sum(len(str(message.get("content"))) for message in said),
    )
    call = Call(svc, caller, target, checks.asked(form, caller, ROUTE, turn.messages, "input"))
    opened = await open_turn(svc, caller.tenant, target, turn, draw, stream=bool(form.stream))
    await call.start(request, [opened])
    answer = Answer(call, form)
    if form.stream:
        await call.begun()
        return EventStream(answer.events(), call.headers, answer.failed, call.end)
    steps = await call.whole()
    return Response(encode(answer.whole(steps[0][0])), media_type="application/json", headers=call.headers)


@router.get("/responses/{response_id}", dependencies=[auth.scope("sample")])
async def get_response(request: Request, response_id: str) -> Response:
    svc = services(request)
    row, texts = await kept(svc, auth.caller(request), response_id)
    fields = {**texts["params"], "input": "", "user": row.user, "metadata": texts["metadata"]}
    form = msgspec.convert(fields, forms.ResponsesForm)
    reason = row.finish_reasons[0]
    usage = usage_of(row.prompt_tokens, row.completion_tokens, row.cached_tokens, 0)
    output = items.items_of(suffix_of(row.record_id), texts["answer"][0], status_of(reason))
    told = response_of(row.record_id, row.created_at, row.model, form, status_of(reason), output, usage)
    return Response(encode({**told, "everlearn": {"record": row.record_id, "version": row.model}}), media_type="application/json")


@router.delete("/responses/{response_id}", dependencies=[auth.scope("sample")])
async def delete_response(request: Request, response_id: str) -> dict[str, Any]:
    svc, caller = services(request), auth.caller(request)
    row, _ = await kept(svc, caller, response_id)
    await svc.write(lambda conn: records.delete(conn, caller.tenant, row.record_id))
    return {"id": response_id, "object": "response", "deleted": True}


# ---- what was said before ----


async def earlier(svc: Services, caller: auth.Caller, response_id: str | None) -> list[dict[str, Any]]:
    """The conversation up to a response, its instructions left out: those are each request's own."""
    if response_id is None:
        return []
    try:
        _, said = await kept(svc, caller, response_id)
    except NotFound as error:
        raise InvalidRequest(f"previous_response_id: {error.message}", param="previous_response_id", code=MISSING) from None
    messages = said["messages"][1:] if said["params"].get("instructions") else said["messages"]
    return [*messages, *said["answer"]]


async def kept(svc: Services, caller: auth.Caller, response_id: str) -> tuple[records.Row, dict[str, Any]]:
    """The record behind a response, and its texts."""
    missing = NotFound(f"there is no response {response_id[:80]!r}, or it isn't kept any more", param="response_id")
    if not response_id.startswith("resp_"):
        raise missing
    record_id = shapes.public_id("rec_", response_id.removeprefix("resp_"))
    await svc.records.settled(record_id)
    try:
        row, body = await svc.read(lambda conn: records.get(conn, caller.tenant, record_id))
    except NotFound:
        raise missing from None
    if row.route != ROUTE or (row.key_id != caller.key_id and caller.scopes.isdisjoint(READERS)):
        raise missing
    if body is None:
        raise NotFound(f"the content of response {response_id} wasn't kept (store was false, or the key's content isn't kept)")
    return row, msgspec.json.decode(body.texts)


# ---- what is said now ----


class Answer:
    """One response, whole or as events."""

    def __init__(self, call: Call, form: forms.ResponsesForm):
        self.call, self.form = call, form
        self.exchange: Exchange = call.exchanges[0]
        self.growing = Growing(suffix_of(self.exchange.record_id), self.exchange.opened.chat.tokenizer)

    def whole(self, step: Step) -> dict[str, Any]:
        self.growing.take(step)
        status = status_of(self.exchange.replies[0].finish)
        self.growing.end(status)
        return self.body(status)

    async def events(self) -> AsyncIterator[bytes]:
        growing = self.growing
        begun = self.body("in_progress")
        yield growing.event("response.created", response=begun) + growing.event("response.in_progress", response=begun)
        async for steps in self.exchange.steps():
            out = b"".join(event for _, step in steps for event in growing.take(step))
            if out:
                yield out
        status = status_of(self.exchange.replies[0].finish)
        out = b"".join(growing.end(status))
        yield out + growing.event(f"response.{status}", response=self.body(status))

    def failed(self, error: EverlearnError) -> bytes:
        """An error after the headers: the event that says so, and the response as it ended."""
        message = error.message.encode("utf-8", "backslashreplace").decode()
        told = {"code": "server_error" if STATUS.get(error.code, 500) >= 500 else "invalid_prompt", "message": message}
        first = self.growing.event("error", code=error.code, message=message, param=error.param)
        return first + self.growing.event("response.failed", response={**self.body("failed"), "error": told})

    def body(self, status: str) -> dict[str, Any]:
        exchange, call = self.exchange, self.call
        usage = None
        if status not in ("in_progress", "failed"):
            thought = exchange.replies[0].reasoning_tokens
            usage = usage_of(exchange.prompt_tokens, exchange.completion_tokens, exchange.cached_tokens, thought)
        told = response_of(exchange.record_id, call.created_at, call.target.name, self.form, status, self.growing.output, usage)
        return {**told, "everlearn": shapes.ours(call)}


def response_of(
    record_id: str,
    created_at: float,
    model: str,
    form: forms.ResponsesForm,
    status: str,
    output: list[dict[str, Any]],
    usage: dict[str, Any] | None,
) -> dict[str, Any]:
    told = {
        "id": f"resp_{suffix_of(record_id)}",
        "object": "response",
        "created_at": int(created_at),
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "model": model,
        "output": output,
        **forms.echoed(form),
    }
    return told if usage is None else {**told, "usage": usage}


def usage_of(prompt: int, completion: int, cached: int, reasoning: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": prompt - cached},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": prompt + completion,
    }


def status_of(finish: str) -> str:
    return "completed" if finish in ("stop", "tool_calls") else "incomplete"


def suffix_of(record_id: str) -> str:
    return record_id.removeprefix("rec_")
