"""Grammars that hold a reply to a family's tool calls, in llguidance's dialect of Lark.

Marks that are special tokens of the model's tokenizer are written as token references, which text can't imitate; others as strings.
Around the arguments a call is written exactly as the family was trained to, the arguments are JSON of the tool's schema. Before the
calls stands a thought where the model thinks. Pure text in, text out: the engine compiles what comes out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from everlearn.errors import InvalidRequest, Unsupported
from everlearn.render import dsml as markup
from everlearn.render.parameters import ENDS, FUNCTION_END, PARAMETER, PARAMETER_END
from everlearn.render.pythonic import PYTHON_START, SIGNS
from everlearn.render.reasoning import CLOSE, OPEN, closed_by, opened_by
from everlearn.render.schemas import KINDS, Parameters
from everlearn.render.syntaxes import (
    CHANNEL,
    CONSTRAIN,
    DEEPSEEK_CALL,
    DEEPSEEK_CALL_END,
    DEEPSEEK_SECTION,
    DEEPSEEK_SECTION_END,
    DEEPSEEK_SEP,
    END,
    FUNCTION,
    KIMI_ARGUMENTS,
    KIMI_CALL,
    KIMI_CALL_END,
    KIMI_SECTION,
    KIMI_SECTION_END,
    MESSAGE,
    PYTHON_TAG,
    START,
    TOOL_CALL,
    TOOL_CALL_END,
)  # fmt: skip
from everlearn.types import Grammar

# JSON as models write it: on one line, a space after a colon or comma or none. Free white space lets a small model write nothing else.
SPACING = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
ANYTHING = "ANYTHING"
MAX_CALLS = 64
MAX_MESSAGES = 4  # harmony's thoughts and preambles before a call


class Signature(NamedTuple):
    """A tool as far as a grammar sees it."""

    name: str
    schema: Mapping[str, Any]
    strict: bool


class Lark:
    """A grammar in the making: rules by name, and how a mark is written."""

    def __init__(self, special: Collection[str]):
        self.special = special
        self.rules: list[str] = []

    def mark(self, mark: str) -> str:
        return mark if mark in self.special else literal(mark)

    def rule(self, body: str, options: str = "") -> str:
        """Adds a rule; its name."""
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{options}: {body}")
        return name

    def until(self, mark: str) -> str:
        """Any text up to and with the mark, which the text doesn't contain."""
        if mark in self.special:
            return f"{ANYTHING} {mark}"
        return self.rule(f"{ANYTHING} {literal(mark)}", "[lazy]")

    def json(self, signature: Signature) -> str:
        return self.rule("%json " + json.dumps(json_schema(signature.schema, signature.strict), ensure_ascii=False))

    def source(self, start: str) -> str:
        return "\n".join(["%llguidance {}", f"start: {start}", *self.rules, f"{ANYTHING}: /(?s:.*)/"]) + "\n"


Rules = Callable[[Lark, Sequence[Signature], bool, bool], str]  # (lark, tools, text may come instead, several calls may come)


def build(
    rules: Rules,
    tools: Sequence[Signature],
    tool_choice: str | Mapping[str, Any],
    parallel: bool,
    special: Collection[str],
    thinks: bool,
    prompt: str,
) -> Grammar | None:
    """None where anything may come. Raises InvalidRequest(param="tool_choice") for a choice that can't be made."""
    mode, chosen = choose(tools, tool_choice)
    if mode == "none" or (mode == "auto" and not any(tool.strict for tool in chosen)):
        return None
    lark = Lark(special)
    before = _thought(lark, rules, thinks, prompt)
    body = lark.rule(rules(lark, chosen, mode == "auto", parallel and mode != "named"))
    return Grammar("lark", lark.source(f"{before} {body}".strip()))


def answer(
    rules: Rules,
    schema: Mapping[str, Any] | bool,
    special: Collection[str],
    thinks: bool,
    prompt: str,
    tools: Sequence[Signature] = (),
    parallel: bool = True,
) -> Grammar:
    """JSON of `schema`, or calls of `tools` instead."""
    if tools and rules in (llama3, llama4):
        raise Unsupported(
            "this model writes calls as bare lists or objects, not to be told from an answer in JSON; leave out the format or the tools",
            param="response_format",
        )
    lark = Lark(special)
    before = _thought(lark, rules, thinks, prompt)
    if not before and rules is not harmony and not tools:
        return Grammar("json_schema", json.dumps(schema, ensure_ascii=False))
    body = lark.json(Signature("", schema if isinstance(schema, Mapping) else {}, True))
    if rules is harmony:
        body = f'{lark.mark(CHANNEL)} "final" {lark.mark(MESSAGE)} {body}'
    if tools:
        body = f"({lark.rule(rules(lark, tools, False, parallel))} | {lark.rule(body)})"
    return Grammar("lark", lark.source(f"{before} {body}".strip()))


def choose(tools: Sequence[Signature], tool_choice: str | Mapping[str, Any]) -> tuple[str, list[Signature]]:
    """(none, auto, required or named; the tools that may be called)."""
    known = {tool.name: tool for tool in tools}
    if isinstance(tool_choice, str):
        if tool_choice not in ("none", "auto", "required"):
            raise InvalidRequest(f"tool_choice is {tool_choice[:80]!r}; it is none, auto, required or a tool", param="tool_choice")
        if tool_choice == "required" and not known:
            raise InvalidRequest("tool_choice is required and there are no tools; send tools", param="tool_choice")
        return ("none" if not known else tool_choice), list(tools)
    allowed = tool_choice.get("allowed_tools", tool_choice) if tool_choice.get("type") == "allowed_tools" else None
    named = [tool_choice] if allowed is None else allowed.get("tools", [])
    names = [entry.get("function", entry).get("name") for entry in named]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InvalidRequest(f"tool_choice names {unknown[:1] or 'no tool'}; tools are {', '.join(known) or 'none'}", param="tool_choice")
    if allowed is None:
        return "named", [known[names[0]]]
    mode = allowed.get("mode", "auto")
    if mode not in ("auto", "required"):
        raise InvalidRequest(f"the mode of allowed_tools is {mode!r}; it is auto or required", param="tool_choice")
    return mode, [known[name] for name in names]


def json_schema(schema: Mapping[str, Any], strict: bool) -> dict[str, Any]:
    """`schema` for llguidance. A tool that isn't strict may use keywords that a grammar can't hold a model to: they are passed over."""
    return {**schema, "x-guidance": {**SPACING, "lenient": not strict}}


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _thought(lark: Lark, rules: Rules, thinks: bool, prompt: str) -> str:
    """What comes before the answer."""
    if rules is harmony:
        message = f'{lark.mark(CHANNEL)} ("analysis" | "commentary") {lark.mark(MESSAGE)} {lark.until(END)} {lark.mark(START)} "assistant"'
        return f"({lark.rule(message)}){{0,{MAX_MESSAGES}}}"
    if opened_by(prompt):
        return f"{lark.until(CLOSE)} /\\s{{0,4}}/"
    if thinks and not closed_by(prompt):
        return f"({lark.mark(OPEN)} {lark.until(CLOSE)} /\\s{{0,4}}/)?"
    return ""


def _without(lark: Lark, *patterns: str, begins: str = "") -> str:
    """Any text in which none of the patterns occurs (literals and regular expressions of Lark), and that doesn't begin with `begins`."""
    refused = [f"~({ANYTHING} {pattern} {ANYTHING})" for pattern in patterns] + ([f"~({begins} {ANYTHING})"] if begins else [])
    name = f"TEXT{len(lark.rules)}"
    lark.rules.append(f"{name}: {' & '.join([ANYTHING, *refused])}")
    return name


def _more(between: str, call: str, several: bool) -> str:
    return f"({between} {call}){{0,{MAX_CALLS - 1}}}" if several else ""


def _behind(lark: Lark, mark: str, rest: str, text: bool) -> str:
    """`rest` behind its mark; with `text`, any text before it or instead of it."""
    if not text:
        return f"{lark.mark(mark)} {rest}"
    if mark in lark.special:
        return f"{ANYTHING} ({mark} {rest})?"
    return f"{lark.until(mark)} {rest} | {_without(lark, literal(mark))}"


# ---- the families ----


def hermes(lark: Lark, tools: Sequence[Signature], text: bool, several: bool) -> str:
    """`<tool_call>\\n{"name": "NAME", "arguments": {...}}\\n</tool_call>`, one after another."""
    calls = [f'"\\n" {_named_object(lark, tool, "arguments")} "\\n" {lark.mark(TOOL_CALL_END)}' for tool in tools]
    return _tagged(lark, calls, text, several)


def qwen3_coder(lark: Lark, tools: Sequence[Signature], text: bool, several: bool) -> str:
    """`<tool_call>\\n<function=NAME>\\n<parameter=KEY>\\nVALUE\\n</parameter>\\n</function>\\n</tool_call>`."""
    calls = [f"{_elements(lark, tool)} {lark.mark(TOOL_CALL_END)}" for tool in tools]
    return _tagged(lark, calls, text, several)


def llama3(lark: Lark, tools: Sequence[Signature], text: bool, several: bool) -> str:
    """`{"name": "NAME", "parameters": {...}}`, several with a semicolon between."""
    call = lark.rule(" | ".join(_named_object(lark, tool, "parameters") for tool in tools))
    calls = f"{call} {_more(literal('; '), call, several)}"
    if not text:
        return calls
    other = _without(lark, r'/\n\{\s*"name"/', literal(FUNCTION), literal(PYTHON_TAG), begins=r"/\s*\{/")
    return f"{calls} | {other}"


def kimi_k2(lark: Lark, tools: Sequence[Signature], text: bool, several: bool) -> str:
    """A section of `<|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>{...}<|tool_call_end|>`."""
    begin, middle, end = lark.mark(KIMI_CALL), lark.mark(KIMI_ARGUMENTS), lark.mark(KIMI_CALL_END)
    calls = [f"{begin} {literal(f'functions.{tool.name}:')} /[0-9]{{1,3}}/ {middle} {lark.json(tool)} {end}" for tool in tools]
    return _section(lark, calls, "", KIMI_SECTION[0], KIMI_SECTION_END[0], text, several)


def deepseek_v3(lark: Lark, tools: Sequence[Signature], text: bool, several: bool) -> str:
    """A section of `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`, the arguments in a code block, `<｜tool▁call▁end｜>`."""
    begin, middle, end = lark.mark(DEEPSEEK_CALL), lark.mark(DEEPSEEK_SEP), lark.mark(DEEPSEEK_CALL_END)
    block = "\n```json\n"
    calls = [f'{begin} "function" {middle} {literal(tool.name + block)} {lark.json(tool)} "\\n```" {end}' for tool in tools]
    return _section(lark, calls, literal("\n"), DEEPSEEK_SECTION, DEEPSEEK_SECTION_END, text, several)


def deepseek_v31(lark: Lark, tools: Sequence[Signature], text: bool, several: bool) -> str:
    """A section of `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>`."""
    begin, middle, end = lark.mark(DEEPSEEK_CALL), lark.mark(DEEPSEEK_SEP), lark.mark(DEEPSEEK_CALL_END)
    calls = [f"{begin} {literal(tool.name)} {middle} {lark.json(tool)} {end}" for tool in tools]
    return _section(lark, calls, "", DEEPSEEK_SECTION, DEEPSEEK_SECTION_END, text, several)


def harmony(lark: Lark, tools: Sequence[Signature], text: bool, several: bool) -> str:
    """`<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}`; the end of the turn is the end of the call."""
    channel, message = lark.mark(CHANNEL), lark.mark(MESSAGE)
    head = f'{lark.mark(CONSTRAIN)} "json" {message}'
    calls = [f"{channel} {literal(f'commentary to=functions.{tool.name} ')} {head} {lark.json(tool)}" for tool in tools]
    return " | ".join([*calls, *([f'{channel} "final" {message} {ANYTHING}'] if text else [])])


def deepseek_v32(lark: Lark, tools: Sequence[Signature], text: bool, several: bool) -> str:
    """A section of invocations in DeepSeek's markup, parameters in the schema's order."""
    begin = markup.SECTIONS[0]
    calls = lark.rule(" | ".join(_invocation(lark, tool) for tool in tools))
    rest = f"{_markup(lark, begin + chr(10))} {calls} {_more('', calls, several)} {_markup(lark, begin.replace('<', '</'))}"
    if not text:
        return rest
    if _reference(lark) is None:
        end = literal(begin.replace("<", "</"))
        other = _without(lark, *map(literal, (*markup.SECTIONS, markup.INVOKE)))
        return f"{lark.until(begin + chr(10))} {calls} {_more('', calls, several)} {end} | {other}"
    # The bracket before the token is text, like all before it.
    return f"/(?s:.*)</ {rest.removeprefix(literal('<') + ' ')} | {ANYTHING}"


def llama4(lark: Lark, tools: Sequence[Signature], text: bool, several: bool) -> str:
    """`[NAME(KEY=VALUE, ...), ...]`, arguments in the schema's order, those that must be there first."""
    call = lark.rule(" | ".join(_python_call(lark, tool) for tool in tools))
    calls = f'"[" {call} {_more(literal(", "), call, several)} "]"'
    if not text:
        return calls
    other = _without(lark, literal("\n["), literal(PYTHON_START), begins=r"/\s*\[/")
    return f"{calls} | {other}"


def _reference(lark: Lark) -> str | None:
    """DeepSeek's mark where it is a special token: its text has no brackets, so that a grammar knows it by its number alone."""
    return next((mark for mark in lark.special if mark.startswith("<[")), None)


def _markup(lark: Lark, text: str) -> str:
    token = _reference(lark)
    if token is None:
        return literal(text)
    return f" {token} ".join(literal(part) if part else "" for part in text.split(markup.DSML)).strip()


def _invocation(lark: Lark, tool: Signature) -> str:
    parts, known = [_markup(lark, f'{markup.INVOKE} name="{tool.name}">\n')], Parameters(tool.schema)
    for name in known.schemas:
        element = lark.rule(" | ".join(_typed_elements(lark, tool, known, name)))
        parts.append(element if name in known.required else f"({element})?")
    return " ".join([*parts, _markup(lark, f"{markup.INVOKE_END}\n")])


def _typed_elements(lark: Lark, tool: Signature, known: Parameters, name: str) -> list[str]:
    """The element of a parameter as text, as JSON, or either where the schema allows both."""
    wanted, texts = _wanted(tool, known, name)
    found, end = [], f"{markup.PARAMETER_END}\n"
    if "string" in wanted:
        begin = _markup(lark, f'{markup.PARAMETER} name="{name}" string="true">')
        if texts is not None:
            found.append(f"{begin} ({' | '.join(map(literal, texts))}) {_markup(lark, end)}")
        elif _reference(lark) is None:
            value = f"VALUE{len(lark.rules)}"
            lark.rules.append(f"{value}: {_without(lark, literal(markup.PARAMETER_END))} {literal(end)}")
            found.append(f"{begin} {value}")
        else:
            found.append(f"{begin} /(?s:.*)<\\// {_markup(lark, end).removeprefix(literal('</') + ' ')}")
    if values := known.values(name):
        begin = _markup(lark, f'{markup.PARAMETER} name="{name}" string="false">')
        found.append(f"{begin} {_values(lark, tool, values)} {_markup(lark, end)}")
    return found


def _wanted(tool: Signature, known: Parameters, name: str) -> tuple[frozenset[str], tuple[str, ...] | None]:
    """The types that a parameter may have and the texts, None for any. Where that isn't clear they are all, but not of a strict tool."""
    kinds, texts = known.reading(name)
    if not kinds and tool.strict:
        shown = json.dumps(known.schemas[name], ensure_ascii=False)[:80]
        raise Unsupported(
            f"parameter {name!r} of tool {tool.name!r} doesn't say of which type it is ({shown}), and this model writes texts and "
            "other values in two ways; give it a type, or leave out strict",
            param="tools",
        )
    return (kinds, texts) if kinds else (frozenset(KINDS), None)


def _values(lark: Lark, tool: Signature, schemas: Sequence[Mapping[str, Any]]) -> str:
    """JSON of one of these schemas."""
    return f"({' | '.join(lark.json(Signature(tool.name, schema, tool.strict)) for schema in schemas)})"


def _python_call(lark: Lark, tool: Signature) -> str:
    known = Parameters(tool.schema)
    must = [_keyword(lark, tool, known, name) for name in known.schemas if name in known.required]
    may = [_keyword(lark, tool, known, name) for name in known.schemas if name not in known.required]
    rest = ""  # the optional ones from the last to the first: each may be there, with a comma if something stands before it
    first = ""
    for keyword in reversed(may):
        first = lark.rule(f"{keyword} {rest} | {first}" if first else f"{keyword} {rest}")
        rest = lark.rule(f'(", " {keyword})? {rest}')
    comma = literal(", ")
    inside = f" {comma} ".join(must) + f" {rest}" if must else f"({first})?" if first else ""
    return f"{literal(tool.name + '(')} {inside} {literal(')')}"


def _keyword(lark: Lark, tool: Signature, known: Parameters, name: str) -> str:
    if name != name.strip() or any(sign in name for sign in SIGNS):
        raise Unsupported(f"parameter {name!r} of tool {tool.name!r} can't be named in a call in Python's words; rename it", param="tools")
    if known.kinds(name) == {"boolean"}:
        return lark.rule(f'{literal(f"{name}=")} ("True" | "False")')
    return lark.rule(f"{literal(f'{name}=')} {_values(lark, tool, [known.alone(known.schemas[name])])}")


def _tagged(lark: Lark, calls: Sequence[str], text: bool, several: bool) -> str:
    call = lark.rule(" | ".join(calls))
    return _behind(lark, TOOL_CALL, f"{call} {_more(f'{literal(chr(10))} {lark.mark(TOOL_CALL)}', call, several)}", text)


def _section(lark: Lark, calls: Sequence[str], between: str, begin: str, end: str, text: bool, several: bool) -> str:
    call = lark.rule(" | ".join(calls))
    return _behind(lark, begin, f"{call} {_more(between, call, several)} {lark.mark(end)}", text)


def _named_object(lark: Lark, tool: Signature, key: str) -> str:
    before = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "{key}": '
    return f"{literal(before)} {lark.json(tool)} {literal('}')}"


def _elements(lark: Lark, tool: Signature) -> str:
    """One element for each parameter, in the schema's order; text parameters hold any text without their end tag."""
    parts, known = [literal(f"\n{FUNCTION}{tool.name}>\n")], Parameters(tool.schema)
    for name in known.schemas:
        element = f"{literal(f'{PARAMETER}{name}>' + chr(10))} {_element_value(lark, tool, known, name)}"
        parts.append(element if name in known.required else f"({element})?")
    return " ".join([*parts, literal(f"{FUNCTION_END}\n")])


def _element_value(lark: Lark, tool: Signature, known: Parameters, name: str) -> str:
    end = f"\n{PARAMETER_END}\n"
    wanted, texts = _wanted(tool, known, name)
    if "string" in wanted and texts is None:
        value = f"VALUE{len(lark.rules)}"
        lark.rules.append(f"{value}: {_without(lark, *map(literal, ENDS))} {literal(end)}")
        return value
    found = [literal(text + end) for text in texts or ()]
    if values := known.values(name):
        found.append(f"{_values(lark, tool, values)} {literal(end)}")
    return f"({' | '.join(found)})"
