"""Samples on their way: each is sent at once, in no order, and again to every new engine until it is answered.

A sample is a function of (version, prompt, parameters, seed), so sending it twice does no harm. What trains goes through a feed
(everlearn/api/feed.py) instead; both are the dispatcher's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from everlearn.api.ledger import Pending, first
from everlearn.engine import protocol
from everlearn.faultpoints import around
from everlearn.store import log as request_log
from everlearn.store.log import Entry

if TYPE_CHECKING:
    from everlearn.api.dispatch import Dispatcher

log = logging.getLogger(__name__)


class Samples:
    def __init__(self, dispatcher: Dispatcher):
        self.dispatcher = dispatcher
        self.ledger = dispatcher.ledger

    def send(self, pending: Pending, payload: bytes | None) -> None:
        """To the present engine, if it hasn't got it and may have it."""
        engine, request_id = self.dispatcher.engine, pending.entry.request_id
        if not payload or not engine.up or pending.generation == engine.generation or pending.future.done():
            return
        if self.dispatcher.may_send(request_id):
            pending.generation = engine.generation
            with around("command.send"):
                engine.send(payload)
            self.dispatcher.sent(request_id, None)

    async def send_all(self) -> None:
        """All that this engine hasn't got, oldest first: after a start, and after a quarantine."""
        engine = self.dispatcher.engine
        generation = engine.generation
        for pending in self.ledger:
            if generation != engine.generation or not engine.up:
                return
            if pending.entry.kind == "sample" and pending.generation != generation:
                request_id = pending.entry.request_id
                try:
                    payload = await self.ledger.read(lambda conn, request_id=request_id: request_log.payload(conn, request_id))
                except Exception as error:  # the database is away for a moment
                    log.warning("samples wait: %s", error)
                    asyncio.get_running_loop().call_later(1.0, lambda: self.dispatcher.spawn(self.send_all()))
                    return
                self.send(pending, payload)

    async def finished(self, tenant: str, sampler_id: str, seqs: range, after: int, timeout: float) -> list[Entry]:
        """The samples of a sampler, with a seq in `seqs`, that finished after `after` (a finish_order, 0: ever), in the order in which
        they did; waits up to `timeout` seconds for the first. What was looked at once is not looked at again while it waits."""
        deadline = time.monotonic() + timeout
        while True:
            event = self.ledger.finished_event(sampler_id)
            event.clear()
            newer = partial(request_log.finished_samples, tenant=tenant, sampler_id=sampler_id, after=after, seqs=seqs)
            found, after = await self.ledger.read(newer)
            if found or time.monotonic() >= deadline or self.dispatcher.stopped.is_set():
                return found
            waiter = asyncio.ensure_future(event.wait())
            await first(waiter, self.dispatcher.stopped, deadline)
            waiter.cancel()

    async def cancel(self, tenant: str, request_id: str) -> bool:
        """Cancels an unfinished Sample: its future fails with code "cancelled". False if it had finished already, or trains.
        Raises NotFound for an id that this tenant has not got."""
        pending, engine = self.ledger.get(request_id), self.dispatcher.engine
        if pending is None or pending.entry.tenant != tenant:
            await self.ledger.read(lambda conn: request_log.get(conn, tenant, request_id))
            return False
        if pending.entry.kind != "sample":
            return False
        if engine.up and pending.generation == engine.generation:
            engine.send(protocol.Cancel(request_id))
        error = {"code": "cancelled", "message": "cancelled by the client", "param": None}
        await asyncio.shield(self.ledger.finish(pending.entry, None, error))
        self.dispatcher.let_go(request_id)
        return True
