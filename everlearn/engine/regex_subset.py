"""The part of regular expressions that xgrammar keeps to, said in a way that it can't take otherwise.

It takes `^` and `$` inside of a text, lookahead and letters such as `\\A` for nothing or for themselves, and a point for a new line too;
and it puts a pattern between the quotes of a JSON string as it is, quotes, backslashes and control characters included. So an expression is
read here, piece by piece, and what isn't known is an error that names it. Inside of JSON strings the characters that would have to be
escaped there are taken out of every class, and a pattern that asks for one of them by name is refused.

The whole text matches, as everywhere: `^` at the beginning and `$` at the end change nothing.
"""

from __future__ import annotations

import re

CLASSES = {
    "d": [(0x30, 0x39)],
    "w": [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
    "s": [(0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0)],
}
CONTROLS = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B}
LAST = 0x10FFFF
QUOTED = [(0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C)]  # what JSON's strings hold only escaped
SURROGATES = (0xD800, 0xDFFF)  # in no text
ESCAPE = r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]{1,6}\}|[dDwWsSnrtfv]|[^a-zA-Z0-9])"
PIECE = re.compile(
    rf"(?P<group>\((?:\?:|\?P?<[A-Za-z]\w*>|(?!\?)))|(?P<syntax>[)|])|(?P<repeat>(?:[*+?]|\{{\d+(?:,\d*)?\}})\??(?![*+?{{]))"
    rf"|(?P<class>\[\^?(?:{ESCAPE}|[^\]\[\\])+\])|(?P<one>{ESCAPE}|[^\\\[\](){{}}*+?|^$])",
    re.DOTALL,
)
MEMBER = re.compile(rf"{ESCAPE}|.", re.DOTALL)
Ranges = list[tuple[int, int]]


def keep(source: str, in_json: bool) -> str:
    """The same expression as xgrammar is to read it. `in_json`: for the inside of a JSON string. Raises ValueError with what can't be
    kept."""
    place, end = int(source.startswith("^")), len(source)
    if source.endswith("$") and (len(source) - len(source[:-1].rstrip("\\"))) % 2 == 1:
        end -= 1
    made = []
    while place < end:
        found = PIECE.match(source, place, end)
        if found is None:
            raise ValueError(f"{source[place : place + 8]!r} at character {place}")
        text = found[0]
        match found.lastgroup:
            case "group":
                made.append("(")
            case "syntax" | "repeat":
                made.append(text)
            case _:
                made.append(_one(text, in_json))
        place = found.end()
    return "".join(made)


def _one(text: str, in_json: bool) -> str:
    """A character or a class of them."""
    allowed = _ranges(text)
    if in_json:
        within = _minus(allowed, QUOTED)
        if not within or (len(allowed) == 1 and allowed[0][0] == allowed[0][1] and within != allowed):
            raise ValueError(f"{text[:40]!r} (a quote, a backslash or a control character)")
        allowed = within
    if not allowed:
        raise ValueError(f"{text[:40]!r} (nothing matches it)")
    low, high = allowed[0]
    if len(allowed) == 1 and low == high:
        return _spell(low)
    if low == ord("^"):  # which the library takes for a negation at the beginning, however it is spelled
        allowed = [*([(low + 1, high)] if high > low else []), *allowed[1:], (low, low)]
    return "[" + "".join(_spell(low) if low == high else f"{_spell(low)}-{_spell(high)}" for low, high in allowed) + "]"


def _ranges(text: str) -> Ranges:
    if text == ".":
        return _minus([(0, LAST)], [(0x0A, 0x0A), SURROGATES])
    if not (text.startswith("[") and len(text) > 1):
        return _minus(_member(text), [SURROGATES])
    negated = text.startswith("[^")
    members = MEMBER.findall(text[2 if negated else 1 : -1])
    found: Ranges = []
    while members:
        low = _member(members.pop(0))
        if len(members) > 1 and members[0] == "-":
            high = _member(members[1])
            if len(low) > 1 or len(high) > 1 or low[0][0] != low[0][1] or high[0][0] != high[0][1] or low > high:
                raise ValueError(f"the range in {text[:40]!r}")
            low, members = [(low[0][0], high[0][0])], members[2:]
        found += low
    return _minus([(0, LAST)], [*found, SURROGATES]) if negated else _minus(_joined(found), [SURROGATES])


def _member(text: str) -> Ranges:
    name = text[1:2] if text.startswith("\\") else ""
    if name.lower() in CLASSES:
        found = CLASSES[name.lower()]
        return _minus([(0, LAST)], found) if name.isupper() else found
    number = CONTROLS.get(name) or (int(text[2:].strip("{}"), 16) if name in ("x", "u") else ord(text[-1]))
    if number > LAST:
        raise ValueError(f"{text!r} (no character)")
    return [(number, number)]


def _joined(ranges: Ranges) -> Ranges:
    """In order, without overlaps."""
    return _minus([(0, LAST)], _minus([(0, LAST)], ranges))


def _minus(ranges: Ranges, others: Ranges) -> Ranges:
    for first, last in sorted(others):
        kept = [(low, min(high, first - 1)) for low, high in ranges if low < first]
        ranges = sorted(kept + [(max(low, last + 1), high) for low, high in ranges if high > last])
    return ranges


def _spell(number: int) -> str:
    """ASCII alone: the library reads other patterns by a second reader, which lets more through."""
    return chr(number) if number < 0x80 and chr(number).isalnum() else f"\\u{{{number:x}}}"
