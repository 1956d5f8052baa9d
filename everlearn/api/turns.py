"""From a conversation to what is sent to the engine: render, encode, check, and know how to read what comes back.

A dialect (everlearn/api/openai, ...) turns its request into a `Turn` (what was said, with which tools) and a `Draw` (how to draw), in the
shapes of chat templates and of no API. What it gets is `Opened`: the spec for `svc.serving.generate`, and a `Reply` for each sequence.

    target = await resolve(svc, caller, model)
    opened = await open_turn(svc, tenant, target, turn, draw, stream=True)
    generation = await svc.serving.generate(opened.spec)
    replies = opened.replies()
    async for parts in generation:
        for part in parts:
            step = replies[part.index].feed(part)
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from everlearn.api import rendering
from everlearn.api.chatmodels import ChatModel
from everlearn.api.images import ImageReader, place_pictures, take_pictures
from everlearn.api.replies import Reply
from everlearn.api.services import Services
from everlearn.api.serving import GRAMMAR_PARAM, GenerationSpec
from everlearn.api.target import Target
from everlearn.errors import InvalidRequest, Unsupported
from everlearn.render.images import look_at
from everlearn.types import BaseModelInfo, Grammar, ImageSpan, SamplingParams


class Draw(msgspec.Struct, frozen=True, kw_only=True):
    """How to draw, checked against the bounds by its dialect already. `top_logprobs` None: no log-probabilities are reported."""

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop_strings: list[str] = []
    stop_tokens: list[int] = []
    ignore_eos: bool = False
    n: int = 1
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    deadline: float | None = None


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """What was said and may be answered. `messages` and `tools` as chat templates take them (OpenAI's field names; `arguments` of calls
    may be JSON text). `tool_choice` is auto, none, required or {"type": "function", "function": {"name": ...}}. The answer matches
    `answer_schema`, or `grammar`, if there is one. `switches` are variables of the template (enable_thinking). `continue_final`: go on
    writing the last message. `chars`: about how long all of it is."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] = "auto"
    parallel_calls: bool = True
    answer_schema: dict[str, Any] | None = None
    grammar: Grammar | None = None
    switches: dict[str, Any] = {}
    continue_final: bool = False
    chars: int = 0

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that may be called."""
        return [] if self.tool_choice == "none" else self.tools


class Opened(msgspec.Struct, frozen=True):
    """A request that can be sent. `text` is the prompt's. `turn` None: a bare text is continued, and nothing is looked for in it."""

    chat: ChatModel
    spec: GenerationSpec
    text: str
    turn: Turn | None
    scored: bool

    @property
    def most_tokens(self) -> int:
        """What it may use at most, for limits."""
        return len(self.spec.prompt) + self.spec.n * self.spec.params.max_tokens

    def replies(self) -> list[Reply]:
        return [self._reply() for _ in range(self.spec.n)]

    def _reply(self) -> Reply:
        params, turn, format = self.spec.params, self.turn, self.chat.format
        return Reply(
            self.chat.tokenizer,
            parser=None if turn is None else format.stream(turn.offered, self.text),
            stop_tokens=params.stop_tokens,
            stop_strings=params.stop_strings,
            keep=() if turn is None else format.keep_ids,
            scored=self.scored,
            continues=turn is None or turn.continue_final,
            single_call=turn is not None and not turn.parallel_calls,
        )


async def open_turn(svc: Services, tenant: str, target: Target, turn: Turn, draw: Draw, *, stream: bool) -> Opened:
    """Raises UserErrors for what this model can't do, or hasn't room for, and Overloaded where the queue is full."""
    svc.serving.check_room(tenant, target)
    chat = await svc.chat_models.get(target.base)
    text, prompt, images = await encode_turn(svc, chat, turn)
    extra = {chat.eos_id} if chat.eos_id is not None and not draw.ignore_eos else set()
    params = _params(svc, target, len(prompt), draw, _grammar(chat, turn, text), "messages", extra)
    spec = _spec(svc, tenant, target, prompt, draw, params, stream, _bound_by(turn), images)
    return Opened(chat, spec, text, turn, draw.top_logprobs is not None)


async def open_text(
    svc: Services, tenant: str, target: Target, prompt: str | list[int], draw: Draw, *, grammar: Grammar | None, stream: bool
) -> Opened:
    """A bare prompt, as text or as token ids."""
    svc.serving.check_room(tenant, target)
    chat = await svc.chat_models.get(target.base)
    ids = prompt if isinstance(prompt, list) else await rendering.encode(chat, prompt, True)
    vocab = target.base.vocab_size
    if ids and not 0 <= min(ids) <= max(ids) < vocab:
        raise InvalidRequest(f"prompt holds token ids outside of 0..{vocab - 1}, those of {target.base.name}", param="prompt")
    params = _params(svc, target, len(ids), draw, grammar, "prompt", set())
    text = prompt if isinstance(prompt, str) else ""
    return Opened(chat, _spec(svc, tenant, target, ids, draw, params, stream), text, None, draw.top_logprobs is not None)


async def encode_turn(svc: Services, chat: ChatModel, turn: Turn) -> tuple[str, list[int], list[ImageSpan]]:
    """The prompt as text and as tokens, and the images among them."""
    reader = ImageReader(chat.base, svc.settings.images)
    messages, pictures = await take_pictures(turn.messages, reader, svc.settings.api.max_body_bytes)
    tools, format = turn.offered, chat.format
    shown = [_shown(tool) for tool in tools] if tools and format.native else None
    injected = format.inject(messages, tools)
    text = await rendering.render(chat, injected, shown, turn.chars, continue_final=turn.continue_final, kwargs=turn.switches)
    ids = await rendering.encode(chat, text)
    if not pictures:
        return text, ids, []
    return (text, *await look_at(place_pictures, ids, pictures, reader))


def _shown(tool: dict[str, Any]) -> dict[str, Any]:
    """`strict` is for the grammar; models have not seen it."""
    function = tool["function"]
    return tool if "strict" not in function else {**tool, "function": {k: v for k, v in function.items() if k != "strict"}}


def _grammar(chat: ChatModel, turn: Turn, text: str) -> Grammar | None:
    """What the reply must match: its calls' syntax, its answer's schema or grammar, either of them, or nothing."""
    format, offered, choice = chat.format, turn.offered, turn.tool_choice
    must_call = bool(offered) and choice != "auto"
    if turn.grammar is not None and offered:
        raise Unsupported(
            "structured_outputs can't be combined with tools; leave one out, or set tool_choice to none", param="structured_outputs"
        )
    if turn.answer_schema is not None and not must_call:
        return format.answer_grammar(turn.answer_schema, text, offered, turn.parallel_calls)
    calls = format.grammar(offered, choice, turn.parallel_calls, prompt=text) if offered else None
    return calls or turn.grammar


def _bound_by(turn: Turn) -> str:
    """The field that the grammar is made of: see `_grammar`."""
    if turn.offered and (turn.tool_choice != "auto" or turn.answer_schema is None):
        return "tools"
    return GRAMMAR_PARAM


def _spec(
    svc: Services,
    tenant: str,
    target: Target,
    prompt: list[int],
    draw: Draw,
    params: SamplingParams,
    stream: bool,
    bound_by: str = GRAMMAR_PARAM,
    images: Sequence[ImageSpan] = (),
) -> GenerationSpec:
    most = svc.settings.api.request_seconds
    return GenerationSpec(
        tenant=tenant,
        target=target,
        prompt=prompt,
        images=list(images),
        params=params,
        n=draw.n,
        top_logprobs=draw.top_logprobs or 0,
        prompt_logprobs=draw.prompt_logprobs,
        deadline=min(draw.deadline or most, most),
        stream=stream,
        bound_by=bound_by,
    )


def room_of(svc: Services, base: BaseModelInfo) -> int:
    """Tokens that a prompt and its answer may take together: what the model was made for, as far as the engine has memory for it. How much
    that is of a model that isn't loaded yet nobody knows; the engine then lowers max_tokens."""
    return min(base.max_context, svc.engine.kv_tokens.get(base.name, base.max_context))


def _params(
    svc: Services, target: Target, length: int, draw: Draw, grammar: Grammar | None, field: str, stop_tokens: set[int]
) -> SamplingParams:
    base = target.base
    room = room_of(svc, base)
    if length == 0:
        raise InvalidRequest(f"{field} is empty; there is nothing to answer", param=field)
    if length >= room + (draw.max_tokens == 0):
        raise InvalidRequest(
            f"{field} takes {length} tokens and {base.name} has room for {room}, its answer included; shorten it",
            param=field,
            code="context_length_exceeded",
        )
    vocab = base.vocab_size
    for name, ids in (("logit_bias", draw.logit_bias), ("stop_token_ids", draw.stop_tokens)):
        if bad := [number for number in ids if not 0 <= number < vocab]:
            raise InvalidRequest(f"{name} names token {bad[0]}; those of {base.name} are 0 to {vocab - 1}", param=name)
    ends = stop_tokens if draw.ignore_eos else stop_tokens | set(base.eos_token_ids)
    return SamplingParams(
        max_tokens=room - length if draw.max_tokens is None else min(draw.max_tokens, room - length),
        seed=secrets.randbits(62) if draw.seed is None else draw.seed,
        temperature=draw.temperature,
        top_k=min(draw.top_k, vocab),
        top_p=draw.top_p,
        stop_tokens=sorted(ends | set(draw.stop_tokens)),
        stop_strings=draw.stop_strings,
        min_p=draw.min_p,
        presence_penalty=draw.presence_penalty,
        frequency_penalty=draw.frequency_penalty,
        repetition_penalty=draw.repetition_penalty,
        logit_bias=draw.logit_bias,
        min_tokens=min(draw.min_tokens, room - length),
        grammar=grammar,
        lowers=True,
    )
