"""An answer as blocks: content as it grows, and the events of the Messages API that tell of it. Pure: deltas in, blocks and events out.

A block is opened by the first delta of its kind, filled, and closed by the first of another. The whole answer is made of the same blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from pydantic_core import from_json

from everlearn.api.replies import ContentDelta, Delta, ReasoningDelta, Step, ToolCallDelta
from everlearn.render.template import BROKEN

encode = msgspec.json.encode


def event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode({"type": kind, **fields}))


class Blocks:
    """`content` is what was said so far; `take` returns the events that a step adds. `eager`: whether the input of a tool's calls may
    go out as it is drawn. `signature` is that of thoughts."""

    def __init__(self, signature: str, eager: Callable[[str], bool]):
        self.signature, self.eager = signature, eager
        self.content: list[dict[str, Any]] = []
        self._open = ""  # the type of the open block
        self._text: list[str] = []
        self._call = -1
        self._held = False  # the open call's input goes out whole

    def take(self, step: Step) -> list[bytes]:
        out: list[bytes] = []
        for delta in step.deltas:
            self._take(out, delta)
        return out

    def end(self) -> list[bytes]:
        out: list[bytes] = []
        self._close(out)
        return out

    def _take(self, out: list[bytes], delta: Delta) -> None:
        if isinstance(delta, ToolCallDelta):
            if self._open != "tool_use" or delta.index != self._call:
                name = delta.name or ""
                self._begin(out, {"type": "tool_use", "id": delta.id or "", "name": name, "input": {}})
                self._call, self._held = delta.index, not self.eager(name)
            self._text.append(delta.arguments)
            if delta.arguments and not self._held:
                self._delta(out, {"type": "input_json_delta", "partial_json": delta.arguments})
        elif isinstance(delta, ContentDelta):
            if self._open != "text":
                self._begin(out, {"type": "text", "text": "", "citations": None})
            self._text.append(delta.text)
            self._delta(out, {"type": "text_delta", "text": delta.text})
        elif isinstance(delta, ReasoningDelta):
            if self._open != "thinking":
                self._begin(out, {"type": "thinking", "thinking": "", "signature": ""})
            self._text.append(delta.text)
            self._delta(out, {"type": "thinking_delta", "thinking": delta.text})

    def _begin(self, out: list[bytes], block: dict[str, Any]) -> None:
        self._close(out)
        self.content.append(block)
        self._open, self._text = block["type"], []
        out.append(event("content_block_start", index=len(self.content) - 1, content_block=block))

    def _delta(self, out: list[bytes], delta: dict[str, Any]) -> None:
        out.append(event("content_block_delta", index=len(self.content) - 1, delta=delta))

    def _close(self, out: list[bytes]) -> None:
        kind, self._open = self._open, ""
        if not kind:
            return
        block, text = self.content[-1], "".join(self._text)
        if kind == "tool_use":
            block["input"], shown = input_of(text)
            if self._held and shown:
                self._delta(out, {"type": "input_json_delta", "partial_json": shown})
        elif kind == "thinking":
            block["thinking"], block["signature"] = text, self.signature
            self._delta(out, {"type": "signature_delta", "signature": self.signature})
        else:
            block["text"] = text
        out.append(event("content_block_stop", index=len(self.content) - 1))


def input_of(arguments: str) -> tuple[dict[str, Any], str]:
    """A call's arguments as an object, and as JSON to stream. What breaks off is as much of it as there is; what isn't the JSON of an
    object stands in one as text, so that nothing is lost and no client stumbles."""
    if not arguments.strip():
        return {}, ""
    try:
        value = from_json(arguments, allow_inf_nan=False, allow_partial=True)
    except ValueError:
        value = None
    if isinstance(value, dict):
        return value, arguments
    return {BROKEN: arguments}, encode({BROKEN: arguments}).decode()
