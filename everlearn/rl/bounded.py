"""Work that ends in time, whatever it does: what hangs becomes a value, and nobody waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from everlearn.errors import InvalidRequest

T = TypeVar("T")
GRACE_SECONDS = 1.0  # what cancelled work gets to close what it holds; what won't end is left behind


class OutOfTime(Exception):
    """Becomes a Failure of kind "timeout", or a tool's result; nobody outside sees it."""


async def bounded(work: Awaitable[T], seconds: float, what: str = "the environment") -> T:
    """The result of `work`, or OutOfTime. Work that ignores being cancelled is left to itself, so that it can't hold up the others."""
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not done:
        task.cancel()
        await asyncio.wait({task}, timeout=GRACE_SECONDS)
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # whatever it still raises is nobody's
        raise OutOfTime(f"not over after {seconds:g} s; raise the limit, or make {what} faster")
    if task.cancelled():
        raise InvalidRequest(f"{what} cancelled itself (asyncio.CancelledError); let it raise an error of its own")
    return task.result()
