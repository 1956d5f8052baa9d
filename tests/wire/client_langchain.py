"""Run inside LangChain's environment: ChatOpenAI with tools and formats, on the server at argv[1] with model argv[2].

Prints one JSON object of what came back; the test asserts on that.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Literal

from client_hosts import hosts
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

URL, MODEL, KEY = sys.argv[1], sys.argv[2], "tml-test"


@tool
def get_weather(city: Literal["Bonn", "Bern"]) -> str:
    """The weather of a city."""
    return f"rain in {city}"


class Trip(BaseModel):
    """A trip."""

    city: Literal["Bonn", "Bern"]
    days: Literal[1, 2, 3]


async def converse(**settings) -> dict:
    model = ChatOpenAI(base_url=f"{URL}/v1", api_key=KEY, model=MODEL, max_tokens=200, temperature=0.8, max_retries=0, **settings)
    asking = model.bind_tools([get_weather], tool_choice="required", strict=True, parallel_tool_calls=False)
    answering = model.bind_tools([get_weather])
    messages: list = [HumanMessage("How is the weather in Bonn?")]
    said = asking.invoke(messages)
    messages.append(said)
    messages += [get_weather.invoke(call) for call in said.tool_calls]
    final = answering.invoke(messages)
    chunks = list(asking.stream(messages[:1]))
    streamed = chunks[0]
    for chunk in chunks[1:]:
        streamed = streamed + chunk
    beside = await asking.ainvoke(messages[:1])
    trip = model.with_structured_output(Trip, method="json_schema", strict=True).invoke("Where to?")
    return {
        "calls": [[call["name"] for call in one.tool_calls] for one in (said, streamed, beside)],
        "results": [message.content for message in messages[2:]],
        "prompts": [said.usage_metadata["input_tokens"], final.usage_metadata["input_tokens"]],
        "chunks": len(chunks),
        "trip": trip.model_dump(),
    }


async def main() -> dict:
    return {"chat": await converse(), "responses": await converse(use_responses_api=True)}


out = asyncio.run(main())  # one loop, because LangChain's clients share their connections
out["hosts"] = sorted(hosts)
print(json.dumps(out))
