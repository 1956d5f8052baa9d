"""The part of JSON Schema that xgrammar keeps to. It passes over the rest without a word: here that is an error that names it.

A schema is one of: a reference, a constant, an enumeration, a choice (`anyOf`), or one type, or several, with their keywords. Beside the
first four no other keyword may stand, because it would be passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from everlearn.engine.regex_subset import keep
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
    places, references = set(), []
    while waiting:
        place, part = waiting.pop()
        places.add(f"#{place}")
        if isinstance(part, bool):
            continue
        if not isinstance(part, Mapping):
            raise InvalidRequest(f"{place or 'the schema'} is {str(part)[:40]!r}; it must be an object", param=param)
        if (wrong := _wrong(part)) is not None:
            raise _refusal(wrong, place, param)
        if "$ref" in part:
            references.append((place, part["$ref"]))
        waiting += [(f"{place}/{name}", inner) for name, inner in _parts(part)]
    for place, reference in references:  # what stands elsewhere was not looked at; the library skips empty names
        if reference not in places or "//" in reference:
            raise _refusal(f"the reference {reference[:60]!r}, which leads to no schema of its own,", place, param)


def _refusal(wrong: str, place: str, param: str) -> InvalidRequest:
    text = f"xgrammar, by which this server holds answers to schemas, can't follow {wrong} at {place or '/'}; leave it out"
    return InvalidRequest(text, param=param)


def prepare(schema: Any) -> None:
    """Says a schema's patterns, in place, as xgrammar keeps to them. What it can't keep to goes, so that its log, which is the process's
    and quotes them, has nothing to say: only the schemas of tools that aren't strict have such."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            continue
        waiting += [inner for _, inner in _parts(part)]
        waiting += [*(part["oneOf"] if isinstance(part.get("oneOf"), list) else []), part.get("propertyNames")]
        if part.pop("patternProperties", None) is not None:
            part.pop("additionalProperties", None)
        if not re.fullmatch(r"#|#/.*", str(part.get("$ref", "#")), re.DOTALL):
            del part["$ref"]
        if (pattern := part.pop("pattern", None)) is not None and _unkept(pattern) is None:
            part["pattern"] = keep(pattern, in_json=True)


def _unkept(pattern: Any) -> str | None:
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN:
        return f"a 'pattern' of more than {MAX_PATTERN} characters" if isinstance(pattern, str) else "a 'pattern' that is no text"
    try:
        keep(pattern, in_json=True)
    except ValueError as error:
        return f"{error} of the 'pattern'"
    return None


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
    if (missing := _missing(schema)) is not None:
        return missing
    if "minProperties" in found and schema.get("additionalProperties") is not False:
        return "'minProperties' where further properties may come (it counts a repeated one twice)"
    return _together(schema, found)


def _missing(schema: Mapping[str, Any]) -> str | None:
    """What is required and not among the properties is passed over."""
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        return "this 'required'"
    known = schema.get("properties", {})
    missing = [name for name in required if not isinstance(known, Mapping) or name not in known]
    return f"'required' of {missing[0][:40]!r}, which is none of the properties," if missing else None


def _beside(name: str, schema: Mapping[str, Any], others: set[str]) -> str | None:
    if name == "$ref" and not (isinstance(schema[name], str) and schema[name].startswith("#")):
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
    if "pattern" in found:
        return "'pattern' beside a length" if found & {"minLength", "maxLength"} else _unkept(schema["pattern"])
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
            yield from ((f"{name}/{key.replace('~', '~0').replace('/', '~1')}", inner) for key, inner in schema[name].items())
    for name in ("anyOf", "allOf", "prefixItems"):
        if isinstance(schema.get(name), list):
            yield from ((f"{name}/{number}", inner) for number, inner in enumerate(schema[name]))
    for name in ("items", "additionalProperties"):
        if name in schema:
            yield name, schema[name]
