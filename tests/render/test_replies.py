"""Recorded replies of every family, whole and in every kind of pieces; and what no reply may do: raise, lose text, take long."""

from __future__ import annotations

import itertools
import random
import re
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everlearn.render.replies import ParsedReply, fold
from everlearn.render.tools import FORMATS, ToolFormat
from tests.render.conftest import TIME, WEATHER


def tool(name: str, **properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


TEXT, FLAG = {"type": "string"}, {"type": "boolean"}
TOOLS = [
    WEATHER,
    TIME,
    tool("write_file", path=TEXT, text=TEXT),
    tool("book", city=TEXT, nights={"type": "integer"}, breakfast=FLAG, guests={"type": "array"}),
]
RECORDED = [
    pytest.param(path.stem, entry, id=f"{path.stem}: {entry['title']}")
    for path in sorted((Path(__file__).parent / "recorded").glob("*.toml"))
    for entry in tomllib.loads(path.read_text(encoding="utf-8"))["reply"]
]


def plain(reply: ParsedReply) -> tuple[Any, ...]:
    return reply.content, reply.reasoning, [(call.name, call.arguments) for call in reply.tool_calls], reply.problems


def in_pieces(format: ToolFormat, text: str, pieces: list[str], tools: Any = None, prompt: str = "") -> ParsedReply:
    parser = format.stream(tools, prompt)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    deltas += parser.finish()
    assert "".join(pieces) == text
    return fold(deltas, parser.problems)


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place for place in places if place <= len(text)), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


@pytest.mark.parametrize(("family", "entry"), RECORDED)
def test_recorded_reply(family: str, entry: dict[str, Any]):
    reply = FORMATS[family].parse(entry["text"], TOOLS, entry.get("prompt", ""))
    assert reply.content == entry.get("content")
    assert reply.reasoning == entry.get("reasoning")
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [
        (call["name"], call["arguments"]) for call in entry.get("calls", [])
    ]
    assert len(reply.problems) == entry.get("problems", 0), reply.problems
    for call, expected in zip(reply.tool_calls, entry.get("calls", []), strict=True):
        assert call.id == expected["id"] if "id" in expected else call.id.startswith("call_")


@pytest.mark.parametrize(("family", "entry"), RECORDED)
def test_recorded_reply_in_pieces(family: str, entry: dict[str, Any]):
    """Character by character, every single cut, and 100 random ones: always the same reply."""
    format, text, prompt = FORMATS[family], entry["text"], entry.get("prompt", "")
    whole = plain(format.parse(text, TOOLS, prompt))
    assert plain(in_pieces(format, text, list(text), TOOLS, prompt)) == whole
    for place in range(len(text)):
        assert plain(in_pieces(format, text, [text[:place], text[place:]], TOOLS, prompt)) == whole
    choose = random.Random(text)
    for _ in range(100):
        places = [choose.randint(0, len(text)) for _ in range(choose.randint(1, 20))]
        assert plain(in_pieces(format, text, cut(text, places), TOOLS, prompt)) == whole


@pytest.mark.parametrize("name", FORMATS)
def test_any_format_takes_any_text(name: str):
    """A model may write another family's syntax: nothing raises, and every letter of it is in the reply or in a mark."""
    for _, entry in (param.values for param in RECORDED):
        reply = FORMATS[name].parse(entry["text"], None, entry.get("prompt", ""))
        said = "".join([reply.content or "", reply.reasoning or "", *(call.name + call.arguments for call in reply.tool_calls)])
        for word in re.findall(r"[A-Z][a-z]{3,}", re.sub(r"<[^<>]*>|\\\\\w{5}|True|None", " ", entry["text"])):
            assert word in said, entry["title"]


MARKS = sorted({mark for format in FORMATS.values() for mark in format.marks})
FRAGMENTS = [
    *MARKS, '{"name": "f", ', '"arguments": {', '"parameters": {', '"a": 1', '"a": "x', '"}', "}}", "}", "]", "[", '"', "\\", "\n", " ", "prose",
    "<function=f>", "</function>", "<parameter=a>", "</parameter>", "```json\n", "```", "functions.f:0", "function", "analysis", "final",
    "commentary to=functions.f ", "<", "<tool", "é🙂", ";", ",", "null", "\0",
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=24),
    places=st.lists(st.integers(0, 400), max_size=12),
    known=st.booleans(),
)
def test_any_mixture_of_fragments_reads_the_same_in_pieces(name: str, fragments: list[str], places: list[int], known: bool):
    text = "".join(fragments)
    tools = [tool("f", a=TEXT)] if known else None
    whole = FORMATS[name].parse(text, tools)
    assert plain(in_pieces(FORMATS[name], text, cut(text, places), tools)) == plain(whole)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(set(FORMATS) - {"llama3"})), text=st.text(st.characters(exclude_characters="<"), max_size=80))
def test_text_without_marks_comes_through_untouched(name: str, text: str):
    reply = FORMATS[name].parse(text)
    assert (reply.content or "") == (text if not text.isspace() else reply.content or "")
    assert not reply.tool_calls and not reply.problems and reply.reasoning is None


@pytest.mark.parametrize("name", FORMATS)
def test_without_tools_no_call_is_looked_for(name: str):
    text = '{"name": "f", "parameters": {}}\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n '
    reply = FORMATS[name].parse(text, [])
    assert reply.content == text and not reply.tool_calls and not reply.problems


NESTS = [
    '{"function": ', '{"name": "f", "arguments": ', '{"name": "f", "arguments": {}, "function": ', '{"type": "function", ', "[", '{"a": [', "f(a=(",
]  # fmt: skip


@pytest.mark.parametrize("opening", ["", "<tool_call>", "<tool_call>[", "<|python_tag|>", "<function=f>", "<|python_start|>[f(a="])
@pytest.mark.parametrize("name", FORMATS)
def test_a_reply_nested_deeper_than_any_stack_is_a_reply(name: str, opening: str):
    for nest, depth in itertools.product(NESTS, (2, 3_000)):
        text = f'{opening}{nest * depth}{{"name": "f", "arguments": {{}}}}{"}" * depth} and prose'
        whole = FORMATS[name].parse(text)
        assert plain(in_pieces(FORMATS[name], text, cut(text, list(range(0, len(text), 37))))) == plain(whole)


@pytest.mark.parametrize("name", ["prompted", "hermes", "qwen3_coder"])
def test_a_call_inside_of_one_function_is_read_and_deeper_ones_are_text(name: str):
    call = '{"name": "f", "arguments": {"a": 1}}'
    one, two = (FORMATS[name].parse(f'<tool_call>{{"function": {inner}}}</tool_call>') for inner in (call, f'{{"function": {call}}}'))
    assert [(made.name, made.arguments) for made in one.tool_calls] == [("f", '{"a": 1}')] and not one.problems
    assert not two.tool_calls and call in (two.content or "") and "inside of a function" in two.problems[0]


def test_arguments_go_out_while_they_are_written():
    parser = FORMATS["hermes"].stream()
    assert parser.feed('<tool_call>\n{"name": "write_file", "arguments": ') == []
    first, *_ = parser.feed('{"text": "')
    assert (first.name, first.index, first.arguments) == ("write_file", 0, '{"text": "') and first.id.startswith("call_")
    (more,) = parser.feed("once upon a time ")
    assert (more.name, more.id, more.arguments) == (None, None, "once upon a time ")


def test_content_goes_out_at_once():
    parser = FORMATS["hermes"].stream()
    assert [delta.text for delta in parser.feed("Hello there")] == ["Hello there"]
    assert parser.feed(" <tool_ca") == []
    assert [delta.text for delta in parser.feed("binet>")] == [" <tool_cabinet>"]


@pytest.mark.parametrize("name", FORMATS)
def test_the_time_for_a_piece_does_not_grow_with_the_text(name: str):
    """Ten times the text in pieces of one token takes about ten times as long; quadratic work would take a hundred."""

    def seconds(opening: str, pieces: int) -> float:
        parser = FORMATS[name].stream()
        parser.feed(opening)
        start = time.process_time()
        for _ in range(pieces):
            parser.feed("word ")
        parser.finish()
        return time.process_time() - start

    for opening in ("", "<think>", '<tool_call>\n{"name": "f", "arguments": {"a": "', '<tool_call>{"x": "', "<", "\n{"):
        small, large = (min(seconds(opening, pieces) for _ in range(3)) for pieces in (1_000, 10_000))
        assert large < 30 * small + 0.05, opening
