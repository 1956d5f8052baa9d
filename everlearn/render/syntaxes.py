"""How families of models write tool calls, as parsers: each reads a reply and writes its content, thoughts and calls.

What begins like a call and turns out to be none is given back as content, every character of it. Once a call has its name and its
arguments begin, it is a call: its arguments go out as they come, and what breaks them stays in them and is named as a problem.
Marks that are special tokens can't be text; marks that are text are looked for outside JSON strings alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from everlearn.render.parameters import parameters
from everlearn.render.reader import BrokenError, Emit, Marks, Reader, Step
from everlearn.render.reasoning import CLOSE, opened_by, thoughts
from everlearn.render.replies import Writer
from everlearn.render.schemas import Parameters

Parser = Callable[[Reader, Writer, str], Step[None]]  # (reader, writer, the prompt's text); reads a whole reply
Call = Callable[[Reader, Writer, str], Step[None]]  # (reader, writer, the mark that was taken); reads what follows the mark

NAME = re.compile(r"[^\s<>\"'{}()\[\]=]{1,256}")

TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PYTHON_TAG = "<|python_tag|>"
KIMI_SECTION = ("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>")
KIMI_SECTION_END = ("<|tool_calls_section_end|>", "<|tool_call_section_end|>")
KIMI_CALL, KIMI_ARGUMENTS, KIMI_CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
DEEPSEEK_SECTION, DEEPSEEK_SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
DEEPSEEK_CALL, DEEPSEEK_SEP, DEEPSEEK_CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"


def marked(call: Call, *marks: str, special: bool) -> Parser:
    """The parser of a family whose calls stand behind `marks`. Marks that are special tokens end a thought as well."""
    looked_for, ends = Marks(*marks), Marks(CLOSE, *marks) if special else Marks(CLOSE)

    def parser(reader: Reader, out: Writer, prompt: str) -> Step[None]:
        if not out.calls:
            return (yield from plain(reader, out, prompt))
        mark = yield from thoughts(reader, out, opened_by(prompt), ends)
        if mark in ("", CLOSE):
            mark = yield from reader.until(looked_for, out.content)
        while mark:
            yield from attempt(reader, out, mark, call)
            mark = yield from reader.until(looked_for, out.content)

    return parser


def plain(reader: Reader, out: Writer, prompt: str) -> Step[None]:
    """A thought, then content; no calls."""
    yield from thoughts(reader, out, opened_by(prompt), Marks(CLOSE))
    yield from reader.rest(out.content)


def attempt(reader: Reader, out: Writer, mark: str, call: Call) -> Step[None]:
    """Reads a call; text that is none becomes content again."""
    reader.keep(mark)
    try:
        yield from call(reader, out, mark)
    except BrokenError as error:
        if mark.strip() not in ("{", "["):  # what nothing marked may well be meant as text
            out.problems.append(f"left as text: {error}")
    else:
        reader.forget()
    out.close_call()
    out.content(reader.forget())


def commit(reader: Reader, out: Writer, name: str, id: str = "") -> None:
    """From here on it is a call, and nothing of what was read goes back."""
    reader.forget()
    out.open_call(name, id)


def calls_by_line(reader: Reader, out: Writer, prompt: str, start: str, bare: str, marks: Marks, call: Call) -> Step[None]:
    """A thought, then content with calls: behind one of `marks` (`start` among them), or bare, from `bare` on, at the beginning."""
    if not out.calls:
        return (yield from plain(reader, out, prompt))
    mark = yield from thoughts(reader, out, opened_by(prompt), Marks(CLOSE, start))
    if mark in ("", CLOSE):
        reader.keep("")
        yield from reader.space()
        begins = yield from reader.comes(bare)
        before = reader.forget()
        if begins:
            mark = before
        else:
            out.content(before)
            mark = yield from reader.until(marks, out.content)
    while mark:
        yield from attempt(reader, out, mark, call)
        mark = yield from reader.until(marks, out.content)


# ---- a call as one JSON object ----


def call_object(
    reader: Reader, out: Writer, end: Marks, *, hard: bool = False, opened: bool = False, bare: bool = False, inner: bool = False
) -> Step[None]:
    """`{"name": ..., "arguments": {...}}`, or with `parameters`, or inside of `{"function": ...}`. `opened`: its brace was taken.

    `bare`: nothing marks it as a call, so it is one only if its name comes first and is the name of a tool. `inner`: it is the one
    inside of `{"function": ...}`; no family nests deeper, and a reply that did would go as deep as Python's stack.
    """
    if not opened and not (yield from reader.comes("{")):
        raise BrokenError("a call is a JSON object")
    name, early, committed = "", "", False
    while True:
        yield from reader.space()
        if (yield from reader.comes("}")):
            break
        key = yield from reader.string(end)
        yield from reader.space()
        if not (yield from reader.comes(":")):
            raise BrokenError(f"{key!r} has no value")
        yield from reader.space()
        if key == "function" and not committed and (yield from reader.peek()) == "{":
            if inner:
                raise BrokenError("a function inside of a function is not a call")
            yield from call_object(reader, out, end, hard=hard, bare=bare, inner=True)
            committed = True
        elif key in ("name", "function") and not name:
            name = yield from reader.string(end)
            if not NAME.fullmatch(name) or (bare and out.tools is not None and name not in out.tools):
                raise BrokenError(f"{name!r} is not a name to call")
        elif key in ("arguments", "parameters") and name and not committed:
            if not (yield from reader.peek()):
                raise BrokenError("the text ends before the arguments")
            commit(reader, out, name)
            committed = True
            if not (yield from arguments(reader, out.arguments, end, hard)):
                return
            reader.keep("")
        elif bare and not name and key not in ("type", "id"):
            raise BrokenError("an object that begins with something else than a name")
        else:
            pieces: list[str] = []
            yield from arguments(reader, pieces.append, end, hard)
            early = "".join(pieces) if key in ("arguments", "parameters") else early
        yield from reader.space()
        if not (yield from reader.comes(",")):
            if not (yield from reader.comes("}")):
                if not committed:
                    raise BrokenError("a call's object isn't closed")
                out.problems.append("a call's object isn't closed")
            break
    if committed:
        return
    if not name or bare:
        raise BrokenError("an object that names nothing to call")
    commit(reader, out, name)
    out.arguments(early)


def arguments(reader: Reader, emit: Emit, end: Marks, hard: bool) -> Step[bool]:
    """The value of a call's arguments: an object as it comes; a string that holds one (as OpenAI's API writes it); null is none."""
    first = yield from reader.peek()
    if first in ("{", "["):
        return (yield from reader.value(emit, end, hard))
    pieces: list[str] = []
    whole = yield from reader.value(pieces.append, end, hard)
    text = "".join(pieces)
    if first == '"' and whole:
        try:
            text = json.loads(text, strict=False)
        except ValueError:
            whole = False
    emit("" if text == "null" else text)
    return whole


def closed_by(reader: Reader, out: Writer, end: str) -> Step[None]:
    """The mark that ends a call; brackets too many before it are dropped, a missing mark is only named."""
    reader.keep("")
    yield from reader.space()
    stray = ""
    while (char := (yield from reader.peek())) and char in "}]":
        stray += reader.take(reader.at + 1)
        yield from reader.space()
    if stray:
        out.problems.append(f"brackets too many after a call: {stray}")
    if not (yield from reader.comes(end)):
        out.problems.append(f"a call isn't closed by {end}")
    reader.forget()


# ---- Hermes, Qwen ----


def hermes_call(reader: Reader, out: Writer, mark: str) -> Step[None]:
    """After `<tool_call>`: one object or several or a list of them, or Qwen3-Coder's XML."""
    yield from reader.space()
    if mark == FUNCTION or (yield from reader.comes(FUNCTION)):
        yield from function_call(reader, out, mark)
        return (yield from closed_by(reader, out, TOOL_CALL_END))
    end = Marks(TOOL_CALL_END)
    listed = yield from reader.comes("[")
    while True:
        yield from reader.space()
        yield from call_object(reader, out, end)
        out.close_call()
        reader.keep("")
        yield from reader.space()
        if listed and (yield from reader.comes(",")):
            continue
        if (yield from reader.peek()) != "{":
            _ = listed and (yield from reader.comes("]"))
            break
    yield from closed_by(reader, out, TOOL_CALL_END)


def function_call(reader: Reader, out: Writer, mark: str) -> Step[None]:
    """After `<function=`: the name, then Qwen3-Coder's `<parameter=...>` elements or the JSON object of Llama's custom format."""
    pieces: list[str] = []
    stop = yield from reader.until(Marks(">", "\n"), pieces.append)
    name = "".join(pieces).strip()
    if stop != ">" or not NAME.fullmatch(name):
        raise BrokenError("<function= without a name")
    yield from reader.space()
    if (yield from reader.peek()) != "{":
        known = Parameters((out.tools or {}).get(name, {}))
        return (yield from parameters(reader, out, lambda: commit(reader, out, name), known))
    commit(reader, out, name)
    yield from reader.value(out.arguments, Marks(FUNCTION_END))
    yield from closed_by(reader, out, FUNCTION_END)


# ---- Llama 3 ----

LLAMA_MARKS = Marks(PYTHON_TAG, FUNCTION, "\n{")
BUILTIN = re.compile(r'\s*(\w+)\.call\(\s*(\w+)\s*=\s*("(?:[^"\\]|\\.)*")\s*\)\s*', re.DOTALL)


def llama(reader: Reader, out: Writer, prompt: str) -> Step[None]:
    """A bare object at the beginning of the reply or of a line, objects or a built-in's call after `<|python_tag|>`, `<function=`."""
    yield from calls_by_line(reader, out, prompt, PYTHON_TAG, "{", LLAMA_MARKS, llama_call)


def llama_call(reader: Reader, out: Writer, mark: str) -> Step[None]:
    if mark == FUNCTION:
        return (yield from function_call(reader, out, mark))
    if mark == PYTHON_TAG:
        yield from reader.space()
        if not (yield from reader.comes("{")):
            return (yield from builtin_call(reader, out))
    while True:
        yield from call_object(reader, out, Marks(PYTHON_TAG), hard=True, opened=True, bare=mark != PYTHON_TAG)
        out.close_call()
        reader.keep("")
        yield from reader.space()
        _ = (yield from reader.comes(";")) or (yield from reader.comes(","))
        yield from reader.space()
        if not (yield from reader.comes("{")):
            return out.content(reader.forget())


def builtin_call(reader: Reader, out: Writer) -> Step[None]:
    """`brave_search.call(query="...")`; other code stays text."""
    pieces: list[str] = []
    yield from reader.rest(pieces.append)
    found = BUILTIN.fullmatch("".join(pieces))
    if found is None:
        raise BrokenError("code after <|python_tag|>")
    commit(reader, out, found[1])
    out.arguments(f'{{"{found[2]}": {found[3]}}}')


# ---- Kimi K2, DeepSeek: marks are special tokens ----

KIMI_MARKS = (*KIMI_SECTION, *KIMI_SECTION_END, KIMI_CALL, KIMI_CALL_END)
KIMI_ENDS = Marks(KIMI_CALL, KIMI_CALL_END, *KIMI_SECTION_END)
KIMI_HEAD_ENDS = Marks(KIMI_ARGUMENTS, KIMI_CALL, KIMI_CALL_END, *KIMI_SECTION_END)
DEEPSEEK_MARKS = (DEEPSEEK_SECTION, DEEPSEEK_SECTION_END, DEEPSEEK_CALL, DEEPSEEK_CALL_END)
DEEPSEEK_ENDS = Marks(DEEPSEEK_CALL, DEEPSEEK_CALL_END, DEEPSEEK_SECTION_END)
DEEPSEEK_HEAD_ENDS = Marks(DEEPSEEK_SEP, DEEPSEEK_CALL, DEEPSEEK_CALL_END, DEEPSEEK_SECTION_END)


def kimi_call(reader: Reader, out: Writer, mark: str) -> Step[None]:
    """`functions.NAME:INDEX`, which is the call's id, then its arguments."""
    if mark != KIMI_CALL:
        return
    pieces: list[str] = []
    stop = yield from reader.until(KIMI_HEAD_ENDS, pieces.append)
    id = "".join(pieces).strip()
    name = id.rpartition(":")[0].removeprefix("functions.") if ":" in id else id.removeprefix("functions.")
    if stop != KIMI_ARGUMENTS or not NAME.fullmatch(name):
        raise BrokenError(f"a call without a name or arguments: {id[:80]!r}")
    yield from special_arguments(reader, out, name, id, KIMI_ENDS, KIMI_CALL_END)


def deepseek_call(reader: Reader, out: Writer, mark: str) -> Step[None]:
    """V3 and R1: `function<sep>NAME`, then the arguments in a code block. V3.1: `NAME<sep>` and the arguments."""
    if mark != DEEPSEEK_CALL:
        return
    pieces: list[str] = []
    stop = yield from reader.until(DEEPSEEK_HEAD_ENDS, pieces.append)
    name = "".join(pieces).strip()
    if stop == DEEPSEEK_SEP and name == "function" and (yield from reader.peek()) not in ("{", "\n"):
        pieces = []
        stop = (yield from reader.until(Marks("\n", *DEEPSEEK_MARKS), pieces.append)) and DEEPSEEK_SEP
        name = "".join(pieces).strip()
    if stop != DEEPSEEK_SEP or not NAME.fullmatch(name):
        raise BrokenError(f"a call without a name or arguments: {name[:80]!r}")
    yield from reader.space()
    _ = (yield from reader.comes("```json")) or (yield from reader.comes("```"))
    yield from special_arguments(reader, out, name, "", DEEPSEEK_ENDS, DEEPSEEK_CALL_END)


def special_arguments(reader: Reader, out: Writer, name: str, id: str, ends: Marks, end: str) -> Step[None]:
    yield from reader.space()
    if not (yield from reader.peek()):
        raise BrokenError("the text ends before the arguments")
    commit(reader, out, name, id)
    yield from arguments(reader, out.arguments, ends, hard=True)
    reader.keep("")
    yield from reader.space()
    if (yield from reader.comes("```")):
        reader.forget()
    yield from closed_by(reader, out, end)


# ---- gpt-oss: harmony ----

HARMONY_MARKS = Marks(START, CHANNEL, END, CALL, RETURN)
HARMONY_HEAD_ENDS = Marks(MESSAGE, END, CALL, RETURN)
RECIPIENT, CHANNEL_NAME = re.compile(r"\bto=([^\s<]+)"), re.compile(r"<\|channel\|>\s*(\w+)")


def harmony(reader: Reader, out: Writer, prompt: str) -> Step[None]:
    """Messages with a header: the channel says whether one is thought or answer, a recipient that it is a call."""
    header, begun, body = prompt.rpartition(START + "assistant")[2].partition(MESSAGE)
    if begun and END not in body:
        mark = yield from harmony_body(reader, out, header)
    elif (yield from reader.comes(" to=")):
        mark = " to="
    else:
        mark = yield from reader.until(HARMONY_MARKS, out.content)
    while mark:
        if mark in (START, CHANNEL, " to="):
            reader.keep(mark)
            pieces = [mark]
            if (yield from reader.until(HARMONY_HEAD_ENDS, pieces.append)) == MESSAGE:
                reader.forget()
                out.separate()
                mark = yield from harmony_body(reader, out, "".join(pieces))
                continue
            out.problems.append("left as text: a message's header without a message")
            out.content(reader.forget())
        mark = yield from reader.until(HARMONY_MARKS, out.content)


def harmony_body(reader: Reader, out: Writer, header: str) -> Step[str]:
    """A message after its header; returns the mark that ended it."""
    recipient, channel = RECIPIENT.search(header), CHANNEL_NAME.search(header)
    called = recipient is not None and recipient[1] != "assistant"
    if recipient is not None and called and out.calls:
        commit(reader, out, recipient[1].removeprefix("functions."))
        yield from reader.space()
        mark = yield from reader.until(HARMONY_MARKS, out.arguments)
        out.close_call()
        return mark
    thought = channel is not None and channel[1] == "analysis" and not called
    return (yield from reader.until(HARMONY_MARKS, out.reasoning if thought else out.content))


HERMES = marked(hermes_call, TOOL_CALL, special=False)
QWEN3_CODER = marked(hermes_call, TOOL_CALL, FUNCTION, special=False)
KIMI = marked(kimi_call, *KIMI_MARKS, special=True)
DEEPSEEK = marked(deepseek_call, *DEEPSEEK_MARKS, special=True)
# What a parser reads that may be special tokens: detokenisation must not leave it out.
KIMI_ALL = (*KIMI_MARKS, KIMI_ARGUMENTS)
DEEPSEEK_ALL = (*DEEPSEEK_MARKS, DEEPSEEK_SEP)
HARMONY_ALL = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
