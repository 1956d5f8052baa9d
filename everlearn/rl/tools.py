"""Tools that a policy may call: typed Python functions, and whatever else answers a call (everlearn/rl/mcp_tools.py).

What a tool does wrong is told to whoever called it, as text, and ends nothing: a tool that raises, hangs or floods, a call of a tool that
isn't there, arguments that don't fit. Only one thing is no answer: a tool that can't be reached (`unavailable`), because that says
nothing about the call; an episode in which that happens should fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import re
import threading
import time
import typing
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, InvalidStateError
from typing import Annotated, Any, Literal

import msgspec

from everlearn.errors import InvalidRequest, Unavailable
from everlearn.rl.bounded import OutOfTime, bounded

FailedCall = Literal["", "unknown", "arguments", "raised", "timeout", "unavailable"]
POLL_SECONDS = 0.02  # how often a call looks whether another one has left its tool
PARAMETER = re.compile(r"^\s*(\w+)(?: \([^)]*\))?: +(.+)$")  # a line of a docstring's Args, as Google writes them


class ToolFailed(Exception):
    """Raise it in a tool to tell the caller something in your own words; other exceptions are told by their name and message."""


class ToolUnavailable(Unavailable):
    """The tool can't be reached, so the call has no answer. Nothing that a policy did is the reason."""


class ToolLimits(msgspec.Struct, frozen=True):
    """`seconds` bounds a call, `max_chars` what it may say. `calls_at_once` is for each tool: a call that hangs and can't be ended keeps
    its place, so that a tool leaves at most so many threads behind."""

    seconds: float = 10.0
    max_chars: int = 4000
    calls_at_once: int = 16


class ToolResult(msgspec.Struct, frozen=True):
    """What the caller is told. `failure` is empty for a call that worked, else

    | failure | what happened |
    |---|---|
    | unknown | there is no such tool |
    | arguments | they aren't JSON, or not what the tool takes; it was not called |
    | raised | the tool raised, or said itself that it failed |
    | timeout | it took longer than its limit |
    | unavailable | it couldn't be reached |
    """

    content: str
    failure: FailedCall = ""
    seconds: float = 0.0


class Tool(msgspec.Struct, frozen=True):
    """`parameters` is a JSON schema of type object. `read` makes of a call's JSON text the keyword arguments of `run`, or raises ValueError
    saying what is wrong with it. `run` may be asynchronous; if it isn't, it runs in a thread. `strict`: a server that decodes by
    grammar shall hold calls to the schema (a schema that no grammar can hold is then refused)."""

    name: str
    description: str
    parameters: dict[str, Any]
    read: Callable[[str], Mapping[str, Any]]
    run: Callable[..., Any]
    strict: bool = True

    @classmethod
    def of(cls, function: Callable[..., Any], name: str | None = None) -> Tool:
        """A function whose parameters all have types that JSON has (also Literal, TypedDict, dataclasses, msgspec structs, unions).

        The description is the docstring up to its `Args:`; there, or as a text in `Annotated`, parameters have descriptions of their
        own. Raises InvalidRequest for a function whose schema can't be told from its signature.
        """
        name = name or function.__name__
        description, described = _documented(inspect.getdoc(function) or "")
        arguments = _arguments(function, name, described)
        schema = _schema(arguments, name)

        def read(text: str) -> Mapping[str, Any]:
            given = msgspec.json.decode(text.encode("utf-8", "replace") or b"{}", type=arguments)
            return {field: getattr(given, field) for field in arguments.__struct_fields__}

        return cls(name, description, schema, read, function)

    @property
    def schema(self) -> dict[str, Any]:
        """As the OpenAI API takes it in `tools`."""
        told = {"name": self.name, "description": self.description, "parameters": self.parameters, "strict": self.strict}
        return {"type": "function", "function": told}


class Toolbox:
    """Tools by name. One toolbox serves any number of episodes at the same time, from any event loop."""

    def __init__(self, tools: Iterable[Tool | Callable[..., Any]], limits: ToolLimits | None = None):
        made = [one if isinstance(one, Tool) else Tool.of(one) for one in tools]
        self.tools = {tool.name: tool for tool in made}
        if len(self.tools) < len(made):
            names = [tool.name for tool in made]
            raise InvalidRequest(f"two tools are named {max(names, key=names.count)!r}; give one of them another name", param="tools")
        self.limits = limits or ToolLimits()
        self._places = {name: threading.Semaphore(self.limits.calls_at_once) for name in self.tools}

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """For the `tools` of a request to the OpenAI API."""
        return [tool.schema for tool in self.tools.values()]

    async def call(self, name: str, arguments: str) -> ToolResult:
        """What came of a call; `arguments` is JSON text. Raises nothing but CancelledError."""
        started = time.monotonic()
        content, failure = await self._call(name, arguments)
        if failure:
            content = _cut(content, self.limits.max_chars)
        return ToolResult(content, failure, time.monotonic() - started)

    async def _call(self, name: str, arguments: str) -> tuple[str, FailedCall]:
        tool = self.tools.get(name)
        if tool is None:
            return f"error: there is no tool {name[:100]!r}; there are {', '.join(self.tools) or 'none'}", "unknown"
        try:
            given = tool.read(arguments)
        except Exception as error:  # noqa: BLE001 - the arguments' fault, or that of a schema that can't be read
            return f"error: the arguments of {name} don't fit: {error or type(error).__name__}", "arguments"
        try:
            return await self._within_time(tool, given), ""
        except OutOfTime:
            return f"error: {name} was not over after {self.limits.seconds:g} s", "timeout"
        except ToolUnavailable as error:
            return f"error: {error}", "unavailable"
        except ToolFailed as error:
            return f"error: {error}", "raised"
        except Exception as error:  # noqa: BLE001 - whatever a tool raises is told to its caller
            return f"error: {type(error).__name__}: {error}", "raised"

    async def _within_time(self, tool: Tool, given: Mapping[str, Any]) -> str:
        place, ends = self._places[tool.name], time.monotonic() + self.limits.seconds
        while not place.acquire(blocking=False):
            if time.monotonic() > ends:
                raise OutOfTime
            await asyncio.sleep(POLL_SECONDS)
        left = max(ends - time.monotonic(), 0.0)
        if inspect.iscoroutinefunction(tool.run):
            task = asyncio.ensure_future(_awaited(tool, given, self.limits.max_chars))
            task.add_done_callback(lambda _: place.release())  # also of one that is cancelled before it begins
            return await bounded(task, left, tool.name)
        said = _in_a_thread(tool, given, place, self.limits.max_chars)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(said), left)
        except TimeoutError:
            if not said.cancelled():
                raise  # the tool's own
            raise OutOfTime from None


async def _awaited(tool: Tool, given: Mapping[str, Any], most: int) -> str:
    return _text(await tool.run(**given), most)


def _in_a_thread(tool: Tool, given: Mapping[str, Any], place: threading.Semaphore, most: int) -> Future[str]:
    """Its text, some time. Python can't end a thread: one that hangs is left behind, and doesn't keep the program from ending."""
    said: Future[str] = Future()

    def answer() -> tuple[str, Exception | None]:
        try:
            return _text(tool.run(**given), most), None
        except Exception as error:  # noqa: BLE001 - it is for whoever waits
            return "", error
        except BaseException as error:  # noqa: BLE001 - SystemExit, say: of this call alone
            return "", ToolFailed(f"{type(error).__name__}: {error}")
        finally:
            place.release()

    def run() -> None:
        text, error = answer()
        with contextlib.suppress(InvalidStateError):  # nobody waits any more
            if error is None:
                said.set_result(text)
            else:
                said.set_exception(error)

    threading.Thread(target=run, name=f"tool {tool.name}", daemon=True).start()
    return said


def _text(value: Any, most: int) -> str:
    """What a tool returned, as a model reads it: text as it is, anything else as JSON."""
    return _cut(value if isinstance(value, str) else msgspec.json.encode(value, enc_hook=str).decode(), most)


def _cut(text: str, most: int) -> str:
    told = text[:most].encode("utf-8", "replace").decode()  # half a surrogate pair can't be sent
    return told if len(text) <= most else f"{told}\n[{len(text) - most} more characters were cut off]"


# ---- from a function's signature ----


def _documented(text: str) -> tuple[str, dict[str, str]]:
    """The docstring without its sections, and what it says of each parameter."""
    told, _, rest = text.partition("\nArgs:\n")
    found: dict[str, str] = {}
    last = ""
    for line in rest.splitlines():
        if line and not line.startswith(" "):
            break  # another section
        if match := PARAMETER.match(line):
            last = match[1]
            found[last] = match[2].strip()
        elif last and line.strip():
            found[last] += " " + line.strip()
    return " ".join(re.split(r"\n(?:Returns|Raises|Yields|Examples?):\n", told)[0].split()), found


def _arguments(function: Callable[..., Any], name: str, described: Mapping[str, str]) -> type[msgspec.Struct]:
    """A struct with the function's parameters as fields: its schema is the tool's, and decoding it checks a call."""
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise InvalidRequest(f"the tool {name!r} has a type that can't be resolved ({error}); import it in its module") from None
    fields: list[Any] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise InvalidRequest(
                f"the parameter {parameter} of tool {name!r} can't be given by name; a tool's parameters are ordinary ones", param="tools"
            )
        if parameter.name not in hints:
            raise InvalidRequest(f"the parameter {parameter.name!r} of tool {name!r} has no type; a model must be told one", param="tools")
        kind = hints[parameter.name]
        text = next((one for one in getattr(kind, "__metadata__", ()) if isinstance(one, str)), described.get(parameter.name))
        if text:
            kind = Annotated[kind, msgspec.Meta(description=text)]
        if parameter.default is parameter.empty:
            fields.append((parameter.name, kind))
        else:
            fields.append((parameter.name, kind, parameter.default))
    try:
        return msgspec.defstruct(name, fields, kw_only=True, forbid_unknown_fields=True)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the tool {name!r} has a parameter that can't be described: {error}", param="tools") from None


def _schema(arguments: type[msgspec.Struct], name: str) -> dict[str, Any]:
    try:
        (top,), shared = msgspec.json.schema_components([arguments], ref_template="#/$defs/{name}")
    except TypeError as error:
        raise InvalidRequest(f"the tool {name!r} has a parameter of a type that JSON doesn't have: {error}", param="tools") from None
    schema = dict(shared.pop(top["$ref"].removeprefix("#/$defs/")))
    schema.pop("title", None)  # the tool's name again, and every token of it is read with every prompt
    return {**schema, **({"$defs": shared} if shared else {})}
