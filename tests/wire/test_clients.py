"""Frameworks on top of the SDKs, unmodified and in their own environments: each asks for a tool, runs it and sends its result.

Slow, because their environments are made on first use. No name of another host is looked up by any of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.live import LiveServer
from tests.wire.sdk_envs import python_with, run_script

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
HERE = {"127.0.0.1", "localhost", "None"}


def run(server: LiveServer, script: str, package: str, version: str, *more: str) -> dict[str, Any]:
    path, python = Path(__file__).with_name(script), python_with(package, version, *more)
    lines = run_script(python, path, server.url, server.model, timeout=900).strip().splitlines()
    out: dict[str, Any] = json.loads(lines[-1])
    assert set(out.pop("hosts")) <= HERE
    return out


def test_litellm_calls_a_tool_over_both_apis(server: LiveServer) -> None:
    out = run(server, "client_litellm.py", "litellm", "1.106.2", "mcp")  # with tools it imports mcp, and doesn't ask for it
    assert set(out) == {"openai", "anthropic"}
    for told in out.values():
        assert "temperature" in told["refused"]
        for one in (told["whole"], told["streamed"]):
            assert one["calls"] == ["get_weather"] and one["finish"] == "tool_calls" and one["answered"] in ("stop", "length", "tool_calls")
            assert one["results"][0] in ("rain in Bonn", "rain in Bern") and one["prompts"][1] > one["prompts"][0] > 50


def test_langchain_calls_a_tool_and_fills_a_form(server: LiveServer) -> None:
    out = run(server, "client_langchain.py", "langchain-openai", "1.7.3")
    assert set(out) == {"chat", "responses"}
    for told in out.values():
        assert told["calls"] == [["get_weather"]] * 3 and told["chunks"] > 3
        assert told["results"][0] in ("rain in Bonn", "rain in Bern") and told["prompts"][1] > told["prompts"][0] > 50
        assert told["trip"]["city"] in ("Bonn", "Bern") and told["trip"]["days"] in (1, 2, 3)


def test_an_agent_of_openais_sdk_runs_its_tool_and_answers(server: LiveServer) -> None:
    out = run(server, "client_agents.py", "openai-agents", "0.24.0")
    assert set(out) == {"chat", "responses"}
    for told in out.values():
        for items, calls in ((told["items"], told["calls"]), (told["streamed"], told["streamed_calls"])):
            assert items[:2] == ["tool_call_item", "tool_call_output_item"] and items[-1] == "message_output_item"
            assert calls and set(calls) <= {"Bonn", "Bern"}
        assert {"raw_response_event", "run_item_stream_event"} <= set(told["events"])
        assert told["reports"] == [True, True] and told["input_tokens"] > 100
