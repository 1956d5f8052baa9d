"""The schema of a tool's parameters, looked at before a prompt is made of it: a type that JSON Schema doesn't know, or a keyword of another
shape than it has, is the client's slip, and is told by its place. A keyword that is null is left out: serialisers write so what isn't set.
What a grammar can't hold a model to is the compiler's to say. It goes through places where schemas stand, never into values (`enum`,
`const`, `default`, `examples`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from everlearn.errors import InvalidRequest

TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
ONE = (
    "items", "additionalProperties", "additionalItems", "contains", "not", "if", "then", "else", "propertyNames",
    "unevaluatedProperties", "unevaluatedItems",
)  # fmt: skip
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
SHAPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    **dict.fromkeys(ONE, ((Mapping, bool), "a schema")),
    **dict.fromkeys((*LISTS, "required", "enum"), (list, "a list")),
    **dict.fromkeys(NAMED, (Mapping, "an object")),
    "items": ((Mapping, bool, list), "a schema"),
}


Place = tuple[str, Any, Any]  # (what it is called, what holds the schema, under which key)
NULLABLE = ("type", "const", "default", "examples", "example")  # null says something there, or is no type


def check(schema: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The schema without keywords that are null. Raises InvalidRequest with param `place`, the field of the request that holds it."""
    whole: dict[str, Any] = {"": schema}
    left: list[Place] = [("", whole, "")]
    while left:
        where, holder, key = left.pop()
        if isinstance(holder[key], Mapping):
            holder[key] = one = {name: value for name, value in holder[key].items() if value is not None or name in NULLABLE}
            if "type" in one and (bad := _unknown(one["type"])) is not None:
                known = ", ".join(TYPES)
                raise InvalidRequest(f"{place}{where}.type is {str(bad)[:80]!r}; types of JSON Schema are {known}", param=place)
            _check_shapes(one, place, where)
            left += _inside(where, one)
    checked: dict[str, Any] = whole[""]
    return checked


def _check_shapes(schema: Mapping[str, Any], place: str, where: str) -> None:
    for name, value in schema.items():
        wanted = SHAPES.get(name)
        if wanted is not None and not isinstance(value, wanted[0]):
            shown = json.dumps(value, ensure_ascii=False)[:80]
            raise InvalidRequest(f"{place}{where}.{name} is {shown}; in JSON Schema it is {wanted[1]}", param=place)
    if not all(isinstance(name, str) for name in schema.get("required", ())):
        raise InvalidRequest(f"{place}{where}.required holds something else than names", param=place)


def _unknown(given: Any) -> Any:
    """What of a `type` is none; None if all of it is."""
    kinds = given if isinstance(given, list) and given else [given]
    return next((kind if kind is not None else "null, the value" for kind in kinds if kind not in TYPES), None)


def _inside(where: str, schema: dict[str, Any]) -> Iterator[Place]:
    """The schemas in a schema; what holds them is copied, because they are put back without what is null."""
    for name in NAMED:
        if name in schema:
            children = schema[name] = dict(schema[name])
            yield from ((f"{where}.{name}.{str(key)[:80]}", children, key) for key in children)
    for name in LISTS:
        if isinstance(schema.get(name), list):
            listed = schema[name] = list(schema[name])
            yield from ((f"{where}.{name}[{place}]", listed, place) for place in range(len(listed)))
    for name in ONE:
        if isinstance(schema.get(name), Mapping):
            yield f"{where}.{name}", schema, name
