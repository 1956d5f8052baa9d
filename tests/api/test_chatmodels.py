"""What an effort of reasoning becomes: variables that the model's template reads, and a refusal where it reads none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from everlearn.api.chatmodels import ChatModel
from everlearn.errors import Unsupported
from everlearn.models.catalog import read_info
from everlearn.render import template, tokenizer
from everlearn.render.tokenizer import ChatTokenizer
from everlearn.render.tools import format_for

USER = {"role": "user", "content": "Hi"}
# As gpt-oss's: the effort is a variable of a macro with a default, and a thought is a field of messages.
HARMONY = """{%- macro system() %}{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}
{{- 'Reasoning: ' + reasoning_effort }}{% endmacro %}<|start|>system<|message|>{{ system() }}<|end|>
{%- for message in messages %}{% if 'thinking' in message and message.thinking %}<|channel|>analysis<|message|>{{ message.thinking }}
{%- endif %}<|channel|>final<|message|>{{ message.content }}<|end|>{% endfor %}"""
# As DeepSeek V3.1's: one name stands for the other, and both are set by the template where the request doesn't.
SWITCH = """{% if thinking is not defined %}{% if enable_thinking is defined %}{% set thinking = enable_thinking %}{% else %}
{%- set thinking = false %}{% endif %}{% endif %}{{ messages[0].content }}{{ '<think>' if thinking else '</think>' }}"""
BOTH = "{{ messages[0].content }} {{ enable_thinking }} {{ reasoning_effort }}{% if reasoning_effort in ('minimal', 'max') %}!{% endif %}"
NAMED = "{{ reasoning_effort }}{% if reasoning_effort | lower == 'none' %}</think>{% endif %}"
FIELD = "{% for m in messages %}{% if 'enable_thinking' in m %}{{ m.reasoning_effort }}{% endif %}{{ m.content }}{% endfor %}"
FIXED = "{% set enable_thinking = true %}{% set reasoning_effort = 'high' %}{{ enable_thinking }}{{ reasoning_effort }}"


@pytest.fixture
def model(tiny_model: Path) -> Callable[..., ChatModel]:
    plain = tokenizer.load(tiny_model)

    def make(source: str) -> ChatModel:
        own = ChatTokenizer(plain.tokenizer, plain.config, {"default": source})
        return ChatModel(read_info("tiny", tiny_model, []), own, format_for(own))

    return make


@pytest.mark.parametrize(
    ("source", "effort", "expected"),
    [
        (HARMONY, "low", {"reasoning_effort": "low"}),
        (HARMONY, "high", {"reasoning_effort": "high"}),
        (SWITCH, "none", {"enable_thinking": False}),
        (SWITCH, "minimal", {"enable_thinking": True}),
        (BOTH, "high", {"enable_thinking": True, "reasoning_effort": "high"}),
        (BOTH, "max", {"enable_thinking": True, "reasoning_effort": "max"}),
        (BOTH, "none", {"enable_thinking": False}),
        (NAMED, "none", {"reasoning_effort": "none"}),
        (FIELD, "none", {}),
        (FIXED, "none", {}),
    ],
)
def test_an_effort_becomes_what_the_template_reads(model, source: str, effort: str, expected: dict[str, object]) -> None:
    chat = model(source)
    assert chat.thinking(effort) == expected
    said = [template.render(chat.tokenizer, [USER], kwargs=kwargs) for kwargs in ({}, expected)]
    assert (said[0] != said[1]) == bool(expected) or (source, effort) == (SWITCH, "none")  # which doesn't think by itself


@pytest.mark.parametrize(
    ("source", "effort", "named"),
    [
        (HARMONY, "none", "takes low, medium, high; send one of them"),
        (HARMONY, "minimal", "takes low, medium, high"),
        (HARMONY, "banana", "takes low, medium, high"),
        (SWITCH, "banana", "takes none, minimal, low, medium, high, xhigh, max"),
        (BOTH, "xhigh", "takes none, minimal, low, medium, high, max"),
        (NAMED, "xhigh", "takes none, low, medium, high"),
        (FIELD, "high", "doesn't think before it answers; leave it out"),
        (FIXED, "low", "doesn't think before it answers"),
    ],
)
def test_an_effort_that_would_be_ignored_is_refused(model, source: str, effort: str, named: str) -> None:
    with pytest.raises(Unsupported, match=named) as caught:
        model(source).thinking(effort, "reasoning.effort")
    assert caught.value.param == "reasoning.effort"
