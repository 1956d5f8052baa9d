"""An MCP server with tools that behave well, and tools that don't. Run by tests as a process of its own."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Literal

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

app = MCPServer("shop")


@app.tool()
def price(item: Literal["lamp", "chair"], count: int = 1) -> int:
    """What so many of an item cost."""
    return {"lamp": 12, "chair": 30}[item] * count


@app.tool()
def fail() -> str:
    raise ToolError("the shop is closed")


@app.tool()
def flood() -> str:
    return "x" * 2_000_000


@app.tool()
async def wait() -> str:
    await asyncio.sleep(600)
    return "late"


@app.tool()
async def block() -> str:
    time.sleep(600)  # noqa: ASYNC251 - it is meant to hold up the whole server
    return "late"


@app.tool()
def die() -> str:
    os._exit(3)


if __name__ == "__main__":
    app.run()
