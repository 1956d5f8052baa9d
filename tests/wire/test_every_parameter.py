"""Every parameter, one by one, whole and streamed, through the unmodified `openai` and `anthropic` SDKs on the embedded model: a real
vocabulary, a real template, a model that comes to an end. What each parameter does is tested beside this, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import openai
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from tests.live import KEY, LiveServer
from tests.wire import openai_schema

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
MESSAGES: list[Any] = [{"role": "user", "content": "How is the weather in Bonn?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Bonn", "Bern"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FORM = {"name": "trip", "schema": SCHEMA, "strict": True}
FUNCTION = {"name": "get_weather", "description": "The weather of a city.", "parameters": SCHEMA, "strict": True}
TOOL: Any = {"type": "function", "function": FUNCTION}
MUST: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 120}
OURS: list[dict[str, Any]] = [
    {"extra_body": fields}
    for fields in (
        {"top_k": 20}, {"min_p": 0.1}, {"repetition_penalty": 1.2}, {"min_tokens": 4}, {"stop_token_ids": [30]}, {"ignore_eos": True},
        {"deadline": 60}, {"structured_outputs": {"regex": "[a-z]{3,9}"}}, {"structured_outputs": {"choice": ["rain", "sun"]}},
        {"structured_outputs": {"grammar": 'root ::= "rain" | "sun"'}}, {"structured_outputs": {"json": SCHEMA}},
    )
]  # fmt: skip
DRAWING: list[dict[str, Any]] = [
    {}, {"temperature": 0}, {"temperature": 1.5}, {"top_p": 0.5}, {"presence_penalty": 1.5}, {"frequency_penalty": -0.5},
    {"logit_bias": {"30": -100, "253": 5}}, {"seed": 7}, {"stop": "e"}, {"stop": [".", "\n"]}, {"n": 3}, {"user": "ann"},
    {"extra_body": {"metadata": {"a": "b"}}}, {"extra_body": {"store": False}}, {"extra_body": {"store": True}},
]  # fmt: skip
CHAT: list[dict[str, Any]] = [
    *DRAWING, *OURS,
    {"max_tokens": openai.NOT_GIVEN, "max_completion_tokens": 5}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 5},
    {"response_format": {"type": "text"}}, {"response_format": {"type": "json_object"}, "max_tokens": 200},
    {"response_format": {"type": "json_schema", "json_schema": FORM}, "max_tokens": 60},
    {"tools": [TOOL], "tool_choice": "auto"}, {"tools": [TOOL], "tool_choice": "none"}, MUST,
    {**MUST, "tool_choice": {"type": "function", "function": {"name": "get_weather"}}}, {**MUST, "parallel_tool_calls": True},
    {"reasoning_effort": "none"}, {"metadata": {"a": "b"}}, {"store": True},
]  # fmt: skip
COMPLETIONS: list[dict[str, Any]] = [
    *DRAWING, *OURS, {"prompt": ["The sky is", "The sea is"]}, {"prompt": [504, 6376, 314]}, {"echo": True}, {"logprobs": 3}, {"best_of": 1},
]  # fmt: skip
RESPONSES: list[dict[str, Any]] = [
    {}, {"instructions": "Be brief."}, {"temperature": 0}, {"top_p": 0.5}, {"max_output_tokens": 16}, {"metadata": {"a": "b"}},
    {"user": "ann"}, {"store": False}, {"input": MESSAGES}, {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    {"text": {"format": {"type": "text"}}}, {"text": {"format": {"type": "json_object"}}},
    {"text": {"format": {"type": "json_schema", **FORM}}, "max_output_tokens": 60},
    {"tools": [{"type": "function", **FUNCTION}], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 120},
    {"tools": [{"type": "function", **FUNCTION}], "tool_choice": {"type": "function", "name": "get_weather"}, "max_output_tokens": 120},
    {"reasoning": {"effort": "none"}}, {"extra_body": {"seed": 3, "top_k": 5}},
]  # fmt: skip
ANTHROPIC: list[dict[str, Any]] = [
    {}, {"system": "Be brief."}, {"stop_sequences": [".", "e"]}, {"metadata": {"user_id": "ann"}}, {"thinking": {"type": "adaptive"}},
    {"thinking": {"type": "disabled"}}, {"service_tier": "auto"}, {"cache_control": {"type": "ephemeral"}},
    {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}, "max_tokens": 60},
    *(
        {"tools": [{"name": "get_weather", "input_schema": SCHEMA, "strict": True}], "tool_choice": choice, "max_tokens": 120}
        for choice in ({"type": "auto"}, {"type": "none"}, {"type": "any"}, {"type": "tool", "name": "get_weather"})
    ),
    *({"extra_body": fields} for fields in ({"temperature": 0.3}, {"top_p": 0.5}, {"top_k": 5}, {"min_p": 0.1}, {"seed": 1})),
    *({"extra_body": fields} for fields in ({"presence_penalty": 1}, {"frequency_penalty": 1}, {"repetition_penalty": 1.1}, {"deadline": 60})),
]  # fmt: skip


@pytest.fixture(scope="module")
def client(embedded_server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=embedded_server.url + "/v1", api_key=KEY, max_retries=0) as made:
        yield made


def published(name: str, given: Any) -> None:
    openai_schema.validate(name, given.model_dump(mode="json", exclude_unset=True, by_alias=True))


def every(cases: list[dict[str, Any]], check: Callable[[dict[str, Any]], None]) -> None:
    """All cases, so that one run tells of every parameter that fails."""
    failures = []
    for fields in cases:
        try:
            check(fields)
        except (AssertionError, openai.APIError, anthropic.APIError) as error:
            failures.append(f"{fields}: {error}")
    assert not failures, "\n".join(failures)


def test_chat_completions(client) -> None:
    def check(fields: dict[str, Any]) -> None:
        fields = {"model": "smollm2", "messages": MESSAGES, "max_tokens": 6, "seed": 1, **fields}
        whole = client.chat.completions.create(**fields)
        published("CreateChatCompletionResponse", whole)
        chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **fields))
        for chunk in chunks:
            published("CreateChatCompletionStreamResponse", chunk)
        for choice in whole.choices:
            deltas = [one for chunk in chunks for one in chunk.choices if one.index == choice.index]
            assert "".join(one.delta.content or "" for one in deltas) == (choice.message.content or "")
            assert deltas[-1].finish_reason == choice.finish_reason
            if fields.get("tool_choice") not in (None, "auto", "none"):
                arguments = [call.function.arguments for call in choice.message.tool_calls]
                assert all(set(json.loads(one)) == {"city", "days"} for one in arguments)
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens

    every(CHAT, check)


def test_completions(client) -> None:
    def check(fields: dict[str, Any]) -> None:
        fields = {"model": "smollm2", "prompt": "The weather in Bonn is", "max_tokens": 6, "seed": 1, **fields}
        whole = client.completions.create(**fields)
        published("CreateCompletionResponse", whole)
        chunks = list(client.completions.create(stream=True, **fields))
        for choice in whole.choices:
            parts = [one for chunk in chunks for one in chunk.choices if one.index == choice.index]
            assert "".join(one.text for one in parts) == choice.text and parts[-1].finish_reason == choice.finish_reason

    every(COMPLETIONS, check)


def test_responses(client) -> None:
    def check(fields: dict[str, Any]) -> None:
        fields = {"model": "smollm2", "input": "How is the weather in Bonn?", "max_output_tokens": 8, "extra_body": {"seed": 1}, **fields}
        whole = client.responses.create(**fields)
        published("Response", whole)
        events = list(client.responses.create(stream=True, **fields))
        for event in events:
            published(openai_schema.event_schema(event.type), event)
        final = events[-1].response
        assert final.output_text == whole.output_text and final.status == whole.status
        assert [item.type for item in final.output] == [item.type for item in whole.output]

    every(RESPONSES, check)


def test_messages(embedded_server: LiveServer) -> None:
    event_type: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)

    def check(fields: dict[str, Any]) -> None:
        fields = {"model": "smollm2", "messages": MESSAGES, "max_tokens": 8, **fields}
        fields["extra_body"] = {"seed": 1, **fields.get("extra_body", {})}
        whole = client.messages.create(**fields)
        Message.model_validate(whole.to_dict(), strict=True)
        for event in client.messages.create(stream=True, **fields):
            event_type.validate_python(event.to_dict())
        with client.messages.stream(**fields) as stream:
            final = stream.get_final_message()
        texts = [[block.text for block in one.content if block.type == "text"] for one in (whole, final)]
        assert texts[0] == texts[1] and final.stop_reason == whole.stop_reason

    with anthropic.Anthropic(base_url=embedded_server.url + "/anthropic/api", api_key=KEY, max_retries=0) as client:
        every(ANTHROPIC, check)
