"""The part of JSON Schema that xgrammar keeps to. It passes over the rest without a word: here that is an error that names it.

A schema is one of: a reference, a constant, an enumeration, a choice (`anyOf`), or one type, or several, with their keywords. Beside the
first four no other keyword may stand, because it would be passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from everlearn.errors import InvalidRequest

NOTES = frozenset(
    {
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$comment",
        "$schema",
        "$id",
        "$defs",
        "definitions",
        "x-guidance",
        "strict",
    }
)
ALONE = ("$ref", "const", "enum", "anyOf", "allOf")
NUMBERS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
KEYWORDS: dict[str, frozenset[str]] = {
    "null": frozenset(),
    "boolean": frozenset(),
    "integer": NUMBERS,
    "number": NUMBERS - {"multipleOf"},
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "object": frozenset({"properties", "required", "additionalProperties", "minProperties", "maxProperties"}),
}
# Not date and date-time: it takes the 31st of February.
FORMATS = frozenset({"time", "duration", "email", "ipv4", "ipv6", "uuid", "uri"})
MAX_PATTERN = 1024
NAMES = {"null": type(None), "boolean": bool, "string": str, "array": list, "object": dict}


def check_schema(schema: Any, param: str) -> None:
    """Raises InvalidRequest for the first keyword that would be passed over, and where it stands."""
    waiting: list[tuple[str, Any]] = [("", schema)]  # no recursion: schemas are as deep as clients like
    while waiting:
        place, part = waiting.pop()
        if isinstance(part, bool):
            continue
        if not isinstance(part, Mapping):
            raise InvalidRequest(f"{place or 'the schema'} is {str(part)[:40]!r}; it must be an object", param=param)
        if (wrong := _wrong(part)) is not None:
            text = f"xgrammar, by which this server holds answers to schemas, can't follow {wrong} at {place or '/'}; leave it out"
            raise InvalidRequest(text, param=param)
        waiting += [(f"{place}/{name}", inner) for name, inner in _parts(part)]


def _wrong(schema: Mapping[str, Any]) -> str | None:
    found = set(schema) - NOTES
    for name in ALONE:
        if name in found:
            return _beside(name, schema, found - {name})
    if not found:
        return None
    if "type" not in found:
        return f"{min(found)!r} without a type"
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    unknown = [kind for kind in types if kind not in KEYWORDS]
    if unknown or not types:
        return f"type {str(schema['type'])[:40]!r}"
    known = frozenset({"type"}).union(*(KEYWORDS[kind] for kind in types))
    if found - known:
        return repr(min(found - known))
    if "minProperties" in found and schema.get("additionalProperties") is not False:
        return "'minProperties' where further properties may come (it counts a repeated one twice)"
    return _together(schema, found)


def _beside(name: str, schema: Mapping[str, Any], others: set[str]) -> str | None:
    if name == "$ref" and not str(schema[name]).startswith("#"):
        return f"the reference {str(schema[name])[:60]!r}, which leads out of the schema"
    if name == "allOf" and not (isinstance(schema[name], list) and len(schema[name]) == 1):
        return "'allOf' of several schemas"
    if name in ("const", "enum") and others == {"type"}:
        values = schema["enum"] if name == "enum" else [schema["const"]]
        if isinstance(values, list) and all(_is_of(value, schema["type"]) for value in values):
            return None
    return f"{min(others)!r} beside {name!r}" if others else None


def _together(schema: Mapping[str, Any], found: set[str]) -> str | None:
    """Keywords that it follows alone, and not with others."""
    if "format" in found and (schema["format"] not in FORMATS or found & {"pattern", "minLength", "maxLength"}):
        return f"the format {str(schema['format'])[:40]!r}" + (" beside other keywords" if schema["format"] in FORMATS else "")
    if "pattern" in found and len(str(schema["pattern"])) > MAX_PATTERN:
        return f"a 'pattern' of more than {MAX_PATTERN} characters"
    if "pattern" in found and found & {"minLength", "maxLength"}:
        return "'pattern' beside a length"
    if "multipleOf" in found and (schema["type"] != "integer" or found & (NUMBERS - {"multipleOf"}) or not _divides(schema["multipleOf"])):
        return "this 'multipleOf' (a whole number up to 1024 for integers without bounds is followed)"
    return None


def _divides(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1024


def _is_of(value: Any, types: Any) -> bool:
    """Whether JSON's `value` has one of these types."""
    for kind in types if isinstance(types, list) else [types]:
        if kind in ("integer", "number"):
            whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            if not isinstance(value, bool) and (whole if kind == "integer" else isinstance(value, (int, float))):
                return True
        elif kind in NAMES and isinstance(value, NAMES[kind]):
            return True
    return False


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas in a schema, each with its place."""
    for name in ("$defs", "definitions", "properties"):
        if isinstance(schema.get(name), Mapping):
            yield from ((f"{name}/{key}", inner) for key, inner in schema[name].items())
    for name in ("anyOf", "allOf", "prefixItems"):
        if isinstance(schema.get(name), list):
            yield from ((f"{name}/{number}", inner) for number, inner in enumerate(schema[name]))
    for name in ("items", "additionalProperties"):
        if name in schema:
            yield name, schema[name]
