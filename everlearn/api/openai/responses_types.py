"""The request of the Responses API, and what becomes of its fields."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from everlearn.api import bounds
from everlearn.api.openai import checks
from everlearn.api.openai.types import Form, TextFormat, refuse
from everlearn.api.turns import Draw
from everlearn.errors import InvalidRequest, Unsupported

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"


class FunctionTool(Form, tag_field="type", tag="function"):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Form, tag_field="type", tag="function"):
    name: str


class AllowedFunctions(Form, tag_field="type", tag="allowed_tools"):
    mode: Literal["auto", "required"]
    tools: list[NamedFunction]


class JsonFormat(Form, tag_field="type", tag="json_object"):
    pass


class SchemaFormat(Form, tag_field="type", tag="json_schema"):
    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextForm(Form):
    format: TextFormat | JsonFormat | SchemaFormat | None = None
    verbosity: str | None = None


class ReasoningForm(Form):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class StreamForm(Form):
    include_obfuscation: bool | None = None


class ResponsesForm(Form):
    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedFunction | AllowedFunctions | None = None
    parallel_tool_calls: bool | None = None
    text: TextForm | None = None
    reasoning: ReasoningForm | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    stream: bool | None = None
    stream_options: StreamForm | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    truncation: str | None = None
    service_tier: str | None = None
    background: bool | None = None
    max_tool_calls: int | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    deadline: float | None = None
    # refused
    prompt_cache_retention: str | None = None
    conversation: Any = None
    prompt: Any = None
    context_management: Any = None
    moderation: Any = None
    prompt_cache_options: Any = None
    access_programs: Any = None
    background_options: Any = None
    image: Any = None


REFUSED = {
    "conversation": "send previous_response_id or the items themselves",
    "prompt": "there are no stored prompts here; send instructions and input",
    "context_management": "nothing is compacted here; send what shall be seen",
    "access_programs": "there are none here; leave it out",
    "background_options": "there are no background responses here; leave it out",
    "image": "this server gives text alone; leave it out",
}


def check(form: ResponsesForm, thinks: bool) -> None:
    """Raises Unsupported for what can't be honoured."""
    refuse(form)
    for name, why in REFUSED.items():
        if getattr(form, name) is not None:
            raise Unsupported(f"{name} is not offered: {why}", param=name)
    if form.background:
        raise Unsupported("background is not offered: a response is made while its connection is open; leave it out", param="background")
    if form.truncation not in (None, "disabled"):
        raise Unsupported(f"truncation {form.truncation!r} is not offered: what doesn't fit is refused; shorten it", param="truncation")
    if form.text is not None and form.text.verbosity not in (None, "medium"):
        raise Unsupported("text.verbosity can't be set for this server's models; say it in the instructions", param="text.verbosity")
    if form.stream_options is not None and form.stream_options.include_obfuscation:
        raise Unsupported("stream_options.include_obfuscation is not offered; leave it out", param="stream_options.include_obfuscation")
    if form.reasoning is not None and (form.reasoning.summary or form.reasoning.generate_summary):
        raise Unsupported("reasoning.summary is not offered: reasoning is given whole; leave it out", param="reasoning.summary")
    for value in form.include or []:
        if value == ENCRYPTED and thinks:
            raise Unsupported(f"include {value!r} is not offered: reasoning is given as text; send its items back so", param="include")
        if value not in (LOGPROBS, ENCRYPTED):
            raise Unsupported(f"include {value[:80]!r} is not offered; {LOGPROBS} is", param="include")


def draw_of(form: ResponsesForm) -> Draw:
    most = form.max_output_tokens
    if most is not None and not 1 <= most <= bounds.MAX_TOKENS:
        raise InvalidRequest(f"max_output_tokens is {most}; it must lie in 1..{bounds.MAX_TOKENS}", param="max_output_tokens")
    scored = LOGPROBS in (form.include or [])
    if form.top_logprobs and not scored:
        raise InvalidRequest(f"top_logprobs belongs to include: [{LOGPROBS!r}]; add it", param="top_logprobs")
    return Draw(
        max_tokens=most,
        temperature=checks.within(form, "temperature", 0.0, bounds.MAX_TEMPERATURE, 1.0),
        top_p=checks.within(form, "top_p", 0.0, 1.0, 1.0),
        top_k=int(checks.within(form, "top_k", -1, 2**31, -1)) or -1,
        min_p=checks.within(form, "min_p", 0.0, 1.0, 0.0),
        presence_penalty=checks.within(form, "presence_penalty", -bounds.MAX_PENALTY, bounds.MAX_PENALTY, 0.0),
        frequency_penalty=checks.within(form, "frequency_penalty", -bounds.MAX_PENALTY, bounds.MAX_PENALTY, 0.0),
        repetition_penalty=checks.repetition_penalty(form),
        seed=checks.seed(form.seed),
        top_logprobs=checks.top_logprobs(form.top_logprobs, scored),
        deadline=checks.deadline(form.deadline),
    )


def tools_and_choice(form: ResponsesForm) -> tuple[list[dict[str, Any]], str | dict[str, Any]]:
    """Functions are strict unless they say otherwise, as OpenAI has it here."""
    if form.tools and len(form.tools) > bounds.MAX_TOOLS:
        raise InvalidRequest(f"tools holds {len(form.tools)}; {bounds.MAX_TOOLS} is the limit", param="tools")
    offered = [
        checks.tool(tool.name, tool.description, tool.parameters, tool.strict is not False, f"tools[{place}]")
        for place, tool in enumerate(form.tools or [])
    ]
    choice = form.tool_choice
    if isinstance(choice, AllowedFunctions):
        return checks.allowed([tool.name for tool in choice.tools], offered), choice.mode
    if isinstance(choice, NamedFunction):
        return offered, checks.named_choice(choice.name, offered)
    if choice == "required" and not offered:
        raise InvalidRequest("tool_choice is 'required', and there are no tools; send tools", param="tool_choice")
    return offered, choice or "auto"


def answer_schema(form: ResponsesForm) -> dict[str, Any] | None:
    wanted = form.text.format if form.text is not None else None
    if isinstance(wanted, JsonFormat):
        return {"type": "object"}
    if isinstance(wanted, SchemaFormat):
        return checks.answer_schema(wanted.name, wanted.schema, "text.format")
    return None


def echoed(form: ResponsesForm) -> dict[str, Any]:
    """What a response says of its request."""
    text = form.text.format if form.text is not None and form.text.format is not None else TextFormat()
    shown_format = msgspec.to_builtins(text)
    return {
        "instructions": form.instructions,
        "max_output_tokens": form.max_output_tokens,
        "max_tool_calls": form.max_tool_calls,
        "metadata": form.metadata or {},
        "parallel_tool_calls": form.parallel_tool_calls is not False,
        "previous_response_id": form.previous_response_id,
        "reasoning": {"effort": form.reasoning.effort if form.reasoning else None, "summary": None},
        "service_tier": "default",
        "store": form.store is not False,
        "temperature": 1.0 if form.temperature is None else form.temperature,
        "text": {"format": shown_format},
        "tool_choice": "auto" if form.tool_choice is None else msgspec.to_builtins(form.tool_choice),
        "tools": [
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters or {"type": "object", "properties": {}},
                "strict": tool.strict is not False,
            }
            for tool in form.tools or []
        ],
        "top_logprobs": form.top_logprobs or 0,
        "top_p": 1.0 if form.top_p is None else form.top_p,
        "truncation": "disabled",
        "background": False,
        **({} if form.user is None else {"user": form.user}),
    }
