"""What a reply consists of, whole and as a stream of deltas, and the writer that parsers write it with."""

from __future__ import annotations

import itertools
import json
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec


class ContentDelta(msgspec.Struct, frozen=True, tag="content"):
    text: str


class ReasoningDelta(msgspec.Struct, frozen=True, tag="reasoning"):
    text: str


class ToolCallDelta(msgspec.Struct, frozen=True, tag="tool_call"):
    """The first delta of a call has its `id` and `name`; the `arguments` of all its deltas, joined, are the call's."""

    index: int
    id: str | None
    name: str | None
    arguments: str


Delta = ContentDelta | ReasoningDelta | ToolCallDelta


class ToolCall(msgspec.Struct, frozen=True):
    """`arguments` is JSON as the model wrote it; where it is broken, a problem of the reply says so."""

    name: str
    arguments: str
    id: str


class ParsedReply(msgspec.Struct, frozen=True):
    """`content` and `reasoning` are None where there is none; `problems` are for people, in the order of the text."""

    content: str | None
    reasoning: str | None
    tool_calls: list[ToolCall]
    problems: list[str]


Tools = Mapping[str, Mapping[str, Any]]  # name -> JSON schema of its parameters


class Writer:
    """Collects deltas. White space around calls and thoughts only separates them: it is held until text follows it, and is one line
    break where a kind of text goes on after something else.

    `tools` None: any name may be called. `calls` False: no call is looked for, so content goes out exactly as it comes.
    """

    def __init__(self, tools: Tools | None, calls: bool):
        self.tools, self.calls = tools, calls
        self.problems: list[str] = []
        self.num_calls = 0
        self._deltas: list[Delta] = []
        self._arguments: list[str] | None = None
        self._kind: type[ContentDelta] | type[ReasoningDelta] | None = None  # of the text that is being said; None after a break
        self._space = ""
        self._begun = False
        self._said: set[type] = set()

    def content(self, text: str) -> None:
        self._say(ContentDelta, text, hold=self.calls)

    def reasoning(self, text: str) -> None:
        self._say(ReasoningDelta, text, hold=True)

    def separate(self) -> None:
        """The part that was being said is over; white space up to the next one is dropped."""
        self._kind, self._space, self._begun = None, "", True

    def open_call(self, name: str, id: str = "") -> None:
        self.separate()
        if self.tools is not None and name not in self.tools:
            self.problems.append(f"calls {name!r}, which is no tool of this request")
        self._deltas.append(ToolCallDelta(self.num_calls, id or f"call_{secrets.token_hex(12)}", name, ""))
        self._arguments = []

    def arguments(self, text: str) -> None:
        if self._arguments is None:
            raise AssertionError("no call is open")
        if text:
            self._arguments.append(text)
            self._deltas.append(ToolCallDelta(self.num_calls, None, None, text))

    def close_call(self) -> None:
        """Ends the open call, if one is; without any arguments it has an empty object of them."""
        if self._arguments is None:
            return
        if not any(piece.strip() for piece in self._arguments):
            self.arguments("{}")
        if problem := _problem("".join(self._arguments)):
            self.problems.append(f"the arguments of call {self.num_calls} are {problem}")
        self.num_calls += 1
        self._arguments = None
        self.separate()

    def finish(self) -> None:
        self.close_call()
        if self._space and self._kind is ContentDelta:
            self._deltas.append(ContentDelta(self._space))
            self._space = ""

    def pop(self) -> list[Delta]:
        """What was written since the last time, neighbours of a kind joined."""
        deltas, self._deltas = self._deltas, []
        return [_joined(list(group)) for _, group in itertools.groupby(deltas, _key)]

    def _say(self, kind: type[ContentDelta] | type[ReasoningDelta], text: str, hold: bool) -> None:
        if self._kind is not kind:
            if self._kind is not None:
                self.separate()
            text = text.lstrip() if self._begun else text
            if not text:
                return
            text = "\n" + text if kind in self._said else text
            self._kind, self._begun = kind, True
        text = self._space + text
        end = len(text.rstrip()) if hold else len(text)
        text, self._space = text[:end], text[end:]
        if text:
            self._said.add(kind)
            self._deltas.append(kind(text))


def fold(deltas: Iterable[Delta], problems: list[str]) -> ParsedReply:
    """The reply that a stream's deltas make."""
    texts: dict[type, list[str]] = {ContentDelta: [], ReasoningDelta: []}
    calls: list[tuple[str, str, list[str]]] = []
    for delta in deltas:
        if isinstance(delta, ToolCallDelta):
            if delta.id is not None:
                calls.append((delta.name or "", delta.id, []))
            calls[-1][2].append(delta.arguments)
        else:
            texts[type(delta)].append(delta.text)
    content, reasoning = ("".join(texts[kind]) or None for kind in (ContentDelta, ReasoningDelta))
    return ParsedReply(content, reasoning, [ToolCall(name, "".join(pieces), id) for name, id, pieces in calls], problems)


def _key(delta: Delta) -> tuple[type, int]:
    return type(delta), delta.index if isinstance(delta, ToolCallDelta) else 0


def _joined(deltas: list[Delta]) -> Delta:
    first = deltas[0]
    if isinstance(first, ToolCallDelta):
        arguments = "".join(delta.arguments for delta in deltas if isinstance(delta, ToolCallDelta))
        return ToolCallDelta(first.index, first.id, first.name, arguments)
    return type(first)("".join(delta.text for delta in deltas if not isinstance(delta, ToolCallDelta)))


def _problem(arguments: str) -> str:
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError) as error:
        return f"no valid JSON ({error})"
    return "" if isinstance(value, dict) else "no JSON object"
