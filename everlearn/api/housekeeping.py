"""What has to be done now and then so that disk and memory stay bounded, and the status line.

Everything is idempotent and may be late; nothing here is needed for an answer to be right.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

from everlearn.engine import protocol
from everlearn.store import deployments, forgetting, garbage, memories, records, runs, sessions, steps
from everlearn.store import log as request_log

if TYPE_CHECKING:
    from everlearn.api.services import Services

log = logging.getLogger(__name__)

STATUS_SECONDS = 10.0
SWEEP_SECONDS = 60.0
SWEEP_AT_LEAST = 5.0  # between two sweeps that snapshots ask for


class Housekeeping:
    def __init__(self, svc: Services):
        self.svc = svc
        self._sweep_now = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._tokens = (time.monotonic(), 0, 0)

    def start(self) -> None:
        self.svc.dispatcher.on_snapshot = self._sweep_now.set
        for job, seconds in ((self._status, STATUS_SECONDS), (self._unload_idle, 1.0)):
            self._tasks.append(asyncio.create_task(every(seconds, job)))
        self._tasks.append(asyncio.create_task(self._sweeps()))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- disk --------------------------------------------------------------------------------------------------------------

    async def _sweeps(self) -> None:
        """Once a minute, and soon after a snapshot made an older one superfluous. What has expired goes by the clock: a steady
        stream of snapshots must not put it off."""
        due = time.monotonic() + SWEEP_SECONDS
        await guarded(self._scrub)
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(due - time.monotonic()):
                    await self._sweep_now.wait()
            if time.monotonic() >= due:
                due = time.monotonic() + SWEEP_SECONDS
                await guarded(self._expire)
                await guarded(self._scrub)
            self._sweep_now.clear()
            await guarded(self._remove_garbage)
            await asyncio.sleep(SWEEP_AT_LEAST)

    async def _expire(self) -> None:
        svc, settings, now = self.svc, self.svc.settings.store, time.time()
        await svc.write(lambda conn: request_log.expire(conn, now, settings.result_retention_seconds))
        await self._forget_records(now - settings.record_retention_seconds)
        await svc.write(partial(steps.forget_rollouts, before=now - settings.record_retention_seconds))
        await self._forget_histories(now - settings.record_retention_seconds)
        for run in await svc.read(lambda conn: runs.idle_runs(conn, now - runs.SILENCE_SECONDS)):
            await svc.write(partial(runs.unload_run, tenant=run.tenant, run_id=run.run_id))
            await svc.dispatcher.forget(run.run_id)
        while await svc.write(partial(sessions.expire, before=now - settings.session_retention_seconds)) == sessions.PIECE:
            await asyncio.sleep(0.05)  # others can write in between
        usage = await svc.read(request_log.usage)
        svc.metrics.store_bytes.labels("payloads").set(usage.payload_bytes)
        svc.metrics.store_bytes.labels("results").set(usage.result_bytes)
        if usage.payload_bytes > settings.log_max_bytes:  # no snapshot lets answers go: they go with their time
            await self._shrink(usage.payload_bytes - settings.log_max_bytes)

    async def _scrub(self) -> None:
        """Bytes of what was forgotten: whoever waited for them to go was cut off, or this server was killed meanwhile."""
        if await asyncio.to_thread(memories.scrub, self.svc.db):
            log.info("the last bytes of what was forgotten are gone")

    async def _forget_records(self, before: float) -> None:
        """Those past their time, and the oldest of too many; in pieces, so that others can write in between."""
        beyond = await self.svc.read(partial(records.oldest_beyond, max_bytes=self.svc.settings.store.record_max_bytes))
        before = max(before, beyond or 0.0)
        while await self.svc.write(partial(records.sweep, before=before)) == records.SWEEP_ROWS:
            await asyncio.sleep(0.05)
        self.svc.metrics.store_bytes.labels("records").set(await self.svc.read(records.size))

    async def _forget_histories(self, before: float) -> None:
        """A history is kept as long as what it tells of, and then as long as a record is."""
        while gone := await self.svc.read(partial(forgetting.forgotten_feedback, before=before)):
            await self.svc.write(partial(forgetting.drop_history, feedback_ids=gone))
            await asyncio.sleep(0.05)
        await self.svc.write(partial(deployments.sweep_log, before=before))

    async def _shrink(self, excess: int) -> None:
        """The log is over its bound: the runs that fill it most are asked for snapshots, which let their payloads go."""
        dispatcher = self.svc.dispatcher
        for model_id, size in await self.svc.read(request_log.heaviest):
            if excess <= 0:
                return
            feed = dispatcher.feeds.get(model_id)
            if feed is not None and feed.generation == dispatcher.engine.generation and dispatcher.engine.up:
                dispatcher.engine.send(protocol.TakeSnapshot(model_id))
                excess -= size
            elif feed is None:
                await dispatcher.revive(model_id)  # brings it into the engine; the next sweep asks for its snapshot
                excess -= size

    async def _remove_garbage(self) -> None:
        await asyncio.to_thread(garbage.collect, self.svc.db, time.time())

    # -- memory ------------------------------------------------------------------------------------------------------------

    async def _unload_idle(self) -> None:
        """An adapter that nobody has trained for long leaves the engine, after a snapshot if it has changed since the last."""
        dispatcher, limit = self.svc.dispatcher, self.svc.settings.engine.idle_unload_seconds
        if not dispatcher.engine.up:
            return
        for feed in list(dispatcher.feeds.values()):
            if not feed.idle or time.monotonic() - feed.active_at < limit:
                continue
            here = feed.generation == dispatcher.engine.generation
            if here and feed.effect_seq > max(feed.snapshot_seq, 0):
                dispatcher.engine.send(protocol.TakeSnapshot(feed.model_id))
                feed.active_at = time.monotonic() - limit + min(limit, 10.0)  # looks again in a while
            else:
                log.info("run %s is idle; its adapter leaves memory", feed.model_id)
                await dispatcher.forget(feed.model_id)

    # -- words -------------------------------------------------------------------------------------------------------------

    async def _status(self) -> None:
        engine, stats = self.svc.engine, self.svc.dispatcher.stats()
        ready, reason = self.svc.dispatcher.readiness()
        now, trained, sampled = time.monotonic(), engine.counter("trained_tokens"), engine.counter("sampled_tokens")
        before, trained_before, sampled_before = self._tokens
        self._tokens = now, trained, sampled
        seconds = max(1e-6, now - before)
        beat = engine.heartbeat
        if not ready or beat is None:
            log.warning("not ready: %s; %d requests wait", reason, len(self.svc.dispatcher.ledger))
            return
        log.info(
            "training %.0f tok/s, %d requests wait; sampling %.0f tok/s, %d run, %d wait; KV %.0f %%; %d adapters; %s",
            (trained - trained_before) / seconds,
            stats["training_requests_pending"],
            (sampled - sampled_before) / seconds,
            beat.sampling_running,
            beat.sampling_waiting,
            100 * beat.kv_blocks_used / max(1, beat.kv_blocks_total),
            stats["runs_in_engine"],
            beat.activity or "idle",
        )


async def every(seconds: float, job: Callable[[], Coroutine[Any, Any, None]]) -> None:
    while True:
        await asyncio.sleep(seconds)
        await guarded(job)


async def guarded(job: Callable[[], Coroutine[Any, Any, None]]) -> None:
    try:
        await job()
    except Exception as error:  # housekeeping that fails once is tried again; the server goes on
        log.warning("housekeeping: %s failed: %s", job.__name__.strip("_"), error)
