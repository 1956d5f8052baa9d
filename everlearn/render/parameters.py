"""Qwen3-Coder's arguments: an XML element for each parameter, whose text becomes the JSON that the tool's schema asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pydantic_core import from_json

from everlearn.render.reader import BrokenError, Marks, Reader, Step
from everlearn.render.replies import Writer
from everlearn.render.schemas import KINDS, Parameters

PARAMETER, PARAMETER_END, FUNCTION_END = "<parameter=", "</parameter>", "</function>"
# A missing end tag is seen by what can only come after it, at the beginning of a line.
ENDS = (PARAMETER_END, "\n" + PARAMETER, "\n" + FUNCTION_END)
_ENDS = Marks(*ENDS)


def parameters(reader: Reader, out: Writer, commit: Callable[[], None], known: Parameters) -> Step[None]:
    """Elements up to `</function>`. Writes them as one JSON object, strings as they come; `commit` is called at the first."""
    between, stop = "{", ""
    while True:
        if between != "{":
            reader.keep("")  # what can't be read from here on is text after a call
        yield from reader.space()
        if stop == "\n" + FUNCTION_END or (not stop.strip() and (yield from reader.comes(FUNCTION_END))):
            if between == "{":
                commit()
            out.arguments("{}" if between == "{" else "}")
            return
        if stop != "\n" + PARAMETER and not (yield from reader.comes(PARAMETER)):
            if between == "{":
                raise BrokenError("a function without parameters and without an end")
            if (yield from reader.peek()):
                out.arguments("}")
                out.problems.append("a function isn't closed by </function>")
            return
        pieces: list[str] = []
        if (yield from reader.until(Marks(">", "\n"), pieces.append)) != ">":
            raise BrokenError("<parameter= without a name")
        name = "".join(pieces).strip()
        if between == "{":
            commit()
        reader.forget()
        out.arguments(f"{between}{json.dumps(name, ensure_ascii=False)}: ")
        stop = yield from _value(reader, out, known.kinds(name))
        if not stop:
            return
        if stop != PARAMETER_END:
            out.problems.append(f"parameter {name!r} isn't closed by {PARAMETER_END}")
        between, stop = ", ", "" if stop == PARAMETER_END else stop


def _value(reader: Reader, out: Writer, wanted: frozenset[str]) -> Step[str]:
    """A parameter's text; the line breaks next to its tags aren't part of it. Returns the mark that ended it, "" at the end of the text."""
    yield from reader.comes("\n")
    held = ""
    if wanted != {"string"}:
        pieces: list[str] = []
        stop = yield from reader.until(_ENDS, pieces.append)
        text = "".join(pieces)
        out.arguments((convert if stop else broken_off)(text.removesuffix("\n"), wanted))
        return stop

    def emit(piece: str) -> None:
        nonlocal held
        piece = held + piece
        held = "\n" if piece.endswith("\n") else ""
        out.arguments(json.dumps(piece.removesuffix("\n"), ensure_ascii=False)[1:-1])

    out.arguments('"')
    stop = yield from reader.until(_ENDS, emit)
    if stop:
        out.arguments('"')
    return stop


def convert(text: str, wanted: frozenset[str]) -> str:
    """`text` as JSON of one of the `wanted` types; a string where it is none of the others."""
    bare = _bare(text)
    try:
        value = loads(bare)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return bare if _fits(value, wanted) else json.dumps(text, ensure_ascii=False)


def broken_off(text: str, wanted: frozenset[str] = frozenset(), quoted: bool = False) -> str:
    """The same of a text that breaks off: the beginning of such JSON, so that what was streamed stays the beginning of an object. `quoted`:
    a string has its quotes where it is one."""
    bare = _bare(text)
    try:
        value = _begun(bare)
        fits = _fits(value, wanted) or (quoted and isinstance(value, str))
    except ValueError:
        fits = False
    return bare if fits or not bare else json.dumps(text, ensure_ascii=False)[:-1]


def loads(text: str) -> Any:
    """A value from JSON as everybody reads it, without Python's own NaN and Infinity."""
    return _DECODER.decode(text)


def _begun(text: str) -> Any:
    """What there is of the value whose JSON begins with `text`. Raises ValueError where none does."""
    try:
        value, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return from_json(text, allow_inf_nan=False, allow_partial="trailing-strings")
    if end < len(text):
        raise ValueError("there is more behind a value")
    return value


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is Python's alone")


_DECODER = json.JSONDecoder(parse_constant=_no_number)


def _bare(text: str) -> str:
    return {"None": "null", "True": "true", "False": "false"}.get(text.strip(), text.strip())  # models were shown Python's words too


def _fits(value: Any, wanted: frozenset[str]) -> bool:
    """Whether it is of a wanted type other than text."""
    return any(
        isinstance(value, KINDS[name]) and (name == "boolean") == isinstance(value, bool)
        for name in wanted or KINDS
        if name in KINDS and name != "string"
    )
