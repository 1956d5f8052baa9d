"""Parameters whose schemas refer to others and join others, as Pydantic and zod write them: held in every format, and read back as said."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from everlearn.errors import Unsupported
from everlearn.render.schemas import KINDS, Parameters
from everlearn.render.tools import FORMATS
from tests.render.test_callgrammar import OWN, Bound, bound  # noqa: F401 - a fixture

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
SCHEMA = {
    "$defs": {"Point": POINT, "Colour": {"enum": ["red", "green"], "type": "string", "title": "Colour"}, "Name": {"type": "string"}},
    "type": "object",
    "properties": {
        "at": {"$ref": "#/$defs/Point"},
        "till": {"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}], "default": None},
        "colour": {"$ref": "#/$defs/Colour", "description": "of the pen"},
        "fill": {"anyOf": [{"$ref": "#/$defs/Colour"}, {"type": "null"}]},
        "name": {"$ref": "#/$defs/Name"},
        "count": {"allOf": [{"type": "integer"}, {"minimum": 3}]},
        "kind": {"const": "pen"},
        "mode": {"type": ["string", "null"], "enum": ["fast", None]},
        "mark": {"anyOf": [{"enum": ["dot", 1]}, {"$ref": "#/$defs/Point"}, {"type": "null"}]},
        "note": {"type": ["string", "null"]},
    },
    "additionalProperties": False,
}
GOOD: dict[str, list[Any]] = {
    "at": [{"x": 1}],
    "till": [{"x": 1}, None],
    "colour": ["red", "green"],
    "fill": ["red", None],
    "name": ["Ann", "42"],
    "count": [3],
    "kind": ["pen"],
    "mode": ["fast", None],
    "mark": ["dot", 1, {"x": 1}, None],
    "note": ["Hm.", None],
}
BAD: dict[str, list[Any]] = {
    "at": [{"y": 1}, "here", None],
    "till": [{}, 3, "here"],
    "colour": ["blue", None],
    "fill": ["blue", 1],
    "count": [2, "many"],
    "kind": ["pencil", None],
    "mode": ["slow", 1],
    "mark": ["x", 2, {"y": 1}],
}
CALL = {
    "qwen3_coder": "<tool_call>\n<function=draw>\n{}</function>\n</tool_call>",
    "deepseek_v32": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="draw">\n{}</｜DSML｜invoke>\n</｜DSML｜function_calls>',
    "llama4": "[draw({})]",
    "hermes": '<tool_call>\n{{"name": "draw", "arguments": {}}}\n</tool_call>',
}
FAMILY = pytest.mark.parametrize("family", CALL)
SPLIT = pytest.mark.parametrize("family", ["qwen3_coder", "deepseek_v32"])


def tool(schema: dict[str, Any], strict: bool = True) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "draw", "parameters": schema, "strict": strict}}


def called(family: str, values: dict[str, Any]) -> str:
    arguments = json.dumps(values)
    return CALL[family].format(OWN[family](arguments) if family in OWN else arguments)


def of(schema: Any, **shared: Any) -> Parameters:
    return Parameters({"type": "object", "properties": {"a": schema}, **shared})


@FAMILY
@pytest.mark.parametrize("name", GOOD)
def test_a_parameter_that_refers_to_a_schema_is_held_to_it_and_read_as_it(bound: Callable[..., Bound], family: str, name: str):  # noqa: F811
    kit = bound(family, False)
    grammar = kit.format.grammar([tool({**SCHEMA, "required": [name]})], "required", False)
    for value in GOOD[name]:
        text = called(family, {name: value})
        assert kit.takes(grammar, text), text
        assert json.loads(kit.format.parse(text, [tool(SCHEMA)]).tool_calls[0].arguments) == {name: value}
    for value in BAD.get(name, []):
        assert not kit.takes(grammar, called(family, {name: value})), value


@FAMILY
@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {"Args": {**SCHEMA, "required": ["at"]}, **SCHEMA["$defs"]}, "$ref": "#/$defs/Args"},
        {"$defs": SCHEMA["$defs"], "allOf": [{**SCHEMA, "additionalProperties": True}, {"required": ["at"]}]},
    ],
    ids=["$ref", "allOf"],
)
def test_a_tool_whose_parameters_stand_elsewhere(bound: Callable[..., Bound], family: str, schema: dict[str, Any]):  # noqa: F811
    kit = bound(family, False)
    grammar = kit.format.grammar([tool(schema)], "required", False)
    said = called(family, {"at": {"x": 1}, "name": "42"})
    assert kit.takes(grammar, said) and not kit.takes(grammar, called(family, {"name": "42"}))
    assert json.loads(kit.format.parse(said, [tool(schema)]).tool_calls[0].arguments) == {"at": {"x": 1}, "name": "42"}


@FAMILY
def test_references_to_other_places_of_the_tool_s_schema(bound: Callable[..., Bound], family: str):  # noqa: F811
    """As zod writes them; `#` is the schema of the whole tool, wherever it stands."""
    node = {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "a": POINT, "b": {"$ref": "#/properties/a"}},
        "required": ["next"],
        "additionalProperties": False,
    }
    kit = bound(family, False)
    grammar = kit.format.grammar([tool(node)], "required", False)
    assert kit.takes(grammar, called(family, {"next": {"next": None, "b": {"x": 1}}, "b": {"x": 1}}))
    for wrong in ({"next": {"b": {"x": 1}}}, {"next": {"next": None, "b": {"y": 1}}}, {"next": None, "b": {"y": 1}}):
        assert not kit.takes(grammar, called(family, wrong)), wrong


@SPLIT
@pytest.mark.parametrize(
    "schema",
    [{"minimum": 3}, {"$ref": "#/$defs/none"}, {"$ref": "https://example.org/a"}, {"not": {"type": "string"}}, {"$ref": "#/$defs/round"}],
)
def test_a_strict_parameter_of_no_clear_type_is_refused_by_name(bound: Callable[..., Bound], family: str, schema: dict[str, Any]):  # noqa: F811
    format = bound(family, False).format
    whole = {"$defs": {"round": {"allOf": [{"$ref": "#/$defs/round"}]}}, "type": "object", "properties": {"a": schema}}
    with pytest.raises(Unsupported, match="parameter 'a' of tool 'draw' doesn't say of which type") as caught:
        format.grammar([tool(whole)], "required")
    assert caught.value.param == "tools"
    assert format.grammar([tool(whole, strict=False)], "required") is not None
    for free in ({}, True, {"description": "anything"}, {"anyOf": [{}, {"type": "null"}]}):
        kit = bound(family, False)
        assert kit.takes(kit.format.grammar([tool({"properties": {"a": free}})], "required"), called(family, {"a": "x"}))


@pytest.mark.parametrize(
    ("schema", "kinds", "texts"),
    [
        ({}, set(KINDS), None),
        ({"type": "string", "anyOf": [{"pattern": "a"}, {"pattern": "b"}]}, {"string"}, None),
        ({"allOf": [{"type": ["string", "number"]}, {"type": ["integer", "null"]}]}, {"integer"}, ()),
        ({"allOf": [{"enum": ["a", "b"]}, {"enum": ["b", "c", 1]}]}, {"string"}, ("b",)),
        ({"oneOf": [{"const": "a"}, {"enum": ["a", "b", True]}]}, {"string", "boolean"}, ("a", "b")),
        ({"$ref": "#/$defs/tree"}, {"array", "string"}, None),
        ({"$ref": "#/definitions/a~1b%25"}, {"boolean"}, ()),
        ({"$ref": "#/$defs/tree/anyOf/1"}, {"string"}, None),
    ],
)
def test_what_a_schema_says(schema: dict[str, Any], kinds: set[str], texts: tuple[str, ...] | None):
    tree = {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/tree"}}, {"type": "string"}]}
    reading = of(schema, **{"$defs": {"tree": tree}, "definitions": {"a/b%": {"type": "boolean"}}}).reading("a")
    assert (reading.kinds, reading.texts) == (kinds, texts)


def test_schemas_that_go_in_circles_double_or_are_deep_are_read_in_little_time():
    doubling = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 9} for n in range(12)}
    found = of({"$ref": "#/$defs/d0"}, **{"$defs": {**doubling, "d12": {"enum": ["a", None]}}})
    assert found.reading("a") == ({"string", "null"}, ("a",)) and len(json.dumps(found.values("a"))) < 10_000
    circle = of({"$ref": "#/$defs/a"}, **{"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#"})
    assert not circle.kinds("a")
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(300):
        deep = {"allOf": [deep]}
    assert not of(deep).kinds("a") and not Parameters(deep).schemas


def test_texts_stream_where_a_reference_says_that_they_are():
    stream = FORMATS["qwen3_coder"].stream([tool(SCHEMA)])
    written = [getattr(delta, "arguments", "") for delta in stream.feed("<tool_call>\n<function=draw>\n<parameter=name>\n42 is")]
    assert "".join(written) == '{"name": "42 is'


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": [1]},
        {"required": True},
        {"allOf": {"x": 1}},
        *({"properties": {"a": {key: odd}}} for key in ("type", "enum", "anyOf", "allOf", "$ref") for odd in (None, 5, {"x": 1}, [["x"]])),
    ],
)
def test_what_is_no_schema_holds_a_value_to_nothing(schema: dict[str, Any]) -> None:
    """A tool that isn't strict may come with any: what was called is read all the same."""
    known = Parameters(schema)
    assert all(isinstance(known.kinds(name), frozenset) for name in known.schemas) and not known.required
