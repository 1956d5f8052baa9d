"""The loop of an agent with tools: ask, call what is asked for, tell the results, until the model answers in text."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, Literal

import msgspec

from everlearn.rl.agents import Chat
from everlearn.rl.tools import Toolbox, ToolUnavailable


class Conversation(msgspec.Struct):
    """What was said. `answer` is the last text of the model, `ended` why it went no further: the model answered, was cut off, or used up
    its turns with calls. `calls` counts calls of tools, `failed` those that failed, by kind (ToolResult)."""

    messages: list[dict[str, Any]]
    answer: str = ""
    ended: Literal["answer", "length", "turns"] = "turns"
    calls: int = 0
    failed: Counter[str] = msgspec.field(default_factory=Counter)

    @property
    def metrics(self) -> dict[str, float]:
        """`tools/calls`; `tools/valid`, the share of them that name a tool and fit its schema (1 if there are none); `tools/failed`."""
        invalid = self.failed["unknown"] + self.failed["arguments"]
        valid = 1.0 - invalid / self.calls if self.calls else 1.0
        return {"tools/calls": float(self.calls), "tools/valid": valid, "tools/failed": float(self.failed.total())}


async def converse(chat: Chat, messages: list[dict[str, Any]], toolbox: Toolbox, turns: int = 8, **fields: Any) -> Conversation:
    """Goes on from `messages`, which stay as they are. `fields` go into every request (max_tokens, tool_choice, ...).

    Raises ToolUnavailable where a tool can't be reached, because then the episode says nothing about the policy.
    """
    talk = Conversation(list(messages))
    for _ in range(turns):
        answer = await chat.client.chat.completions.create(model=chat.model, messages=talk.messages, tools=toolbox.schemas, **fields)
        choice = answer.choices[0]
        calls = choice.message.tool_calls or []
        said: dict[str, Any] = {"role": "assistant", "content": choice.message.content}
        if calls:
            said["tool_calls"] = [call.model_dump(include={"id", "type", "function"}) for call in calls]
        talk.messages.append(said)
        if not calls:
            talk.answer = choice.message.content or ""
            talk.ended = "length" if choice.finish_reason == "length" else "answer"
            return talk
        results = await asyncio.gather(*(toolbox.call(call.function.name, call.function.arguments) for call in calls))
        for call, result in zip(calls, results, strict=True):
            if result.failure == "unavailable":
                raise ToolUnavailable(f"{call.function.name} can't be reached: {result.content}")
            talk.calls += 1
            talk.failed.update([result.failure] if result.failure else [])
            talk.messages.append({"role": "tool", "tool_call_id": call.id, "content": result.content})
    return talk
