"""/v1/tokenize and /v1/detokenize: a conversation or a text as this server's models read it, and back. What trains on token ids needs no
tokenizer of its own then. Field names are those of vLLM's routes."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Request

from everlearn.api import auth, bounds, rendering
from everlearn.api.auth import scope
from everlearn.api.openai import checks, types
from everlearn.api.services import Services, services
from everlearn.api.target import Target, resolve
from everlearn.api.turns import encode_turn, room_of
from everlearn.errors import InvalidRequest

router = APIRouter(prefix="/v1", tags=["tokens"], dependencies=[scope("train", "sample", "read")])


class TokenizeForm(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Either `messages` (with what a chat has beside them), as the prompt of the next answer, or `prompt`."""

    model: str
    prompt: str | None = None
    add_special_tokens: bool = True
    messages: list[types.Message] | None = None
    tools: list[types.ToolForm] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None


class DetokenizeForm(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str
    tokens: list[int]


@router.post("/tokenize")
async def tokenize(request: Request) -> dict[str, Any]:
    """The token ids, how many they are, how many the model takes, how many of them this server has room for, and the token with which it
    ends a turn."""
    form = await types.read(request, TokenizeForm)
    if (form.prompt is None) == (form.messages is None):
        raise InvalidRequest("give one of prompt and messages", param="prompt")
    svc, target = await _target(request, form.model)
    chat = await svc.chat_models.get(target.base)
    if form.messages is not None:
        asked = types.ChatForm(
            model=form.model,
            messages=form.messages,
            tools=form.tools,
            chat_template_kwargs=form.chat_template_kwargs,
            continue_final_message=form.continue_final_message,
        )
        _, ids, _ = await encode_turn(svc, chat, checks.chat_turn(asked, chat.thinking, len(await request.body())))
    else:
        ids = await rendering.encode(chat, form.prompt or "", form.add_special_tokens)
    end = chat.eos_id if chat.eos_id is not None else next(iter(target.base.eos_token_ids), None)
    most, room = target.base.max_context, room_of(svc, target.base)
    return {"object": "tokens", "tokens": ids, "count": len(ids), "max_model_len": most, "room": room, "end_token": end}


@router.post("/detokenize")
async def detokenize(request: Request) -> dict[str, Any]:
    """The text of token ids, without special tokens."""
    form = await types.read(request, DetokenizeForm)
    svc, target = await _target(request, form.model)
    if len(form.tokens) > bounds.MAX_TOKENS or not all(0 <= number < target.base.vocab_size for number in form.tokens):
        raise InvalidRequest(f"tokens must be {bounds.MAX_TOKENS} ids at most, from 0 to {target.base.vocab_size - 1}", param="tokens")
    chat = await svc.chat_models.get(target.base)
    return {"object": "text", "prompt": await asyncio.to_thread(chat.tokenizer.decode, form.tokens, True)}


async def _target(request: Request, model: str) -> tuple[Services, Target]:
    svc, caller = services(request), auth.caller(request)
    target = await resolve(svc, caller, model)
    svc.limiter.check_model(caller, target.name)
    return svc, target
