"""A tool whose schema is none is refused by its place, in every dialect, before anything is drawn."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from everlearn.api import toolschemas
from everlearn.api.openai import checks
from everlearn.errors import InvalidRequest
from everlearn.render.tools import FORMATS

GOOD: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"type": ["string", "null"]},
        "items": {"type": "array", "items": {"type": "integer"}},
        "x": {"enum": [{"type": "any"}]},
    },
    "required": ["type"],
    "additionalProperties": False,
    "$defs": {"node": {"anyOf": [{"$ref": "#/$defs/node"}, True, {"const": {"type": 3}}]}},
    "default": {"type": "nothing"},
}


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "dict"}, "p.type is 'dict'"),
        ({"type": None}, "p.type is"),
        ({"type": ["string", "any"]}, "p.type is 'any'"),
        ({"type": []}, r"p.type is '\[\]'"),
        ({"type": {"a": 1}}, "p.type is"),
        ({"properties": {"a": {"items": {"type": "float"}}}}, "p.properties.a.items.type is 'float'"),
        ({"anyOf": [{"type": "string"}, {"type": "str"}]}, r"p.anyOf\[1\].type is 'str'"),
        ({"$defs": {"n": {"not": {"type": 1}}}}, r"p.\$defs.n.not.type is '1'"),
    ],
)
def test_types_that_are_none(schema: dict[str, Any], place: str) -> None:
    with pytest.raises(InvalidRequest, match=place) as caught:
        toolschemas.check(schema, "p")
    assert caught.value.param == "p"


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"properties": []}, r"p.properties is \[\]; in JSON Schema it is an object"),
        ({"properties": "a"}, 'p.properties is "a"'),
        ({"required": "a"}, 'p.required is "a"; in JSON Schema it is a list'),
        ({"required": {"a": True}}, "p.required is"),
        ({"required": ["a", 1]}, "p.required holds something else than names"),
        ({"properties": {"a": {"type": "string", "required": True}}}, "p.properties.a.required is true"),
        ({"properties": {"a": {"enum": "a|b"}}}, 'p.properties.a.enum is "a|b"'),
        ({"items": {"anyOf": 5}}, "p.items.anyOf is 5; in JSON Schema it is a list"),
        ({"$defs": {"a": {"items": "string"}}}, r'p.\$defs.a.items is "string"; in JSON Schema it is a schema'),
    ],
)
def test_keywords_of_another_shape(schema: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named) as caught:
        toolschemas.check(schema, "p")
    assert caught.value.param == "p"


NULLS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "enum": None, "description": None, "default": None},
        "b": {"properties": None, "required": None, "items": None, "anyOf": [{"type": "null", "enum": None}, {"const": None}]},
    },
    "required": None,
    "$defs": None,
    "additionalProperties": False,
}


def test_a_keyword_that_is_null_is_not_there() -> None:
    before = json.dumps(NULLS)
    assert toolschemas.check(NULLS, "p") == {
        "type": "object",
        "properties": {"a": {"type": "string", "default": None}, "b": {"anyOf": [{"type": "null"}, {"const": None}]}},
        "additionalProperties": False,
    }
    assert json.dumps(NULLS) == before and toolschemas.check({"properties": None}, "p") == {}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_takes_tools_with_nulls(name: str) -> None:
    """What reads a schema beside the compiler: grammars of calls, and the parsers of those that write no JSON."""
    for schema in (
        NULLS,
        {"properties": None, "required": None},
        {"type": "object", "properties": {"a": {"enum": None}}, "required": None},
    ):
        for strict in (False, True):
            tool = checks.tool("f", None, schema, strict, "tools[0]")
            for choice in ("auto", "required"):
                FORMATS[name].grammar([tool], choice)
            for reply in ("<function=f>\n<parameter=a>\nx", "[f(a=", '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a">x'):
                FORMATS[name].parse(reply, [tool])


def test_values_are_not_schemas() -> None:
    assert toolschemas.check(GOOD, "p") == GOOD
    toolschemas.check({"properties": {"a": True, "b": {}}, "items": [{"type": "null"}], "type": "object"}, "p")


def test_depth_and_width_cost_little() -> None:
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(5000):
        deep = {"items": deep}
    toolschemas.check(deep, "p")


HI = [{"role": "user", "content": "hi"}]
BAD, FINE = {"type": "object", "properties": {"a": {"type": "nothing"}}}, {"type": "object", "properties": {}}
# JSON Schema, but none that llguidance compiles: what the engine finds is told by the tools' name too.
UNFIT = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)y"}}, "required": ["a"], "additionalProperties": False}


SHORT = {"/v1/chat/completions": {"max_tokens": 4}, "/v1/responses": {"max_output_tokens": 4}}


def bodies(schema: dict[str, Any], strict: bool) -> list[tuple[str, dict[str, Any], str]]:
    functions = [{"name": "fine", "parameters": FINE}, {"name": "bad", "parameters": schema, "strict": strict}]
    chat = {"messages": HI, "tools": [{"type": "function", "function": function} for function in functions]}
    flat = {"input": "hi", "tools": [{"type": "function", **function} for function in functions]}
    blocks = [{"name": "fine", "input_schema": FINE}, {"name": "bad", "input_schema": schema, "strict": strict}]
    return [
        ("/v1/chat/completions", chat, "tools[1].function.parameters"),
        ("/v1/responses", flat, "tools[1].parameters"),
        ("/anthropic/api/v1/messages", {"messages": HI, "tools": blocks, "max_tokens": 4}, "tools[1].input_schema"),
    ]


@pytest.mark.parametrize("streamed", [False, True])
def test_every_dialect_names_the_tool(server, streamed: bool) -> None:
    for strict in (False, True):
        for path, body, place in bodies(BAD, strict):
            reply = httpx.post(server.url + path, json={"model": "tiny", "stream": streamed, **body}, timeout=60)
            error = reply.json()["error"]
            assert reply.status_code == 400 and f"{place}.properties.a.type is 'nothing'" in error["message"], reply.text
            assert error.get("param", place) == place
        for path, body, _ in bodies(NULLS, strict):
            reply = httpx.post(server.url + path, json={"model": "tiny", "stream": streamed, **SHORT.get(path, {}), **body}, timeout=60)
            assert reply.status_code == 200, reply.text
    for path, body, _ in bodies(UNFIT, True):
        reply = httpx.post(server.url + path, json={"model": "tiny", "stream": streamed, **body}, timeout=60)
        assert reply.status_code == 400 and reply.json()["error"].get("param", "tools") == "tools", reply.text
