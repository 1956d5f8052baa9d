"""The table: which format a model gets, and how tools and calls are shown to a model whose template can't."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from everlearn.errors import InvalidRequest
from everlearn.render import template
from everlearn.render.tokenizer import ChatTokenizer
from everlearn.render.tools import FORMATS, format_for
from tests.render.conftest import TIME, WEATHER

# As short as templates can be that have the signs of their families.
TEMPLATES = {
    "hermes": "{% if tools %}<tools>{{ tools | tojson }}</tools> in <tool_call></tool_call>{% endif %}{% for m in messages %}{{ m.tool_calls }}{% endfor %}",
    "qwen3_coder": "{% if tools %}<tool_call>\n<function=name>\n<parameter=x>{% endif %}{% for m in messages %}{{ m.tool_calls }}{% endfor %}",
    "llama3": "{% if tools %}{{ '<|python_tag|>' }}{% endif %}{% for m in messages %}{{ m.tool_calls }}{% endfor %}",
    "llama4": "{% if tools %}[func_name1(params_name1=params_value1)]{% endif %}{% for m in messages %}{{ m.tool_calls }}{% endfor %}",
    "deepseek_v32": "{% for m in messages %}{% if m.tool_calls %}<｜DSML｜function_calls>{% endif %}{% endfor %}",
    "kimi_k2": "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.tool_calls %}<|tool_call_begin|>{% endif %}{% endfor %}",
    "deepseek_v3": "{% for m in messages %}{% if m.tool_calls %}<｜tool▁call▁begin｜>function<｜tool▁sep｜>x\n```json{% endif %}{% endfor %}",
    "deepseek_v31": "{% for m in messages %}{% if m.tool_calls %}<｜tool▁call▁begin｜>x<｜tool▁sep｜>{% endif %}{% endfor %}",
    "harmony": "{% if tools %}namespace functions{% endif %}{% for m in messages %}<|channel|>final<|message|>{{ m.tool_calls }}{% endfor %}",
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bonn"}'}}
TALK = [
    {"role": "user", "content": "Weather and time?"},
    {"role": "assistant", "content": "I'll look.", "tool_calls": [CALL, {**CALL, "id": "call_2"}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "sun"}]},
    {"role": "user", "content": "Thanks."},
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_model_has_the_format_of_its_template(with_tokens: Callable[..., ChatTokenizer], name: str):
    format = format_for(with_tokens(template=TEMPLATES[name]), "SomeForCausalLM", "some")
    assert format.name == name and format.shows_calls
    assert format.native == (not name.startswith("deepseek")) and not format.special and not format.keep_ids
    if format.native:
        assert format.inject(TALK, [WEATHER]) == TALK


def test_marks_that_are_special_tokens_are_kept_for_the_parser(with_tokens: Callable[..., ChatTokenizer]):
    tokenizer = with_tokens("<tool_call>", "</tool_call>", "<think>", "</think>", template=TEMPLATES["hermes"])
    format = format_for(tokenizer)
    assert format.thinks and format.special == {"<tool_call>", "</tool_call>", "<think>", "</think>"}
    assert format.keep_ids == {tokenizer.id_of(mark) for mark in format.special}


def test_the_embedded_model_is_prompted(tokenizer: ChatTokenizer):
    format = format_for(tokenizer, "LlamaForCausalLM", "llama")
    assert (format.name, format.native, format.shows_calls, format.thinks) == ("prompted", False, False, False)
    text = template.render(tokenizer, format.inject([{"role": "system", "content": "Be kind."}, *TALK], [WEATHER, TIME]))
    head, _, rest = text.partition("<|im_end|>")
    assert head.startswith("<|im_start|>system\nBe kind.\n\n# Tools")
    shown = [json.loads(line) for line in head.partition("<tools>\n")[2].partition("\n</tools>")[0].splitlines()]
    assert [tool["function"]["name"] for tool in shown] == ["get_weather", "get_time"]
    assert shown[0]["function"]["parameters"] == WEATHER["function"]["parameters"]
    block = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
    assert f"<|im_start|>assistant\nI'll look.\n{block}\n{block}<|im_end|>" in rest
    result = "<tool_response>\n{}\n</tool_response>"
    assert f"<|im_start|>user\n{result.format('rain')}\n{result.format('sun')}<|im_end|>\n<|im_start|>user\nThanks.<|im_end|>" in rest


# What gpt-oss's and Llama 3's templates do with calls: the first one is shown; a thought and a text beside it, or a second call, are refused.
ONE_CALL = {
    "harmony": """{% set last = namespace(name='') %}{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}
{%- if m.content and m.thinking %}{{ raise_exception('both content and thinking') }}{% endif %}
{%- if m.content or m.thinking %}<|channel|>analysis<|message|>{{ m.content or m.thinking }}<|end|>{% endif %}
{%- set call = m.tool_calls[0].function %}{% set last.name = call.name %} to={{ call.name }}<|message|>{{ call.arguments | tojson }}<|call|>
{%- elif m.role == 'tool' %}{{ last.name }}<|message|>{{ m.content }}<|end|>{% else %}{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}
{%- endfor %}{% if tools %}functions{% endif %}""",
    "llama3": """{% for m in messages %}{% if 'tool_calls' in m %}{% if not m.tool_calls | length == 1 %}
{{- raise_exception('single tool-calls at once') }}{% endif %}{% set call = m.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}}<|eot_id|>
{%- else %}{{ m.role }}: {{ m.content }}<|eot_id|>{% endif %}{% endfor %}{% if tools %}<|python_tag|>{% endif %}""",
}
NOW = {"id": "call_2", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}


def test_a_thought_and_a_text_before_a_call_are_one_for_gpt_oss(with_tokens: Callable[..., ChatTokenizer]):
    tokenizer = with_tokens(template=ONE_CALL["harmony"])
    format = format_for(tokenizer)
    assert format.name == "harmony"
    parsed = format.parse(
        "<|channel|>analysis<|message|>Bonn, then.<|end|><|start|>assistant<|channel|>commentary<|message|>I'll look.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Bonn"}<|call|>'
    )
    assert (parsed.reasoning, parsed.content) == ("Bonn, then.", "I'll look.")
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in parsed.tool_calls
    ]
    said = {"role": "assistant", "content": parsed.content, "reasoning_content": parsed.reasoning, "tool_calls": calls}
    for content in (parsed.content, [{"type": "text", "text": parsed.content}]):
        shown = template.render(tokenizer, format.inject([TALK[0], {**said, "content": content}], None))
        assert '<|message|>Bonn, then.\nI\'ll look.<|end|> to=get_weather<|message|>{"city": "Bonn"}<|call|>' in shown
    for alone in ({"content": "I'll look."}, {"content": None, "reasoning_content": "I'll look."}):
        shown = template.render(tokenizer, format.inject([TALK[0], {**TALK[1], "tool_calls": calls, **alone}], None))
        assert "<|message|>I'll look.<|end|> to=get_weather" in shown
    answer = {"role": "assistant", "content": "Rain.", "reasoning_content": "hm"}
    assert format.inject([answer], None) == [answer]


@pytest.mark.parametrize("name", ONE_CALL)
def test_calls_of_a_message_come_in_turn_where_the_template_shows_one(with_tokens: Callable[..., ChatTokenizer], name: str):
    tokenizer = with_tokens(template=ONE_CALL[name])
    format = format_for(tokenizer)
    assert format.name == name and format.one_call
    sun, rain = TALK[3], TALK[2]
    talk = [TALK[0], {**TALK[1], "tool_calls": [CALL, NOW]}, sun, rain, {**rain, "tool_call_id": "call_9"}, TALK[4]]
    split = format.inject(talk, None)
    assert [message.get("tool_calls") or message.get("tool_call_id") or message["role"] for message in split] == [
        "user", [CALL], "call_1", [NOW], "call_2", "call_9", "user",
    ]  # fmt: skip
    assert (split[1]["content"], split[3]["content"]) == ("I'll look.", "")
    shown = template.render(tokenizer, split)
    assert -1 < shown.find('{"city": "Bonn"}') < shown.find("rain") < shown.find("get_time") < shown.find("sun")


# DeepSeek V3 and R1, and what was made of R1: calls are shown where there is no text. Then as later ones do it.
ALONE = """{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}A:{% for c in m['tool_calls'] %}
{{- '<｜tool▁call▁begin｜>' + c['type'] + '<｜tool▁sep｜>' + c['function']['name'] + '\n```json\n' + c['function']['arguments'] + '\n```' }}
{%- endfor %};{% endif %}{% if m['role'] == 'assistant' and m['content'] is not none %}A:{{ m['content'] }};{% endif %}
{%- if m['role'] != 'assistant' %}{{ m['role'] }}:{{ m['content'] }};{% endif %}{% endfor %}"""
EITHER = """{% for m in messages %}{% if m['role'] == 'assistant' and 'tool_calls' in m %}A:{% for c in m['tool_calls'] %}
{%- if loop.first %}{% if m['content'] is none %}[none]{% else %}{{ m['content'] }}{% endif %}{% endif %}
{{- '<｜tool▁call▁begin｜>' + c['type'] + '<｜tool▁sep｜>' + c['function']['name'] + '\n```json\n' + c['function']['arguments'] + '\n```' }}
{%- endfor %};{% else %}{{ m['role'] }}:{{ m['content'] }};{% endif %}{% endfor %}"""
BONN = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Bonn"}\n```'


@pytest.mark.parametrize(
    ("source", "alone", "silent", "said"),
    [
        (ALONE, True, f"A:{BONN}{BONN};", f"A:I'll look.;A:{BONN}{BONN};"),
        (EITHER, False, f"A:[none]{BONN}{BONN};", f"A:I'll look.{BONN}{BONN};"),
    ],
    ids=["alone", "either"],
)
def test_calls_are_shown_by_a_template_that_asks_whether_there_is_text(
    with_tokens: Callable[..., ChatTokenizer], source: str, alone: bool, silent: str, said: str
):
    tokenizer = with_tokens(template=source)
    format = format_for(tokenizer)
    assert (format.name, format.shows_calls, format.calls_alone) == ("deepseek_v3", True, alone)

    def shown(content: object) -> str:
        return template.render(tokenizer, format.inject([TALK[0], {**TALK[1], "content": content}, TALK[2]], None))

    for content in (None, "", []):  # a null by the OpenAI API, and how others write it
        assert shown(content) == f"user:Weather and time?;{silent}tool:rain;"
    for content in ("I'll look.", [{"type": "text", "text": "I'll look."}]):
        assert shown(content) == f"user:Weather and time?;{said}tool:rain;"
    assert template.render(tokenizer, [TALK[0], {"role": "assistant", "content": None}]).endswith("A:;" if alone else "assistant:;")


def test_what_is_shown_of_a_call_is_what_is_read_as_one(tokenizer: ChatTokenizer):
    format = format_for(tokenizer)
    (said,) = format.inject([TALK[1]], None)
    read = format.parse(said["content"])
    assert read.content == "I'll look." and [call.arguments for call in read.tool_calls] == ['{"city": "Bonn"}'] * 2


def test_inject_leaves_the_request_alone(tokenizer: ChatTokenizer):
    before = json.dumps(TALK)
    format_for(tokenizer).inject(TALK, [WEATHER])
    assert json.dumps(TALK) == before


def test_without_a_system_message_one_is_made(tokenizer: ChatTokenizer):
    first, second = format_for(tokenizer).inject(TALK[:1], [WEATHER])
    assert first["role"] == "system" and first["content"].startswith("# Tools") and second == TALK[0]
    assert format_for(tokenizer).inject(TALK[:1], None) == TALK[:1]


def test_strict_is_not_shown_to_the_model(tokenizer: ChatTokenizer):
    tool = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    assert "strict" not in format_for(tokenizer).inject(TALK[:1], [tool])[0]["content"]


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v31", "deepseek_v32"])
def test_deepseek_is_shown_tools_in_its_own_words(with_tokens: Callable[..., ChatTokenizer], name: str):
    format = format_for(with_tokens(template=TEMPLATES[name]))
    system, *others = format.inject(TALK, [WEATHER])
    assert "### get_weather" in system["content"] and FORMATS[name].marks[0] in system["content"] and others == TALK


@pytest.mark.parametrize(
    ("tools", "named"),
    [
        ([{"type": "web_search"}], "web_search"),
        ([{"type": "function", "function": {}}], r"tools\[0\]"),
        ([{"type": "function", "function": {"name": "a b"}}], "a b"),
        ([{"type": "function", "function": {"name": "f", "parameters": []}}, WEATHER, WEATHER], "get_weather"),
        ([{"type": "function", "function": {"name": "f", "parameters": "x"}}], "JSON schema"),
    ],
)
def test_tools_that_are_none_are_named(tools: list, named: str):
    with pytest.raises(InvalidRequest, match=named) as caught:
        FORMATS["hermes"].grammar(tools, "required")
    assert caught.value.param == "tools"
