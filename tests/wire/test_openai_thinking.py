"""What only some models can, through the unmodified `openai` SDK on a tiny one that can: efforts of reasoning, thoughts, filling in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.live import KEY, LiveServer
from tests.wire import test_openai_chat as chat
from tests.wire import test_openai_completions as completions
from tests.wire import test_openai_responses as responses


@pytest.fixture(scope="module")
def client(thinker: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=thinker.url + "/v1", api_key=KEY, max_retries=0) as made:
        yield made


def thought(answer: Any) -> str:
    return answer.choices[0].message.model_extra.get("reasoning_content", "")


def test_a_thought_comes_apart_from_the_content(client) -> None:
    answer = chat.ask(client, seed=2, max_tokens=60)
    reasoning = answer.usage.completion_tokens_details.reasoning_tokens
    assert thought(answer) and chat.text(answer) and "think>" not in thought(answer) and 0 < reasoning < answer.usage.completion_tokens
    chunks = chat.stream(client, model="tiny", messages=chat.HI, seed=2, max_tokens=60, stream_options={"include_usage": True})
    deltas = [chunk.choices[0].delta.model_extra.get("reasoning_content", "") for chunk in chunks if chunk.choices]
    assert "".join(deltas) == thought(answer) and chunks[-1].usage.completion_tokens_details.reasoning_tokens == reasoning


def test_an_effort_switches_thoughts_on_and_off(client) -> None:
    silent, thinking = (chat.ask(client, seed=2, max_tokens=60, reasoning_effort=effort) for effort in ("none", "high"))
    assert thought(thinking) and not thought(silent) and silent.usage.prompt_tokens != thinking.usage.prompt_tokens
    assert silent.usage.completion_tokens_details.reasoning_tokens == 0
    switched = chat.ask(client, seed=2, max_tokens=60, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert chat.text(switched) == chat.text(silent)
    refused = chat.refused(client, extra_body={"chat_template_kwargs": {"thinking": False}})
    assert refused["param"] == "chat_template_kwargs" and refused["message"].endswith("those that it reads are enable_thinking")


def test_a_thought_comes_before_a_call_and_is_sent_back_with_it(client) -> None:
    fields: Any = {"tools": [chat.WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    answer = chat.ask(client, seed=2, max_tokens=400, **fields)
    message = answer.choices[0].message
    assert thought(answer) and set(json.loads(message.tool_calls[0].function.arguments)) == {"city", "days"}
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    bare = {name: value for name, value in message.to_dict().items() if name != "reasoning_content"}
    with_it, without = (
        client.chat.completions.create(model="tiny", messages=[*chat.HI, said, result], max_tokens=1).usage.prompt_tokens
        for said in (message, bare)
    )
    assert with_it > without


def test_a_response_has_its_thought_as_an_item(client) -> None:
    fields: Any = {"model": "tiny", "input": "hi", "max_output_tokens": 60, "extra_body": {"seed": 2}}
    answer = client.responses.create(reasoning={"effort": "high"}, **fields)
    responses.openai_schema.validate("Response", answer.model_dump(mode="json", exclude_unset=True, by_alias=True))
    assert [item.type for item in answer.output] == ["reasoning", "message"] and answer.output[0].content[0].text
    assert 0 < answer.usage.output_tokens_details.reasoning_tokens < answer.usage.output_tokens
    events = list(client.responses.create(reasoning={"effort": "high"}, stream=True, **fields))
    for event in events:
        schema = responses.openai_schema.event_schema(event.type)
        responses.openai_schema.validate(schema, event.model_dump(mode="json", exclude_unset=True, by_alias=True))
    told = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert told == answer.output[0].content[0].text and events[-1].response.output_text == answer.output_text
    silent = client.responses.create(reasoning={"effort": "none"}, **fields)
    assert [item.type for item in silent.output] == ["message"]


def test_the_tokens_of_a_response_are_told_after_a_thought_too(client) -> None:
    fields: Any = {"model": "tiny", "input": "hi", "max_output_tokens": 60, "extra_body": {"seed": 2}}
    fields["include"] = ["message.output_text.logprobs"]
    said = client.responses.create(**fields).output[1].content[0]
    events = list(client.responses.create(stream=True, **fields))
    done = next(event for event in events if event.type == "response.output_text.done")
    assert said.logprobs and [token.token for token in done.logprobs] == [token.token for token in said.logprobs]
    assert "".join(token.token for token in said.logprobs).strip() == said.text.strip()


def test_a_suffix_is_written_up_to(client) -> None:
    record = completions.complete(client, prompt="the quick", suffix="over the dog").model_extra["everlearn"]["record"]
    ids = client.get(f"/records/{record}", cast_to=dict)["content"]["prompt_token_ids"]
    plain, after = (completions.token_ids(client, one) for one in ("the quick", "over the dog"))
    marks = [ids[0], ids[1 + len(plain)], ids[-1]]
    assert ids == [marks[0], *plain, marks[1], *after, marks[2]] and len(set(marks)) == 3
    assert completions.refused(client, prompt=[40, 41], suffix="x")["param"] == "suffix"
