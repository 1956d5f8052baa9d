"""The Responses API through the unmodified `openai` SDK: text, functions, events, and conversations that go on by an id."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.live import KEY, LiveServer
from tests.wire import openai_schema
from tests.wire.test_openai_chat import SCHEMA

ENDS: Any = {"min_tokens": 4}
WEATHER: Any = {"type": "function", "name": "get_weather", "description": "d", "parameters": SCHEMA, "strict": True}


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as made:
        yield made


def respond(client: openai.OpenAI, **fields: Any) -> Any:
    """The whole response. The same request as events must end with the same output."""
    fields = {"model": "tiny", "input": "hi", "max_output_tokens": 8, "extra_body": {"seed": 1}, **fields}
    whole = client.responses.create(**fields)
    openai_schema.validate("Response", whole.model_dump(mode="json", exclude_unset=True, by_alias=True))
    events = list(client.responses.create(stream=True, **fields))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for event in events:
        openai_schema.validate(openai_schema.event_schema(event.type), event.model_dump(mode="json", exclude_unset=True, by_alias=True))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    final = events[-1].response
    assert events[-1].type == f"response.{whole.status}" and final.usage.output_tokens == whole.usage.output_tokens
    assert [plain(item) for item in final.output] == [plain(item) for item in whole.output]
    deltas = "".join(event.delta for event in events if event.type.endswith(".delta"))
    assert deltas == "".join(text_of(item) for item in whole.output)
    return whole


def plain(item: Any) -> dict[str, Any]:
    """Without what differs between two answers by right."""
    return {key: value for key, value in item.model_dump(mode="json").items() if key not in ("id", "call_id", "content")} | {
        "text": text_of(item)
    }


def text_of(item: Any) -> str:
    return item.arguments if item.type == "function_call" else item.content[0].text


def refused(client: openai.OpenAI, **fields: Any) -> Any:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": "tiny", "input": "hi", **fields})
    return caught.value.body


def test_text_comes_whole_and_as_events(client) -> None:
    answer = respond(client, instructions="be kind", metadata={"a": "b"}, user="ann")
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.instructions == "be kind" and answer.metadata == {"a": "b"} and answer.user == "ann"
    assert answer.usage.output_tokens == 8 and answer.usage.input_tokens_details.cached_tokens >= 0
    assert answer.model_extra["everlearn"]["record"].removeprefix("rec_") == answer.id.removeprefix("resp_")


def test_answers_match_their_schema(client) -> None:
    form = {"type": "json_schema", "name": "trip", "schema": SCHEMA, "strict": True}
    answer = respond(client, text={"format": form}, max_output_tokens=120)
    assert set(json.loads(answer.output_text)) == {"city", "days"} and answer.status == "completed"
    assert answer.text.format.name == "trip"
    assert respond(client, text={"format": {"type": "json_object"}}, max_output_tokens=4).output_text.lstrip().startswith("{")


def test_scores_come_where_they_are_asked_for(client) -> None:
    answer = respond(client, include=["message.output_text.logprobs"], top_logprobs=2)
    tokens = answer.output[0].content[0].logprobs
    assert len(tokens) == 8 and all(len(token.top_logprobs) == 2 for token in tokens)
    assert respond(client).output[0].content[0].logprobs == []


def test_a_function_is_called_and_its_output_goes_back(client) -> None:
    fields: Any = {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "get_weather"}, "parallel_tool_calls": False}
    answer = respond(client, max_output_tokens=250, **fields)
    [call] = answer.output
    assert answer.status == "completed" and call.type == "function_call" and set(json.loads(call.arguments)) == {"city", "days"}
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    by_items = respond(client, input=[{"role": "user", "content": "hi"}, *answer.output, output], tools=[WEATHER], tool_choice="none")
    by_id = respond(client, input=[output], previous_response_id=answer.id, tools=[WEATHER], tool_choice="none")
    assert by_items.usage.input_tokens == by_id.usage.input_tokens and by_id.previous_response_id == answer.id
    assert by_items.output_text == by_id.output_text


def test_a_conversation_goes_on_by_id_without_the_instructions(client) -> None:
    first = client.responses.create(model="tiny", input="hi", instructions="be", max_output_tokens=4, extra_body={"seed": 1})
    second = respond(client, input="and?", previous_response_id=first.id)
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "and?"}]
    assert second.usage.input_tokens == respond(client, input=history).usage.input_tokens
    third = client.responses.create(model="tiny", input="so?", previous_response_id=second.id, max_output_tokens=2)
    assert third.usage.input_tokens > second.usage.input_tokens


def test_a_response_is_told_again_and_deleted(client) -> None:
    made = client.responses.create(model="tiny", input="hi", max_output_tokens=4, temperature=0.5, metadata={"a": "b"})
    again = client.responses.retrieve(made.id)
    openai_schema.validate("Response", again.model_dump(mode="json", exclude_unset=True, by_alias=True))
    assert again.output_text == made.output_text and again.temperature == 0.5 and again.metadata == {"a": "b"}
    assert [item.id for item in again.output] == [item.id for item in made.output]
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    assert refused(client, previous_response_id=made.id)["param"] == "previous_response_id"


def test_what_is_not_stored_can_not_go_on(client) -> None:
    made = client.responses.create(model="tiny", input="hi", max_output_tokens=4, store=False)
    assert made.store is False and "store" in refused(client, previous_response_id=made.id)["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": []}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"reasoning": {"effort": "high"}}, "reasoning_effort"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"extra_body": {"n": 2}}, "n"),
        ({"previous_response_id": "resp_0"}, "previous_response_id"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_can_not_be_honoured_is_refused_by_name(client, fields: dict[str, Any], param: str) -> None:
    assert refused(client, **fields)["param"] == param


def test_the_sdks_stream_helper_works(client) -> None:
    with client.responses.stream(
        model="tiny",
        input="hi",
        max_output_tokens=120,
        text={"format": {"type": "json_schema", "name": "trip", "schema": SCHEMA}},
        extra_body={"seed": 1},
    ) as events:
        kinds = [event.type for event in events]
        final = events.get_final_response()
    assert kinds[-1] == "response.completed" and set(json.loads(final.output_text)) == {"city", "days"}


def test_events_have_their_names_on_the_wire(server) -> None:
    body = {"model": "tiny", "input": "hi", "max_output_tokens": 2, "temperature": 0, "stream": True}
    with httpx.stream("POST", server.url + "/v1/responses", json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream") and reply.headers["x-everlearn-version"] == "tiny"
        lines = [line for line in reply.iter_lines() if line.startswith("event: ")]
    assert lines[0] == "event: response.created" and lines[-1] == "event: response.incomplete"
