"""What a tool's schema says of its parameters, for formats that write each by itself: which there are, of which types, and which texts.

A schema is a client's: it may refer to parts of itself in circles, be as deep as it likes and no schema at all, so that reading gives up at
MAX_DEPTH, reads what is referred to once, and takes a keyword of another form than its own for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

KINDS: dict[str, type | tuple[type, ...]] = {
    "integer": int, "number": (int, float), "boolean": bool, "object": dict, "array": list, "string": str, "null": type(None),
}  # fmt: skip
MAX_DEPTH = 32
MAX_ALTERNATIVES = 8
SHARED = ("$defs", "definitions")
NOTES = frozenset(  # keywords that hold a value to nothing
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema", "$id", *SHARED}
)
WHOLE = "tool"  # under this name a parameter's schema holds that of its tool, where it refers to it


class Reading(NamedTuple):
    """What may be written where a schema stands."""

    kinds: frozenset[str] | None  # JSON types; None where it says something else than which
    texts: tuple[str, ...] | None  # the strings; None where there may be any


ANYTHING, UNCLEAR, NOTHING = Reading(frozenset(KINDS), None), Reading(None, None), Reading(frozenset(), ())


class Parameters:
    """The parameters of a tool: their schemas by name, those that are required, and what each says. `whole` is the tool's schema."""

    def __init__(self, schema: Mapping[str, Any]):
        self.whole = schema
        self.schemas: dict[str, Any] = {}
        self.required: set[str] = set()
        self._read: dict[str, Reading] = {}
        self._collect(schema, set(), 0)

    def reading(self, name: str) -> Reading:
        return self._reading(self.schemas.get(name, True), 0)

    def kinds(self, name: str) -> frozenset[str]:
        """The JSON types that a parameter may have; none where it isn't clear."""
        return self.reading(name).kinds or frozenset()

    def alone(self, schema: Any) -> dict[str, Any]:
        """A parameter's schema with all that it refers to."""
        own = dict(schema) if isinstance(schema, Mapping) else {}
        shared = {key: self.whole[key] for key in SHARED if key in self.whole}
        found: list[str] = []

        def note(part: dict[str, Any]) -> None:
            found.append(str(part.get("$ref", "")))

        json.loads(json.dumps([own, shared]), object_hook=note)
        if all(not ref.startswith("#") or ref.startswith(tuple(f"#/{key}/" for key in SHARED)) for ref in found):
            return {**shared, **own}
        return {**_moved(own), "$defs": {WHOLE: _moved(self.whole)}}

    def values(self, name: str) -> list[dict[str, Any]]:
        """Schemas of a parameter's values that are no strings: a value has one of them."""
        schema = self._followed(self.schemas[name])
        beside = set(schema) - NOTES if isinstance(schema, Mapping) else set()
        key = next((key for key in ("anyOf", "oneOf") if beside == {key} and _listed(schema, key)), None)
        options = [self._followed(option) for option in schema[key]] if key else [schema]
        found = [self._narrowed(option) for option in {id(option): option for option in options}.values() if self._has_values(option)]
        if key and len(found) > (MAX_ALTERNATIVES if key == "anyOf" else 1):
            return [self.alone({key: found})]
        return [self.alone(option) for option in found]

    def _followed(self, schema: Any) -> Any:
        """What a schema that is a reference alone leads to."""
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, Mapping) or set(schema) - NOTES != {"$ref"} or (target := self._target(schema["$ref"])) is None:
                break
            schema = target
        return schema

    def _has_values(self, schema: Any) -> bool:
        kinds = self._reading(schema, 0).kinds
        return kinds is None or bool(kinds - {"string"})

    def _narrowed(self, schema: Any) -> Any:
        """The schema without strings."""
        kinds = self._reading(schema, 0).kinds or frozenset()
        if "string" not in kinds:
            return schema
        whole = {} if schema is True else dict(schema)
        if "enum" in whole:
            whole["enum"] = [value for value in whole["enum"] if not isinstance(value, str)]
        return {**whole, "type": sorted(kinds - {"string"} - ({"integer"} if "number" in kinds else set()))}

    def _collect(self, schema: Any, seen: set[str], depth: int) -> None:
        """Parameters of an object's schema, of what it refers to, and of all that it joins."""
        if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
            return
        properties = schema.get("properties")
        for name, own in (properties if isinstance(properties, Mapping) else {}).items():
            self.schemas[name] = {"allOf": [self.schemas[name], own]} if name in self.schemas else own
        self.required |= {name for name in _listed(schema, "required") if isinstance(name, str)}
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            self._collect(self._target(reference), seen, depth + 1)
        for part in _listed(schema, "allOf"):
            self._collect(part, seen, depth + 1)

    def _reading(self, schema: Any, depth: int) -> Reading:
        if isinstance(schema, bool):
            return ANYTHING if schema else NOTHING
        if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
            return UNCLEAR
        parts = []
        if "type" in schema:
            parts.append(_of_types(schema["type"]))
        if "const" in schema or isinstance(schema.get("enum"), list):
            parts.append(_of_values([schema["const"]] if "const" in schema else schema["enum"]))
        if isinstance(reference := schema.get("$ref"), str):
            parts.append(self._referred(reference, depth + 1))
        parts += [self._reading(part, depth + 1) for part in _listed(schema, "allOf")]
        for key in ("anyOf", "oneOf"):
            if options := _listed(schema, key):
                parts.append(_either([self._reading(option, depth + 1) for option in options]))
        return _both(parts) if parts or set(schema) - NOTES else ANYTHING

    def _referred(self, reference: str, depth: int) -> Reading:
        if reference not in self._read:
            self._read[reference] = UNCLEAR  # where it refers to itself
            self._read[reference] = self._reading(self._target(reference), depth)
        return self._read[reference]

    def _target(self, reference: Any) -> Any:
        """What a reference leads to within the tool's schema; None where it leads nowhere."""
        if not isinstance(reference, str) or (reference != "#" and not reference.startswith("#/")):
            return None
        found: Any = self.whole
        for step in reference.split("/")[1:]:
            step = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and step.isdecimal() and int(step) < len(found):
                found = found[int(step)]
            else:
                found = found.get(step) if isinstance(found, Mapping) else None
        return found


def _listed(schema: Mapping[str, Any], key: str) -> list[Any]:
    return found if isinstance(found := schema.get(key), list) else []


def _of_types(given: Any) -> Reading:
    kinds = {kind for kind in (given if isinstance(given, list) else [given]) if isinstance(kind, str)}
    return _reading(kinds | ({"integer"} if "number" in kinds else set()), None)


def _of_values(values: Sequence[Any]) -> Reading:
    kinds = {
        name
        for value in values
        for name, kind in KINDS.items()
        if isinstance(value, kind) and (name == "boolean") == isinstance(value, bool)
    }
    return _reading(kinds, tuple(dict.fromkeys(value for value in values if isinstance(value, str))))


def _either(options: Sequence[Reading]) -> Reading:
    if any(option.kinds is None for option in options):
        return UNCLEAR
    texts: dict[str, None] | None = {}
    for option in options:
        texts = None if texts is None or option.texts is None else texts | dict.fromkeys(option.texts)
    return _reading({kind for option in options for kind in option.kinds or ()}, None if texts is None else tuple(texts))


def _both(parts: Sequence[Reading]) -> Reading:
    kinds: frozenset[str] | None = None
    texts: tuple[str, ...] | None = None
    for part in parts:
        if part.kinds is not None:
            kinds = part.kinds if kinds is None else kinds & part.kinds
        if part.texts is not None:
            texts = part.texts if texts is None else tuple(text for text in texts if text in part.texts)
    return Reading(None, texts) if kinds is None else _reading(kinds, texts)


def _reading(kinds: set[str] | frozenset[str], texts: tuple[str, ...] | None) -> Reading:
    """No strings where none of them may be, and no texts where there are no strings."""
    if texts == ():
        kinds = kinds - {"string"}
    return Reading(frozenset(kinds), texts if "string" in kinds else ())


def _moved(schema: Any) -> Any:
    """A schema whose references lead to the tool's schema under WHOLE."""

    def lead(part: dict[str, Any]) -> dict[str, Any]:
        reference = part.get("$ref")
        return {**part, "$ref": f"#/$defs/{WHOLE}{reference[1:]}"} if isinstance(reference, str) and reference.startswith("#") else part

    return json.loads(json.dumps(schema), object_hook=lead)
