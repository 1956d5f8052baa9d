"""JSON schemas as clients write them for structured answers: closed objects, enums, unions, lists, shared definitions. All can be met."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]
NAMES = ("id", "name", "status", "total", "tags", "next", "due", "ü", "first name", "is_open", "a.b", 'q"')
TEXTS = ("open", "closed", "n/a", "à la carte", 'say "hi"', "", "🙂", "line\nbreak")


def scalars() -> st.SearchStrategy[Schema]:
    whole, span = st.integers(-(10**6), 10**6), st.integers(0, 1000)
    return st.one_of(
        st.sampled_from(
            [{"type": "boolean"}, {"type": "null"}, {"type": "integer"}, {"type": "number"}, {"type": "string", "maxLength": 12}]
        ),
        st.builds(lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more}, whole, span),
        st.builds(lambda low, more: {"type": "number", "exclusiveMinimum": low / 4, "maximum": (low + more + 1) / 4}, whole, span),
        st.builds(lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more}, st.integers(0, 6), st.integers(0, 8)),
        st.sampled_from(["date", "time", "date-time", "uuid", "ipv4"]).map(lambda name: {"type": "string", "format": name}),
        st.sampled_from(["^[a-z]{1,8}$", "^[A-Z]{2,3}-[0-9]{2,4}$", "^(yes|no)$", r"^\d+(\.\d{1,2})?$"]).map(
            lambda pattern: {"type": "string", "pattern": pattern}
        ),
        st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4, unique=True).map(lambda texts: {"type": "string", "enum": texts}),
        st.lists(st.one_of(st.integers(-99, 99), st.none(), st.booleans()), min_size=1, max_size=4).map(lambda values: {"enum": values}),
        st.sampled_from(TEXTS).map(lambda text: {"const": text}),
        st.just({"type": ["string", "null"], "maxLength": 6}),
    )


def closed(properties: dict[str, Schema], title: str) -> Schema:
    """As OpenAI wants it for strict answers: nothing else may come, and all of it must."""
    return {"type": "object", "title": title, "properties": properties, "required": list(properties), "additionalProperties": False}


def loose(properties: dict[str, Schema], keep: list[bool]) -> Schema:
    required = [name for name, wanted in zip(properties, keep, strict=False) if wanted]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def linked(item: Schema) -> Schema:
    """A list that is made of itself."""
    node = {"value": {"$ref": "#/$defs/item"}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}}
    return {"$defs": {"item": item, "node": closed(node, "node")}, **closed({"head": {"$ref": "#/$defs/node"}}, "chain")}


def properties(children: st.SearchStrategy[Schema]) -> st.SearchStrategy[dict[str, Schema]]:
    return st.dictionaries(st.sampled_from(NAMES), children, min_size=1, max_size=4)


def nested(children: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    def listed(items: Schema, low: int, more: int) -> Schema:
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + more}

    return st.one_of(
        st.builds(closed, properties(children), st.sampled_from(["ticket", "person", "order"])),
        st.builds(loose, properties(children), st.lists(st.booleans(), min_size=4, max_size=4)),
        st.builds(listed, children, st.integers(0, 2), st.integers(0, 2)),
        st.lists(children, min_size=2, max_size=3).map(lambda choices: {"anyOf": choices}),
        st.builds(lambda part: {"allOf": [part]}, children),
        st.lists(children, min_size=1, max_size=3).map(
            lambda items: {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
        ),
    )


def schemas() -> st.SearchStrategy[Schema]:
    """Whole answers: an object at the top, as most clients want one, or anything else."""
    parts = st.recursive(scalars(), nested, max_leaves=6)
    return st.one_of(st.builds(closed, properties(parts), st.just("answer")), parts, st.builds(linked, scalars()))
