"""The schema of a tool's parameters, looked at before a prompt is made of it: a type that JSON Schema doesn't know is the client's slip,
and is told by its place. What a grammar can't hold a model to is the compiler's to say. It goes through places where schemas stand,
never into values (`enum`, `const`, `default`, `examples`).
"""

from __future__ import annotations

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


def check(schema: Mapping[str, Any], place: str) -> None:
    """Raises InvalidRequest with param `place` (the field of the request that holds `schema`)."""
    left: list[tuple[str, Any]] = [("", schema)]
    while left:
        where, one = left.pop()
        if isinstance(one, Mapping):
            if "type" in one and (bad := _unknown(one["type"])) is not None:
                known = ", ".join(TYPES)
                raise InvalidRequest(f"{place}{where}.type is {str(bad)[:80]!r}; types of JSON Schema are {known}", param=place)
            left += _inside(where, one)


def _unknown(given: Any) -> Any:
    """What of a `type` is none; None if all of it is."""
    kinds = given if isinstance(given, list) and given else [given]
    return next((kind if kind is not None else "null, the value" for kind in kinds if kind not in TYPES), None)


def _inside(where: str, schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in NAMED:
        if isinstance(children := schema.get(name), Mapping):
            yield from ((f"{where}.{name}.{str(key)[:80]}", child) for key, child in children.items())
    for name in LISTS:
        if isinstance(children := schema.get(name), list):
            yield from ((f"{where}.{name}[{place}]", child) for place, child in enumerate(children))
    for name in ONE:
        if isinstance(child := schema.get(name), Mapping):
            yield f"{where}.{name}", child
