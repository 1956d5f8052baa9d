"""From the blocks of a request to a `Turn`: messages, tools and switches as chat templates take them. Pure; UserErrors only."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec

from everlearn.api import bounds
from everlearn.api.anthropic.types import (
    AdaptiveThinking,
    AnyChoice,
    AssistantMessage,
    AutoChoice,
    CountForm,
    ImageBlock,
    MessagesForm,
    NamedChoice,
    NoChoice,
    NoThinking,
    TextBlock,
    Thinking,
    ThinkingBlock,
    ToolForm,
    ToolResultBlock,
    ToolUseBlock,
    UserMessage,
    refuse,
)
from everlearn.api.chatmodels import ChatModel
from everlearn.api.openai import checks
from everlearn.api.openai.types import named
from everlearn.api.turns import Turn
from everlearn.errors import InvalidRequest, Unsupported

_encode = msgspec.json.encode
Block = TextBlock | ImageBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock
Placed = tuple[str, Block]  # with its place in the request


def turn_of(form: CountForm, chat: ChatModel, chars: int) -> Turn:
    """The conversation, ready to be opened. A last message of the assistant's is continued."""
    refuse(form)
    if not 1 <= len(form.messages) <= bounds.MAX_MESSAGES:
        raise InvalidRequest(f"messages holds {len(form.messages)}; 1 to {bounds.MAX_MESSAGES} are taken", param="messages")
    messages = [*system_message(form.system, "system"), *messages_of(form, chat.base.vision is not None)]
    continues = messages[-1]["role"] == "assistant"
    if continues and messages[-1].get("tool_calls"):
        raise InvalidRequest("messages ends with a tool_use; send its tool_result in a user message after it", param="messages")
    offered = tools_of(form)
    return Turn(
        messages=messages,
        tools=offered,
        tool_choice=choice_of(form, offered),
        parallel_calls=not getattr(form.tool_choice, "disable_parallel_tool_use", False),
        answer_schema=answer_schema(form),
        switches=switches(form, chat),
        continue_final=continues,
        chars=chars,
    )


# ---- messages ----


def messages_of(form: CountForm, sees: bool) -> list[dict[str, Any]]:
    """Messages of one role that follow each other are one. `sees`: whether the model takes images."""
    found: list[dict[str, Any]] = []
    for role, group in itertools.groupby(enumerate(form.messages), key=lambda pair: type(pair[1])):
        blocks = [placed for place, message in group for placed in blocks_of(message.content, f"messages[{place}].content")]
        if role is UserMessage:
            found += user_messages(blocks, sees)
        elif role is AssistantMessage:
            found.append(assistant_message(blocks))
        else:
            found += system_message([block for _, block in blocks if isinstance(block, TextBlock)], "messages")
    return found


def blocks_of(content: Any, place: str) -> list[Placed]:
    if isinstance(content, str):
        return [(place, TextBlock(text=content))]
    if len(content) > bounds.MAX_PARTS:
        raise InvalidRequest(f"{place} has {len(content)} blocks; {bounds.MAX_PARTS} is the limit", param=place)
    return [(f"{place}[{number}]", block) for number, block in enumerate(content)]


def system_message(content: str | list[TextBlock] | None, place: str) -> list[dict[str, Any]]:
    blocks = blocks_of(content or [], place)
    texts = [block.text for _, block in blocks if isinstance(block, TextBlock)]
    return [{"role": "system", "content": content_of([part_of(text) for text in texts])}] if any(texts) else []


def user_messages(blocks: list[Placed], sees: bool) -> list[dict[str, Any]]:
    """Results are messages of their own; what is said before, between and after them is the user's."""
    found: list[dict[str, Any]] = []
    said: list[dict[str, Any]] = []
    for place, block in blocks:
        if isinstance(block, ToolResultBlock):
            if said:
                found.append({"role": "user", "content": content_of(said)})
                said = []
            found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": result_of(place, block)})
        elif isinstance(block, ImageBlock) and sees:
            said.append({"type": "image_url", "image_url": {"url": url_of(place, block)}})
        else:
            said.append(part_of(text_of(place, block)))
    if said or not found:
        found.append({"role": "user", "content": content_of(said)})
    return found


def assistant_message(blocks: list[Placed]) -> dict[str, Any]:
    """An answer's blocks, put together as the reply was before it was cut into them."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    thoughts = [block.thinking for _, block in blocks if isinstance(block, ThinkingBlock)]
    calls = [block for _, block in blocks if isinstance(block, ToolUseBlock)]
    message["content"] = "".join(block.text for _, block in blocks if isinstance(block, TextBlock))
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments_of(call)}} for call in calls
        ]
    return message


def arguments_of(call: ToolUseBlock) -> str:
    """JSON as models write it, so that a call that is sent back is found in the prefix cache."""
    return json.dumps(call.input, ensure_ascii=False)


def result_of(place: str, block: ToolResultBlock) -> str:
    """A result as text. Templates know no failed results, so one that failed says so."""
    texts = [text_of(inner, part) for inner, part in blocks_of(block.content or "", f"{place}.content")]
    text = "\n".join(texts)
    return f"Error: {text}" if block.is_error and not text.lower().startswith("error") else text


def text_of(place: str, block: Block) -> str:
    if isinstance(block, TextBlock):
        return block.text
    raise Unsupported(f"{place} is an image, where this model reads text alone; send blocks of type 'text'", param=place)


def url_of(place: str, block: ImageBlock) -> str:
    """The image as a URL: of its data, or where it is."""
    if block.transformations:
        raise Unsupported(f"{place}.transformations can't be honoured; leave it out", param=f"{place}.transformations")
    source, param = block.source, f"{place}.source"
    kind = source.get("type")
    wanted = {"base64": ("media_type", "data"), "url": ("url",)}.get(str(kind))
    if wanted is None:
        raise Unsupported(f"{param} is of type {str(kind)[:40]!r}; base64 and url are taken", param=param)
    texts = [source.get(name) for name in wanted]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(f"{param} of type {kind!r} needs {' and '.join(wanted)}", param=param)
    return f"data:{texts[0]};base64,{texts[1]}" if kind == "base64" else str(texts[0])


def part_of(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def content_of(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """One text as it is; else the parts."""
    return parts[0]["text"] if len(parts) == 1 and "text" in parts[0] else parts


# ---- tools, format, thoughts ----


def tools_of(form: CountForm) -> list[dict[str, Any]]:
    given = form.tools or []
    if len(given) > bounds.MAX_TOOLS:
        raise InvalidRequest(f"tools holds {len(given)}; {bounds.MAX_TOOLS} is the limit", param="tools")
    return [tool_of(read_tool(raw, place), f"tools[{place}]") for place, raw in enumerate(given)]


def read_tool(raw: dict[str, Any], place: int) -> ToolForm:
    kind = raw.get("type") or "custom"
    if kind != "custom":
        raise Unsupported(
            f"tools[{place}] is of type {str(kind)[:80]!r}, which this server doesn't have; describe it as a tool with an input_schema",
            param=f"tools[{place}].type",
        )
    try:
        return msgspec.convert(raw, ToolForm)
    except msgspec.ValidationError as error:
        raise named(str(error), ToolForm, f"tools[{place}]") from None


def tool_of(form: ToolForm, place: str) -> dict[str, Any]:
    if form.defer_loading:
        raise Unsupported(f"{place}.defer_loading: there is no tool search here; leave it out", param=f"{place}.defer_loading")
    if form.input_examples:
        raise Unsupported(f"{place}.input_examples aren't shown to models; put them into the description", param=f"{place}.input_examples")
    return checks.tool(form.name, form.description, form.input_schema, form.strict, place, "input_schema")


def choice_of(form: CountForm, offered: list[dict[str, Any]]) -> str | dict[str, Any]:
    choice = form.tool_choice
    if choice is None or isinstance(choice, AutoChoice):
        return "auto"
    if isinstance(choice, NoChoice):
        return "none"
    if isinstance(choice, NamedChoice):
        return checks.named_choice(choice.name, offered)
    assert isinstance(choice, AnyChoice)
    if not offered:
        raise InvalidRequest("tool_choice is 'any', and there are no tools; send tools", param="tool_choice")
    return "required"


def answer_schema(form: CountForm) -> dict[str, Any] | None:
    if form.output_config is None or form.output_config.format is None:
        return None
    schema = form.output_config.format.schema
    checks.bounded(_encode(schema).decode(), "output_config.format.schema")
    return schema


def switches(form: CountForm, chat: ChatModel) -> dict[str, Any]:
    """The template's switches for thinking and effort. Raises Unsupported where the model can't be told."""
    effort = form.output_config.effort if form.output_config else None
    thinking = form.thinking
    if isinstance(thinking, NoThinking):
        if effort is not None:
            raise InvalidRequest("output_config.effort has no meaning while thinking is disabled; send one of them", param="thinking")
        return chat.thinking("none", "thinking")
    if isinstance(thinking, (Thinking, AdaptiveThinking)) and thinking.display == "omitted":
        raise Unsupported("thinking.display 'omitted' is not offered: thoughts are shown; leave it out", param="thinking.display")
    if isinstance(thinking, Thinking):
        budget(form, thinking, chat)
    if effort is not None:
        return chat.thinking(effort, "output_config.effort")
    return chat.switches("medium") or {} if isinstance(thinking, Thinking) else {}


def budget(form: CountForm, thinking: Thinking, chat: ChatModel) -> None:
    """A thought can't be ended from outside, so only a budget that leaves all of max_tokens to it is kept."""
    if not chat.format.thinks and not chat.switches("medium"):
        raise Unsupported(f"thinking: {chat.base.name} doesn't think before it answers; leave it out", param="thinking")
    if thinking.budget_tokens < 1:
        raise InvalidRequest(f"thinking.budget_tokens is {thinking.budget_tokens}; it must be above 0", param="thinking.budget_tokens")
    if isinstance(form, MessagesForm) and thinking.budget_tokens < form.max_tokens - 1:
        raise Unsupported(
            f"thinking.budget_tokens {thinking.budget_tokens}: a thought can't be held to less than max_tokens ({form.max_tokens}); "
            "send thinking of type 'adaptive', or a smaller max_tokens",
            param="thinking.budget_tokens",
        )
