"""Llama 4's tool calls in Python's words: `[get_weather(city="Bonn", days=3), get_time()]`, between `<|python_start|>` and `<|python_end|>`
or bare, at the beginning of the reply or of a line.

Nothing is evaluated: a value is read up to the comma or bracket that ends it, and its strings and words are written as JSON's.
"""

from __future__ import annotations

import json
import re

from everlearn.render.parameters import broken_off, convert, loads
from everlearn.render.reader import BrokenError, Marks, Reader, Step
from everlearn.render.replies import Writer
from everlearn.render.schemas import Parameters
from everlearn.render.syntaxes import NAME, calls_by_line, commit

PYTHON_START, PYTHON_END = "<|python_start|>", "<|python_end|>"
MARKS = Marks(PYTHON_START, "\n[")
SIGNS = ("(", ")", "[", "]", "=", ",", "\n", '"', "'")
WORD_ENDS = Marks(*SIGNS)
TOKEN = re.compile(r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|([A-Za-z_]\w*)|(.)""", re.DOTALL)
ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
WORDS = {"True": "true", "False": "false", "None": "null"}


def pythonic(reader: Reader, out: Writer, prompt: str) -> Step[None]:
    yield from calls_by_line(reader, out, prompt, PYTHON_START, "[", MARKS, calls)


def calls(reader: Reader, out: Writer, mark: str) -> Step[None]:
    """A list of calls. A bare one is a list of calls only if it begins with the name of a tool."""
    if mark == PYTHON_START:
        yield from reader.space()
        if not (yield from reader.comes("[")):
            raise BrokenError(f"no list of calls behind {PYTHON_START}")
    found = 0
    while True:
        try:
            yield from call(reader, out, known=mark != PYTHON_START and not found)
        except BrokenError as error:
            if found and mark != PYTHON_START:  # it was a list of calls, so this is worth telling
                out.problems.append(f"left as text: {error}")
            raise
        out.close_call()
        found += 1
        reader.keep("")
        yield from reader.space()
        if not (yield from reader.comes(",")):
            break
    if not (yield from reader.comes("]")):
        out.problems.append("a list of calls isn't closed by ]")
    yield from reader.space()
    if (yield from reader.comes(PYTHON_END)):
        reader.forget()


def call(reader: Reader, out: Writer, known: bool) -> Step[None]:
    """`NAME(KEY=VALUE, ...)`, its arguments written as one JSON object, each when it is whole."""
    yield from reader.space()
    name, stop = yield from word(reader)
    if stop != "(" or not NAME.fullmatch(name) or (known and out.tools is not None and name not in out.tools):
        raise BrokenError(f"{name[:80]!r} is not a name to call")
    wanted = Parameters((out.tools or {}).get(name, {}))
    between = "{"
    while True:
        yield from reader.space()
        if (yield from reader.comes(")")):
            if between == "{":
                commit(reader, out, name)
            out.arguments("{}" if between == "{" else "}")
            return
        key, stop = yield from word(reader)
        if stop != "=" or not (key.isidentifier() or key in wanted.schemas):
            if between == "{":
                raise BrokenError("arguments are written name=value")
            out.problems.append(f"an argument that isn't written name=value: {key[:80]!r}")
            out.arguments("}")
            return
        if between == "{":
            commit(reader, out, name)
        out.arguments(f"{between}{json.dumps(key, ensure_ascii=False)}: ")
        text, stop = yield from value(reader)
        out.arguments(as_json(text, wanted.kinds(key)) if stop else broken_off(text, quoted=True))
        if not stop:
            return
        between = ", "
        if stop == ",":
            reader.take(reader.at + 1)


def word(reader: Reader) -> Step[tuple[str, str]]:
    """The text up to the next sign of Python's, and that sign."""
    pieces: list[str] = []
    stop = yield from reader.until(WORD_ENDS, pieces.append)
    return "".join(pieces).strip(), stop


def value(reader: Reader) -> Step[tuple[str, str]]:
    """The text of a value, and what ends it, which isn't taken: a comma, a bracket that it didn't open, "" at the end of the text."""
    pieces: list[str] = []
    depth, quote = 0, ""
    while char := (yield from reader.peek()):
        if quote:
            if char == "\\":
                pieces.append(reader.take(reader.at + 1))
                if not (yield from reader.peek()):
                    break
            elif char == quote:
                quote = ""
        elif char in "\"'":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}" or (char == "," and not depth):
            if not depth:
                return "".join(pieces), char
            depth -= 1
        pieces.append(reader.take(reader.at + 1))
    return "".join(pieces), ""


def as_json(text: str, wanted: frozenset[str]) -> str:
    """A literal of Python as JSON; what is none is text, or what is `wanted`."""
    text = text.strip()
    written = "".join(
        json.dumps(_unescaped(string[1:-1]), ensure_ascii=False) if string else WORDS.get(name, name) if name else _BRACKETS.get(sign, sign)
        for string, name, sign in TOKEN.findall(text)
    )
    try:
        loads(written)
    except (ValueError, RecursionError):
        return convert(text, wanted)
    return written


_BRACKETS = {"(": "[", ")": "]"}


def _unescaped(text: str) -> str:
    plain_text = ESCAPE.sub(_escape, text)
    return plain_text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if "\\u" in text else plain_text


def _escape(found: re.Match[str]) -> str:
    code = found[1]
    if len(code) > 1:
        number = int(code[1:], 16)
        return chr(number) if number <= 0x10FFFF else "\ufffd"
    return ESCAPES.get(code, code if code in "\\'\"" else f"\\{code}")
