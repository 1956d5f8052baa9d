"""A model's chat template, however hostile, doesn't hold up the event loop; a long text's tokens don't either."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everlearn.api import rendering
from everlearn.api.chatmodels import ChatModel
from everlearn.errors import InvalidRequest, Overloaded
from everlearn.models.catalog import read_info
from everlearn.render import tokenizer as tokenizers
from everlearn.render.tools import FORMATS
from tests.render.test_sandbox import BOMBS
from tests.tiny import CHAT_TEMPLATE

HI = [{"role": "user", "content": "hello, world! " * 20}]


@pytest.fixture
def model(tiny_model: Path) -> Callable[[str], ChatModel]:
    """A function that gives the tiny model with a template."""

    def make(template: str) -> ChatModel:
        own = tokenizers.load(tiny_model)
        own.templates = {"default": template}
        return ChatModel(read_info("tiny", tiny_model, []), own, FORMATS["hermes"])

    return make


async def longest_hold(doing: asyncio.Future[Any]) -> float:
    """The most processor time that the loop's own thread was busy between two of its turns while `doing` was under way."""
    longest, before = 0.0, time.thread_time()
    while not doing.done():
        await asyncio.sleep(0)
        now = time.thread_time()
        longest, before = max(longest, now - before), now
        await asyncio.sleep(0.001)
        before = time.thread_time()
    return longest


@pytest.mark.parametrize("name", ["a long loop", "a macro that calls itself twice", "a list in a list, printed", "doubling with ~"])
def test_a_hostile_template_does_not_hold_the_loop(model: Callable[[str], ChatModel], name: str) -> None:
    chat = model(BOMBS[name])

    async def both() -> tuple[float, Any]:
        doing = asyncio.ensure_future(rendering.render(chat, HI, None, 300))
        longest = await longest_hold(doing)
        with pytest.raises(InvalidRequest):
            await doing
        return longest, None

    longest, _ = asyncio.run(both())
    assert longest < 0.1, f"the loop was held for {longest:.3f} s"


def test_a_slow_template_is_run_apart_and_gives_the_same(model: Callable[[str], ChatModel]) -> None:
    slow = model(
        "{% for i in range(200) %}{% for j in range(200) %}{% for k in range(20) %}{% endfor %}{% endfor %}{% endfor %}" + CHAT_TEMPLATE
    )
    quick = model(CHAT_TEMPLATE)

    async def said(chat: ChatModel, chars: int) -> str:
        return await rendering.render(chat, HI, None, chars)

    whole = asyncio.run(said(quick, 300))
    for _ in range(rendering.OVERRUNS + 1):
        assert asyncio.run(said(slow, 300)) == whole
    assert (quick.overruns, slow.overruns, slow.rendering) == (0, rendering.OVERRUNS, 0)
    assert asyncio.run(said(quick, 100_000)) == whole


def test_what_waits_for_a_slow_template_is_bounded(model: Callable[[str], ChatModel]) -> None:
    chat = model(BOMBS["a long loop"])
    chat.overruns, chat.rendering = rendering.OVERRUNS, rendering.MAX_WAITING
    with pytest.raises(Overloaded, match="slow"):
        asyncio.run(rendering.render(chat, HI, None, 300))


def test_long_texts_are_encoded_beside_the_loop_and_alike(model: Callable[[str], ChatModel]) -> None:
    chat, text = model(CHAT_TEMPLATE), "the quick brown fox, déjà vu 你好 🙂 <|im_end|> " * 2000

    async def both() -> tuple[int, list[int]]:
        doing, turns = asyncio.ensure_future(rendering.encode(chat, text)), 0
        while not doing.done():
            await asyncio.sleep(0.001)
            turns += 1
        return turns, await doing

    turns, ids = asyncio.run(both())
    assert ids == chat.tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
    assert turns > 5, "the loop stood still meanwhile"
