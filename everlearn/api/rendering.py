"""A conversation to the text and tokens of its prompt, without holding up the event loop.

A short conversation is rendered at once: a thread would cost more than the template does. But a template is a program that came with a
model, so what it may take of the loop is small; one that needs more again and again is run in threads from then on, two at once for all
such models, and a model of which many requests wait there refuses more. So a hostile template holds up nobody but its own model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from everlearn.api.chatmodels import ChatModel
from everlearn.errors import Overloaded
from everlearn.render import template

INLINE_CHARS = 8192  # a longer conversation is rendered and encoded in a thread: the event loop has others to serve
INLINE_SECONDS = 0.05  # of processor time; about 25 times what a chat of that length needs
OVERRUNS = 3  # a template that took longer than that so many times is slow; once may be a pause of the interpreter
MAX_WAITING = 32  # of one model
_threads = ThreadPoolExecutor(2, "template")


async def render(
    chat: ChatModel, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, chars: int, **given: Any
) -> str:
    """`template.render` of what is about `chars` long. Raises Overloaded where too many of the model's requests wait for its template."""
    if chat.overruns >= OVERRUNS:
        return await _render_apart(chat, partial(template.render, chat.tokenizer, messages, tools, **given))
    if chars > INLINE_CHARS:
        return await asyncio.to_thread(template.render, chat.tokenizer, messages, tools, **given)
    text = template.render_within(INLINE_SECONDS, chat.tokenizer, messages, tools, **given)
    if text is None:
        chat.overruns += 1
        return await _render_apart(chat, partial(template.render, chat.tokenizer, messages, tools, **given))
    return text


async def _render_apart(chat: ChatModel, whole: partial[str]) -> str:
    if chat.rendering >= MAX_WAITING:
        raise Overloaded(
            f"{chat.rendering} requests wait for the chat template of {chat.base.name}, which is slow; try again later", retry_after=5
        )
    chat.rendering += 1
    try:
        return await asyncio.get_running_loop().run_in_executor(_threads, whole)
    finally:
        chat.rendering -= 1


async def encode(chat: ChatModel, text: str, add_special: bool = False) -> list[int]:
    """A text's tokens; `add_special`: with those that the tokenizer itself puts around a text."""
    if len(text) > 4 * INLINE_CHARS:  # as the templates of long system messages and many tools make of a short request
        return await asyncio.to_thread(chat.tokenizer.encode, text, add_special)
    return chat.tokenizer.encode(text, add_special)
