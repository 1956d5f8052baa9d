"""Grammars of calls, by llguidance itself: what they take and refuse, and that whatever they let a model write is a valid call."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from everlearn.errors import InvalidRequest, Unsupported
from everlearn.render.tokenizer import ChatTokenizer
from everlearn.render.tools import FORMATS, TOKEN_FORMATS, ToolFormat, special_marks
from everlearn.types import Grammar
from tests.render.conftest import TIME, WEATHER

TOOLS = [{**tool, "function": {**tool["function"], "strict": True}} for tool in (WEATHER, TIME)]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
HARMONY_THOUGHT = "<|channel|>analysis<|message|>Weather?<|end|><|start|>assistant"
# A call as each family writes it; between two calls; around them; with $ARGS for the arguments of get_weather, or its own form of them.
CALLS = {
    "hermes": ('<tool_call>\n{"name": "get_weather", "arguments": $ARGS}\n</tool_call>', "\n", "", ""),
    "qwen3_coder": ("<tool_call>\n<function=get_weather>\n$ARGS</function>\n</tool_call>", "\n", "", ""),
    "llama3": ('{"name": "get_weather", "parameters": $ARGS}', "; ", "", ""),
    "llama4": ("get_weather($ARGS)", ", ", "[", "]"),
    "deepseek_v32": (
        '<｜DSML｜invoke name="get_weather">\n$ARGS</｜DSML｜invoke>\n',
        "",
        "<｜DSML｜function_calls>\n",
        "</｜DSML｜function_calls>",
    ),
    "kimi_k2": (
        "<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>$ARGS<|tool_call_end|>",
        "",
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
    ),
    "deepseek_v3": (
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n$ARGS\n```<｜tool▁call▁end｜>",
        "\n",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
    ),
    "deepseek_v31": (
        "<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>$ARGS<｜tool▁call▁end｜>",
        "",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
    ),
    "harmony": ("<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>$ARGS", None, "", ""),
}
GOOD = ['{"city": "Bonn"}', '{"city":"Bonn","days":3,"unit":"C"}', '{"city": "東京 \\"x\\" </tool_call>", "days": -2}']
BAD = ["{}", '{"city": 3}', '{"city": "Bonn", "x": 1}', '{"city": "Bonn", "unit": "K"}', '{"city":    "Bonn"}', '{"city": "Bo', "null"]


def tags(arguments: str) -> str:
    try:
        values = json.loads(arguments)
    except ValueError:
        return '<｜DSML｜parameter name="city" string="true">Bonn'
    return "".join(
        f'<｜DSML｜parameter name="{key}" string="{str(isinstance(value, str)).lower()}">'
        f"{value if isinstance(value, str) else json.dumps(value)}</｜DSML｜parameter>\n"
        for key, value in (values or {}).items()
    )


def keywords(arguments: str) -> str:
    try:
        values = json.loads(arguments)
    except ValueError:
        return 'city="Bo'
    return ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in (values or {}).items())


def element(arguments: str) -> str:
    try:
        values = json.loads(arguments)
    except ValueError:
        return "<parameter=city>\nBonn"
    return "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
        for key, value in (values or {}).items()
    )


OWN = {"qwen3_coder": element, "deepseek_v32": tags, "llama4": keywords}  # arguments in another form than JSON's
SPACED = '{"city":    "Bonn"}'


def reply(family: str, *arguments: str) -> str:
    call, between, opening, closing = CALLS[family]
    calls = [call.replace("$ARGS", OWN[family](text) if family in OWN else text) for text in arguments]
    return opening + (between or "").join(calls) + closing


class Bound:
    """A format bound to a tokenizer that has its marks as special tokens, or has none of them."""

    def __init__(self, name: str, tokenizer: ChatTokenizer):
        self.tokenizer, self.matchers = tokenizer, LLTokenizer(tokenizer.tokenizer.to_str())
        row = FORMATS[name]
        self.numbers = special_marks(row, tokenizer)
        special = frozenset(self.numbers)
        self.format: ToolFormat = msgspec.structs.replace(row, special=special, thinks=row.thinks or "<think>" in special)

    def matcher(self, grammar: Grammar) -> LLMatcher:
        source = grammar.source if grammar.kind == "lark" else LLMatcher.grammar_from_json_schema(grammar.source)
        matcher = LLMatcher(self.matchers, LLMatcher.grammar_from_lark(source) if grammar.kind == "lark" else source)
        assert not matcher.is_error(), f"{matcher.get_error()}\n{grammar.source}"
        return matcher

    def takes(self, grammar: Grammar, text: str) -> bool:
        matcher, ids = self.matcher(grammar), self.tokenizer.encode(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.fixture(scope="session")
def bound(tokenizer: ChatTokenizer, with_tokens: Callable[..., ChatTokenizer]) -> Callable[[str, bool], Bound]:
    @functools.cache
    def make(name: str, special: bool) -> Bound:
        return Bound(name, with_tokens(*FORMATS[name].marks) if special else tokenizer)

    return make


EITHER = pytest.mark.parametrize("special", [True, False], ids=["special tokens", "strings"])
FAMILY = pytest.mark.parametrize("family", CALLS)


@EITHER
@FAMILY
@pytest.mark.parametrize("choice", ["auto", "required", NAMED], ids=["auto", "required", "named"])
def test_calls_that_match_their_schema_and_no_others(bound: Callable[..., Bound], family: str, special: bool, choice: Any):
    kit = bound(family, special)
    grammar = kit.format.grammar(TOOLS, choice)
    assert grammar is not None and grammar.kind == "lark"
    for arguments in GOOD[: 2 if special or family in ("qwen3_coder", "deepseek_v32") else 3]:  # a special token is no text
        assert kit.takes(grammar, reply(family, arguments)), arguments
    for arguments in BAD[:-1] if family in OWN else BAD:
        if (family, arguments) != ("qwen3_coder", '{"city": 3}') and (family not in OWN or arguments != SPACED):  # text is text there
            assert not kit.takes(grammar, reply(family, arguments)), arguments
    assert not kit.takes(grammar, reply(family, GOOD[0]).replace("get_weather", "get_wether"))
    assert kit.takes(grammar, reply(family, GOOD[0]).replace("get_weather", "get_time")) is False  # the other's arguments


@EITHER
@FAMILY
def test_how_many_calls_and_what_else(bound: Callable[..., Bound], family: str, special: bool):
    kit, two, one = bound(family, special), reply(family, GOOD[0], GOOD[0]), reply(family, GOOD[0])
    auto, required = kit.format.grammar(TOOLS, "auto"), kit.format.grammar(TOOLS, "required")
    if family != "harmony":
        assert kit.takes(auto, two) and kit.takes(required, two)
        single = [kit.format.grammar(TOOLS, "auto", False), kit.format.grammar(TOOLS, "required", False), kit.format.grammar(TOOLS, NAMED)]
        assert [kit.takes(grammar, two) for grammar in single] == [False] * 3
        assert [kit.takes(grammar, one) for grammar in single] == [True] * 3
    text = "Hello!\n{} < 3 and <b>.\n"
    answer = f"<|channel|>final<|message|>{text}" if family == "harmony" else text
    assert kit.takes(auto, answer) and not kit.takes(required, answer)
    if family not in ("harmony", "llama3", "llama4"):
        assert kit.takes(auto, text + one) and not kit.takes(required, text + one)
        mark = one[: one.index(">") + 1]
        assert not kit.takes(auto, f"{text}{mark} is a mark")
    assert kit.takes(auto, reply(family, GOOD[0]).replace("get_weather", "get_time").replace("city", "zone"))
    named = kit.format.grammar(TOOLS, NAMED)
    assert not kit.takes(named, reply(family, GOOD[0]).replace("get_weather", "get_time").replace("city", "zone"))


@FAMILY
def test_a_thought_comes_before(bound: Callable[..., Bound], family: str):
    kit, one = bound(family, True), reply(family, GOOD[0])
    if family == "harmony":
        grammar = kit.format.grammar(TOOLS, "required")
        preamble = "<|channel|>commentary<|message|>I'll look.<|end|><|start|>assistant"
        assert kit.takes(grammar, HARMONY_THOUGHT + one) and kit.takes(grammar, HARMONY_THOUGHT + preamble + one)
        assert not kit.takes(grammar, HARMONY_THOUGHT * 5 + one)  # it must come to its call
        return
    may = kit.format.grammar(TOOLS, "required", prompt="<|im_start|>assistant\n")
    must = kit.format.grammar(TOOLS, "required", prompt="<|im_start|>assistant\n<think>\n")
    never = kit.format.grammar(TOOLS, "required", prompt="<|im_start|>assistant\n<think>\n\n</think>\n\n")
    thought = "<think>\nHm, </b>.\n</think>\n\n"
    assert [kit.takes(may, text) for text in (one, thought + one, thought + thought + one)] == [True, True, False]
    assert [kit.takes(must, text) for text in (thought[8:] + one, one)] == [True, False]
    assert [kit.takes(never, text) for text in (one, thought + one)] == [True, False]


def test_when_anything_may_come(bound: Callable[..., Bound]):
    format = bound("hermes", False).format
    assert format.grammar(TOOLS, "none") is None and format.grammar([], "auto") is None
    assert format.grammar([WEATHER], "auto") is None  # not strict: the model decides freely
    assert format.grammar([WEATHER], "auto", strict=True) is not None
    own = {**WEATHER, "function": {**WEATHER["function"], "strict": False}}
    assert format.grammar([own], "auto", strict=True) is None
    assert format.grammar([WEATHER], "required") is not None


def test_choices_that_cannot_be_made_are_named(bound: Callable[..., Bound]):
    format = bound("hermes", False).format
    for choice, tools in [("always", TOOLS), ("required", []), ({"type": "function", "function": {"name": "nope"}}, TOOLS), ({}, TOOLS)]:
        with pytest.raises(InvalidRequest) as caught:
            format.grammar(tools, choice)
        assert caught.value.param == "tool_choice"


def test_some_of_the_tools_may_be_allowed(bound: Callable[..., Bound]):
    kit = bound("hermes", False)
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}
    grammar = kit.format.grammar(TOOLS, allowed)
    assert kit.takes(grammar, reply("hermes", GOOD[0]))
    assert not kit.takes(grammar, '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>')
    assert kit.format.grammar(TOOLS, {"type": "function", "name": "get_time"}) is not None  # Responses' flat form


def test_schemas_keep_their_references_and_what_no_grammar_can_hold_is_passed_over_unless_strict(bound: Callable[..., Bound]):
    kit = bound("hermes", False)
    schema = {
        "type": "object",
        "$defs": {"point": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}},
        "properties": {"at": {"$ref": "#/$defs/point"}, "when": {"type": "string", "format": "no-such-format"}},
        "required": ["at"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "go", "parameters": schema}}
    grammar = kit.format.grammar([tool], "required")
    assert kit.takes(grammar, '<tool_call>\n{"name": "go", "arguments": {"at": {"x": 1}, "when": "now"}}\n</tool_call>')
    assert not kit.takes(grammar, '<tool_call>\n{"name": "go", "arguments": {"at": {"y": 1}}}\n</tool_call>')
    strict = kit.format.grammar([tool], "required", strict=True)
    assert "no-such-format" in LLMatcher(kit.matchers, LLMatcher.grammar_from_lark(strict.source)).get_error()


def test_names_with_unusual_letters(bound: Callable[..., Bound]):
    for family in CALLS:
        kit = bound(family, True)
        tool = {"type": "function", "function": {"name": "météo-v1.2/x", "parameters": {"type": "object", "properties": {}}}}
        grammar = kit.format.grammar([tool], "required")
        kit.matcher(grammar)


@pytest.mark.parametrize(("family", "special"), [("hermes", False), ("hermes", True), ("harmony", True), ("llama3", False)])
def test_an_answer_in_json(bound: Callable[..., Bound], family: str, special: bool):
    kit = bound(family, special)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
    before = {"harmony": "<|channel|>final<|message|>"}.get(family, "")
    grammar = kit.format.answer_grammar(schema)
    assert kit.takes(grammar, before + '{"a": 1}') and not kit.takes(grammar, before + '{"b": 1}')
    if family == "harmony":
        assert kit.takes(grammar, HARMONY_THOUGHT + before + '{"a": 1}')
    elif special:
        assert kit.takes(grammar, '<think>\nHm.\n</think>\n\n{"a": 1}')
        opened = kit.format.answer_grammar(schema, prompt="<think>\n")
        assert kit.takes(opened, 'Hm.</think>{"a": 1}') and not kit.takes(opened, '{"a": 1}')
    else:
        assert grammar.kind == "json_schema"


@EITHER
@FAMILY
def test_an_answer_in_json_or_calls_instead(bound: Callable[..., Bound], family: str, special: bool):
    if family in TOKEN_FORMATS and not special:
        return
    kit = bound(family, special)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
    if family in ("llama3", "llama4"):
        with pytest.raises(Unsupported):
            kit.format.answer_grammar(schema, tools=TOOLS)
        return
    before = {"harmony": "<|channel|>final<|message|>"}.get(family, "")
    grammar = kit.format.answer_grammar(schema, tools=TOOLS, parallel=False)
    assert kit.takes(grammar, before + '{"a": 1}') and kit.takes(grammar, reply(family, GOOD[0]))
    for text in ('{"b": 1}', "Sunny.", reply(family, BAD[0]), reply(family, GOOD[0]) + '{"a": 1}'):
        assert not kit.takes(grammar, before + text), text


@pytest.mark.parametrize(
    ("family", "special"),
    [(family, True) for family in FORMATS] + [(family, False) for family in FORMATS if family not in TOKEN_FORMATS],
)
def test_whatever_a_model_writes_under_the_grammar_is_a_call(bound: Callable[..., Bound], family: str, special: bool):
    """A model that draws at random from the allowed tokens: its calls are read without a problem, and their arguments fit the schema."""
    kit, choose = bound(family, special), random.Random(family)
    plain = np.arange(200, 2_000)  # common words and pieces of words; none is special
    calls = 0
    for turn in range(8):
        grammar = kit.format.grammar(TOOLS, ["required", NAMED, "auto"][turn % 3])
        text = draw(kit, grammar, choose, plain)
        read = kit.format.parse(text, TOOLS)
        assert not read.problems, (text, read.problems)
        assert read.tool_calls or turn % 3 == 2
        for call in read.tool_calls:
            values = json.loads(call.arguments)
            if call.name == "get_weather":
                assert isinstance(values["city"], str) and set(values) <= {"city", "days", "unit"}
                assert isinstance(values.get("days", 0), int) and values.get("unit", "C") in ("C", "F")
            else:
                assert call.name == "get_time" and set(values) <= {"zone"}
            calls += 1
    assert calls >= 5


BOOK = {
    "type": "object",
    "properties": {
        "note": {"type": ["string", "null"]},
        "sea-view": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        "guests": {
            "type": "object",
            "properties": {"adult": {"type": "boolean"}, "tags": {"type": "array", "items": {"type": "integer"}, "maxItems": 3}},
            "required": ["adult", "tags"],
            "additionalProperties": False,
        },
        "breakfast": {"type": "boolean"},
    },
    "required": ["note", "sea-view", "guests", "breakfast"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("family", ["qwen3_coder", "llama4", "deepseek_v32"])
def test_truth_values_nothing_and_objects_where_arguments_are_not_one_json_text(bound: Callable[..., Bound], family: str):
    kit, choose = bound(family, True), random.Random(family)
    tool = {"type": "function", "function": {"name": "book", "parameters": BOOK, "strict": True}}
    grammar = kit.format.grammar([tool], "required", False)
    for _ in range(6):
        text = draw(kit, grammar, choose, np.arange(200, 2_000))
        read = kit.format.parse(text, [tool])
        assert not read.problems and len(read.tool_calls) == 1, (text, read.problems)
        values = json.loads(read.tool_calls[0].arguments)
        assert set(values) == set(BOOK["required"]), text
        assert isinstance(values["note"], str | None) and values["sea-view"] in (True, False, None), text
        assert isinstance(values["guests"]["adult"], bool) and isinstance(values["breakfast"], bool), text


def test_a_parameter_that_python_s_words_cannot_name_is_refused(bound: Callable[..., Bound]):
    tool = {"type": "function", "function": {"name": "book", "parameters": {"type": "object", "properties": {"a=b": {"type": "string"}}}}}
    with pytest.raises(Unsupported, match=r"'a=b' of tool 'book'"):
        bound("llama4", True).format.grammar([tool], "required")


def draw(kit: Bound, grammar: Grammar, choose: random.Random, plain: np.ndarray) -> str:
    """Random tokens, ending half of the time where it may; after a while whatever ends a string, an object or an element is tried first."""
    matcher, ids = kit.matcher(grammar), []
    mask = allocate_token_bitmask(1, kit.matchers.vocab_size)

    endings = [
        kit.tokenizer.encode(text)
        for text in ("\n</parameter>\n", '"', "}", "</think>", "<|end|>", "</function>\n", ")", "]", "</｜DSML｜parameter>\n")
    ]
    while not matcher.is_stopped() and not (matcher.is_accepting() and choose.random() < 0.5):
        fill_next_token_bitmask(matcher, mask)
        allowed = np.unpackbits(mask[0].view(np.uint8), bitorder="little")
        allowed[kit.matchers.eos_token] = 0
        near = [ending for ending in endings if len(ids) > 30 and matcher.validate_tokens(ending) == len(ending)]
        some = plain[np.flatnonzero(allowed[plain])].tolist()
        marks = [number for _, number in sorted(kit.numbers.items()) if allowed[number]]
        if near and choose.random() < 0.8:
            drawn = choose.choice(near)
        elif some or marks:
            drawn = [choose.choice(marks if marks and (not some or choose.random() < 0.3) else some)]
        else:
            drawn = [choose.choice(np.flatnonzero(allowed).tolist())]
        assert matcher.consume_tokens(drawn)
        ids += drawn
        assert len(ids) < 1_000, kit.tokenizer.decode(ids)
    return kit.tokenizer.decode(ids)
