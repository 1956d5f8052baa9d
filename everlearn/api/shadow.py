"""Shadow answers: a candidate answers what the champion has answered, unseen, and its answer is recorded beside the champion's.

It costs what is left over: an answer at a time for each server, of SHADOW_TOKENS at most, none while requests wait or much is running, and
nothing of the caller's limits. Its record has the route "shadow", and says in its metadata which record it stands beside. It
is in that one's episode without being part of it, and is forgotten with it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import msgspec

from everlearn.errors import EverlearnError
from everlearn.store.records import SHADOW_OF, UNSEEN

if TYPE_CHECKING:
    from everlearn.api.calls import Call

log = logging.getLogger(__name__)

SHADOW_TOKENS = 512
MOST_RUNNING = 1


class Shadows:
    """The shadow answers under way; the event loop's alone."""

    def __init__(self) -> None:
        self.running: set[asyncio.Task[None]] = set()

    def offer(self, call: Call) -> None:
        """Call when a call has ended: begins its shadow's answer, if it has one and there is room."""
        if call.exchanges[0].opened.spec.pooling:  # a vector says nothing that could be compared
            return
        room = call.svc.serving.sequences
        if call.target.shadow is None or len(self.running) >= MOST_RUNNING or 2 * room.total > room.limit or call.svc.dispatcher.draining:
            return
        task = asyncio.get_running_loop().create_task(_answer(call))
        self.running.add(task)
        task.add_done_callback(self.running.discard)


async def _answer(call: Call) -> None:
    target = call.target.shadow
    assert target is not None
    shown = call.exchanges[0]
    spec = shown.opened.spec
    most = min(spec.params.max_tokens, SHADOW_TOKENS)
    params = msgspec.structs.replace(spec.params, max_tokens=most, min_tokens=min(spec.params.min_tokens, most))
    spec = msgspec.structs.replace(spec, target=target, n=1, stream=False, params=params)
    asked = msgspec.structs.replace(call.asked, route=UNSEEN, metadata={SHADOW_OF: shown.record_id})
    beside = type(call)(call.svc, call.caller, target, asked)
    try:
        await beside.unseen(msgspec.structs.replace(shown.opened, spec=spec))
    except EverlearnError as error:  # nobody waits for it, and nobody is told
        log.info("a shadow answer of %s wasn't made: %s", target.name, error.message)
