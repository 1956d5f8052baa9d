"""Thoughts through the unmodified `anthropic` SDK, on a tiny model that thinks: blocks, switches, budgets, and thoughts that are sent back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.live import KEY, LiveServer
from tests.wire.test_anthropic import HI, SCHEMA, WEATHER, prompt_tokens, refused, say, text


@pytest.fixture(scope="module")
def client(thinker: LiveServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=thinker.url + "/anthropic/api", api_key=KEY, max_retries=0) as made:
        yield made


def kinds(message: Any) -> list[str]:
    return [block.type for block in message.content]


def test_a_thought_is_a_block_before_the_answer(client) -> None:
    found = [say(client, seed=seed, max_tokens=60) for seed in range(4)]
    both = [answer for answer in found if kinds(answer) == ["thinking", "text"]]
    assert both, [kinds(answer) for answer in found]
    for answer in both:
        thought = answer.content[0]
        assert thought.thinking and "think>" not in thought.thinking and thought.signature == answer.everlearn["record"] and text(answer)
        assert 0 < answer.usage.output_tokens_details.thinking_tokens < answer.usage.output_tokens


def test_thinking_is_switched_off_and_on(client) -> None:
    silent = say(client, thinking={"type": "disabled"}, max_tokens=20)
    assert kinds(silent) == ["text"] and prompt_tokens(silent) != prompt_tokens(say(client))
    for fields in (
        {"thinking": {"type": "adaptive"}},
        {"thinking": {"type": "enabled", "budget_tokens": 19}},
        {"output_config": {"effort": "high"}},
    ):
        assert kinds(say(client, max_tokens=20, **fields))[0] == "thinking"


def test_a_budget_that_can_not_be_kept_is_refused(client) -> None:
    error = refused(client, max_tokens=4096, thinking={"type": "enabled", "budget_tokens": 1024})
    assert error["param"] == "thinking.budget_tokens" and "adaptive" in error["message"]
    assert refused(client, thinking={"type": "enabled", "budget_tokens": 0})["param"] == "thinking.budget_tokens"


def test_a_thought_comes_before_calls_and_formats(client) -> None:
    wanted: Any = {"type": "any", "disable_parallel_tool_use": True}
    answer = say(client, seed=2, tools=[WEATHER], tool_choice=wanted, max_tokens=400)
    assert kinds(answer) == ["thinking", "tool_use"] and set(answer.content[1].input) == {"city", "days"}
    result = {"type": "tool_result", "tool_use_id": answer.content[1].id, "content": "rain"}
    messages = [*HI, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    without = [*HI, {"role": "assistant", "content": answer.content[1:]}, {"role": "user", "content": [result]}]
    said = prompt_tokens(client.messages.create(model="tiny", max_tokens=1, messages=messages, tools=[WEATHER]))
    assert said > prompt_tokens(client.messages.create(model="tiny", max_tokens=1, messages=without, tools=[WEATHER]))
    formatted = say(client, seed=2, output_config={"format": {"type": "json_schema", "schema": SCHEMA}}, max_tokens=300)
    assert kinds(formatted) == ["thinking", "text"] and set(json.loads(text(formatted))) == {"city", "days"}
