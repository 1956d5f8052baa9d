"""Tools: what a model is told of a function, what a call must look like, and everything that a tool can do wrong."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest

from everlearn.errors import InvalidRequest, Unavailable
from everlearn.rl import mcp_tools
from everlearn.rl.mcp_tools import McpServer, _reader
from everlearn.rl.tools import Tool, Toolbox, ToolFailed, ToolLimits, ToolResult, ToolUnavailable

SHOP = [sys.executable, str(Path(__file__).parent / "mcp_shop.py")]


@dataclass
class Address:
    street: str
    number: int | None = None


def deliver(
    to: Address, items: list[str], speed: Literal["slow", "fast"] = "slow", weight: Annotated[float, "in kilograms"] = 1.0
) -> dict[str, Any]:
    """Sends a parcel.

    It may take a while.

    Args:
        to: where it goes
        items: what is in it,
            one by one

    Returns:
        what was sent
    """
    return {"to": to, "items": items, "speed": speed, "weight": weight}


def call(box: Toolbox, name: str, arguments: str = "{}") -> ToolResult:
    return asyncio.run(box.call(name, arguments))


# ---- functions ----


def test_a_function_s_schema_is_its_signature_and_its_docstring():
    told = Tool.of(deliver).schema["function"]
    assert (told["name"], told["description"], told["strict"]) == ("deliver", "Sends a parcel. It may take a while.", True)
    schema = told["parameters"]
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["required"] == ["to", "items"] and schema["additionalProperties"] is False and "title" not in schema
    properties = schema["properties"]
    assert properties["items"] == {"type": "array", "items": {"type": "string"}, "description": "what is in it, one by one"}
    assert properties["weight"] == {"type": "number", "default": 1.0, "description": "in kilograms"}
    assert sorted(properties["speed"]["enum"]) == ["fast", "slow"] and schema["$defs"]["Address"]["required"] == ["street"]
    good = {"to": {"street": "Hill"}, "items": ["cup"]}
    jsonschema.validate(good, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**good, "colour": "red"}, schema)


def test_arguments_are_checked_and_results_are_json():
    box = Toolbox([deliver])
    fine = call(box, "deliver", '{"to": {"street": "Hügel", "number": 3}, "items": []}')
    assert fine.content == '{"to":{"street":"Hügel","number":3},"items":[],"speed":"slow","weight":1.0}' and fine.failure == ""
    for arguments, word in [
        ('{"to": {"street": "Hill"}}', "items"),
        ('{"to": {"street": "Hill"}, "items": ["a", 1]}', "$.items[1]"),
        ('{"to": {"street": "Hill"}, "items": [], "speed": "warp"}', "$.speed"),
        ('{"to": {"street": "Hill"}, "items": [], "colour": "red"}', "colour"),
        ('{"to": {"street": "Hi', "don't fit"),
        ("[]", "Expected `object`"),
        ("[" * 100_000, "don't fit"),
        ('{"to": "\ud800"}', "don't fit"),
    ]:
        wrong = call(box, "deliver", arguments)
        assert wrong.failure == "arguments" and word in wrong.content, (arguments[:60], wrong)


def test_a_tool_that_is_not_there():
    assert call(Toolbox([deliver]), "delver").content == "error: there is no tool 'delver'; there are deliver"
    assert call(Toolbox([]), "x" * 10_000).failure == "unknown"


def hangs() -> str:
    time.sleep(3600)
    return "late"


async def waits() -> str:
    await asyncio.sleep(3600)
    return "late"


async def stubborn() -> str:
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            continue


def divides() -> float:
    return 1 / 0


def refuses() -> str:
    raise ToolFailed("not on Sundays")


def leaves() -> str:
    sys.exit(3)


def own_timeout() -> str:
    raise TimeoutError("the database was slow")


def gone() -> str:
    raise ToolUnavailable("the shop's line is dead")


def floods() -> str:
    return "x" * 10_000_000


def halves() -> str:
    return "a\ud800b"


WRONG: dict[Callable[..., Any], tuple[str, str]] = {
    hangs: ("timeout", "error: hangs was not over after 1 s"),
    waits: ("timeout", "error: waits was not over after 1 s"),
    stubborn: ("timeout", "error: stubborn was not over after 1 s"),
    divides: ("raised", "error: ZeroDivisionError: division by zero"),
    refuses: ("raised", "error: not on Sundays"),
    leaves: ("raised", "error: SystemExit: 3"),
    own_timeout: ("raised", "error: TimeoutError: the database was slow"),
    gone: ("unavailable", "error: the shop's line is dead"),
    floods: ("", "x" * 50 + "\n[9999950 more characters were cut off]"),
    halves: ("", "a?b"),
}


@pytest.mark.parametrize("function", WRONG, ids=lambda function: function.__name__)
def test_whatever_a_tool_does_is_told(function: Callable[..., Any]):
    async def play() -> ToolResult:
        try:
            return await Toolbox([function], ToolLimits(seconds=1, max_chars=50)).call(function.__name__, "")
        finally:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.get_coro().close()  # the stubborn one lets go of nothing, and asyncio.run would wait for it

    started = time.monotonic()
    result = asyncio.run(play())
    assert (result.failure, result.content) == WRONG[function]
    assert time.monotonic() - started < 60


def test_a_schema_that_cannot_be_checked_is_told_and_ends_nothing():
    """Patterns of other languages' regular expressions are legal in a server's schema."""
    schema = {"type": "object", "properties": {"name": {"type": "string", "pattern": r"^\p{L}+$"}}}

    async def run(**arguments: Any) -> str:
        return "never"

    tool = Tool("greet", "", schema, _reader(schema), run)
    result = asyncio.run(Toolbox([tool]).call("greet", '{"name": "Ana"}'))
    assert result.failure == "arguments" and "greet" in result.content


def test_calls_that_hang_keep_their_place_and_no_more_threads_are_made():
    box = Toolbox([hangs, divides], ToolLimits(seconds=0.5, calls_at_once=2))

    async def crowd() -> list[ToolResult]:
        return await asyncio.gather(*(box.call("hangs", "{}") for _ in range(6)), box.call("divides", "{}"))

    before = threading.active_count()
    *hung, other = asyncio.run(crowd())
    assert {one.failure for one in hung} == {"timeout"} and other.failure == "raised"
    assert threading.active_count() - before <= 2


def untyped(x) -> str:
    return x


def many(*x: int) -> int:
    return 0


def odd(x: threading.Thread) -> int:
    return 0


def test_functions_that_cannot_be_tools():
    for function, word in [
        (untyped, "'x' of tool 'untyped' has no type"),
        (many, "can't be given by name"),
        (odd, "that JSON doesn't have"),
    ]:
        with pytest.raises(InvalidRequest, match=word):
            Tool.of(function)
    with pytest.raises(InvalidRequest, match="two tools are named 'deliver'"):
        Toolbox([deliver, deliver])


# ---- MCP ----


@pytest.fixture(scope="module")
def shop() -> Iterator[McpServer]:
    pytest.importorskip("mcp", reason="pip install 'mcp>=2.3,<3'")
    with McpServer(SHOP, environment={"PYTHONPATH": ":".join(sys.path)}) as server:
        yield server


def test_an_mcp_server_s_tools_are_tools(shop: McpServer):
    box = Toolbox(shop.tools)
    assert list(box.tools) == ["price", "fail", "flood", "wait", "block", "die"]
    told = box.tools["price"].schema["function"]
    assert told["description"] == "What so many of an item cost." and told["parameters"]["properties"]["item"]["enum"] == ["lamp", "chair"]
    assert call(box, "price", '{"item": "chair", "count": 3}').content == "90"
    wrong = call(box, "price", '{"item": "sofa"}')
    assert wrong.failure == "arguments" and "$.item: 'sofa' is not one of" in wrong.content
    closed = call(box, "fail")
    assert closed.failure == "raised" and "the shop is closed" in closed.content
    assert len(call(box, "flood").content) < 5000

    async def crowd() -> list[str]:
        return [one.content for one in await asyncio.gather(*(box.call("price", f'{{"item": "lamp", "count": {n}}}') for n in range(20)))]

    assert asyncio.run(crowd()) == [str(12 * n) for n in range(20)]


def test_an_mcp_server_that_dies_or_hangs_is_started_anew(shop: McpServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mcp_tools, "PING_SECONDS", 30.0)
    box, patient = Toolbox(shop.tools, ToolLimits(seconds=1)), Toolbox(shop.tools, ToolLimits(seconds=60))
    starts = shop.starts
    assert call(box, "wait").failure == "timeout" and call(patient, "price", '{"item": "lamp"}').content == "12"
    assert shop.starts == starts, "one slow call says nothing about the server"
    assert call(patient, "die").failure == "unavailable"
    assert call(patient, "price", '{"item": "lamp"}').content == "12" and shop.starts == starts + 1
    monkeypatch.setattr(mcp_tools, "PING_SECONDS", 1.0)
    assert call(box, "block").failure == "timeout"
    deadline = time.monotonic() + 60
    while call(patient, "price", '{"item": "lamp"}').failure and time.monotonic() < deadline:
        time.sleep(0.2)
    assert shop.starts == starts + 2


def test_an_mcp_server_that_cannot_be_started():
    pytest.importorskip("mcp", reason="pip install 'mcp>=2.3,<3'")
    for command, word in [(["no-such-program"], "No such file"), ([sys.executable, "-c", "raise SystemExit(3)"], "closed")]:
        with pytest.raises(ToolUnavailable, match=word):
            with McpServer(command):
                raise AssertionError("never entered")
    with McpServer(SHOP, environment={"PYTHONPATH": ":".join(sys.path)}) as server:
        box = Toolbox(server.tools)
    assert call(box, "price", '{"item": "lamp"}').failure == "unavailable"


def test_a_server_from_the_package_registry_is_a_tool_source():
    pytest.importorskip("mcp_server_time", reason="pip install mcp-server-time")
    with McpServer([sys.executable, "-m", "mcp_server_time"], environment={"PYTHONPATH": ":".join(sys.path)}) as server:
        told = call(Toolbox(server.tools), "convert_time", '{"source_timezone": "UTC", "time": "12:00", "target_timezone": "Asia/Tokyo"}')
    assert told.failure == "" and '"time_difference": "+9.0h"' in told.content


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(Unavailable, match="pip install 'mcp"):
        McpServer(SHOP)
