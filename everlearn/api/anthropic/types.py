"""The requests of Anthropic's Messages API as they are read, and how to draw what they ask for.

As in the other dialects: a field that isn't here is unknown, and one that can't be honoured is refused with its reason. Fields of older
SDKs (temperature, top_p, top_k) are all here; those that Anthropic doesn't have, and vLLM does, have vLLM's names.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from everlearn.api import bounds
from everlearn.api.openai import checks
from everlearn.api.openai.types import Form
from everlearn.api.turns import Draw
from everlearn.errors import InvalidRequest, Unsupported


class CacheControl(Form, tag_field="type", tag="ephemeral"):
    """Prefixes are cached by themselves while there is room, so a mark changes nothing; an hour can't be promised."""

    ttl: Literal["5m"] | None = None


# ---- blocks ----


class TextBlock(Form, tag_field="type", tag="text"):
    text: str
    cache_control: CacheControl | None = None
    citations: None = None  # answers have it, and are sent back as they were


class ImageBlock(Form, tag_field="type", tag="image"):
    source: dict[str, Any]
    cache_control: CacheControl | None = None
    transformations: Any = None


class ThinkingBlock(Form, tag_field="type", tag="thinking"):
    thinking: str
    signature: str = ""


class DirectCaller(Form, tag_field="type", tag="direct"):
    pass


class ToolUseBlock(Form, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: DirectCaller | None = None
    toolset_name: None = None


class ToolResultBlock(Form, tag_field="type", tag="tool_result"):
    tool_use_id: str
    content: str | list[TextBlock | ImageBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None
    toolset_name: None = None


class UserMessage(Form, tag_field="role", tag="user"):
    content: str | list[TextBlock | ImageBlock | ToolResultBlock]


class AssistantMessage(Form, tag_field="role", tag="assistant"):
    content: str | list[TextBlock | ThinkingBlock | ToolUseBlock]


class SystemMessage(Form, tag_field="role", tag="system"):
    content: str | list[TextBlock]


Message = UserMessage | AssistantMessage | SystemMessage


# ---- tools, thoughts, format ----


class ToolForm(Form):
    """A tool of the client's own. Tools that Anthropic runs, or whose schema it knows, have other types and are refused by name."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    cache_control: CacheControl | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    defer_loading: bool | None = None
    input_examples: list[Any] | None = None


class AutoChoice(Form, tag_field="type", tag="auto"):
    disable_parallel_tool_use: bool | None = None


class AnyChoice(Form, tag_field="type", tag="any"):
    disable_parallel_tool_use: bool | None = None


class NamedChoice(Form, tag_field="type", tag="tool"):
    name: str
    disable_parallel_tool_use: bool | None = None


class NoChoice(Form, tag_field="type", tag="none"):
    pass


class Thinking(Form, tag_field="type", tag="enabled"):
    budget_tokens: int
    display: Literal["summarized", "omitted"] | None = None


class AdaptiveThinking(Form, tag_field="type", tag="adaptive"):
    display: Literal["summarized", "omitted"] | None = None


class NoThinking(Form, tag_field="type", tag="disabled"):
    pass


class SchemaFormat(Form, tag_field="type", tag="json_schema"):
    schema: dict[str, Any]


class OutputConfig(Form):
    effort: str | None = None
    format: SchemaFormat | None = None


class Metadata(Form):
    user_id: str | None = None


# ---- requests ----


class CountForm(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What decides about the prompt."""

    model: str
    messages: list[Message]
    system: str | list[TextBlock] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: AutoChoice | AnyChoice | NamedChoice | NoChoice | None = None
    thinking: Thinking | AdaptiveThinking | NoThinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    speed: str | None = None


class MessagesForm(CountForm, kw_only=True):
    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    service_tier: str | None = None
    container: Any = None
    diagnostics: Any = None
    inference_geo: str | None = None
    thread: Any = None
    # vLLM's
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    deadline: float | None = None


# Known, and not offered: what the server does anyway, and why nothing else.
REFUSED: dict[str, tuple[frozenset[str], str]] = {
    "container": (frozenset(), "no tool runs on this server; leave it out"),
    "diagnostics": (frozenset(), "the usage says how much was read from the cache; leave it out"),
    "inference_geo": (frozenset(), "answers come from this machine; leave it out"),
    "service_tier": (frozenset({"auto", "standard_only"}), "there is one tier; leave it out"),
    "speed": (frozenset({"standard"}), "there is one speed; leave it out"),
}
NO_THREADS = "thread_unsupported_request"  # Anthropic's word, at which the SDK goes on without


def refuse(form: CountForm) -> None:
    """Raises Unsupported for the first field that asks for something of REFUSED."""
    if getattr(form, "thread", None) is not None:
        raise Unsupported("thread is not offered: no conversation is held here; send all of it", param="thread", code=NO_THREADS)
    for name, (harmless, why) in REFUSED.items():
        value = getattr(form, name, None)
        if value is not None and not (isinstance(value, str) and value in harmless):
            shown = f"{name} {value!r}" if isinstance(value, str) and len(value) < 40 else name
            raise Unsupported(f"{shown} is not offered: {why}", param=name)


def draw_of(form: MessagesForm) -> Draw:
    """With max_tokens 0 nothing is drawn, and the prompt is in the cache."""
    if not 0 <= form.max_tokens <= bounds.MAX_TOKENS:
        raise InvalidRequest(f"max_tokens is {form.max_tokens}; it must lie in 0..{bounds.MAX_TOKENS}", param="max_tokens")
    return Draw(
        max_tokens=form.max_tokens,
        temperature=checks.within(form, "temperature", 0.0, bounds.MAX_TEMPERATURE, 1.0),
        top_p=checks.within(form, "top_p", 0.0, 1.0, 1.0),
        top_k=int(checks.within(form, "top_k", -1, 2**31, -1)) or -1,
        min_p=checks.within(form, "min_p", 0.0, 1.0, 0.0),
        presence_penalty=checks.within(form, "presence_penalty", -bounds.MAX_PENALTY, bounds.MAX_PENALTY, 0.0),
        frequency_penalty=checks.within(form, "frequency_penalty", -bounds.MAX_PENALTY, bounds.MAX_PENALTY, 0.0),
        repetition_penalty=checks.repetition_penalty(form),
        seed=checks.seed(form.seed),
        stop_strings=checks.stops(form.stop_sequences, "stop_sequences"),
        deadline=checks.deadline(form.deadline),
    )
