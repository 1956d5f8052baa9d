"""Tool formats: how a model is shown tools, how it writes calls, and the grammar that holds it to them. One table for all families.

A model whose template knows no tools gets the prompted format: the tools stand in the system message, calls are written as Hermes
models write them (docs/guides/tools.md). `format_for` picks a format by what the model's template and vocabulary say, and binds it to
the tokenizer, which decides what of its marks is a special token.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from everlearn.errors import InvalidRequest
from everlearn.render import callgrammar, dsml, pythonic, syntaxes, template
from everlearn.render.reader import Reader
from everlearn.render.reasoning import CLOSE, OPEN
from everlearn.render.replies import (
    ContentDelta,
    Delta,
    ParsedReply,
    ReasoningDelta,
    ToolCall,
    ToolCallDelta,
    Tools,
    Writer,
    fold,
)
from everlearn.render.tokenizer import ChatTokenizer
from everlearn.types import Grammar

__all__ = [
    "FORMATS", "ContentDelta", "Delta", "ParsedReply", "ReasoningDelta", "ReplyParser", "ToolCall", "ToolCallDelta", "ToolFormat",
    "format_for",
]  # fmt: skip

Tool = Mapping[str, Any]


class ReplyParser:
    """One reply, as it comes. Deltas joined are what `ToolFormat.parse` gives for the whole text, wherever it was cut."""

    def __init__(self, parser: syntaxes.Parser, tools: Tools | None, calls: bool, prompt: str):
        self._reader, self._out = Reader(), Writer(tools, calls)
        self._steps = parser(self._reader, self._out, prompt)
        self._running = True
        self._advance(None, first=True)

    @property
    def problems(self) -> list[str]:
        """What was wrong with the reply so far."""
        return self._out.problems

    @property
    def num_calls(self) -> int:
        """Calls that are complete."""
        return self._out.num_calls

    def feed(self, text: str) -> list[Delta]:
        """What `text` adds. Never raises for what a model may write."""
        if text:
            self._advance(text)
        return self._out.pop()

    def finish(self) -> list[Delta]:
        """What was held back; the reply is over."""
        while self._running:
            self._advance(None)
        self._out.finish()
        return self._out.pop()

    def _advance(self, piece: str | None, first: bool = False) -> None:
        if not self._running:  # the parser has read its reply to the end; nothing may be lost all the same
            self._out.content(piece or "")
            return
        try:
            if first:
                next(self._steps)
            else:
                self._steps.send(piece)
        except StopIteration:
            self._running = False


class ToolFormat(msgspec.Struct, frozen=True):
    """A row of the table. `native`: the model's template shows tools, so give them to `template.render`; `shows_calls`: it shows calls
    and their results. What it doesn't show, `inject` turns into text. `one_call`: it shows one call of a message. `calls_alone`: it shows
    calls of a message that has no text. `thinks`: the model may think before it answers.

    `marks` are the strings that must reach the parser although they may be special tokens; `special` are those that the model's
    tokenizer has as one token each, `keep_ids` their ids (give them to TextStream as `keep`). Both are empty in `FORMATS`.
    """

    name: str
    parser: syntaxes.Parser
    grammar_of: callgrammar.Rules
    marks: tuple[str, ...] = ()
    native: bool = True
    shows_calls: bool = True
    one_call: bool = False
    calls_alone: bool = False
    special: frozenset[str] = frozenset()
    keep_ids: frozenset[int] = frozenset()
    thinks: bool = False

    def inject(self, messages: Sequence[template.Message], tools: Sequence[Tool] | None) -> list[dict[str, Any]]:
        """`messages` as the model's template can show them, with what it can't show (tools, calls and their results) as text."""
        copies = [dict(message) for message in messages]
        if self.name == "harmony":
            copies = [_thought_with_preamble(message) for message in copies]
        if self.one_call:
            copies = _one_call_each(copies)
        if not self.shows_calls:
            copies = _calls_as_text(copies)
        if self.calls_alone:
            copies = _text_before_calls(copies)
        if tools and not self.native:
            copies = _with_section(copies, section(self.name, tools))
        return copies

    def parse(self, text: str, tools: Sequence[Tool] | None = None, prompt: str = "") -> ParsedReply:
        """The whole reply. See `stream` for `tools` and `prompt`."""
        parser = self.stream(tools, prompt)
        deltas = [*parser.feed(text), *parser.finish()]
        return fold(deltas, parser.problems)

    def stream(self, tools: Sequence[Tool] | None = None, prompt: str = "") -> ReplyParser:
        """A parser for one reply. `tools` are the request's: with an empty list no calls are looked for, with None all are taken
        (names and parameter types are then not known). `prompt` is the rendered prompt: a template may have opened a thought in it.
        """
        known = None if tools is None else {name: schema for name, schema, _ in signatures(tools)}
        return ReplyParser(self.parser, known, known is None or bool(known), prompt)

    def grammar(
        self,
        tools: Sequence[Tool],
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel: bool = True,
        strict: bool = False,
        prompt: str = "",
    ) -> Grammar | None:
        """What the reply must match, None where anything may come: "none", and "auto" without a strict tool.

        `tool_choice` is OpenAI's: auto, none, required, or {"type": "function", "function": {"name": ...}}. `strict` stands for tools
        that don't say themselves; arguments of a strict tool match its schema exactly, those of another as far as the grammar can.
        """
        return callgrammar.build(self.grammar_of, signatures(tools, strict), tool_choice, parallel, self.special, self.thinks, prompt)

    def answer_grammar(
        self, schema: Mapping[str, Any] | bool, prompt: str = "", tools: Sequence[Tool] = (), parallel: bool = True
    ) -> Grammar:
        """JSON of `schema` as the answer, or calls of `tools` instead, after a thought where the model thinks."""
        found = signatures(tools)
        return callgrammar.answer(self.grammar_of, schema, self.special, self.thinks, prompt, found, parallel)


def signatures(tools: Sequence[Tool], strict: bool = False) -> list[callgrammar.Signature]:
    """Name, parameters and strictness of each tool, in OpenAI's chat form or its flat one (Responses)."""
    found = []
    for place, tool in enumerate(tools):
        function = tool.get("function", tool)
        name = function.get("name")
        if tool.get("type", "function") != "function" or not isinstance(name, str):
            raise InvalidRequest(f"tools[{place}] is of type {tool.get('type')!r}; this server takes functions", param="tools")
        if not syntaxes.NAME.fullmatch(name):
            raise InvalidRequest(f"tools[{place}] is named {name[:100]!r}; names have no spaces, quotes or brackets", param="tools")
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(schema, Mapping):
            raise InvalidRequest(f"the parameters of tool {name!r} are a JSON schema", param="tools")
        own = function.get("strict")
        found.append(callgrammar.Signature(name, schema, strict if own is None else bool(own)))
    names = [signature.name for signature in found]
    if len(set(names)) < len(names):
        raise InvalidRequest(f"two tools are named {max(names, key=names.count)!r}; names must differ", param="tools")
    return found


# ---- the table ----

_HERMES = (syntaxes.TOOL_CALL, syntaxes.TOOL_CALL_END, OPEN, CLOSE)
FORMATS = {
    row.name: row
    for row in (
        ToolFormat("prompted", syntaxes.HERMES, callgrammar.hermes, _HERMES, native=False, shows_calls=False),
        ToolFormat("hermes", syntaxes.HERMES, callgrammar.hermes, _HERMES),
        ToolFormat("qwen3_coder", syntaxes.QWEN3_CODER, callgrammar.qwen3_coder, _HERMES),
        ToolFormat("llama3", syntaxes.llama, callgrammar.llama3, (syntaxes.PYTHON_TAG, OPEN, CLOSE)),
        ToolFormat("llama4", pythonic.pythonic, callgrammar.llama4, (pythonic.PYTHON_START, pythonic.PYTHON_END, OPEN, CLOSE)),
        ToolFormat("kimi_k2", syntaxes.KIMI, callgrammar.kimi_k2, (*syntaxes.KIMI_ALL, OPEN, CLOSE)),
        ToolFormat("deepseek_v3", syntaxes.DEEPSEEK, callgrammar.deepseek_v3, (*syntaxes.DEEPSEEK_ALL, OPEN, CLOSE)),
        ToolFormat("deepseek_v31", syntaxes.DEEPSEEK, callgrammar.deepseek_v31, (*syntaxes.DEEPSEEK_ALL, OPEN, CLOSE)),
        ToolFormat("deepseek_v32", dsml.PARSER, callgrammar.deepseek_v32, (dsml.DSML, OPEN, CLOSE)),
        ToolFormat("harmony", syntaxes.harmony, callgrammar.harmony, syntaxes.HARMONY_ALL, thinks=True),
    )
}
# In order: the first whose strings the model's template holds all is its format.
SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", (syntaxes.CHANNEL, syntaxes.MESSAGE)),
    ("kimi_k2", (syntaxes.KIMI_CALL,)),
    ("deepseek_v32", (dsml.DSML,)),
    ("deepseek_v3", (syntaxes.DEEPSEEK_CALL, "```json")),
    ("deepseek_v31", (syntaxes.DEEPSEEK_CALL,)),
    ("qwen3_coder", (syntaxes.TOOL_CALL, syntaxes.FUNCTION)),
    ("hermes", (syntaxes.TOOL_CALL,)),
    ("llama4", ("[func_name1(",)),
    ("llama3", (syntaxes.PYTHON_TAG,)),
    ("llama3", ('"parameters": dictionary',)),
)
# Families whose syntax is one of special tokens, so that the architecture says it where the template doesn't.
ARCHITECTURES = {"GptOssForCausalLM": "harmony", "gpt_oss": "harmony"}


def format_for(tokenizer: ChatTokenizer, architecture: str = "", model_type: str = "") -> ToolFormat:
    """The model's format, bound to its tokenizer."""
    text = "\n".join(tokenizer.templates.values())
    found = next((name for name, signs in SIGNS if all(sign in text for sign in signs)), None)
    name = found or ARCHITECTURES.get(architecture) or ARCHITECTURES.get(model_type)
    shows_tools = template.supports_tools(tokenizer)
    shows_calls = template.knows(tokenizer, "tool_calls")
    if name is None or (name not in TOKEN_FORMATS and not shows_tools):
        name, shows_tools, shows_calls = "prompted", False, False
    row = FORMATS[name]
    special = special_marks(row, tokenizer)
    return msgspec.structs.replace(
        row,
        native=shows_tools,
        shows_calls=shows_calls,
        one_call=template.shows_one_call(tokenizer),
        calls_alone=template.shows_calls_alone(tokenizer),
        special=frozenset(special),
        keep_ids=frozenset(special.values()),
        thinks=row.thinks or OPEN in special,
    )


def special_marks(row: ToolFormat, tokenizer: ChatTokenizer) -> dict[str, int]:
    """The marks that are tokens of their own, as grammars write them: by their text, or by their number where that has no brackets."""
    found = [(mark, tokenizer.added[mark]) for mark in row.marks if mark in tokenizer.added]
    return {mark if mark.startswith("<") else f"<[{number}]>": number for mark, number in found}


TOKEN_FORMATS = ("harmony", "kimi_k2", "deepseek_v3", "deepseek_v31", "deepseek_v32")  # never exchanged for the prompted one


# ---- tools as text ----

SECTION = """# Tools

You may call functions to help with the request. Their signatures, one JSON object a line:
<tools>
{tools}
</tools>

To call a function, write a JSON object with its name and arguments between tags:
<tool_call>
{{"name": "function_name", "arguments": {{"argument": "value"}}}}
</tool_call>"""

DEEPSEEK_SECTION = """## Tools
You have access to the following tools:

{tools}

To call tools, write exactly this; several calls stand in a row before the end:
{form}"""
DEEPSEEK_FORMS = {
    "deepseek_v32": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="NAME">\n<｜DSML｜parameter name="PARAMETER" string="true|false">VALUE'
    "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>\n"
    'with string="true" for text as it is, string="false" for other values in JSON',
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>",
}


def section(name: str, tools: Sequence[Tool]) -> str:
    """The part of a system message that shows `tools` to a model of format `name` whose template doesn't."""
    functions = [tool.get("function", tool) for tool in tools]
    if name in DEEPSEEK_FORMS:
        shown = [
            f"### {function['name']}\nDescription: {function.get('description', '')}\n\nParameters: {_json(function.get('parameters', {}))}"
            for function in functions
        ]
        return DEEPSEEK_SECTION.format(tools="\n\n".join(shown), form=DEEPSEEK_FORMS[name])
    kept = ("name", "description", "parameters")
    lines = [_json({"type": "function", "function": {key: function[key] for key in kept if key in function}}) for function in functions]
    return SECTION.format(tools="\n".join(lines))


def call_text(calls: Sequence[Mapping[str, Any]]) -> str:
    """Calls as the prompted format writes them; arguments that aren't JSON stay the text that they are."""
    blocks = []
    for call in calls:
        function = call.get("function", call)
        arguments = function.get("arguments") or "{}"
        text = arguments if isinstance(arguments, str) else _json(arguments)
        blocks.append(f'<tool_call>\n{{"name": {_json(function["name"])}, "arguments": {text}}}\n</tool_call>')
    return "\n".join(blocks)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _text_of(content: Any) -> str:
    """A message's text; other parts than text stay where the template will refuse them."""
    if isinstance(content, list) and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
        return "\n".join(part["text"] for part in content)
    return content if isinstance(content, str) else ""


def _with_section(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """`text` at the end of the system message, which is made where there is none."""
    if messages and messages[0].get("role") in ("system", "developer"):
        first = {**messages[0], "content": f"{_text_of(messages[0].get('content'))}\n\n{text}".lstrip()}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _calls_as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls stand in the assistant's text, results in a user message (results in a row in one): most templates know no other roles."""
    plain: list[dict[str, Any]] = []
    for message in messages:
        if message.get("role") == "tool":
            result = f"<tool_response>\n{_text_of(message.get('content'))}\n</tool_response>"
            if plain and plain[-1].get("role") == "user" and plain[-1].get("_results"):
                plain[-1]["content"] += f"\n{result}"
            else:
                plain.append({"role": "user", "content": result, "_results": True})
        elif message.get("tool_calls"):
            said = _text_of(message.get("content"))
            calls = call_text(message["tool_calls"])
            kept = {key: value for key, value in message.items() if key != "tool_calls"}
            plain.append({**kept, "content": f"{said}\n{calls}" if said else calls})
        else:
            plain.append(message)
    return [{key: value for key, value in message.items() if key != "_results"} for message in plain]


def _thought_with_preamble(message: dict[str, Any]) -> dict[str, Any]:
    """gpt-oss's template has one place for what was thought and said before a call, and refuses messages that have both."""
    thoughts = [name for name in template.REASONING if message.get(name)]
    said = _text_of(message.get("content"))
    if not (message.get("tool_calls") and thoughts and said):
        return message
    return {**message, **dict.fromkeys(thoughts, f"{message[thoughts[0]]}\n{said}"), "content": ""}


def _one_call_each(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls of one message as messages in turn, the result of each behind it."""
    plain: list[dict[str, Any]] = []
    left = deque(messages)
    while left:
        message = left.popleft()
        calls = message.get("tool_calls") or []
        if len(calls) < 2:
            plain.append(message)
            continue
        results: dict[Any, list[dict[str, Any]]] = {}
        while left and left[0].get("role") == "tool":
            result = left.popleft()
            results.setdefault(result.get("tool_call_id"), []).append(result)
        for place, call in enumerate(calls):
            said = {"role": message["role"], "content": ""} if place else message
            plain += [{**said, "tool_calls": [call]}, *results.pop(call.get("id"), [])]
        plain += [result for rest in results.values() for result in rest]  # of calls that aren't there
    return plain


def _text_before_calls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The text of a message with calls as a message of its own, before one with its calls."""
    plain: list[dict[str, Any]] = []
    for message in messages:
        if message.get("tool_calls") and _text_of(message.get("content")):
            plain.append({key: value for key, value in message.items() if key != "tool_calls"})
            message = {"role": message["role"], "content": None, "tool_calls": message["tool_calls"]}
        plain.append(message)
    return plain
