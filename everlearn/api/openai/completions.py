"""POST /completions: bare prompts, as text or token ids, continued, echoed and scored.

`echo` puts the prompt before its continuation, with log-probabilities of its tokens where they are asked for; with max_tokens 0 nothing
is drawn and a prompt is merely scored. `suffix` asks to fill in the middle, for models whose vocabulary has the marks for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from everlearn.api import auth, bounds, rendering
from everlearn.api.calls import Call, Exchange
from everlearn.api.chatmodels import ChatModel
from everlearn.api.openai import checks, shapes, types
from everlearn.api.openai.shapes import LOWEST, encode
from everlearn.api.replies import ContentDelta, ScoredToken, Step
from everlearn.api.routing import episode_of
from everlearn.api.services import services
from everlearn.api.sse import DONE, EventStream
from everlearn.api.target import resolve
from everlearn.api.turns import Draw, open_text
from everlearn.errors import InvalidRequest, Unsupported
from everlearn.render.detokenize import TextStream
from everlearn.render.tokenizer import ChatTokenizer
from everlearn.types import SampleResult

router = APIRouter(tags=["openai: completions"])
DEFAULT_TOKENS = 16  # OpenAI's

# Marks of filling in the middle, in the order prefix, suffix, middle: Qwen-Coder, StarCoder, DeepSeek-Coder, CodeLlama, Codestral-like.
INFILL = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


@router.post("/completions", dependencies=[auth.scope("sample")])
async def create_completion(request: Request) -> Response:
    svc, caller = services(request), auth.caller(request)
    form = await types.read(request, types.CompletionForm)
    draw = draw_of(form)
    target = await resolve(svc, caller, form.model, episode_of(request, form.user, form.prompt))
    chat = await svc.chat_models.get(target.base)
    prompts = [await encoded(chat, prompt, form.suffix) for prompt in prompts_of(form)]
    grammar = checks.structured(form.structured_outputs)
    opened = [await open_text(svc, caller.tenant, target, prompt, draw, grammar=grammar, stream=bool(form.stream)) for prompt in prompts]
    call = Call(svc, caller, target, checks.asked(form, caller, "completions", form.prompt, "prompt"))
    await call.start(request, opened)
    if form.stream:
        await call.begun()
        return EventStream(Chunks(call, form).events(), call.headers, shapes.error_event, call.end)
    steps = await call.whole()
    choices = [
        choice(exchange, form, index, index + place * draw.n, step)
        for place, exchange in enumerate(call.exchanges)
        for index, step in enumerate(steps[place])
    ]
    told = {**shared(call), "choices": choices, "usage": shapes.usage(call.exchanges), "everlearn": shapes.ours(call)}
    return Response(encode(told), media_type="application/json", headers=call.headers)


def draw_of(form: types.CompletionForm) -> Draw:
    n = form.n or 1
    if form.best_of not in (None, n):
        raise Unsupported(f"best_of {form.best_of} with n {n}: only as many are drawn as are shown; leave best_of out", param="best_of")
    if form.logprobs is not None and not 0 <= form.logprobs <= bounds.MAX_TOP_LOGPROBS:
        raise InvalidRequest(f"logprobs is {form.logprobs}; it must lie in 0..{bounds.MAX_TOP_LOGPROBS}", param="logprobs")
    if form.suffix and form.echo:
        raise InvalidRequest("echo and suffix exclude each other: what is echoed would not be what was sent", param="suffix")
    most = DEFAULT_TOKENS if form.max_tokens is None else form.max_tokens
    if most == 0 and not form.echo:
        raise InvalidRequest("max_tokens 0 gives nothing; with echo it scores the prompt", param="max_tokens")
    if form.echo and form.stream and form.logprobs is not None:
        raise Unsupported("log-probabilities of an echoed prompt aren't streamed; leave out echo, logprobs or stream", param="echo")
    draw = checks.draw_of(form, most, form.logprobs)
    if form.echo and form.logprobs is not None:
        return msgspec.structs.replace(draw, prompt_logprobs=form.logprobs)
    return draw


def prompts_of(form: types.CompletionForm) -> list[str | list[int]]:
    """Texts and lists of token ids."""
    prompt = form.prompt
    if isinstance(prompt, str):
        return [prompt]
    ids = [one for one in prompt if isinstance(one, int)]
    if ids and len(ids) == len(prompt):
        return [ids]
    if ids:
        raise InvalidRequest("prompt mixes token ids with texts or lists; send one text, token ids, or a list of either", param="prompt")
    if not 1 <= len(prompt) <= bounds.MAX_PROMPTS or len(prompt) * (form.n or 1) > bounds.MAX_CHOICES:
        raise InvalidRequest(
            f"prompt holds {len(prompt)} prompts; 1 to {bounds.MAX_PROMPTS} are taken, and times n at most {bounds.MAX_CHOICES} choices",
            param="prompt",
        )
    return [one for one in prompt if not isinstance(one, int)]


async def encoded(chat: ChatModel, prompt: str | list[int], suffix: str | None) -> list[int]:
    """The tokens of a prompt; with a suffix, of the three parts between the model's marks."""
    if not suffix:
        return prompt if isinstance(prompt, list) else await rendering.encode(chat, prompt, True)
    for marks in INFILL:
        ids = [chat.tokenizer.id_of(mark) for mark in marks]
        if None not in ids:
            break
    else:
        raise Unsupported(
            f"suffix: {chat.base.name} was not made to fill in the middle (its vocabulary has no marks for it)", param="suffix"
        )
    if isinstance(prompt, list):
        raise InvalidRequest("suffix goes with a prompt of text, not with token ids", param="suffix")
    before, after = await asyncio.to_thread(lambda: (chat.tokenizer.encode(prompt), chat.tokenizer.encode(suffix)))
    return [ids[0], *before, ids[1], *after, ids[2]]  # type: ignore[list-item]


def shared(call: Call) -> dict[str, Any]:
    return {
        "id": shapes.public_id("cmpl-", call.record_ids[0]),
        "object": "text_completion",
        "created": int(call.created_at),
        "model": call.target.name,
        "system_fingerprint": call.target.fingerprint,
    }


# ---- whole ----


def choice(exchange: Exchange, form: types.CompletionForm, index: int, number: int, step: Step) -> dict[str, Any]:
    reply = exchange.replies[index]
    text, logprobs = "".join(reply.content), None
    echoed = ""
    if form.echo:
        echoed, offsets = echo_of(exchange)
    if form.logprobs is not None:
        logprobs = scores(exchange.opened.chat.tokenizer, step.scored, len(echoed))
        if form.echo:
            assert exchange.generation.value is not None
            before = prompt_scores(exchange, exchange.generation.value, offsets, form.logprobs)
            logprobs = {name: before[name] + logprobs[name] for name in logprobs}
    return {"index": number, "text": echoed + text, "logprobs": logprobs, "finish_reason": shapes.finish_reason(reply.finish)}


def echo_of(exchange: Exchange) -> tuple[str, list[int]]:
    """The prompt's text, and where in it each of its tokens begins."""
    stream = TextStream(exchange.opened.chat.tokenizer)
    text = stream.add(exchange.opened.spec.prompt) + stream.finish()
    return exchange.opened.text or text, stream.offsets


def scores(tokenizer: ChatTokenizer, tokens: Sequence[ScoredToken], start: int) -> dict[str, list[Any]]:
    """The old form of log-probabilities. Alternatives hold the drawn token too; `start` is where the continuation's text begins."""
    return {
        "tokens": [name_of(tokenizer, token.id) for token in tokens],
        "token_logprobs": [max(token.logprob, LOWEST) for token in tokens],
        "top_logprobs": [alternatives(tokenizer, [*token.top, (token.id, token.logprob)]) for token in tokens],
        "text_offset": [start + token.offset for token in tokens],
    }


def prompt_scores(exchange: Exchange, result: SampleResult, offsets: list[int], num_top: int) -> dict[str, list[Any]]:
    """The same of the prompt; its first token has no context, so it has no score."""
    assert result.prompt_logprobs is not None
    tokenizer, prompt = exchange.opened.chat.tokenizer, exchange.opened.spec.prompt
    logprobs = result.prompt_logprobs.numpy().tolist()
    rows: list[list[tuple[int, float]]] = [[] for _ in prompt]
    if num_top and result.topk_prompt_logprobs is not None:
        top = result.topk_prompt_logprobs
        pairs = zip(top.token_ids.numpy().tolist(), top.logprobs.numpy().tolist(), strict=True)
        rows = [list(zip(ids, values, strict=True)) for ids, values in pairs]
    return {
        "tokens": [name_of(tokenizer, number) for number in prompt],
        "token_logprobs": [None, *(max(value, LOWEST) for value in logprobs[1:])],
        "top_logprobs": [
            None,
            *(alternatives(tokenizer, [*rows[place], (prompt[place], logprobs[place])]) for place in range(1, len(prompt))),
        ],
        "text_offset": offsets,
    }


def alternatives(tokenizer: ChatTokenizer, scored: Sequence[tuple[int, float]]) -> dict[str, float]:
    return {name_of(tokenizer, number): max(score, LOWEST) for number, score in scored}


def name_of(tokenizer: ChatTokenizer, number: int) -> str:
    """The token's text; a piece of a character is spelled by its bytes, so that two pieces don't share a name."""
    data = tokenizer.token_bytes(number)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


# ---- streamed ----


class Chunks:
    """Events of all choices of all prompts, as they come."""

    def __init__(self, call: Call, form: types.CompletionForm):
        self.call, self.form = call, form
        self.include_usage = form.stream_options is not None and bool(form.stream_options.include_usage)
        self._head = b"data: " + encode(shared(call))[:-1]
        self._tail = b',"usage":null}\n\n' if self.include_usage else b"}\n\n"

    async def events(self) -> AsyncIterator[bytes]:
        call, n = self.call, self.call.exchanges[0].opened.spec.n
        unfinished = n * len(call.exchanges)
        if self.form.echo:
            echoes = [echo_of(exchange)[0] for exchange in call.exchanges]
            yield b"".join(self._chunk(number, encode(echoes[number // n]), None, b"null") for number in range(unfinished))
        async for place, steps in merged(call.exchanges):
            out: list[bytes] = []
            for index, step in steps:
                unfinished -= bool(step.finish)
                self._write(out, place, place * n + index, step, last=unfinished == 0)
            if out:
                yield b"".join(out)
        if self.include_usage:
            told = {"choices": [], "usage": shapes.usage(call.exchanges), "everlearn": shapes.ours(call)}
            yield self._head + b"," + encode(told)[1:] + b"\n\n"
        yield DONE

    def _write(self, out: list[bytes], place: int, number: int, step: Step, last: bool) -> None:
        text = "".join(delta.text for delta in step.deltas if isinstance(delta, ContentDelta))
        if not (text or step.scored or step.finish):
            return
        logprobs = None
        if self.form.logprobs is not None:
            logprobs = scores(self.call.exchanges[place].opened.chat.tokenizer, step.scored, 0)
        finish = encode(shapes.finish_reason(step.finish)) if step.finish else b"null"
        ours = b',"everlearn":' + encode(shapes.ours(self.call)) if last and not self.include_usage else b""
        out.append(self._chunk(number, encode(text), logprobs, finish, ours))

    def _chunk(self, number: int, text: bytes, logprobs: dict[str, Any] | None, finish: bytes, more: bytes = b"") -> bytes:
        return b'%b,"choices":[{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}]%b%b' % (
            self._head, number, text, encode(logprobs), finish, more, self._tail,
        )  # fmt: skip


async def merged(exchanges: list[Exchange]) -> AsyncIterator[tuple[int, list[tuple[int, Step]]]]:
    """The steps of all exchanges as they come, each with its exchange's place."""
    if len(exchanges) == 1:
        async for steps in exchanges[0].steps():
            yield 0, steps
        return
    queue: asyncio.Queue[tuple[int, list[tuple[int, Step]]] | Exception | None] = asyncio.Queue()

    async def pump(place: int) -> None:
        try:
            async for steps in exchanges[place].steps():
                queue.put_nowait((place, steps))
            queue.put_nowait(None)
        except Exception as error:  # told by whoever reads the queue
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(place)) for place in range(len(exchanges))]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
