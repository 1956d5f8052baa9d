"""Run inside LiteLLM's environment: a tool-using conversation over the OpenAI and the Anthropic API of the server at argv[1], model argv[2].

Prints one JSON object of what came back; the test asserts on that.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # the list of prices would be fetched from another host

import litellm
from client_hosts import hosts

URL, MODEL, KEY = sys.argv[1], sys.argv[2], "tml-test"
ROUTES = {
    "openai": {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": KEY},
    "anthropic": {"model": f"anthropic/{MODEL}", "api_base": f"{URL}/anthropic/api", "api_key": KEY},
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Bonn", "Bern"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


def get_weather(city: str) -> str:
    return f"rain in {city}"


def converse(stream: bool, **route) -> dict:
    messages: list = [{"role": "user", "content": "How is the weather in Bonn?"}]

    def ask(**fields):
        if stream:
            fields["stream_options"] = {"include_usage": True}
        answer = litellm.completion(messages=messages, tools=[WEATHER], stream=stream, max_tokens=200, **fields, **route)
        return litellm.stream_chunk_builder(list(answer), messages=messages) if stream else answer

    asked = ask(tool_choice="required", parallel_tool_calls=False)
    said = asked.choices[0].message
    messages.append(said)
    for call in said.tool_calls:
        result = get_weather(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": result})
    final = ask(temperature=0.5)
    return {
        "calls": [call.function.name for call in said.tool_calls],
        "finish": asked.choices[0].finish_reason,
        "results": [message["content"] for message in messages[2:]],
        "prompts": [asked.usage.prompt_tokens, final.usage.prompt_tokens],
        "answered": final.choices[0].finish_reason,
    }


def refused(**route) -> str:
    try:
        litellm.completion(messages=[{"role": "user", "content": "hi"}], max_tokens=4, temperature=9, **route)
    except litellm.BadRequestError as error:
        return str(error)
    return ""


out: dict = {}
for name, route in ROUTES.items():
    out[name] = {"whole": converse(False, **route), "streamed": converse(True, **route), "refused": refused(**route)}
out["hosts"] = sorted(hosts)
print(json.dumps(out))
