"""The guide on tools: its Python runs as it stands there, and its example of a prompt is what the code renders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from everlearn.render import template
from everlearn.render.tokenizer import ChatTokenizer
from everlearn.render.tools import FORMATS, format_for
from tests.render.conftest import smollm2  # noqa: F401 - a fixture


def page(root: Path) -> str:
    return (root / "docs" / "guides" / "tools.md").read_text(encoding="utf-8")


def test_the_datum_trains_the_call_alone(root: Path, smollm2: Path, tokenizer: ChatTokenizer):  # noqa: F811
    (program,) = re.findall(r"^```python\n(.*?)^```$", page(root), flags=re.M | re.S)
    names: dict[str, Any] = {}
    exec(program.replace('Path.home() / ".everlearn" / "models" / "smollm2"', f"Path({str(smollm2)!r})"), names)
    inputs = names["example"].loss_fn_inputs
    targets, weights = inputs["target_tokens"].to_numpy(), inputs["weights"].to_numpy()
    assert len(targets) == len(weights) == names["example"].model_input.length
    trained = tokenizer.decode([int(token) for token, weight in zip(targets, weights, strict=True) if weight])
    assert trained == '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bonn"}}\n</tool_call><|im_end|>'


def test_the_prompt_is_as_shown(root: Path, tokenizer: ChatTokenizer):
    (shown,) = re.findall(r"^```text\n(.*?)^```$", page(root), flags=re.M | re.S)
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bonn"}'}}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
    messages = [
        {"role": "user", "content": "How is the weather in Bonn?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "rain"},
    ]
    text = template.render(tokenizer, format_for(tokenizer).inject(messages, [tool]), add_generation_prompt=False)
    assert shown == text.replace('"parameters": {}', '"parameters": {...}')


def test_the_table_lists_every_format(root: Path):
    assert set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`[^|]*) \|", page(root), flags=re.M)))) >= set(FORMATS)
