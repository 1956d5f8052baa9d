"""Tools of an MCP server that runs as a subprocess and speaks over its pipes. Needs `pip install 'mcp>=2.3,<3'`.

The server has a thread and an event loop of its own here, so its tools can be called from any event loop, and from many at once. A
server that dies, or hangs so that it answers nothing any more, is started anew with the next call; what it kept in its memory is lost then.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from everlearn.errors import InvalidRequest, Unavailable
from everlearn.rl.tools import Tool, ToolFailed, ToolUnavailable

PING_SECONDS = 5.0  # a server that a call was given up on gets so long to show that it still answers
MAX_TOOLS = 1000


class McpServer:
    """`command` is a program and its arguments; `environment` is all of the environment that it gets besides HOME, PATH, USER and the
    like, `folder` where it runs, `log` a file that its error output is appended to (else nobody sees it).

    `strict`: hold calls to the schemas of the tools where the model is decoded by grammar. Schemas of others may have what no grammar can
    hold, so it is off unless asked for; calls are checked against the schemas in any case.

    Use it as a context manager: entering starts the server and asks for its tools, leaving ends it. Raises Unavailable where the package
    isn't installed, and ToolUnavailable where the server can't be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        log: Path | None = None,
        strict: bool = False,
        start_seconds: float = 60.0,
    ):
        if not command:
            raise InvalidRequest("command is empty; give a program and its arguments", param="command")
        self.command, self.environment, self.folder = list(command), dict(environment or {}), folder
        self.log, self.strict, self.start_seconds = log, strict, start_seconds
        self.starts = 0  # how often it was started
        self.tools: list[Tool] = []
        self._mcp = _package()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"mcp {command[0]}", daemon=True)
        self._client: Any = None
        self._gone: asyncio.Event | None = None  # set: the client of now is to be left
        self._task: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.tools = asyncio.run_coroutine_threadsafe(self._list(), self._loop).result()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the server. What is being called fails."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._leave(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        if not self._loop.is_closed():
            self._loop.close()

    async def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """What the tool says. Raises ToolFailed where it says that it failed, ToolUnavailable where the server can't be reached."""
        if self._loop.is_closed():
            raise ToolUnavailable(f"the MCP server {self.command[0]} was closed; call its tools within its `with`")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._call(name, dict(arguments)), self._loop))

    # -- on the thread -----------------------------------------------------------------------------------------------------

    async def _call(self, name: str, arguments: dict[str, Any]) -> str:
        # A start has more time than a call, and goes on when the call's is over: the next call finds it.
        client = await asyncio.shield(self._loop.create_task(self._connected()))
        try:
            result = await client.call_tool(name, arguments)
        except asyncio.CancelledError:  # out of time: the call alone, or the whole server?
            self._loop.create_task(self._look_after(client))
            raise
        except Exception as error:
            if await self._answers(client):
                raise ToolFailed(str(error) or type(error).__name__) from error
            await self._leave(client)
            raise ToolUnavailable(f"the MCP server {self.command[0]} died during a call of {name} ({error!r:.200})") from error
        text = _text(result)
        if result.is_error:
            raise ToolFailed(text)
        return text

    async def _list(self) -> list[Tool]:
        client = await self._connected()
        found: list[Tool] = []
        cursor = None
        while len(found) < MAX_TOOLS:
            page = await asyncio.wait_for(client.list_tools(cursor=cursor), self.start_seconds)
            found += [self._tool(one) for one in page.tools]
            cursor = page.next_cursor
            if cursor is None:
                return found
        raise InvalidRequest(f"the MCP server {self.command[0]} has more than {MAX_TOOLS} tools", param="command")

    def _tool(self, one: Any) -> Tool:
        async def run(**arguments: Any) -> str:
            return await self.call(one.name, arguments)

        return Tool(one.name, one.description or "", dict(one.input_schema), _reader(one.input_schema), run, self.strict)

    async def _connected(self) -> Any:
        async with self._starting:
            if self._client is None:
                ready: asyncio.Future[Any] = self._loop.create_future()
                self._gone = asyncio.Event()
                self._task = self._loop.create_task(self._serve(ready, self._gone))
                try:
                    self._client = await asyncio.wait_for(asyncio.shield(ready), self.start_seconds)
                except Exception as error:
                    self._task.cancel()
                    why = f"not ready in {self.start_seconds:g} s" if isinstance(error, TimeoutError) else f"{_first(error)!r:.300}"
                    raise ToolUnavailable(
                        f"the MCP server {' '.join(self.command)!r:.200} can't be started ({why}); run it by hand to see what it says"
                    ) from error
                self.starts += 1
            return self._client

    async def _serve(self, ready: asyncio.Future[Any], gone: asyncio.Event) -> None:
        """One life of the server. What holds it must be entered and left by the same task."""
        parameters = self._mcp.StdioServerParameters(command=self.command[0], args=self.command[1:], env=self.environment, cwd=self.folder)
        with (self.log or Path(os.devnull)).open("a", encoding="utf-8") as log:
            try:
                async with self._mcp.Client(self._mcp.stdio_client(parameters, errlog=log), cache=None) as client:
                    ready.set_result(client)
                    await gone.wait()
            except Exception as error:  # noqa: BLE001 - it is for whoever waits; a server that is left may end as it likes
                if not ready.done():
                    ready.set_exception(error)

    async def _answers(self, client: Any) -> bool:
        try:
            await asyncio.wait_for(client.list_tools(), PING_SECONDS)
        except Exception:  # noqa: BLE001 - then it doesn't
            return False
        return True

    async def _look_after(self, client: Any) -> None:
        if not await self._answers(client):
            await self._leave(client)

    async def _leave(self, client: Any = None) -> None:
        """Ends the server, if it still is `client`'s (None: whichever it is)."""
        if self._task is None or self._gone is None or (client is not None and client is not self._client):
            return
        task, gone = self._task, self._gone
        self._client = self._task = self._gone = None
        gone.set()
        await asyncio.wait({task}, timeout=PING_SECONDS * 2)
        task.cancel()  # no effect on one that has ended


def _first(error: BaseException) -> BaseException:
    """What went wrong, without the groups that the package's task groups put around it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _package() -> Any:
    try:
        import mcp
    except ImportError:
        raise Unavailable("tools of MCP servers need a package: pip install 'mcp>=2.3,<3'") from None
    return mcp


def _reader(schema: Mapping[str, Any]) -> Callable[[str], Mapping[str, Any]]:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    validator = Draft202012Validator(schema)

    def read(text: str) -> Mapping[str, Any]:
        given = json.loads(text or "{}")
        wrong = best_match(validator.iter_errors(given))
        if wrong is not None:
            raise ValueError(f"{wrong.json_path}: {wrong.message}")
        if not isinstance(given, dict):
            raise ValueError("they must be a JSON object")
        return given

    return read


def _text(result: Any) -> str:
    """The text of a result; of what isn't text, what it is."""
    parts = [block.text if block.type == "text" else f"[{block.type}, which can't be shown]" for block in result.content]
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(parts)
