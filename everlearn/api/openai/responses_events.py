"""A response as it grows: deltas in, items and their events out. Whole responses grow the same way, and their events are dropped.

Items open and close in the order in which the model speaks: a thought, text, calls. Each event has its number.
"""

from __future__ import annotations

from typing import Any

from everlearn.api.openai import items, shapes
from everlearn.api.openai.shapes import encode
from everlearn.api.replies import ContentDelta, Delta, ReasoningDelta, ScoredToken, Step, ToolCallDelta
from everlearn.render.tokenizer import ChatTokenizer


class Growing:
    """`output` is what was said so far; `take` returns the events that a step adds, encoded. `suffix` makes ids."""

    def __init__(self, suffix: str, tokenizer: ChatTokenizer):
        self.suffix, self.tokenizer = suffix, tokenizer
        self.output: list[dict[str, Any]] = []
        self.number = 0  # of the next event
        self._open: str = ""  # the kind of the open item: reasoning, message or function_call
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._scored: list[ScoredToken] = []  # that said nothing yet: the beginning of a text, or of a call
        self._call = -1
        self._counts = {"rs": 0, "msg": 0}

    def event(self, kind: str, **fields: Any) -> bytes:
        told = {"type": kind, "sequence_number": self.number, **fields}
        self.number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode(told))

    def take(self, step: Step) -> list[bytes]:
        out: list[bytes] = []
        for part in step.parts or [step]:
            self._scored += part.scored
            for delta in part.deltas:
                self._take(out, delta)
            if self._open in ("reasoning", "function_call"):  # their tokens aren't reported
                self._scored = []
        return out

    def end(self, status: str) -> list[bytes]:
        """Closes what is open; `status` completed or incomplete. An answer without a word is one empty message."""
        out: list[bytes] = []
        if not self.output:
            self._begin(out, "message")
        if self._open == "message":
            self._logprobs += shapes.scored(self.tokenizer, self._scored)
        self._close(out, status)
        return out

    def _take(self, out: list[bytes], delta: Delta) -> None:
        if isinstance(delta, ToolCallDelta):
            if self._open != "function_call" or delta.index != self._call:
                self._close(out, "completed")
                self._call = delta.index
                self._begin(out, "function_call", delta)
            if delta.arguments:
                self._say(out, "response.function_call_arguments.delta", delta.arguments)
            return
        kind = "message" if isinstance(delta, ContentDelta) else "reasoning"
        if self._open != kind:
            self._close(out, "completed")
            self._begin(out, kind)
        if isinstance(delta, ReasoningDelta):
            self._say(out, "response.reasoning_text.delta", delta.text, content_index=0)
            return
        logprobs = shapes.scored(self.tokenizer, self._scored)
        self._scored = []
        self._logprobs += logprobs
        self._say(out, "response.output_text.delta", delta.text, content_index=0, logprobs=logprobs)

    def _say(self, out: list[bytes], kind: str, text: str, **fields: Any) -> None:
        self._text.append(text)
        out.append(self.event(kind, item_id=self.output[-1]["id"], output_index=len(self.output) - 1, delta=text, **fields))

    def _begin(self, out: list[bytes], kind: str, call: ToolCallDelta | None = None) -> None:
        self._open, self._text, self._logprobs = kind, [], []
        if kind == "function_call":
            assert call is not None
            item = items.call_item(f"fc_{self.suffix}{call.index:02}", call.id or "", call.name or "", "", "in_progress")
            shown = item
        elif kind == "message":
            item = items.message_item(self._id("msg"), "", [], "in_progress")
            shown = {**item, "content": []}
        else:
            item = items.reasoning_item(self._id("rs"), "", "in_progress")
            shown = {**item, "content": []}
        self.output.append(item)
        out.append(self.event("response.output_item.added", output_index=len(self.output) - 1, item=shown))
        if kind != "function_call":
            out.append(self._part("response.content_part.added", item))

    def _part(self, kind: str, item: dict[str, Any]) -> bytes:
        place = {"item_id": item["id"], "output_index": len(self.output) - 1, "content_index": 0}
        return self.event(kind, **place, part=item["content"][0])

    def _close(self, out: list[bytes], status: str) -> None:
        """Tells the whole of the open item, and that it is done."""
        kind, self._open = self._open, ""
        if not kind:
            return
        item, text = self.output[-1], "".join(self._text)
        place = {"item_id": item["id"], "output_index": len(self.output) - 1}
        item["status"] = status
        if kind == "function_call":
            item["arguments"] = text
            out.append(self.event("response.function_call_arguments.done", **place, name=item["name"], arguments=text))
        elif kind == "message":
            item["content"] = [items.text_part(text, self._logprobs)]
            out.append(self.event("response.output_text.done", **place, content_index=0, text=text, logprobs=self._logprobs))
            out.append(self._part("response.content_part.done", item))
        else:
            item["content"][0]["text"] = text
            out.append(self.event("response.reasoning_text.done", **place, content_index=0, text=text))
            out.append(self._part("response.content_part.done", item))
        out.append(self.event("response.output_item.done", output_index=place["output_index"], item=item))

    def _id(self, kind: str) -> str:
        """The first of a kind has the id under which a response told again from its record has it."""
        count = self._counts[kind]
        self._counts[kind] += 1
        return f"{kind}_{self.suffix}" if not count else f"{kind}_{self.suffix}x{count}"
