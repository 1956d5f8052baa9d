"""DeepSeek V3.2's tool calls: a section of invocations in its own markup, an element for each parameter that says whether it is text.

<｜DSML｜function_calls>
<｜DSML｜invoke name="get_weather">
<｜DSML｜parameter name="city" string="true">Bonn</｜DSML｜parameter>
<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜function_calls>
"""

from __future__ import annotations

import json
import re

from everlearn.render.parameters import broken_off, convert, loads
from everlearn.render.reader import BrokenError, Marks, Reader, Step
from everlearn.render.replies import Writer
from everlearn.render.schemas import Parameters
from everlearn.render.syntaxes import NAME, closed_by, commit, marked

DSML = "｜DSML｜"  # one token of the model's vocabulary
SECTIONS = (f"<{DSML}function_calls>", f"<{DSML}tool_calls>")  # the second is what the next generation calls it
INVOKE, INVOKE_END = f"<{DSML}invoke", f"</{DSML}invoke>"
PARAMETER, PARAMETER_END = f"<{DSML}parameter", f"</{DSML}parameter>"
HEADER = re.compile(r'\s*name="([^"]*)"(?:\s+string="(true|false)")?\s*')
# A missing end tag is seen by what can only come after it, at the beginning of a line.
_ENDS = Marks(PARAMETER_END, "\n" + PARAMETER, "\n" + INVOKE_END)


def dsml_call(reader: Reader, out: Writer, mark: str) -> Step[None]:
    """A section's invocations, or one without a section around it."""
    if mark == INVOKE:
        return (yield from invocation(reader, out))
    yield from reader.space()
    found = 0
    while (yield from reader.comes(INVOKE)):
        yield from invocation(reader, out)
        out.close_call()
        found += 1
        reader.keep("")
        yield from reader.space()
    if not found:
        raise BrokenError("a section without a call")
    yield from closed_by(reader, out, mark.replace("<", "</"))


def invocation(reader: Reader, out: Writer) -> Step[None]:
    """After `<｜DSML｜invoke`: the name, parameters, the end. Writes them as one JSON object, texts as they come."""
    name = (yield from _header(reader, "an invocation"))[0]
    if not NAME.fullmatch(name):
        raise BrokenError(f"{name[:80]!r} is not a name to call")
    known = Parameters((out.tools or {}).get(name, {}))
    between, stop = "{", ""
    while True:
        if between != "{":
            reader.keep("")  # what can't be read from here on is text after a call
        yield from reader.space()
        if stop == "\n" + INVOKE_END or (stop != "\n" + PARAMETER and (yield from reader.comes(INVOKE_END))):
            if between == "{":
                commit(reader, out, name)
            out.arguments("{}" if between == "{" else "}")
            return
        if stop != "\n" + PARAMETER and not (yield from reader.comes(PARAMETER)):
            if between == "{":
                raise BrokenError("an invocation without parameters and without an end")
            if (yield from reader.peek()):
                out.arguments("}")
                out.problems.append(f"an invocation isn't closed by {INVOKE_END}")
            return
        key, textual = yield from _header(reader, "a parameter")
        if between == "{":
            commit(reader, out, name)
        reader.forget()
        out.arguments(f"{between}{json.dumps(key, ensure_ascii=False)}: ")
        stop = yield from _value(reader, out, textual, known.kinds(key))
        if not stop:
            return
        if stop != PARAMETER_END:
            out.problems.append(f"parameter {key!r} isn't closed by {PARAMETER_END}")
        between, stop = ", ", "" if stop == PARAMETER_END else stop


def _header(reader: Reader, what: str) -> Step[tuple[str, str | None]]:
    """The rest of a tag: its name, and what it says of `string`."""
    pieces: list[str] = []
    stop = yield from reader.until(Marks(">", "\n"), pieces.append)
    found = HEADER.fullmatch("".join(pieces))
    if stop != ">" or found is None:
        raise BrokenError(f"{what} without a name")
    return found[1], found[2]


def _value(reader: Reader, out: Writer, textual: str | None, wanted: frozenset[str]) -> Step[str]:
    """A parameter's value; the mark that ended it, "" at the end of the text. Where the tag doesn't say what it is, the schema does."""
    if textual == "true" or (textual is None and wanted == {"string"}):
        out.arguments('"')
        stop = yield from reader.until(_ENDS, lambda piece: out.arguments(json.dumps(piece, ensure_ascii=False)[1:-1]))
        out.arguments('"' if stop else "")
        return stop
    pieces: list[str] = []
    stop = yield from reader.until(_ENDS, pieces.append)
    text = "".join(pieces)
    out.arguments(as_json(text, wanted) if stop else broken_off(text, quoted=True))
    return stop


def as_json(text: str, wanted: frozenset[str]) -> str:
    """JSON as it was written; what is none is made into what the schema asks for."""
    try:
        loads(text)
    except (ValueError, RecursionError):
        return convert(text, wanted)
    return text.strip()


PARSER = marked(dsml_call, *SECTIONS, INVOKE, special=False)
