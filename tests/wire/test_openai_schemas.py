"""Random JSON schemas as `response_format`, through the `openai` SDK against a real server: each comes to its end
and matches. 40 of them, and with `-m slow` 200."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from everlearn.render import tokenizer
from tests.live import KEY, LiveServer
from tests.wire.random_schemas import Schema, schemas

AT_ONCE = 20
MESSAGES: list[Any] = [{"role": "user", "content": "hello, world!"}]


@pytest.fixture(scope="module")
def closers(tiny_model: Path) -> dict[str, float]:
    """A bias that makes random weights come to an end: quotes, brackets, the end of a turn."""
    words = tokenizer.load(tiny_model)
    ids = [words.id_of(mark) for mark in ('"', "}", "]", "<|im_end|>")]
    return {str(number): 7.0 for number in ids}


async def answers(server: LiveServer, asked: list[Schema], bias: dict[str, float]) -> list[tuple[str, str]]:
    """Text and finish reason of each; every second one is streamed."""
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0, timeout=120) as client:

        async def ask(number: int, schema: Schema) -> tuple[str, str]:
            form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
            fields: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 800, "seed": number, "logit_bias": bias}
            if number % 2:
                whole = await client.chat.completions.create(**fields, response_format=form)
                return whole.choices[0].message.content or "", whole.choices[0].finish_reason
            text, reason = "", ""
            async for chunk in await client.chat.completions.create(**fields, response_format=form, stream=True):
                text += chunk.choices[0].delta.content or ""
                reason = chunk.choices[0].finish_reason or reason
            return text, reason

        return list(await asyncio.gather(*(ask(number, schema) for number, schema in enumerate(asked))))


@pytest.mark.parametrize("num_schemas", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_every_answer_parses_and_matches(server: LiveServer, closers: dict[str, float], num_schemas: int) -> None:
    answered = 0

    @settings(
        max_examples=num_schemas // AT_ONCE,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(st.lists(schemas(), min_size=AT_ONCE, max_size=AT_ONCE))
    def check(asked: list[Schema]) -> None:
        nonlocal answered
        for schema, (text, reason) in zip(asked, asyncio.run(answers(server, asked, closers)), strict=True):
            answered += 1
            assert reason == "stop", (reason, text, schema)
            validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
            problem = best_match(validator.iter_errors(json.loads(text)))
            assert problem is None, f"{text} of {json.dumps(schema)}: {problem.message}"

    check()
    assert answered >= num_schemas
