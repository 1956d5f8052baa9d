"""Messages to the text of a prompt, by the model's own Jinja template.

The template is a program from whoever made the model: it runs in Jinja's immutable sandbox (`everlearn/render/sandbox.py`) with limits
on time and size, and sees plain data alone. What it needs that OpenAI's messages don't have (arguments as objects, content as one text)
is prepared here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from pydantic_core import from_json

from everlearn.errors import InvalidRequest
from everlearn.render import sandbox
from everlearn.render.needs import GIVEN, Needs, needs_of
from everlearn.render.tokenizer import ChatTokenizer

Message = Mapping[str, Any]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_MESSAGES = 10_000
BROKEN = "INVALID_JSON"  # Anthropic's word for the arguments of a call that are no object
CONTINUE = "\ufdd1CONTINUE\ufdd1"  # marks the end of the last message's text; noncharacters, and taken out again
REASONING = ("reasoning_content", "reasoning", "thinking")  # the same under the names that templates read


def render(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = True,
    continue_final: bool = False,
    kwargs: Mapping[str, Any] = {},
) -> str:
    """The prompt. `messages` and `tools` are as OpenAI's API has them; `kwargs` are variables of the template (enable_thinking). What isn't
    the assistant's own is guarded, so encode it with `tokenizer.encode`: a user's `<|im_end|>` is letters there, and ends nothing.

    `continue_final` leaves the last message open, so that the model goes on writing it. A model without a template gets ChatML.
    Raises InvalidRequest(param="messages") where the template refuses the messages or goes over its limits.
    """
    template, variables = _prepared(tokenizer, messages, tools, add_generation_prompt, continue_final, kwargs)
    text = sandbox.run(template, variables)
    return _cut(text) if continue_final else text


def render_within(
    seconds: float,
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    continue_final: bool = False,
    kwargs: Mapping[str, Any] = {},
) -> str | None:
    """`render` for who can't wait for a slow template: None where `seconds` aren't enough."""
    template, variables = _prepared(tokenizer, messages, tools, True, continue_final, kwargs)
    text = sandbox.attempt(template, variables, seconds)
    return _cut(text) if continue_final and text is not None else text


def _prepared(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    continue_final: bool,
    kwargs: Mapping[str, Any],
) -> tuple[sandbox.Template, dict[str, Any]]:
    """The template, and what it is given."""
    if not messages:
        raise InvalidRequest("messages is empty; send one message at least", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"{len(messages)} messages; {MAX_MESSAGES} is the limit", param="messages")
    source = _source(tokenizer, bool(tools))
    try:
        template, needs = _compiled(source)
    except TemplateError as error:
        raise InvalidRequest(
            f"the model's chat template can't be compiled: {error}; mend chat_template in its folder", param="model"
        ) from None
    plain = [_prepare(message, needs, place) for place, message in enumerate(messages)]
    plain = [message if message["role"] == "assistant" else _guarded(tokenizer, message) for message in plain]
    if continue_final:
        add_generation_prompt = False
        _mark_end(plain[-1])
    _check_switches(kwargs, needs)
    variables = {
        **tokenizer_tokens(tokenizer),
        "documents": None,
        **_guarded(tokenizer, _plain(kwargs)),
        "messages": plain,
        "tools": _guarded(tokenizer, _plain(list(tools))) if tools else None,
        "add_generation_prompt": add_generation_prompt,
    }
    return template, variables


def _check_switches(kwargs: Mapping[str, Any], needs: Needs) -> None:
    """A variable that the template doesn't read would be ignored."""
    param = "chat_template_kwargs"
    if reserved := GIVEN & set(kwargs):
        raise InvalidRequest(f"chat_template_kwargs can't set {', '.join(sorted(reserved))}", param=param)
    if unknown := sorted(set(kwargs) - needs.switches):
        known = f"those that it reads are {', '.join(sorted(needs.switches))}" if needs.switches else "it reads none"
        raise InvalidRequest(f"{unknown[0][:80]!r} is no variable that the model's chat template reads; {known}", param=param)


def turn(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    kwargs: Mapping[str, Any] = {},
) -> tuple[str, str]:
    """The prompt for the last message, and that message as the template writes it, its end of turn included: what to train on."""
    prompt = render(tokenizer, messages[:-1], tools, kwargs=kwargs)
    whole = render(tokenizer, messages, tools, add_generation_prompt=False, kwargs=kwargs)
    if not whole.startswith(prompt):
        raise InvalidRequest(
            "the chat template shows earlier messages differently once there is an answer; train on its parts", param="messages"
        )
    answer = whole[len(prompt) :]
    end = answer.rfind(tokenizer.eos) if tokenizer.eos else -1
    return prompt, answer[: end + len(tokenizer.eos)] if end >= 0 else answer


def supports_tools(tokenizer: ChatTokenizer) -> bool:
    """Whether the model's template shows tools to the model by itself."""
    source = _source(tokenizer, tools=True)
    try:
        return "tools" in _compiled(source)[1].names
    except TemplateError:
        return False


def _with_tools(tokenizer: ChatTokenizer) -> Needs | None:
    """What the template needs where there are tools; None where it is no template."""
    try:
        return _compiled(_source(tokenizer, tools=True))[1]
    except TemplateError:
        return None


def knows(tokenizer: ChatTokenizer, name: str) -> bool:
    """Whether the template reads a variable or a field, or has a constant, of this name (tool_calls, developer)."""
    needs = _with_tools(tokenizer)
    return needs is not None and name in needs.names


def shows_one_call(tokenizer: ChatTokenizer) -> bool:
    """Whether the template shows one call of a message, so that the others would be lost or refused (gpt-oss, Llama 3)."""
    needs = _with_tools(tokenizer)
    return needs is not None and needs.one_call


def shows_calls_alone(tokenizer: ChatTokenizer) -> bool:
    """Whether the template shows calls of a message without text alone (DeepSeek V3 and R1 as they came out)."""
    needs = _with_tools(tokenizer)
    return needs is not None and needs.calls_alone


def switches(tokenizer: ChatTokenizer) -> frozenset[str]:
    """The variables that a request may set (enable_thinking), with tools and without: fields of messages are none, nor are texts."""
    try:
        with_tools, without = (_compiled(_source(tokenizer, tools))[1].switches for tools in (True, False))
    except TemplateError:
        return frozenset()
    return with_tools & without


def efforts(tokenizer: ChatTokenizer) -> frozenset[str]:
    """The efforts of reasoning that the template knows by name; it may well print others as they are."""
    needs = _with_tools(tokenizer)
    return frozenset() if needs is None else needs.efforts


def tokenizer_tokens(tokenizer: ChatTokenizer) -> dict[str, str]:
    """Special tokens by the names that templates use."""
    named = {name: token for name in ("pad_token", "unk_token") if isinstance(token := tokenizer.config.get(name), str)}
    return {**named, "bos_token": tokenizer.bos, "eos_token": tokenizer.eos}


def _source(tokenizer: ChatTokenizer, tools: bool) -> str:
    if tools and "tool_use" in tokenizer.templates:
        return tokenizer.templates["tool_use"]
    return tokenizer.template or CHATML


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> tuple[sandbox.Template, Needs]:
    return sandbox.compile_template(source), needs_of(sandbox.parse(source))


# ---- messages as templates take them ----


def _prepare(message: Message, needs: Needs, place: int) -> dict[str, Any]:
    plain: dict[str, Any] = _plain(dict(message))
    role = plain.get("role")
    if not isinstance(role, str):
        raise InvalidRequest(f"messages[{place}] has no role; roles are system, developer, user, assistant and tool", param="messages")
    if role == "developer" and "developer" not in needs.names:
        plain["role"] = "system"
    plain["content"] = _content(plain.get("content"), needs, place)
    if needs.asks_none and plain.get("tool_calls") and not plain["content"]:
        plain["content"] = None
    reasoning = next((plain[name] for name in REASONING if isinstance(plain.get(name), str)), None)
    if reasoning is not None:
        plain.update(dict.fromkeys(REASONING, reasoning))
    for call in plain.get("tool_calls") or []:
        function = call.get("function", call)
        if isinstance(function.get("arguments"), str) and not needs.text_arguments:
            function["arguments"] = _arguments(function["arguments"], needs.entries)
    return plain


def _content(content: Any, needs: Needs, place: int) -> Any:
    """One text, or the parts where the template goes through them."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"messages[{place}].content is a {type(content).__name__}; it is a text or a list of parts", param="messages")
    texts = []
    for number, part in enumerate(content):
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if kind == "image":
            _check_images(needs, place)
            continue
        if not isinstance(text, str):
            raise InvalidRequest(
                f"messages[{place}].content[{number}] is of type {kind!r}; this model reads text alone, so send parts of type 'text'",
                param="messages",
            )
        texts.append(text)
    if needs.parts:
        return [{"type": "image"} if part.get("type") == "image" else {"type": "text", "text": part["text"]} for part in content]
    return "\n".join(texts)


def _check_images(needs: Needs, place: int) -> None:
    if not needs.parts or "image" not in needs.names:
        raise InvalidRequest(
            f"messages[{place}] shows an image, and the model's chat template has no place for one; send texts, or put a template that "
            "shows images into the model's folder",
            param="messages",
        )


def _arguments(text: str, entries: bool) -> Any:
    """An object where the text is one; else the text, which is what the model wrote. For a template that goes through `entries`, those that
    there are of an object that breaks off, and anything else as the one entry of an object."""
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) or not entries:
        return value if isinstance(value, dict) else text
    try:
        value = from_json(text, allow_inf_nan=False, allow_partial="trailing-strings")
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {BROKEN: text}


def _plain(value: Any) -> Any:
    """A copy out of JSON's own types: the sandbox guards attributes, and these have none worth guarding."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise InvalidRequest(f"messages and tools hold JSON values; {type(value).__name__} is none", param="messages")


def _guarded(tokenizer: ChatTokenizer, value: Any) -> Any:
    if isinstance(value, str):
        return tokenizer.guard(value)
    if isinstance(value, dict):
        return {key: _guarded(tokenizer, item) for key, item in value.items()}
    return [_guarded(tokenizer, item) for item in value] if isinstance(value, list) else value


# ---- an open last message ----


def _mark_end(message: dict[str, Any]) -> None:
    if isinstance(message["content"], list) and message["content"]:
        if "text" not in message["content"][-1]:
            raise InvalidRequest("the last message ends with an image, so there is no text to continue", param="messages")
        message["content"][-1]["text"] += CONTINUE
    else:
        message["content"] = (message["content"] or "") + CONTINUE


def _cut(text: str) -> str:
    place = text.rfind(CONTINUE)
    if place < 0:
        raise InvalidRequest("the model's chat template drops the last message's text, so it can't be continued", param="messages")
    return text[:place]
