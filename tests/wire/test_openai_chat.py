"""Every parameter of chat completions through the unmodified `openai` SDK, against a real server on a tiny model; streamed and whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.live import KEY, LiveServer
from tests.wire import openai_schema

HI: list[Any] = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": SCHEMA, "strict": True}}
NEWS: Any = {"type": "function", "function": {"name": "get_news", "parameters": {"type": "object", "properties": {}}, "strict": True}}


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, **fields: Any) -> ChatCompletion:
    """The whole answer. The same request streamed must say the same, where it is seeded."""
    fields = {"model": "tiny", "messages": HI, "max_tokens": 8, "seed": 1, **fields}
    whole = client.chat.completions.create(**fields)
    openai_schema.validate("CreateChatCompletionResponse", whole.model_dump(mode="json", exclude_unset=True))
    chunks = stream(client, **fields)
    for index, choice in enumerate(whole.choices):
        deltas = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert deltas[0].delta.role == "assistant" and deltas[-1].finish_reason == choice.finish_reason
        assert "".join(d.delta.content or "" for d in deltas) == (choice.message.content or "")
        scored = [token for d in deltas if d.logprobs for token in d.logprobs.content or []]
        expected = (choice.logprobs.content or []) if choice.logprobs else []
        assert [token.token for token in scored] == [token.token for token in expected]
        assert [token.logprob for token in scored] == pytest.approx([token.logprob for token in expected], abs=1e-4)
    return whole


def stream(client: openai.OpenAI, **fields: Any) -> list[ChatCompletionChunk]:
    chunks = list(client.chat.completions.create(stream=True, **fields))
    for chunk in chunks:
        openai_schema.validate("CreateChatCompletionStreamResponse", chunk.model_dump(mode="json", exclude_unset=True))
    assert sum(c.choices[0].finish_reason is not None for c in chunks if c.choices) == fields.get("n", 1)
    return chunks


def text(answer: ChatCompletion) -> str:
    return answer.choices[0].message.content or ""


def refused(client: openai.OpenAI, **fields: Any) -> Any:
    """The error's body; the request has no effect."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": HI, **fields})
    return caught.value.body


# -- what comes back ----------------------------------------------------------------------------------------------------------


def test_an_answer_names_its_weights_its_record_and_what_it_used(client) -> None:
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=HI, max_tokens=4, temperature=0)
    answer = raw.parse()
    assert raw.headers["x-everlearn-version"] == answer.model == "tiny"
    assert answer.system_fingerprint.startswith("fp_") and raw.headers["x-everlearn-record"].startswith("rec_")
    assert answer.id.removeprefix("chatcmpl-") == raw.headers["x-everlearn-record"].removeprefix("rec_")
    assert answer.model_extra["everlearn"]["record"] == raw.headers["x-everlearn-record"]
    assert answer.usage.completion_tokens == 4 and answer.usage.total_tokens == answer.usage.prompt_tokens + 4
    assert answer.choices[0].finish_reason == "length"


def test_a_second_request_finds_its_prefix_in_the_cache(client) -> None:
    long = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog. " * 4}]
    for expected in (False, True):
        answer = client.chat.completions.create(model="tiny", messages=long, max_tokens=2)
        assert (answer.usage.prompt_tokens_details.cached_tokens > 0) == expected


def test_the_record_holds_what_was_drawn(client, server) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=5, seed=1, user="ann", metadata={"a": "b"})
    record = client.get(f"/records/{answer.model_extra['everlearn']['record']}", cast_to=dict)
    content = record["content"]
    assert record["user"] == "ann" and content["metadata"] == {"a": "b"} and record["model"] == "tiny"
    assert len(content["choices"][0]["token_ids"]) == len(content["choices"][0]["logprobs"]) == 5
    assert len(content["prompt_token_ids"]) == answer.usage.prompt_tokens == record["usage"]["prompt_tokens"]
    assert content["messages"] == HI and content["answer"][0]["content"] == text(answer)
    assert content["params"] == {"model": "tiny", "max_tokens": 5, "seed": 1}


def test_store_false_keeps_figures_alone(client) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=2, store=False)
    record = client.get(f"/records/{answer.model_extra['everlearn']['record']}", cast_to=dict)
    assert record["usage"]["prompt_tokens"] > 0 and record["content"] is None


def test_the_last_chunk_names_the_record_with_usage_or_without(client) -> None:
    for options in (None, {"include_usage": True}):
        extra = {"stream_options": options} if options else {}
        chunks = stream(client, model="tiny", messages=HI, max_tokens=4, n=2, seed=1, **extra)
        told = [chunk.model_extra.get("everlearn") for chunk in chunks]
        assert told[-1]["record"].startswith("rec_") and told[-1]["version"] == "tiny" and not any(told[:-1])
        assert [chunk.usage is not None for chunk in chunks][-1] == bool(options)
        if options:
            assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8


def test_the_same_routes_are_at_tinkers_path(server) -> None:
    with openai.OpenAI(base_url=server.url + "/oai/api/v1", api_key=KEY) as client:
        answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=2, temperature=0)
        assert answer.choices[0].finish_reason == "length"
        assert "tiny" in {model.id for model in client.models.list()}


# -- drawing ------------------------------------------------------------------------------------------------------------------


def test_seed_temperature_and_truncation(client) -> None:
    assert text(ask(client)) == text(ask(client))
    assert text(ask(client, seed=1)) != text(ask(client, seed=2))
    greedy = text(ask(client, temperature=0, seed=1))
    assert greedy == text(ask(client, temperature=0, seed=2))
    for fields in ({"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}):
        assert text(ask(client, seed=5, **fields)) == greedy


def test_n_choices_differ_and_each_is_scored(client) -> None:
    answer = ask(client, n=3, logprobs=True, top_logprobs=2, max_tokens=6)
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and answer.usage.completion_tokens == 18
    assert len({choice.message.content for choice in answer.choices}) == 3
    for choice in answer.choices:
        tokens = choice.logprobs.content
        assert len(tokens) == 6 and all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens)
        spelled = b"".join(bytes(token.bytes) for token in tokens)
        assert spelled.decode("utf-8", "replace") == choice.message.content


def test_bias_and_penalties_move_the_draw(client) -> None:
    assert text(ask(client, logit_bias={"40": 100}, temperature=1, max_tokens=5)) == "F" * 5
    penalised = text(ask(client, logit_bias={"40": 20}, presence_penalty=2, frequency_penalty=2, temperature=0, max_tokens=24))
    assert 0 < penalised.count("F") < 24
    plain = text(ask(client, temperature=0, max_tokens=24))
    assert text(ask(client, temperature=0, max_tokens=24, extra_body={"repetition_penalty": 2.0})) != plain


def test_stops_end_the_text_before_them(client) -> None:
    said = text(ask(client, max_tokens=24, temperature=0))
    stop = said[6:9]
    answer = ask(client, max_tokens=24, temperature=0, stop=["never there", stop], logprobs=True)
    assert text(answer) == said[: said.index(stop)] and answer.choices[0].finish_reason == "stop"
    shown = b"".join(bytes(token.bytes) for token in answer.choices[0].logprobs.content).decode("utf-8", "replace")
    assert stop not in shown
    first = client.chat.completions.create(model="tiny", messages=HI, max_tokens=24, temperature=0, logprobs=True, top_logprobs=0)
    assert first.choices[0].logprobs.content[0].top_logprobs == []


def test_stop_tokens_min_tokens_and_ignored_ends(client) -> None:
    bias = {"2": 100}  # <|im_end|>, which ends a turn
    assert ask(client, logit_bias=bias, max_tokens=6).choices[0].finish_reason == "stop"
    assert ask(client, logit_bias=bias, max_tokens=6, extra_body={"min_tokens": 3}).usage.completion_tokens == 4
    assert ask(client, logit_bias=bias, max_tokens=6, extra_body={"ignore_eos": True}).usage.completion_tokens == 6
    own = ask(client, logit_bias={"40": 100}, max_tokens=6, extra_body={"stop_token_ids": [40]})
    assert own.usage.completion_tokens == 1 and text(own) == ""


def test_both_names_of_max_tokens(client) -> None:
    fields = {"max_tokens": openai.NOT_GIVEN, "max_completion_tokens": 3}
    assert ask(client, **fields).usage.completion_tokens == 3
    assert ask(client, max_tokens=100_000, logit_bias={"2": 100}).choices[0].finish_reason == "stop"


def test_a_deadline_ends_the_answer_with_what_there_is(client) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=900, seed=3, extra_body={"deadline": 0.8, "ignore_eos": True}
    )
    assert 0 < answer.usage.completion_tokens < 900
    assert answer.choices[0].finish_reason == "length" and answer.model_extra["everlearn"]["finish"] == "deadline"


# -- the conversation -----------------------------------------------------------------------------------------------------------


def test_every_role_and_part_is_read(client) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bern", "days": 1}'}}
    messages = [
        {"role": "system", "content": "be"},
        {"role": "developer", "content": [{"type": "text", "text": "kind"}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "assistant", "content": "so", "refusal": None, "annotations": [], "provider_specific_fields": {"refusal": None}},
        {"role": "user", "content": "and?"},
    ]
    assert ask(client, messages=messages, tools=[WEATHER], tool_choice="none").usage.prompt_tokens > 60


def test_an_answer_can_be_sent_back_as_it_came(client) -> None:
    answer = ask(client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=200)
    message = answer.choices[0].message
    messages = [*HI, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}]
    assert client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER], max_tokens=2).usage.prompt_tokens > 20


def test_the_last_message_can_be_continued(client) -> None:
    messages = [*HI, {"role": "assistant", "content": "the quick"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    going_on = ask(client, messages=messages, extra_body=extra).usage.prompt_tokens
    assert going_on < ask(client, messages=messages).usage.prompt_tokens


def test_variables_that_the_template_does_not_read_are_refused(client) -> None:
    error = refused(client, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert error["param"] == "chat_template_kwargs" and "'enable_thinking'" in error["message"]
    assert refused(client, extra_body={"chat_template_kwargs": {"messages": []}})["param"] == "chat_template_kwargs"


def test_a_model_that_does_not_think_has_no_effort(client) -> None:
    assert refused(client, reasoning_effort="high")["param"] == "reasoning_effort"
    assert ask(client, reasoning_effort="none").usage.completion_tokens == 8


def test_a_thought_is_no_content(client) -> None:
    extra = {"structured_outputs": {"regex": "<think>hm 1</think>so"}}
    answer = ask(client, max_tokens=60, extra_body=extra)
    assert text(answer) == "so" and answer.choices[0].message.model_extra["reasoning_content"] == "hm 1"
    thought = answer.usage.completion_tokens_details.reasoning_tokens
    assert 0 < thought < answer.usage.completion_tokens
    chunks = stream(client, model="tiny", messages=HI, max_tokens=60, seed=1, extra_body=extra, stream_options={"include_usage": True})
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join((delta.model_extra or {}).get("reasoning_content", "") for delta in deltas) == "hm 1"
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == thought


# -- formats and tools -------------------------------------------------------------------------------------------------------


def test_answers_match_their_schema(client) -> None:
    for seed in range(3):
        answer = ask(
            client,
            seed=seed,
            max_tokens=120,
            response_format={"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}},
        )
        assert set(json.loads(text(answer))) == {"city", "days"} and answer.choices[0].finish_reason == "stop"


def test_json_regex_choice_and_grammar(client) -> None:
    assert text(ask(client, response_format={"type": "text"})) == text(ask(client))
    found = client.chat.completions.create(model="tiny", messages=HI, max_tokens=200, response_format={"type": "json_object"})
    assert text(found).lstrip().startswith("{")
    for wanted, matches in (
        ({"regex": "[ab]{3}c"}, lambda said: len(said) == 4 and said.endswith("c")),
        ({"choice": ["yes", 'no "really"']}, lambda said: said in ("yes", 'no "really"')),
        ({"grammar": 'root ::= "x" [0-9] "y"'}, lambda said: said[0] == "x" and said[1].isdigit() and said[2] == "y"),
        ({"json": {"type": "integer", "minimum": 1, "maximum": 5}}, lambda said: 1 <= int(said) <= 5),
    ):
        assert matches(text(ask(client, max_tokens=40, extra_body={"structured_outputs": wanted}))), wanted


def test_a_grammar_that_does_not_compile_is_a_400_that_names_it(client) -> None:
    for wanted in ({"regex": "(a"}, {"grammar": "root ::= ("}, {"json": {"type": "nothing"}}):
        for streamed in (False, True):
            assert refused(client, stream=streamed, extra_body={"structured_outputs": wanted})["param"] == "response_format"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_is_asked_for_comes_and_fits_its_schema(client, choice) -> None:
    answer = ask(client, tools=[WEATHER, NEWS], tool_choice=choice, parallel_tool_calls=False, max_tokens=250)
    [call] = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
    if choice != "required":
        assert call.function.name == "get_weather" and set(json.loads(call.function.arguments)) == {"city", "days"}
    chunks = stream(
        client, model="tiny", messages=HI, seed=1, tools=[WEATHER, NEWS], tool_choice=choice, parallel_tool_calls=False, max_tokens=250
    )
    deltas = [d for c in chunks if c.choices for d in c.choices[0].delta.tool_calls or []]
    assert deltas[0].id and deltas[0].type == "function" and deltas[0].function.name == call.function.name
    assert "".join(d.function.arguments for d in deltas) == call.function.arguments and {d.index for d in deltas} == {0}


def test_tools_that_may_be_called_are_shown_and_none_hides_them(client) -> None:
    shown = ask(client, tools=[WEATHER], tool_choice="auto").usage.prompt_tokens
    hidden = ask(client, tools=[WEATHER], tool_choice="none").usage.prompt_tokens
    assert shown > hidden == ask(client).usage.prompt_tokens
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NEWS | {"function": {"name": "get_news"}}]}}
    answer = ask(client, tools=[WEATHER, NEWS], tool_choice=allowed, parallel_tool_calls=False, max_tokens=250)
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["get_news"]


def test_an_answer_in_a_format_or_a_call_instead(client) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "days", "schema": {"enum": ["one", "two"]}}}
    ended = set()
    for seed in range(4):
        answer = ask(client, seed=seed, tools=[WEATHER], parallel_tool_calls=False, response_format=form, max_tokens=250)
        choice = answer.choices[0]
        ended.add(choice.finish_reason)
        if choice.message.tool_calls:
            assert set(json.loads(choice.message.tool_calls[0].function.arguments)) == {"city", "days"}
        else:
            assert json.loads(text(answer)) in ("one", "two")
    assert ended <= {"stop", "tool_calls"}
    bound = ask(client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, response_format=form, max_tokens=250)
    assert bound.choices[0].finish_reason == "tool_calls"
    refusal = refused(client, tools=[WEATHER], extra_body={"structured_outputs": {"regex": "a"}})
    assert refusal["param"] == "structured_outputs"


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the SDK's own, about a `parsed` that it sends back
def test_the_sdks_helpers_for_streams_and_parsing_work(client) -> None:
    from pydantic import BaseModel

    class Trip(BaseModel):
        days: int

    parsed = client.chat.completions.parse(model="tiny", messages=HI, response_format=Trip, max_tokens=200, seed=2)
    assert isinstance(parsed.choices[0].message.parsed, Trip)
    messages = [*HI, parsed.choices[0].message, *HI]
    assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=2).usage.prompt_tokens > 10
    ends: Any = {"logit_bias": {"2": 100}, "extra_body": {"min_tokens": 5}, "seed": 1}
    with client.chat.completions.stream(model="tiny", messages=HI, **ends) as events:
        kinds = {event.type for event in events}
        final = events.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert text(final) == text(ask(client, max_tokens=9, **ends)) and final.choices[0].finish_reason == "stop"


# -- errors ------------------------------------------------------------------------------------------------------------------


def test_errors_map_to_the_sdks_classes(client, server) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody@3", messages=HI)
    assert missing.value.body["param"] == "model" and missing.value.request_id
    assert refused(client, messages=[{"role": "user", "content": "x" * 5000}])["code"] == "context_length_exceeded"
    assert refused(client, logit_bias={"99999": 1})["param"] == "logit_bias"
    assert refused(client, extra_body={"stop_token_ids": [99999]})["param"] == "stop_token_ids"
    assert refused(client, extra_body={"unheard_of": 1})["param"] == "unheard_of"
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO"}}]}]
    assert "messages[0].content[0]" in refused(client, messages=image)["message"]
    for body in (refused(client, n=1000), refused(client, temperature=9)):
        openai_schema.validate("ErrorResponse", {"error": body})


def test_names_of_models_that_are_none(client) -> None:
    for name in (
        "",
        "x" * 600,
        "support@",
        "support@-1",
        "support@x",
        "../etc",
        "tinker://nothing",
        "tinker://a/b/c",
        "a;tinker://a:train:0/weights/x",
    ):
        with pytest.raises((openai.NotFoundError, openai.BadRequestError)) as caught:
            client.chat.completions.create(model=name, messages=HI)
        assert caught.value.body["param"] == "model", name


def test_requests_of_many_at_once_are_answered_each_with_its_own(server) -> None:
    """32 together, seeded: each gives what it gives alone."""
    import asyncio

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key=KEY) as client:
            calls = [client.chat.completions.create(model="tiny", messages=HI, max_tokens=6, seed=seed) for seed in range(32)]
            return [text(answer) for answer in await asyncio.gather(*calls)]

    together = asyncio.run(all_of_them())
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY) as client:
        for seed in (0, 13, 31):
            alone = client.chat.completions.create(model="tiny", messages=HI, max_tokens=6, seed=seed)
            assert text(alone) == together[seed]
