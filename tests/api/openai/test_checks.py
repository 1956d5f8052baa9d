"""Bounds of requests, without a server: what is taken, what is refused, and under which name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from everlearn.api import bounds
from everlearn.api.openai import checks, items, types
from everlearn.api.openai import responses_types as forms
from everlearn.errors import InvalidRequest, TooLarge, Unsupported, UserError

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}


def chat(**fields: Any) -> types.ChatForm:
    return types.parse(json.dumps({"model": "m", "messages": [USER], **fields}).encode(), types.ChatForm)


def turn(**fields: Any):
    return checks.chat_turn(chat(**fields), lambda effort: {"effort": effort}, 0)


REFUSED_CHAT = [
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(bounds.MAX_LOGIT_BIAS + 1)}}, "logit_bias"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 10**40}, "seed"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": "x" * (bounds.MAX_STOP_CHARS + 1)}, "stop"),
    ({"stop_token_ids": [1] * (bounds.MAX_STOP_TOKENS + 1)}, "stop_token_ids"),
    ({"n": 0}, "n"),
    ({"n": 10**9}, "n"),
    ({"n": 2**70}, "n"),
    ({"n": 10**400}, "n"),
    ({"top_k": 10**400}, "top_k"),
    ({"min_tokens": -(10**400)}, "min_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"logprobs": True, "top_logprobs": 10**400}, "top_logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    ({"max_tokens": 1, "min_tokens": 2}, "min_tokens"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"deadline": 0}, "deadline"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
    ({"functions": []}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"verbosity": "low"}, "verbosity"),
    ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
]
REFUSED_TURN = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "assistant"}]}, "messages"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tools": [TOOL] * (bounds.MAX_TOOLS + 1)}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}}, "response_format.json_schema.name"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
]
REFUSED_SHAPES = [
    ({"messages": None}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour"),
    ({"temperature": "hot"}, "temperature"),
    ({"n": 1.5}, "n"),
    ({"stream": "yes"}, "stream"),
    ({"unheard_of": 1}, "unheard_of"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
]


def names(value: Any) -> str:
    return str(value)[:60]


@pytest.mark.parametrize(("fields", "param"), REFUSED_CHAT, ids=names)
def test_a_value_outside_of_its_bounds_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UserError) as caught:
        checks.chat_draw(chat(**fields))
    assert caught.value.param == param and param.split(".")[-1] in caught.value.message


@pytest.mark.parametrize(("fields", "param"), REFUSED_TURN, ids=names)
def test_a_conversation_that_makes_no_sense_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        turn(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(("fields", "param"), REFUSED_SHAPES, ids=names)
def test_a_field_of_another_shape_is_refused_by_its_place(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"nothing", b'{"model": NaN}', b'{"model": "\\ud800"}', b"\xff", b"[" * 200_000])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        types.parse(body, types.ChatForm)


def test_a_number_that_is_none_is_refused() -> None:
    form = chat()
    form.temperature = math.nan
    with pytest.raises(InvalidRequest):
        checks.chat_draw(form)


def test_every_field_of_the_sdk_is_known() -> None:
    """What the newest SDK can send is read or refused with a reason, never called unknown."""
    from openai.types.chat import completion_create_params
    from openai.types.completion_create_params import CompletionCreateParamsBase
    from openai.types.responses.response_create_params import ResponseCreateParamsBase

    chat_fields = set(completion_create_params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert chat_fields <= set(types.ChatForm.__struct_fields__)
    assert set(CompletionCreateParamsBase.__annotations__) | {"stream"} <= set(types.CompletionForm.__struct_fields__)
    assert set(ResponseCreateParamsBase.__annotations__) | {"stream"} <= set(forms.ResponsesForm.__struct_fields__)


def test_null_means_not_given() -> None:
    nothing = dict.fromkeys(set(types.ChatForm.__struct_fields__) - {"model", "messages"})
    assert checks.chat_draw(chat(**nothing)) == checks.chat_draw(chat())


def test_messages_become_what_templates_take() -> None:
    call = {"id": "call_1", "type": "function", "index": 0, "function": {"name": "look_up", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "be"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "audio": None, "annotations": []},
        {"role": "tool", "content": "42", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "so", "reasoning": "hm", "tool_calls": []},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ]
    assert turn(messages=messages).messages == [
        {"role": "developer", "content": "be"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}]},
        {"role": "tool", "content": "42", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "so", "reasoning_content": "hm"},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
    ]


def test_what_the_sdk_parsed_can_be_sent_back() -> None:
    """`parse()` puts what it read beside what it read it from, and sends both, null where there is nothing."""
    from openai import NOT_GIVEN
    from openai.lib._parsing import parse_chat_completion
    from openai.types.chat import ChatCompletion
    from pydantic import BaseModel

    class Trip(BaseModel):
        days: int

    call = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"a": 1}'}}
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    for said in ({"content": '{"days": 3}'}, {"content": None, "tool_calls": [call]}):
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", **said}}
        answer = ChatCompletion.model_validate({"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
        for tools in (NOT_GIVEN, [strict]):
            message = parse_chat_completion(response_format=Trip, input_tools=tools, chat_completion=answer).choices[0].message
            given = {name: value for name, value in said.items() if value is not None}
            for sent in (message.model_dump(mode="json", warnings=False), message.to_dict(mode="json", warnings=False)):
                assert turn(messages=[USER, sent]).messages[1] == {"role": "assistant", **given}


def test_tools_are_offered_chosen_and_narrowed() -> None:
    other = {"type": "function", "function": {"name": "other", "strict": True}}
    assert turn(tools=[TOOL, other]).tool_choice == "auto"
    assert turn(tools=[TOOL, other], tool_choice="none").offered == []
    named = turn(tools=[TOOL, other], tool_choice={"type": "function", "function": {"name": "other"}})
    assert named.tool_choice == {"type": "function", "function": {"name": "other"}}
    allowed = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "other"}}]},
    }
    narrowed = turn(tools=[TOOL, other], tool_choice=allowed)
    assert narrowed.tool_choice == "required" and [tool["function"]["name"] for tool in narrowed.tools] == ["other"]


def test_effort_becomes_switches_and_own_switches_win() -> None:
    assert turn(reasoning_effort="low").switches == {"effort": "low"}
    assert turn(reasoning_effort="low", chat_template_kwargs={"effort": 1}).switches == {"effort": 1}


def test_formats_of_the_answer() -> None:
    assert turn(response_format={"type": "json_object"}).answer_schema == {"type": "object"}
    schema = {"type": "object", "properties": {}}
    assert turn(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}).answer_schema == schema
    assert turn(structured_outputs={"regex": "a+"}).grammar.kind == "regex"
    assert turn(structured_outputs={"grammar": 'root ::= "a"'}).grammar.kind == "ebnf"
    assert turn(structured_outputs={"choice": ['"', "b"]}).grammar.source == 'start: "\\"" | "b"'
    assert turn(structured_outputs={"json": schema}).grammar.kind == "json_schema"
    big = {"type": "object", "description": "x" * bounds.MAX_SCHEMA_BYTES}
    with pytest.raises(TooLarge) as caught:
        turn(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": big}})
    assert caught.value.param == "response_format.json_schema.schema"


@pytest.mark.parametrize("given", [{"a" * 65: "x"}, {"a": "x" * 513}, {str(i): "x" for i in range(17)}])
def test_metadata_is_bounded(given: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest):
        checks.metadata(given)


def test_labels_hold_no_nul() -> None:
    for bad in ("a\0b", "x" * 513):
        with pytest.raises(InvalidRequest):
            checks.label(bad, "user")


# ---- responses ----


def responses(**fields: Any) -> forms.ResponsesForm:
    return types.parse(json.dumps({"model": "m", "input": "hi", **fields}).encode(), forms.ResponsesForm)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"service_tier": "priority"}, "service_tier"),
    ],
)
def test_what_responses_do_not_offer_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Unsupported) as caught:
        forms.check(responses(**fields), thinks=False)
    assert caught.value.param == param


def test_encrypted_reasoning_is_refused_where_there_is_reasoning() -> None:
    form = responses(include=["reasoning.encrypted_content"])
    forms.check(form, thinks=False)
    with pytest.raises(Unsupported):
        forms.check(form, thinks=True)


def test_items_become_messages_and_calls_belong_together() -> None:
    given = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}", "status": "completed", "id": None},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}", "parsed_arguments": {}},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
        {
            "type": "message",
            "role": "assistant",
            "id": "m",
            "content": [{"type": "output_text", "text": "so", "annotations": [], "parsed": None}],
        },
    ]
    calls = [{"id": i, "type": "function", "function": {"name": name, "arguments": "{}"}} for i, name in (("c1", "f"), ("c2", "g"))]
    assert items.messages_of(given) == [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "tool_calls": calls, "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "assistant", "content": "so"},
    ]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ([], "input"),
        ([{"type": "web_search_call"}], "input[0].type"),
        ([{"type": "item_reference", "id": "x"}], "input[0].type"),
        ([{"role": "user"}], "input[0].content"),
        ([{"role": "user", "content": [{"type": "input_file"}]}], "input[0].content[0].type"),
        ([{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "colour": 1}], "input[0].colour"),
    ],
)
def test_items_that_are_not_known_are_refused_by_their_place(given: list[dict[str, Any]], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        items.messages_of(given)
    assert caught.value.param == param


def test_a_kept_message_becomes_its_items_again() -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    found = items.items_of("s", {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": calls}, "completed")
    assert [item["type"] for item in found] == ["reasoning", "function_call"]
    assert items.messages_of(found) == [{"role": "assistant", "content": "", "tool_calls": calls, "reasoning_content": "hm"}]


@pytest.mark.parametrize(
    ("sent", "param", "hint"),
    [
        ({"temprature": 1}, "temprature", "did you mean temperature?"),
        ({"audioo": 1}, "audioo", "leave it out"),  # audio isn't offered either
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "one of system, developer, user, assistant, tool"),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "messages[0].content[0].type", "'smell'"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "one of text, json_object, json_schema"),
        ({"tool_choice": "perhaps"}, "tool_choice", "one of auto, none, required"),
    ],
)
def test_what_might_have_been_meant_is_said(sent: dict[str, Any], param: str, hint: str):
    with pytest.raises(InvalidRequest) as error:
        chat(**sent)
    assert error.value.param == param and error.value.message.endswith(hint)


def test_the_roles_of_the_other_apis_are_said_too():
    from everlearn.api.anthropic.types import MessagesForm

    with pytest.raises(InvalidRequest, match=r"input\[0\].role: .* one of assistant, developer, system, user$"):
        items.read_item({"role": "robot", "content": "x"}, 0)
    with pytest.raises(InvalidRequest, match=r"messages\[0\].role: .* one of user, assistant, system$"):
        types.parse(json.dumps({"model": "m", "max_tokens": 1, "messages": [{"role": "robot", "content": "x"}]}).encode(), MessagesForm)
