"""From the fields of a request to a `Draw` and a `Turn`: bounds first, before anything is made of a number. Pure; UserErrors only."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from everlearn.api import bounds, toolschemas
from everlearn.api.auth import Caller
from everlearn.api.calls import Asked
from everlearn.api.openai.types import (
    AllowedTools,
    ChatForm,
    DrawForm,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedTool,
    StructuredOutputs,
    ToolForm,
    refuse,
)
from everlearn.api.remembering import Wanted
from everlearn.api.turns import Draw, Turn
from everlearn.errors import InvalidRequest, TooLarge, Unsupported
from everlearn.types import Grammar

_encode = msgspec.json.encode
MEMORY, MEMORY_BUDGET = "x-everlearn-memory", "x-everlearn-memory-budget"
NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")  # of functions and schemas; OpenAI takes 64 characters, MCP's tools have more


def within(form: Any, name: str, low: float, high: float, default: float) -> float:
    """A number's field, `default` where it isn't given."""
    value = getattr(form, name)
    if value is None:
        return default
    if not low <= value <= high:  # no number is none of these, and an integer may be too large for a float
        shown = value if not abs(value) > 10**30 else "a huge number"
        raise InvalidRequest(f"{name} is {shown}; it must lie in {low:g}..{high:g}", param=name)
    number: float = value
    return number


def draw_of(form: DrawForm, max_tokens: int | None, top_logprobs: int | None, *, limit_name: str = "max_tokens") -> Draw:
    """Everything about drawing; what belongs to one route alone is given by it."""
    if max_tokens is not None and not 0 <= max_tokens <= bounds.MAX_TOKENS:
        raise InvalidRequest(f"{limit_name} is {max_tokens}; it must lie in 1..{bounds.MAX_TOKENS}", param=limit_name)
    top_k = int(within(form, "top_k", -1, 2**31, -1))
    penalty = bounds.MAX_PENALTY
    min_tokens = int(within(form, "min_tokens", 0, bounds.MAX_TOKENS, 0))
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens is {min_tokens}, above {limit_name} ({max_tokens})", param="min_tokens")
    if form.stream_options is not None and not form.stream:
        raise InvalidRequest("stream_options belongs to stream: true; leave one out or set the other", param="stream_options")
    if form.stream_options is not None and form.stream_options.include_obfuscation:
        raise Unsupported("stream_options.include_obfuscation is not offered; leave it out", param="stream_options.include_obfuscation")
    return Draw(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=within(form, "temperature", 0.0, bounds.MAX_TEMPERATURE, 1.0),
        top_p=within(form, "top_p", 0.0, 1.0, 1.0),
        top_k=top_k or -1,
        min_p=within(form, "min_p", 0.0, 1.0, 0.0),
        presence_penalty=within(form, "presence_penalty", -penalty, penalty, 0.0),
        frequency_penalty=within(form, "frequency_penalty", -penalty, penalty, 0.0),
        repetition_penalty=repetition_penalty(form),
        logit_bias=logit_bias(form.logit_bias),
        seed=seed(form.seed),
        stop_strings=stops(form.stop),
        stop_tokens=stop_tokens(form.stop_token_ids),
        ignore_eos=bool(form.ignore_eos),
        n=int(within(form, "n", 1, bounds.MAX_CHOICES, 1)),
        top_logprobs=top_logprobs,
        deadline=deadline(form.deadline),
    )


def repetition_penalty(form: Any) -> float:
    value = within(form, "repetition_penalty", 0.0, bounds.MAX_PENALTY, 1.0)
    if value == 0:
        raise InvalidRequest("repetition_penalty is 0; it must be above (1 is off)", param="repetition_penalty")
    return value


def logit_bias(given: dict[str, float] | None) -> dict[int, float]:
    if not given:
        return {}
    if len(given) > bounds.MAX_LOGIT_BIAS:
        raise InvalidRequest(f"logit_bias has {len(given)} entries; {bounds.MAX_LOGIT_BIAS} is the limit", param="logit_bias")
    bias: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise InvalidRequest(f"logit_bias: {key[:40]!r} is no token id", param="logit_bias")
        if not -100 <= value <= 100:
            raise InvalidRequest(f"logit_bias of token {key} is {value}; it must lie in -100..100", param="logit_bias")
        bias[int(key)] = value
    return bias


def seed(given: int | None) -> int | None:
    if given is not None and not -(2**bounds.SEED_BITS) <= given < 2**bounds.SEED_BITS:
        raise InvalidRequest(f"seed is {given if abs(given) < 10**30 else 'a huge number'}; it must fit 64 bits", param="seed")
    return given


def stops(given: str | list[str] | None, name: str = "stop") -> list[str]:
    found = [given] if isinstance(given, str) else given or []
    if len(found) > bounds.MAX_STOPS:
        raise InvalidRequest(f"{name} has {len(found)} texts; {bounds.MAX_STOPS} is the limit", param=name)
    for text in found:
        if not 1 <= len(text) <= bounds.MAX_STOP_CHARS:
            raise InvalidRequest(f"{name} holds a text of {len(text)} characters; 1 to {bounds.MAX_STOP_CHARS} are taken", param=name)
    return found


def stop_tokens(given: list[int] | None) -> list[int]:
    if given and len(given) > bounds.MAX_STOP_TOKENS:
        raise InvalidRequest(f"stop_token_ids has {len(given)} ids; {bounds.MAX_STOP_TOKENS} is the limit", param="stop_token_ids")
    return given or []


def deadline(given: float | None) -> float | None:
    if given is not None and not (math.isfinite(given) and given > 0):
        raise InvalidRequest(f"deadline is {given}; it must be a number of seconds above 0", param="deadline")
    return given


def top_logprobs(given: int | None, asked: bool | None) -> int | None:
    """None where no log-probabilities are reported."""
    if given is not None and not 0 <= given <= bounds.MAX_TOP_LOGPROBS:
        raise InvalidRequest(f"top_logprobs is {given}; it must lie in 0..{bounds.MAX_TOP_LOGPROBS}", param="top_logprobs")
    if given and not asked:
        raise InvalidRequest("top_logprobs belongs to logprobs: true; set it", param="top_logprobs")
    return (given or 0) if asked else None


def label(text: str | None, name: str) -> str | None:
    """A short text of the client's own: it goes into the store as it is."""
    if text is not None and (len(text) > bounds.MAX_USER_CHARS or "\0" in text):
        raise InvalidRequest(f"{name} must be at most {bounds.MAX_USER_CHARS} characters without NUL", param=name)
    return text


def metadata(given: dict[str, str] | None) -> dict[str, str] | None:
    if not given:
        return None
    if len(given) > bounds.MAX_METADATA:
        raise InvalidRequest(f"metadata has {len(given)} entries; {bounds.MAX_METADATA} is the limit", param="metadata")
    for key, value in given.items():
        if len(key) > bounds.MAX_METADATA_KEY or len(value) > bounds.MAX_METADATA_VALUE:
            rule = f"keys have at most {bounds.MAX_METADATA_KEY} characters, values {bounds.MAX_METADATA_VALUE}"
            raise InvalidRequest(f"metadata entry {key[:80]!r} is too long; {rule}", param="metadata")
    return given


def asked(form: Any, caller: Caller, route: str, said: Any, field: str) -> Asked:
    """What the record says of a request: `said` under its own name, every other field that was sent among the parameters."""
    if form.store and not caller.content:
        raise Unsupported("store: what is said with this key isn't kept (its owner wants it so); leave store out", param="store")

    def params() -> Any:
        return {name: value for name, value in msgspec.to_builtins(form).items() if name not in (field, "user", "metadata")}

    return Asked(
        route=route,
        messages=said,
        params=params,
        user=label(form.user, "user") or label(getattr(form, "safety_identifier", None), "safety_identifier"),
        metadata=metadata(form.metadata),
        store=form.store is not False,
        store_asked=form.store is True,
    )


# ---- grammars ----


def bounded(source: str, name: str) -> str:
    if len(source) > bounds.MAX_SCHEMA_BYTES:
        raise TooLarge(f"{name} has {len(source)} bytes; {bounds.MAX_SCHEMA_BYTES} is the limit", param=name)
    return source


def structured(given: StructuredOutputs | None) -> Grammar | None:
    """vLLM's structured_outputs: JSON schema, regular expression, choice of texts, or a grammar in GBNF."""
    if given is None:
        return None
    chosen = [name for name in given.__struct_fields__ if getattr(given, name)]
    if len(chosen) != 1:
        raise InvalidRequest(
            f"structured_outputs sets {', '.join(chosen) or 'nothing'}; set one of json, regex, choice, grammar, json_object",
            param="structured_outputs",
        )
    name = f"structured_outputs.{chosen[0]}"
    if given.json_object:
        return Grammar("json_object")
    if given.regex:
        return Grammar("regex", bounded(given.regex, name))
    if given.grammar:
        return Grammar("ebnf", bounded(given.grammar, name))
    if given.choice:
        return _choice(given.choice, name)
    source = given.json if isinstance(given.json, str) else _encode(given.json).decode()
    return Grammar("json_schema", bounded(source, name))


def _choice(texts: list[str], name: str) -> Grammar:
    """One of these texts: a grammar of string literals, because a regular expression would have to escape them."""
    literals = " | ".join(_encode(text).decode() for text in texts)
    return Grammar("lark", bounded(f"start: {literals}", name))


# ---- chat ----


def chat_draw(form: ChatForm) -> Draw:
    """`draw_of` with what only chat completions have."""
    refuse(form)
    if form.modalities not in (None, ["text"]):
        raise Unsupported("modalities: this server gives text alone; send ['text'] or leave it out", param="modalities")
    most = form.max_tokens if form.max_completion_tokens is None else form.max_completion_tokens
    name = "max_tokens" if form.max_completion_tokens is None else "max_completion_tokens"
    if form.max_tokens not in (None, most):
        raise InvalidRequest(f"max_tokens is {form.max_tokens} and max_completion_tokens {most}; send one of them", param="max_tokens")
    if most is not None and most < 1:
        raise InvalidRequest(f"{name} is {most}; it must lie in 1..{bounds.MAX_TOKENS}", param=name)
    return draw_of(form, most, top_logprobs(form.top_logprobs, form.logprobs), limit_name=name)


def chat_turn(form: ChatForm, thinking: Callable[[str], dict[str, Any]], chars: int) -> Turn:
    """The conversation. `thinking` gives the template's switches for an effort."""
    if not 1 <= len(form.messages) <= bounds.MAX_MESSAGES:
        raise InvalidRequest(f"messages holds {len(form.messages)}; 1 to {bounds.MAX_MESSAGES} are taken", param="messages")
    offered, choice = tools_and_choice(form)
    schema, grammar = answer_format(form)
    continues = bool(form.continue_final_message)
    if form.add_generation_prompt is not None and form.add_generation_prompt == continues:
        raise InvalidRequest(
            "add_generation_prompt is the opposite of continue_final_message; send one of them, or both so", param="add_generation_prompt"
        )
    switches = form.chat_template_kwargs or {}
    if form.reasoning_effort is not None:
        switches = {**thinking(form.reasoning_effort), **switches}
    return Turn(
        messages=[canonical(message) for message in msgspec.to_builtins(form.messages)],
        tools=offered,
        tool_choice=choice,
        parallel_calls=form.parallel_tool_calls is not False,
        answer_schema=schema,
        grammar=grammar,
        switches=switches,
        continue_final=continues,
        chars=chars,
    )


def memory(form: ChatForm, headers: Mapping[str, str]) -> Wanted | None:
    """The memory that the request names, in its body or in the headers x-everlearn-memory and x-everlearn-memory-budget."""
    given, budget = headers.get(MEMORY), headers.get(MEMORY_BUDGET)
    if form.memory is not None and given is not None:
        raise InvalidRequest(f"memory is named in the body and in the header {MEMORY}; send one of them", param="memory")
    if form.memory is not None:
        asked = form.memory
        return Wanted(asked.id, asked.budget, asked.recent, asked.refill, asked.importance, asked.policy)
    if given is None:
        return None
    if budget is not None and not (budget.isascii() and budget.isdigit() and len(budget) < 10):
        raise InvalidRequest(f"header {MEMORY_BUDGET} is {budget[:20]!r}; it must be a number of tokens", param="memory.budget")
    return Wanted(given, None if budget is None else int(budget))


def canonical(message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates take it: no fields of answers that say nothing, refusals as text."""
    content = message.get("content")
    if isinstance(content, list):
        if len(content) > bounds.MAX_PARTS:
            raise InvalidRequest(f"a message's content has {len(content)} parts; {bounds.MAX_PARTS} is the limit", param="messages")
        message["content"] = [{"type": "text", "text": part["refusal"]} if part["type"] == "refusal" else part for part in content]
    if message["role"] != "assistant":
        return message
    refusal = message.pop("refusal", None)
    if refusal and not content:
        message["content"] = refusal
    if reasoning := message.pop("reasoning", None):
        message.setdefault("reasoning_content", reasoning)
    for said_by_others in ("annotations", "parsed", "provider_specific_fields"):
        message.pop(said_by_others, None)
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
        if message.get("content") is None:
            raise InvalidRequest("an assistant's message has neither content nor tool_calls; send one of them", param="messages")
    else:
        message["tool_calls"] = [
            {"id": call["id"], "type": "function", "function": {name: call["function"][name] for name in ("name", "arguments")}}
            for call in message["tool_calls"]
        ]
    return message


def tools_and_choice(form: ChatForm) -> tuple[list[dict[str, Any]], str | dict[str, Any]]:
    """The tools that may be called, and whether one must be."""
    offered = tool_list(form.tools or [])
    choice = form.tool_choice
    if isinstance(choice, AllowedTools):
        names = [tool.function.name for tool in choice.allowed_tools.tools]
        return allowed(names, offered), choice.allowed_tools.mode
    if isinstance(choice, NamedTool):
        return offered, named_choice(choice.function.name, offered)
    if choice == "required" and not offered:
        raise InvalidRequest("tool_choice is 'required', and there are no tools; send tools", param="tool_choice")
    return offered, choice or "auto"


def allowed(names: list[str], offered: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools of these names."""
    found = [tool for tool in offered if tool["function"]["name"] in names]
    if not found or len(found) < len(set(names)):
        raise InvalidRequest("tool_choice allows a tool that is not in tools, or none at all; name some of tools", param="tool_choice")
    return found


def named_choice(name: str, offered: list[dict[str, Any]]) -> dict[str, Any]:
    if name not in {tool["function"]["name"] for tool in offered}:
        raise InvalidRequest(f"tool_choice names {name[:100]!r}, which is not in tools; add it there", param="tool_choice")
    return {"type": "function", "function": {"name": name}}


def tool_list(forms: list[ToolForm]) -> list[dict[str, Any]]:
    if len(forms) > bounds.MAX_TOOLS:
        raise InvalidRequest(f"tools holds {len(forms)}; {bounds.MAX_TOOLS} is the limit", param="tools")
    return [
        tool(form.function.name, form.function.description, form.function.parameters, form.function.strict, f"tools[{i}].function")
        for i, form in enumerate(forms)
    ]


def tool(
    name: str, description: str | None, parameters: dict[str, Any] | None, strict: bool | None, place: str, field: str = "parameters"
) -> dict[str, Any]:
    """A tool as templates and formats take it, keys in the order in which models saw them. `place` and `field` are the request's names."""
    if not NAME.fullmatch(name):
        raise InvalidRequest(f"{place}.name {name[:140]!r} must be 1 to 128 letters, digits, '_', '-', '.' or ':'", param=f"{place}.name")
    if parameters is not None:
        bounded(_encode(parameters).decode(), f"{place}.{field}")
        parameters = toolschemas.check(parameters, f"{place}.{field}")
    function: dict[str, Any] = {"name": name}
    if description is not None:
        function["description"] = description
    function["parameters"] = parameters or {"type": "object", "properties": {}}
    if strict is not None:
        function["strict"] = strict
    return {"type": "function", "function": function}


def answer_format(form: ChatForm) -> tuple[dict[str, Any] | None, Grammar | None]:
    """What the answer must match: a schema, or a grammar."""
    grammar, given = structured(form.structured_outputs), form.response_format
    if grammar is not None and isinstance(given, (JsonObjectFormat, JsonSchemaFormat)):
        raise InvalidRequest("structured_outputs and response_format both bind the answer; send one of them", param="structured_outputs")
    if isinstance(given, JsonObjectFormat):
        return {"type": "object"}, None
    if isinstance(given, JsonSchemaFormat):
        return answer_schema(given.json_schema.name, given.json_schema.schema, "response_format.json_schema"), None
    return None, grammar


def answer_schema(name: str, schema: dict[str, Any] | None, place: str) -> dict[str, Any]:
    if not NAME.fullmatch(name):
        raise InvalidRequest(f"{place}.name {name[:140]!r} must be 1 to 128 letters, digits, '_' or '-'", param=f"{place}.name")
    if schema is None:
        return {"type": "object"}
    bounded(_encode(schema).decode(), f"{place}.schema")
    return schema
