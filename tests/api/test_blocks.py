"""What a call streams is the beginning of a JSON object wherever it breaks off: the SDK reads it piece by piece, and stumbles over anything else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import RawMessageStreamEvent
from pydantic import TypeAdapter

from everlearn.api.anthropic.blocks import Blocks
from everlearn.api.replies import Step
from everlearn.render.tools import FORMATS

MAYBE = {"anyOf": [{"type": "string"}, {"type": "null"}]}
SCHEMA = {
    "type": "object",
    "properties": {
        "note": MAYBE,
        "days": {"type": "integer"},
        "rain": {"type": "boolean"},
        "any": {},
        "who": {"type": "object"},
        "parts": {"type": ["array", "string"]},
        "text": {"type": "string"},
    },
}
TOOL = {"type": "function", "function": {"name": "plan", "parameters": SCHEMA, "strict": True}}
VALUES: list[dict[str, str]] = [
    {"note": 'null and void\nof "words"', "days": "12", "rain": "true", "any": "3 days", "who": '{"a": "b c", "d": [1, null]}'},
    {"note": "nothing", "parts": '["a", {"b": 2}]', "text": "so\nit is", "rain": "True"},
    {"note": "12 apples", "days": "a dozen", "any": "NaN", "parts": "[not a list", "who": '{"a": 1} and more'},
    {"note": "null"},
]
START = {
    "type": "message_start",
    "message": {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None, "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 1},
    },
}  # fmt: skip
READ = TypeAdapter(RawMessageStreamEvent)


def qwen3_coder(values: dict[str, str]) -> str:
    elements = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in values.items())
    return f"<tool_call>\n<function=plan>\n{elements}</function>\n</tool_call>"


def deepseek_v32(values: dict[str, str]) -> str:
    elements = "".join(
        f'<｜DSML｜parameter name="{name}" string="{"true" if name == "text" else "false"}">{value}</｜DSML｜parameter>\n'
        for name, value in values.items()
    )
    return f'<｜DSML｜function_calls>\n<｜DSML｜invoke name="plan">\n{elements}</｜DSML｜invoke>\n</｜DSML｜function_calls>'


def llama4(values: dict[str, str]) -> str:
    written = [f"{name}={json.dumps(value) if name in ('note', 'text') else value}" for name, value in values.items()]
    return f"[plan({', '.join(written)}, last='it\\'s')]"


@pytest.mark.parametrize("values", VALUES, ids=lambda values: "-".join(values))
@pytest.mark.parametrize("write", [qwen3_coder, deepseek_v32, llama4])
def test_a_call_that_breaks_off_is_the_beginning_of_json(write: Any, values: dict[str, str]) -> None:
    text = write(values)
    for end in range(len(text) + 1):
        parser, blocks = FORMATS[write.__name__].stream([TOOL]), Blocks("s", lambda name: True)
        steps = [Step(parser.feed(text[place : place + 5][: end - place]), [], "") for place in range(0, end, 5)]
        told = [sent for step in (*steps, Step(parser.finish(), [], "")) for sent in blocks.take(step)] + blocks.end()
        message, buffers = None, {}
        for sent in (START, *(json.loads(one.partition(b"data: ")[2]) for one in told)):
            message = accumulate_event(event=READ.validate_python(sent), current_snapshot=message, json_bufs=buffers)
        assert message is not None
        assert [block.input for block in message.content if block.type == "tool_use"] == [
            block["input"] for block in blocks.content if block["type"] == "tool_use"
        ]
