"""Run inside the environment of OpenAI's Agents SDK: an agent with a tool, on the server at argv[1] with model argv[2].

Prints one JSON object of what came back; the test asserts on that.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from client_hosts import hosts
from openai import AsyncOpenAI
from pydantic import BaseModel

URL, MODEL, KEY = sys.argv[1], sys.argv[2], "tml-test"
set_tracing_disabled(True)  # traces would go to another host
called: list[str] = []


@function_tool(is_enabled=lambda context, agent: not called)
def get_weather(city: Literal["Bonn", "Bern"]) -> str:
    """The weather of a city."""
    called.append(city)
    return f"rain in {city}"


class Report(BaseModel):
    """What the agent answers. A format, because a model with random weights would never come to the end of a text."""

    rain: bool
    city: Literal["Bonn", "Bern"]


async def converse(kind, client: AsyncOpenAI) -> dict:
    called.clear()
    agent = Agent(
        name="Weather",
        instructions="Be brief.",
        tools=[get_weather],
        output_type=Report,
        model=kind(model=MODEL, openai_client=client),
        # A call in the first turn. From the second on the SDK would let the model decide; here the tool is gone once it was called.
        model_settings=ModelSettings(tool_choice="required", parallel_tool_calls=False, max_tokens=150, temperature=0.8),
    )
    result = await Runner.run(agent, "How is the weather in Bonn?", max_turns=8)
    whole = [item.type for item in result.new_items]
    calls = list(called)
    called.clear()
    streamed = Runner.run_streamed(agent, "How is the weather in Bonn?", max_turns=8)
    events = [event.type async for event in streamed.stream_events()]
    return {
        "items": whole,
        "streamed": [item.type for item in streamed.new_items],
        "calls": calls,
        "streamed_calls": list(called),
        "events": sorted(set(events)),
        "input_tokens": result.context_wrapper.usage.input_tokens,
        "reports": [isinstance(one.final_output, Report) for one in (result, streamed)],
    }


async def main() -> dict:
    async with AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0) as client:
        kinds = {"chat": OpenAIChatCompletionsModel, "responses": OpenAIResponsesModel}
        return {name: await converse(kind, client) for name, kind in kinds.items()}


out = asyncio.run(main())
out["hosts"] = sorted(hosts)
print(json.dumps(out))
