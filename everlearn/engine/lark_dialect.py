"""Our grammars of calls (everlearn/render/callgrammar.py) in xgrammar's dialect of Lark.

The rules are the same; four things are said otherwise. A mark that is a token goes by its number. A schema goes by a name, beside the
source, so that its white space is bounded. Any text is a class of characters. And "any text without these words", which llguidance says
with intersection and complement, becomes the automaton that looks for the words (Aho and Corasick 1975, "Efficient string matching"),
a rule for each of its states.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from everlearn.engine.matching import PARAM
from everlearn.engine.schema_subset import check_schema
from everlearn.errors import Unsupported

# Texts and regular expressions are left alone; marks are looked up.
PIECE = re.compile(r'("(?:[^"\\\n]|\\.)*"|/(?:[^/\\\n]|\\.)+/)|<([^\s<>]+)>|\b([A-Z]+\d*)\b')
WITHOUT = re.compile(r'~\(ANYTHING ("(?:[^"\\]|\\.)*") ANYTHING\)')
WITH_AN_END = {"object", "array", "integer", "number", "boolean", "null"}
ANY_TEXT, CLASS = "(?s:.*)", r"[\s\S]*"


class Translated(NamedTuple):
    """`schemas` by the name under which the source calls them."""

    source: str
    schemas: dict[str, Any]


def translate(source: str, tokens: Mapping[str, int]) -> Translated:
    """`tokens`: the numbers of special tokens. Raises InvalidRequest for a schema that can't be kept, Unsupported for what has no other way
    of saying it."""
    rules: list[str] = []
    schemas: dict[str, Any] = {}
    for line in source.splitlines():
        if line.startswith("%llguidance"):
            continue
        name, _, body = line.partition(":")
        body = body.strip()
        if body.startswith("%json "):
            schema = json.loads(body.removeprefix("%json "))
            if not schema.pop("x-guidance", {}).get("lenient", False):
                check_schema(schema, PARAM)
            _check_place(schema)
            schemas[f"schema{len(schemas)}"] = schema
            rules.append(f"{_lower(name)}: @schema{len(schemas) - 1}")
        elif " & " in body:
            rules += _without(_lower(name), body)
        else:
            rules.append(f"{_lower(name)}: {PIECE.sub(lambda found: _piece(found, tokens), body)}")
    return Translated("\n".join(rules) + "\n", schemas)


def _check_place(schema: Mapping[str, Any]) -> None:
    """The library takes a string to end where JSON goes on, so among other text it may only stand inside of something."""
    types = schema["type"] if isinstance(schema.get("type"), list) else [schema.get("type")]
    if not {"const", "enum"} & set(schema) and not set(types) <= WITH_AN_END:
        known = ", ".join(sorted(WITH_AN_END))
        raise Unsupported(f"xgrammar can't hold JSON of type {types[0] or 'any'} between other text; it can {known}", param=PARAM)


def _lower(name: str) -> str:
    """Names of terminals as names of rules: a terminal can't hold the automaton."""
    return name.lower() if name.isupper() else name


def _piece(found: re.Match[str], tokens: Mapping[str, int]) -> str:
    text, mark, name = found.groups()
    if text is not None:
        return text.replace(ANY_TEXT, CLASS) if text.startswith("/") else text
    if mark is not None:
        return f"<[{tokens[f'<{mark}>']}]>" if f"<{mark}>" in tokens else f"<{mark}>"
    return _lower(name)


def _without(name: str, body: str) -> list[str]:
    """Rules for any text in which none of the words occurs. A state is the longest beginning of a word that the text ends with."""
    first, *refused = body.split(" & ")
    words = [json.loads(match[1]) for part in refused if (match := WITHOUT.fullmatch(part))]
    if first != "ANYTHING" or len(words) != len(refused):
        raise Unsupported(
            "xgrammar can't say how this model's text and its calls are told apart; ask for a call (tool_choice)", param=PARAM
        )
    states = sorted({word[:length] for word in words for length in range(len(word))}, key=lambda state: (len(state), state))
    letters = sorted(set("".join(words)))
    others = "".join(f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else letter for letter in letters)
    rules = []
    for number, state in enumerate(states):
        ways = [f"/[^{others}]/ {name}_0", '""']
        for letter in letters:
            text = state + letter
            if not any(text.endswith(word) for word in words):
                after = max((known for known in states if text.endswith(known)), key=len)
                ways.append(f"{json.dumps(letter)} {name}_{states.index(after)}")
        rules.append(f"{name}_{number}: {' | '.join(ways)}")
    return [f"{name}: {name}_0", *rules]
