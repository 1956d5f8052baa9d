"""What a request's form takes at a place in it, for errors that name the way out. Pure."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import inspect

STEP = re.compile(r"\[[^\]]*\]|[^.\[\]]+")


def choices(form: Any, place: str) -> list[str]:
    """The values at `place` ("messages[0].role") of `form`, where they are few: those of a Literal, or the tags of a union. Else []."""
    nodes, tags = [_described(form)], []
    for step in STEP.findall(place):
        structs = [node for node in _flat(nodes) if isinstance(node, inspect.StructType)]
        tags = [node.tag for node in structs if node.tag_field == step]
        if step.startswith("["):
            nodes = [node.item_type for node in _flat(nodes) if isinstance(node, inspect.ListType)]
        else:
            nodes = [field.type for node in structs for field in node.fields if field.encode_name == step]
            if len(nodes) > 1:  # several kinds of a union have it, and which one was meant isn't known
                return []
    literals = [value for node in _flat(nodes) if isinstance(node, inspect.LiteralType) for value in node.values]
    return list(dict.fromkeys(str(value) for value in (*tags, *literals)))


def fields(form: Any) -> list[str]:
    """The names of its own fields; none where `form` is a union."""
    return [field.encode_name for field in msgspec.structs.fields(form)] if isinstance(form, type) else []


def _flat(nodes: list[inspect.Type]) -> Iterator[inspect.Type]:
    for node in nodes:
        if isinstance(node, inspect.UnionType):
            yield from _flat(list(node.types))
        else:
            yield node


@functools.cache
def _described(form: Any) -> inspect.Type:
    return inspect.type_info(form)
