"""The Messages API through the unmodified `anthropic` SDK, against a real server on a tiny model: blocks, events, tools, refusals."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.api.test_key_limits import make_key
from tests.live import KEY, LiveServer

HI: list[Any] = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"name": "get_weather", "description": "d", "input_schema": SCHEMA, "strict": True}
NEWS: Any = {"name": "get_news", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}, "strict": True}
CALL: Any = {"type": "tool_use", "id": "call_1", "name": "get_weather", "input": {"city": "Bern", "days": 1}}
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
ENDS = "<|im_end|>"


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url + "/anthropic/api", api_key=KEY, max_retries=0) as made:
        yield made


def say(client: anthropic.Anthropic, seed: int = 1, extra: dict[str, Any] | None = None, **fields: Any) -> Message:
    """The whole answer. The same request as events must come in the official order and end with the same message."""
    fields = {"model": "tiny", "max_tokens": 8, "messages": HI, "extra_body": {"seed": seed, **(extra or {})}, **fields}
    whole = client.messages.create(**fields)
    Message.model_validate(whole.to_dict(), strict=True)
    events = [event.to_dict() for event in client.messages.create(stream=True, **fields)]
    for event in events:
        EVENT.validate_python(event)
    assert put_together(events) == plain(whole)
    with client.messages.stream(**fields) as stream:
        assert plain(stream.get_final_message()) == plain(whole)
    return whole


def put_together(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that the events tell, their order checked."""
    assert [events[0]["type"], events[-2]["type"], events[-1]["type"]] == ["message_start", "message_delta", "message_stop"]
    message = events[0]["message"]
    assert message["content"] == [] and message["stop_reason"] is None and message["usage"]["output_tokens"] == 0
    open_at = None
    for event in events[1:-2]:
        kind, index = event["type"], event["index"]
        if kind == "content_block_start":
            assert open_at is None and index == len(message["content"])
            open_at = index
            message["content"].append(dict(event["content_block"]))
            pieces: list[str] = []
        elif kind == "content_block_delta":
            assert open_at == index
            add(message["content"][index], event["delta"], pieces)
        else:
            assert kind == "content_block_stop" and open_at == index
            open_at = None
    assert open_at is None
    return plain(Message.construct(**{**message, **events[-2]["delta"], "usage": events[-2]["usage"]}))


def add(block: dict[str, Any], delta: dict[str, Any], pieces: list[str]) -> None:
    kind = delta["type"]
    if kind == "input_json_delta":
        pieces.append(delta["partial_json"])
        if block["type"] == "tool_use":
            text = "".join(pieces)
            block["input"] = json.loads(text) if text.endswith("}") else block["input"]
    elif kind == "signature_delta":
        block["signature"] = delta["signature"]
    else:
        name = {"text_delta": "text", "thinking_delta": "thinking"}[kind]
        block[name] += delta[name]


def plain(message: Any) -> dict[str, Any]:
    """Without what differs between two answers by right: ids, signatures, and what was read from the cache."""
    told = message if isinstance(message, dict) else message.to_dict()
    content = [{k: v for k, v in block.items() if k not in ("id", "signature", "parsed_output")} for block in told["content"]]
    usage = told["usage"]
    read = usage["input_tokens"] + usage["cache_read_input_tokens"]
    kept = {name: told[name] for name in ("model", "role", "type", "stop_reason", "stop_sequence")}
    return {**kept, "content": content, "input": read, "output": usage["output_tokens"]}


def text(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def prompt_tokens(message: Any) -> int:
    return int(message.usage.input_tokens + message.usage.cache_read_input_tokens)


def refused(client: anthropic.Anthropic, **fields: Any) -> dict[str, Any]:
    """The error; the request has no effect."""
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**{"model": "tiny", "max_tokens": 8, "messages": HI, **fields})
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    return body["error"]  # type: ignore[no-any-return]


# -- what comes back ----------------------------------------------------------------------------------------------------------


def test_an_answer_names_its_weights_its_record_and_what_it_used(client, server) -> None:
    raw = client.messages.with_raw_response.create(
        model="tiny", max_tokens=4, messages=HI, metadata={"user_id": "ann"}, extra_body={"seed": 1}
    )
    answer = raw.parse()
    record_id = raw.headers["x-everlearn-record"]
    assert raw.headers["x-everlearn-version"] == answer.model == "tiny" and raw.headers["request-id"] == answer._request_id
    assert answer.id.removeprefix("msg_") == record_id.removeprefix("rec_") and answer.everlearn["record"] == record_id
    assert answer.usage.output_tokens == 4 and answer.stop_reason == "max_tokens" and answer.stop_sequence is None
    record = json.loads(server.get(f"/v1/records/{record_id}")[1])
    content = record["content"]
    assert record["user"] == "ann" and record["route"] == "messages" and content["messages"] == HI
    assert content["params"] == {"model": "tiny", "max_tokens": 4, "seed": 1} and content["answer"][0]["content"] == text(answer)
    assert len(content["choices"][0]["token_ids"]) == len(content["choices"][0]["logprobs"]) == 4
    assert len(content["prompt_token_ids"]) == prompt_tokens(answer)


def test_a_second_request_reads_its_prefix_from_the_cache(client) -> None:
    long = [{"role": "user", "content": "hello, world! what is the capital of france? " * 4}]
    warm = client.messages.create(model="tiny", max_tokens=0, messages=long)
    assert warm.content == [] and warm.usage.output_tokens == 0 and warm.usage.cache_read_input_tokens == 0
    again = client.messages.create(model="tiny", max_tokens=2, messages=long)
    assert again.usage.cache_read_input_tokens > again.usage.input_tokens > 0 and prompt_tokens(again) == prompt_tokens(warm)


def test_events_as_they_come_off_the_wire(server) -> None:
    """Names, the ping that the SDK hides, and the record in the last event; a key as X-API-Key, and the older version of the API."""
    body = {"model": "tiny", "max_tokens": 12, "messages": HI, "seed": 1, "stream": True}
    headers = {"x-api-key": KEY, "anthropic-version": "2023-06-01"}
    reply = httpx.post(server.url + "/anthropic/api/v1/messages", json=body, headers=headers)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [block.split("\n") for block in reply.text.strip().split("\n\n")]
    names = [lines[0].removeprefix("event: ") for lines in events]
    told = [json.loads(lines[1].removeprefix("data: ")) for lines in events]
    assert names == [event["type"] for event in told]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert told[-1]["everlearn"] == {"record": reply.headers["x-everlearn-record"], "version": "tiny"}


def test_tokens_are_counted_as_they_are_used(client) -> None:
    fields: Any = {"model": "tiny", "messages": HI, "system": "be kind", "tools": [WEATHER], "tool_choice": {"type": "auto"}}
    counted = client.messages.count_tokens(**fields).input_tokens
    assert (
        counted
        == prompt_tokens(client.messages.create(max_tokens=1, **fields))
        > client.messages.count_tokens(model="tiny", messages=HI).input_tokens
    )
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.count_tokens(model="tiny", messages=HI, extra_body={"max_tokens": 1})


# -- drawing ------------------------------------------------------------------------------------------------------------------


def test_temperature_and_truncation(client) -> None:
    assert text(say(client, seed=1)) != text(say(client, seed=2))
    greedy = text(say(client, extra={"temperature": 0}))
    for extra in ({"top_p": 1e-6}, {"top_k": 1}, {"min_p": 1.0}):
        assert text(say(client, seed=5, extra=extra)) == greedy
    assert text(say(client, extra={"temperature": 0, "repetition_penalty": 2.0}, max_tokens=24)) != greedy


def test_a_stop_sequence_ends_the_text_before_it_and_is_named(client) -> None:
    said = text(say(client, max_tokens=24, extra={"temperature": 0}))
    stop = said[6:9]
    answer = say(client, max_tokens=24, extra={"temperature": 0}, stop_sequences=["never there", stop])
    assert text(answer) == said[: said.index(stop)]
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)


def test_a_full_context_is_told_from_max_tokens(client) -> None:
    words = "a b c d e f g h "
    each = client.messages.count_tokens(model="tiny", messages=[{"role": "user", "content": words * 2}]).input_tokens
    each -= client.messages.count_tokens(model="tiny", messages=[{"role": "user", "content": words}]).input_tokens
    long = [{"role": "user", "content": words * (1000 // each)}]
    room = 1024 - client.messages.count_tokens(model="tiny", messages=long).input_tokens
    answer = say(client, messages=long, max_tokens=room + 50)
    assert answer.stop_reason in ("model_context_window_exceeded", "end_turn") and answer.usage.output_tokens <= room
    too_long = [{"role": "user", "content": words * 500}]
    assert refused(client, messages=too_long)["code"] == "context_length_exceeded"


def test_time_that_is_over_ends_the_answer_with_what_there_is(client) -> None:
    fields = {"model": "tiny", "messages": HI, "max_tokens": 900}
    answers = [client.messages.create(**fields, extra_body={"deadline": 0.3, "seed": seed}) for seed in range(4)]
    late = [answer for answer in answers if answer.everlearn.get("finish") == "deadline"]
    assert late and all(answer.stop_reason == "max_tokens" and 0 < answer.usage.output_tokens < 900 for answer in late)


# -- the conversation -----------------------------------------------------------------------------------------------------------


def test_every_role_and_block_is_read(client) -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a", **cached}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "x"}, CALL]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "rain"}], **cached},
                {"type": "text", "text": "and?"},
            ],
        },
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "go"},
    ]
    fields: Any = {"messages": messages, "tools": [WEATHER], "cache_control": {"type": "ephemeral", "ttl": "5m"}}
    answer = say(client, system=[{"type": "text", "text": "be"}, {"type": "text", "text": "kind", **cached}], **fields)
    assert prompt_tokens(answer) > prompt_tokens(say(client, **fields)) > 60
    assert prompt_tokens(say(client, system="be kind")) > prompt_tokens(say(client))


def test_messages_of_one_role_in_a_row_are_one(client) -> None:
    apart = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    together = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert text(say(client, messages=apart)) == text(say(client, messages=together))


def test_the_last_message_of_the_assistant_is_continued(client) -> None:
    going_on = [*HI, {"role": "assistant", "content": "the quick"}]
    answer = say(client, messages=going_on)
    assert prompt_tokens(answer) < prompt_tokens(say(client, messages=[*going_on, *HI]))
    assert refused(client, messages=[*HI, {"role": "assistant", "content": [CALL]}], tools=[WEATHER])["param"] == "messages"


def test_a_failed_result_says_so(client, server) -> None:
    def shown(**result: Any) -> str:
        content = [{"type": "tool_result", "tool_use_id": "call_1", **result}]
        messages = [*HI, {"role": "assistant", "content": [CALL]}, {"role": "user", "content": content}]
        raw = client.messages.with_raw_response.create(model="tiny", max_tokens=1, messages=messages, tools=[WEATHER])
        record = json.loads(server.get(f"/v1/records/{raw.headers['x-everlearn-record']}")[1])
        return str(record["content"]["messages"][-1]["content"])

    assert shown(content="no such city", is_error=True) == "Error: no such city"
    assert shown(content="error 7", is_error=True) == "error 7" and shown(content="rain", is_error=False) == "rain"
    assert shown() == ""


# -- tools and formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["any", "tool"])
def test_a_call_that_is_asked_for_comes_and_fits_its_schema(client, choice: str) -> None:
    wanted: Any = {"type": choice, "disable_parallel_tool_use": True} | ({"name": "get_weather"} if choice == "tool" else {})
    answer = say(client, tools=[WEATHER, NEWS], tool_choice=wanted, max_tokens=250)
    [call] = answer.content
    assert answer.stop_reason == "tool_use" and call.type == "tool_use" and call.id
    if choice == "tool":
        assert call.name == "get_weather" and set(call.input) == {"city", "days"}


def test_several_calls_are_blocks_of_their_own(client) -> None:
    for seed in range(20):
        answer = client.messages.create(
            model="tiny", max_tokens=300, messages=HI, tools=[NEWS], tool_choice={"type": "any"}, extra_body={"seed": seed}
        )
        if len(answer.content) > 1:
            break
    else:
        raise AssertionError("no answer has two calls")
    assert {block.type for block in answer.content} == {"tool_use"} and len({block.id for block in answer.content}) == len(answer.content)
    say(client, seed=seed, tools=[NEWS], tool_choice={"type": "any"}, max_tokens=300)


def test_tools_are_shown_and_none_hides_them(client) -> None:
    shown = prompt_tokens(say(client, tools=[WEATHER], tool_choice={"type": "auto"}))
    assert shown > prompt_tokens(say(client, tools=[WEATHER], tool_choice={"type": "none"})) == prompt_tokens(say(client))


def test_an_answer_is_sent_back_as_it_came(client) -> None:
    wanted: Any = {"type": "any", "disable_parallel_tool_use": True}
    answer = client.messages.create(model="tiny", max_tokens=250, messages=HI, tools=[WEATHER], tool_choice=wanted, extra_body={"seed": 1})
    result = {"type": "tool_result", "tool_use_id": answer.content[0].id, "content": "rain"}
    for content in (answer.content, answer.to_param()["content"]):
        messages = [*HI, {"role": "assistant", "content": content}, {"role": "user", "content": [result]}]
        said = say(client, messages=messages, tools=[WEATHER])
        assert prompt_tokens(said) > prompt_tokens(answer) + answer.usage.output_tokens
    messages = [*HI, said.to_param(), {"role": "user", "content": "and?"}]
    assert prompt_tokens(say(client, messages=messages)) > prompt_tokens(say(client))


def test_input_is_streamed_eagerly_where_it_is_valid_or_wanted(client) -> None:
    def pieces(**tool: Any) -> int:
        fields = {"tools": [WEATHER | tool], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "max_tokens": 250}
        events = client.messages.create(model="tiny", messages=HI, stream=True, extra_body={"seed": 1}, **fields)
        return sum(event.type == "content_block_delta" for event in events)

    assert pieces() > 5 and pieces(eager_input_streaming=True) > 5 and pieces(eager_input_streaming=False) == 1


def test_an_input_that_breaks_off_is_as_much_as_there_is(client) -> None:
    answer = say(client, tools=[WEATHER], tool_choice={"type": "tool", "name": "get_weather"}, max_tokens=30)
    assert answer.stop_reason == "max_tokens" and (not answer.content or answer.content[0].type in ("tool_use", "text"))


def test_answers_match_their_schema(client) -> None:
    config: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    answer = say(client, output_config=config, max_tokens=120)
    assert set(json.loads(text(answer))) == {"city", "days"} and answer.stop_reason == "end_turn"

    class Trip(BaseModel):
        days: int

    parsed = client.messages.parse(model="tiny", max_tokens=200, messages=HI, output_format=Trip, extra_body={"seed": 1})
    assert isinstance(parsed.parsed_output, Trip)
    either = say(client, output_config=config, tools=[WEATHER], max_tokens=250)
    assert either.stop_reason == "tool_use" or set(json.loads(text(either))) == {"city", "days"}
    for streamed in (False, True):
        bad = {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}
        assert refused(client, output_config=bad, stream=streamed)["param"] == "output_config.format"
        assert refused(client, tools=[NEWS | {"input_schema": {"type": "nothing"}}], stream=streamed)["param"].startswith("tools[0]")


def test_the_sdks_tool_runner_runs_a_tool(client) -> None:
    called: list[str] = []

    @anthropic.beta_tool
    def get_news() -> str:
        """What is new."""
        called.append("now")
        return "nothing"

    runner = client.beta.messages.tool_runner(
        model="tiny", max_tokens=100, messages=HI, tools=[get_news], tool_choice={"type": "any", "disable_parallel_tool_use": True},
        max_iterations=2, extra_body={"seed": 1},
    )  # fmt: skip
    said = list(runner)
    assert len(said) == 2 and called and said[0].content[0].type == "tool_use"


# -- refusals ------------------------------------------------------------------------------------------------------------------

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBO"}}


def user(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (user({"type": "text", "text": "see"}, IMAGE), "messages[0].content[1]"),
        (user({"type": "tool_result", "tool_use_id": "x", "content": [IMAGE]}), "messages[0].content[0].content[0]"),
        (user({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}}), "messages[0].content[0].type"),
        (user({"type": "text", "text": "x", "citations": [{}]}), "messages[0].content[0].citations"),
        (user({"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "1h"}}), "messages[0].content[0].cache_control.ttl"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}]}, "messages[0].content[0].type"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"extra_body": {"max_tokens": 2**40}}, "max_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": ["x"] * 99}, "stop_sequences"),
        ({"extra_body": {"temperature": 9}}, "temperature"),
        ({"extra_body": {"top_p": 2}}, "top_p"),
        ({"extra_body": {"unheard_of": 1}}, "unheard_of"),
        ({"extra_body": {"mcp_servers": []}}, "mcp_servers"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [WEATHER | {"name": "a b"}]}, "tools[0].name"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [WEATHER | {"input_examples": [{}]}]}, "tools[0].input_examples"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema"),
        ({"tools": [WEATHER | {"allowed_callers": ["code_execution_20250825"]}]}, "tools[0].allowed_callers[0]"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, "thinking.display"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"output_config": {"effort": "high"}}, "output_config.effort"),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, "thinking"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"speed": "fast"}, "speed"),
        ({"container": {"id": "x"}}, "container"),
        ({"inference_geo": "eu"}, "inference_geo"),
        ({"diagnostics": {"previous_message_id": None}}, "diagnostics"),
        ({"workspace_id": "x"}, "anthropic-workspace-id"),
        ({"user_profile_id": "x"}, "anthropic-user-profile-id"),
        ({"extra_body": {"thread": {"type": "create"}}}, "thread"),
        ({"metadata": {"user_id": "x" * 600}}, "metadata.user_id"),
        ({"extra_headers": {"anthropic-version": "2023-01-01"}}, "anthropic-version"),
    ],
)  # fmt: skip
def test_what_can_not_be_honoured_is_refused_by_name(client, fields: dict[str, Any], param: str) -> None:
    error = refused(client, **fields)
    assert error["param"] == param and error["message"]


def test_what_asks_for_nothing_is_taken(client) -> None:
    harmless: Any = {"service_tier": "auto", "speed": "standard", "thinking": {"type": "adaptive"}, "tool_choice": {"type": "auto"}}
    assert text(say(client, **harmless)) == text(say(client, thinking={"type": "disabled"}))


def test_every_field_of_the_sdk_is_known() -> None:
    from anthropic.types.message_count_tokens_params import MessageCountTokensParams
    from anthropic.types.message_create_params import MessageCreateParamsBase

    from everlearn.api.anthropic.types import CountForm, MessagesForm, ToolForm

    headers = {"user_profile_id", "workspace_id"}
    assert set(MessageCreateParamsBase.__annotations__) - headers | {"stream"} <= set(MessagesForm.__struct_fields__)
    assert set(MessageCountTokensParams.__annotations__) - headers <= set(CountForm.__struct_fields__)
    assert set(anthropic.types.ToolParam.__annotations__) <= set(ToolForm.__struct_fields__)


# -- errors ------------------------------------------------------------------------------------------------------------------


def test_errors_map_to_the_sdks_classes(client, server) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="nobody@3", max_tokens=1, messages=HI)
    assert missing.value.type == "not_found_error" and missing.value.error_code == "not_found"
    assert missing.value.request_id and missing.value.body["request_id"] == missing.value.request_id
    with pytest.raises(anthropic.NotFoundError):
        client.models.list()
    with pytest.raises(anthropic.RequestTooLargeError) as large:
        client.messages.create(model="tiny", max_tokens=1, messages=HI, system="x" * (65 << 20))
    assert large.value.type == "request_too_large"
    for body in (b"{", b"[]", b"\xff"):
        reply = httpx.post(server.url + "/anthropic/api/v1/messages", content=body)
        assert reply.status_code == 400 and reply.json()["type"] == "error" and reply.json()["error"]["type"] == "invalid_request_error"
    assert (
        "max_tokens"
        in httpx.post(server.url + "/anthropic/api/v1/messages", json={"model": "tiny", "messages": HI}).json()["error"]["message"]
    )
    assert httpx.get(server.url + "/anthropic/api/v1/messages").json()["error"]["type"] == "invalid_request_error"


def test_keys_scopes_and_limits(new_server: Callable[..., LiveServer]) -> None:
    live = new_server()
    secrets = [
        make_key(live, *scopes, **limits)
        for scopes, limits in ((("sample",), {"rpm": 1}), (("read",), {}), (("sample",), {"models": ["x"]}))
    ]
    live.stop()
    live.restart()
    clients = [anthropic.Anthropic(base_url=live.url + "/anthropic/api", api_key=secret, max_retries=0) for secret in (*secrets, "wrong")]
    sampler, reader, other, nobody = clients
    raw = sampler.messages.with_raw_response.create(model="tiny", max_tokens=1, messages=HI)
    assert raw.headers["x-ratelimit-limit-requests"] == "1"
    with pytest.raises(anthropic.RateLimitError) as caught:
        sampler.messages.create(model="tiny", max_tokens=1, messages=HI)
    assert caught.value.type == "rate_limit_error" and int(caught.value.response.headers["retry-after"]) > 0
    assert sampler.messages.count_tokens(model="tiny", messages=HI).input_tokens > 0
    for one, kind in (
        (reader, anthropic.PermissionDeniedError),
        (other, anthropic.PermissionDeniedError),
        (nobody, anthropic.AuthenticationError),
    ):
        for act in (one.messages.create, one.messages.count_tokens):
            with pytest.raises(kind):
                act(model="tiny", messages=HI, **({"max_tokens": 1} if act == one.messages.create else {}))
    for one in clients:
        one.close()


def test_an_error_after_the_first_token_is_an_event_that_the_sdk_raises(new_server: Callable[..., LiveServer]) -> None:
    server = new_server(**{"api.shutdown_grace_seconds": 0.2})
    with anthropic.Anthropic(base_url=server.url + "/anthropic/api", api_key=KEY, max_retries=0) as client:
        schema = {"type": "object", "properties": {"a": {"type": "string", "minLength": 5000}}, "required": ["a"]}
        stream = client.messages.create(
            model="tiny", max_tokens=900, messages=HI, stream=True, output_config={"format": {"type": "json_schema", "schema": schema}}
        )
        next(iter(stream))
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(anthropic.APIStatusError, match="shutting down") as caught:
            for _ in stream:
                pass
    assert caught.value.body["error"]["code"] == "unavailable"
