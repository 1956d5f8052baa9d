"""The requests of OpenAI's API as they are read: every field that exists, those that this server can't honour included.

A field that isn't here is unknown, and one that is here but can't be honoured is refused with its reason (REFUSED below): nothing is
accepted and ignored. Fields that OpenAI doesn't have, and vLLM does, have vLLM's names.
"""

from __future__ import annotations

import asyncio
import difflib
import re
from typing import Any, Literal, TypeVar

import msgspec
from fastapi import Request

from everlearn.api.openai.choices import choices, fields
from everlearn.errors import InvalidRequest, Unsupported

BIG_BODY = 256 * 1024  # bytes; decoding more than this would hold up the event loop
PLACE = re.compile(r" - at `\$(.*)`$")
UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")
F = TypeVar("F", bound=msgspec.Struct)


class Form(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Base of all. Equal to its default means not given."""


# ---- messages ----


class TextPart(Form, tag_field="type", tag="text"):
    text: str


class RefusalPart(Form, tag_field="type", tag="refusal"):
    refusal: str


class ImageUrl(Form):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Form, tag_field="type", tag="image_url"):
    image_url: ImageUrl


class FunctionCall(Form):
    name: str
    arguments: str
    parsed_arguments: Any = None  # the SDK's reading of `arguments`; it sends it along


class ToolCall(Form):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | None = None  # clients send back what they put together from a stream


class SystemMessage(Form, tag_field="role", tag="system"):
    content: str | list[TextPart]
    name: str | None = None


class DeveloperMessage(Form, tag_field="role", tag="developer"):
    content: str | list[TextPart]
    name: str | None = None


class UserMessage(Form, tag_field="role", tag="user"):
    content: str | list[TextPart | ImagePart]
    name: str | None = None


class AssistantMessage(Form, tag_field="role", tag="assistant"):
    """Besides what is said: fields that an answer has, because clients send answers back as they were."""

    content: str | list[TextPart | RefusalPart] | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    name: str | None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None
    parsed: Any = None  # the SDK's reading of `content`
    provider_specific_fields: dict[str, Any] | None = None  # LiteLLM's own notes; it sends them along


class ToolMessage(Form, tag_field="role", tag="tool"):
    content: str | list[TextPart]
    tool_call_id: str
    name: str | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


# ---- tools and formats ----


class FunctionForm(Form):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolForm(Form):
    function: FunctionForm
    type: Literal["function"] = "function"


class FunctionName(Form):
    name: str


class NamedTool(Form, tag_field="type", tag="function"):
    function: FunctionName


class AllowedSet(Form):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedTools(Form, tag_field="type", tag="allowed_tools"):
    allowed_tools: AllowedSet


class TextFormat(Form, tag_field="type", tag="text"):
    pass


class JsonObjectFormat(Form, tag_field="type", tag="json_object"):
    pass


class JsonSchema(Form):
    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Form, tag_field="type", tag="json_schema"):
    json_schema: JsonSchema


class StructuredOutputs(Form):
    """vLLM's: exactly one of these."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StreamOptions(Form):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class MemoryForm(Form):
    """Which memory the conversation is in; `budget` and `recent` are those of a new one. `refill`, `importance` and `policy` say who
    writes and weighs its chunks from now on."""

    id: str
    budget: int | None = None
    recent: int | None = None
    refill: str | None = None
    importance: str | None = None
    policy: str | None = None


# ---- requests ----


class DrawForm(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What chat completions and completions share."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    deadline: float | None = None


class ChatForm(DrawForm, kw_only=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    tools: list[ToolForm] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    memory: MemoryForm | None = None
    service_tier: str | None = None
    verbosity: str | None = None
    modalities: list[str] | None = None
    prompt_cache_retention: str | None = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    moderation: Any = None
    prediction: Any = None
    prompt_cache_options: Any = None
    web_search_options: Any = None


class CompletionForm(DrawForm, kw_only=True):
    prompt: str | list[str | int | list[int]]  # a text, texts, token ids, or lists of them
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class EmbeddingForm(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """`pooling` and `normalize` are ours: which hidden states make a vector, and whether it has length 1 (as OpenAI's have)."""

    model: str
    input: str | list[str | int | list[int]]  # a text, texts, token ids, or lists of them
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    pooling: Literal["mean", "last"] | None = None
    normalize: bool | None = None
    deadline: float | None = None


# Known, and not offered: why, and what to do instead. A value in the set is what the server does anyway.
REFUSED: dict[str, tuple[frozenset[Any], str]] = {
    "audio": (frozenset(), "this server gives text alone; leave it out"),
    "functions": (frozenset(), "it was replaced by tools; send tools"),
    "function_call": (frozenset(), "it was replaced by tool_choice; send tool_choice"),
    "moderation": (frozenset(), "there is no moderation here; leave it out"),
    "prediction": (frozenset(), "there is no predicted output here; leave it out"),
    "prompt_cache_options": (frozenset(), "prefixes are cached by themselves; leave it out"),
    "prompt_cache_retention": (frozenset({"in_memory"}), "prefixes are cached in memory; leave it out"),
    "web_search_options": (frozenset(), "there is no web search here; offer a tool of your own"),
    "service_tier": (frozenset({"auto", "default"}), "there is one tier; leave it out"),
    "verbosity": (frozenset({"medium"}), "it can't be set for this server's models; say it in the messages"),
}


def refuse(form: msgspec.Struct) -> None:
    """Raises Unsupported for the first field of REFUSED that asks for something."""
    for name, (harmless, why) in REFUSED.items():
        value = getattr(form, name, None)
        if value is not None and not (isinstance(value, str) and value in harmless):
            shown = f"{name} {value!r}" if isinstance(value, str) and len(value) < 40 else name
            raise Unsupported(f"{shown} is not offered: {why}", param=name)


async def read(request: Request, form: type[F]) -> F:
    """The request's JSON body as `form`. Raises InvalidRequest naming the field that doesn't fit."""
    body = await request.body()
    if len(body) > BIG_BODY:
        return await asyncio.to_thread(parse, body, form)
    return parse(body, form)


def parse(body: bytes, form: type[F]) -> F:
    try:
        return msgspec.json.decode(body, type=form)
    except msgspec.ValidationError as error:
        raise named(str(error), form) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


def named(message: str, form: Any, prefix: str = "") -> InvalidRequest:
    """msgspec's finding about a `form`, with the field's name where clients look for it, and what might have been meant."""
    place = PLACE.search(message)
    path = prefix + (place[1] if place else "")
    path = path.removeprefix(".")
    what = message[: place.start()] if place else message
    if unknown := UNKNOWN.fullmatch(what):
        near = [] if path else difflib.get_close_matches(unknown[1], [name for name in fields(form) if name not in REFUSED], n=1)
        path = f"{path}.{unknown[1]}" if path else unknown[1]
        way_out = f"did you mean {near[0]}?" if near else "leave it out"
        return InvalidRequest(f"{path} is not known to this server, so it can't be honoured; {way_out}", param=path)
    if what.startswith("Object missing required field `"):
        path = f"{path}." * bool(path) + what.split("`")[1]
        return InvalidRequest(f"{path} is missing; it is required", param=path)
    taken = choices(form, place[1]) if place and what.startswith("Invalid ") else []
    rule = f"; it must be one of {', '.join(taken)}" if taken else ""
    return InvalidRequest(f"{path or 'the body'}: {what[:1].lower()}{what[1:]}{rule}", param=path or None)
