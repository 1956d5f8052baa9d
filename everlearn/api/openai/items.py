"""Items of the Responses API and messages of a chat, each made from the other.

What is sent: a text or a list of items (messages, function calls and their outputs, reasoning). What is said: items as well. The record
keeps messages alone; ids of items follow from the record's id, so that a response can be told again from its record.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from everlearn.api import bounds
from everlearn.api.openai.types import ImagePart, TextPart, named
from everlearn.errors import InvalidRequest


class Part(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class InputText(Part, tag_field="type", tag="input_text"):
    text: str


class OutputText(Part, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] | None = None
    parsed: Any = None  # older SDKs send along what they read from `text`


class Refusal(Part, tag_field="type", tag="refusal"):
    refusal: str


class InputImage(Part, tag_field="type", tag="input_image"):
    image_url: str
    detail: str | None = None


class Thought(msgspec.Struct, kw_only=True):
    text: str
    type: str = "reasoning_text"


class MessageItem(Part, tag_field="type", tag="message"):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText | OutputText | Refusal | InputImage]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class CallItem(Part, tag_field="type", tag="function_call"):
    call_id: str
    name: str
    arguments: str
    parsed_arguments: Any = None
    id: str | None = None
    status: str | None = None


class OutputItem(Part, tag_field="type", tag="function_call_output"):
    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: str | None = None


class ReasoningItem(Part, tag_field="type", tag="reasoning"):
    id: str | None = None
    summary: list[Thought] = []
    content: list[Thought] | None = None
    encrypted_content: None = None
    status: str | None = None


Item = MessageItem | CallItem | OutputItem | ReasoningItem


# ---- what is sent ----


def messages_of(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation that `input` adds. Calls that follow each other belong to one message, and so does the thought before them."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not 1 <= len(given) <= bounds.MAX_MESSAGES:
        raise InvalidRequest(f"input holds {len(given)} items; 1 to {bounds.MAX_MESSAGES} are taken", param="input")
    messages: list[dict[str, Any]] = []
    thought = ""
    for place, raw in enumerate(given):
        item = read_item(raw, place)
        if isinstance(item, ReasoningItem):
            thought = "\n".join(part.text for part in item.content or item.summary)
            continue
        if isinstance(item, OutputItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text_of(item.output)})
        elif isinstance(item, MessageItem):
            messages.append({"role": item.role, "content": content_of(item)})
        else:
            said = messages[-1] if messages and messages[-1]["role"] == "assistant" and not thought else None
            if said is None:
                messages.append(said := {"role": "assistant", "content": ""})
            said.setdefault("tool_calls", []).append(call_of(item))
        if thought and messages[-1]["role"] == "assistant":
            messages[-1]["reasoning_content"] = thought
            thought = ""
    return messages


def read_item(raw: dict[str, Any], place: int) -> Item:
    raw = {"type": "message"} | {name: value for name, value in raw.items() if value is not None}
    try:
        item: Item = msgspec.convert(raw, Item)
    except msgspec.ValidationError as error:
        raise named(str(error), Item, f"input[{place}]") from None
    return item


def content_of(item: MessageItem) -> str | list[dict[str, Any]]:
    """Texts as one; parts where there is something else than text."""
    if isinstance(item.content, str):
        return item.content
    if len(item.content) > bounds.MAX_PARTS:
        raise InvalidRequest(f"a message's content has {len(item.content)} parts; {bounds.MAX_PARTS} is the limit", param="input")
    parts: list[dict[str, Any]] = []
    for part in item.content:
        if isinstance(part, InputImage):
            image = {"url": part.image_url, **({"detail": part.detail} if part.detail else {})}
            parts.append({"type": "image_url", "image_url": image})
        else:
            parts.append({"type": "text", "text": part.refusal if isinstance(part, Refusal) else part.text})
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def text_of(output: str | Sequence[InputText]) -> str:
    return output if isinstance(output, str) else "".join(part.text for part in output)


def call_of(item: CallItem) -> dict[str, Any]:
    return {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}


# ---- what is said ----


def message_item(item_id: str, text: str, logprobs: list[dict[str, Any]], status: str) -> dict[str, Any]:
    return {"id": item_id, "type": "message", "role": "assistant", "status": status, "content": [text_part(text, logprobs)]}


def text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def call_item(item_id: str, call_id: str, name: str, arguments: str, status: str) -> dict[str, Any]:
    return {"id": item_id, "type": "function_call", "call_id": call_id, "name": name, "arguments": arguments, "status": status}


def reasoning_item(item_id: str, text: str, status: str) -> dict[str, Any]:
    return {"id": item_id, "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}], "status": status}


def items_of(suffix: str, message: dict[str, Any], status: str) -> list[dict[str, Any]]:
    """The items of an answer that was kept as a message."""
    found = []
    if thought := message.get("reasoning_content"):
        found.append(reasoning_item(f"rs_{suffix}", thought, status))
    calls = message.get("tool_calls") or []
    if message.get("content") or not calls:
        found.append(message_item(f"msg_{suffix}", message.get("content") or "", [], status))
    for place, call in enumerate(calls):
        function = call["function"]
        found.append(call_item(f"fc_{suffix}{place:02}", call["id"], function["name"], function["arguments"], "completed"))
    return found


__all__ = ["ImagePart", "TextPart", "call_item", "items_of", "message_item", "messages_of", "reasoning_item", "text_part"]
