"""Requests on their way through the log to the engine, and their answers on the way back.

Accepting: into the log first, durable, then towards the engine; a training run's commands through its feed (everlearn/api/feed.py)
in seq order, samples at once (everlearn/api/samples.py). Answering: into the log first, durable, then to whoever waits. The
dispatcher keeps only what is unfinished; a finished result is read from the log. Everything here runs on the event loop; the store
is asked in threads.

After a death of the engine (or of this whole process) nothing is lost and nothing counts twice: commands are sent again from the
log, answers to requests that were finished before are ignored.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everlearn.api.feed import Feed, PayloadBudget
from everlearn.api.ledger import Done, Failed, Ledger, Outcome, Pending, Waiting, as_error, first, outcome
from everlearn.api.quarantine import Quarantine
from everlearn.api.samples import Samples
from everlearn.config import Settings
from everlearn.engine import protocol
from everlearn.errors import EverlearnError, Overloaded, Unavailable
from everlearn.store import checkpoints, rebuild, runs
from everlearn.store import log as request_log
from everlearn.store.db import Database
from everlearn.store.log import Entry
from everlearn.telemetry import key_id_var
from everlearn.types import Result

if TYPE_CHECKING:
    from everlearn.api.ops import Metrics
    from everlearn.api.supervise import EngineProcess

log = logging.getLogger(__name__)

TrainingCommand = protocol.Create | protocol.ForwardBackward | protocol.OptimStep | protocol.Save | protocol.Publish | protocol.Load
Loggable = TrainingCommand | protocol.Sample

UNSENT_BYTES = 256 * 2**20  # unsent commands kept in memory, over all runs

__all__ = ["Dispatcher", "Done", "Failed", "Loggable", "Outcome", "TrainingCommand", "Waiting"]


class Dispatcher:
    """See the module. `start` once at boot, then `submit`, `wait`, `cancel` from any number of requests."""

    def __init__(self, settings: Settings, db: Database, engine: EngineProcess, metrics: Metrics):
        self.settings, self.db, self.engine, self.metrics = settings, db, engine, metrics
        self.budget = PayloadBudget(UNSENT_BYTES)
        self.quarantine = Quarantine()
        self.ledger = Ledger(db, metrics, settings.engine.queue_limit)
        self.feeds: dict[str, Feed] = {}
        self.samples = Samples(self)
        self.draining = False
        self.on_snapshot: Callable[[], None] = lambda: None
        self.on_given_up: Callable[[str, str], None] = lambda request_id, message: None  # a live request that kills engines
        self._sent: dict[str, Feed | None] = {}  # in the engine, unanswered; the feed if it is a training command
        self._tasks: set[asyncio.Task[Any]] = set()
        self._listing: set[asyncio.Task[Any]] = set()  # snapshots on their way into the log
        self.stopped = asyncio.Event()
        engine.listeners.append(self)

    async def start(self) -> None:
        """Takes up what the log holds unfinished. Runs without unfinished requests are rebuilt when their next one comes."""
        for entry in await self.ledger.read(rebuild.unfinished):
            self.ledger.track(entry)
            if entry.kind != "sample":
                self._feed(entry).add(entry.seq, entry.request_id, entry.kind, None)
        if len(self.ledger):
            log.info("%d accepted requests of %d runs are unfinished; they go on", len(self.ledger), len(self.feeds))

    # -- accepting ---------------------------------------------------------------------------------------------------------

    async def submit(
        self, tenant: str, command: Loggable, *, model_id: str | None = None, seq: int | None = None, fingerprint: str, meta: dict[str, Any]
    ) -> Entry:
        """Logs `command` durably, then forwards it to the engine; returns the log's entry. Idempotent: the same (tenant,
        model_id, seq, sample or not) with the same fingerprint returns the first entry and has no second effect.

        Training commands carry model_id and seq (creation is seq 0). For a Sample, `model_id` is the sampler and `seq` the client's
        seq_id. Raises Conflict (same seq, another payload), Overloaded, Unavailable (store, engine given up, shutdown).
        """
        sequences = command.num_samples if isinstance(command, protocol.Sample) else 0
        if model_id is None:
            assert not isinstance(command, protocol.Sample), "a Sample is submitted with model_id= and seq="
            model_id = command.model_id
        if seq is None:
            seq = getattr(command, "seq", 0)
        try:
            self._admit(tenant, command.request_id, sequences)
        except Unavailable:  # for what is new; what was accepted before has its answer, or will have it
            first = await self.first_entry(tenant, model_id, seq, fingerprint, sample=bool(sequences))
            if first is None:
                raise
            return first
        meta = {**meta, "key_id": key_id_var.get()}
        if sequences:
            meta["num_samples"] = sequences
        kind = command.__struct_config__.tag
        assert isinstance(kind, str)
        entry = Entry(command.request_id, tenant, kind, model_id, seq, fingerprint, meta, created_at=time.time())
        return await self._uncancelled(self._accept(entry, protocol.encode(command)))

    async def refuse(
        self,
        tenant: str,
        *,
        model_id: str,
        seq: int,
        request_id: str,
        fingerprint: str,
        error: EverlearnError,
    ) -> Entry | None:
        """A training request that was refused at the door has used up its seq all the same: the client goes on with the next.
        So its place is logged, and passes without effect when its turn comes. Returns the entry that the same request has there
        already, if it does: it was accepted, or refused, before. Never raises for what the log refuses."""
        meta = {"forward_only": True, "refused": as_error(error)}
        entry = Entry(request_id, tenant, "forward_backward", model_id, seq, fingerprint, meta, created_at=time.time())
        try:
            placed: Entry = await self._uncancelled(self._accept(entry, b""))
        except EverlearnError as problem:
            log.debug("the refused request %s has no place in the log: %s", request_id, problem.message)
            return None
        return placed if placed.existing else None

    async def first_entry(self, tenant: str, model_id: str, seq: int, fingerprint: str, *, sample: bool = False) -> Entry | None:
        """The entry that this same request made when it came before."""
        entry = await self.ledger.read(lambda conn: request_log.find(conn, tenant, model_id, seq, sample))
        return entry if entry is not None and entry.fingerprint == fingerprint else None

    async def _uncancelled(self, work: Any) -> Any:
        """Once a request may be in the log it must be forwarded too, even if its client has gone."""
        return await asyncio.shield(self.spawn(work))

    def _admit(self, tenant: str, request_id: str, sequences: int) -> None:
        if self.draining:
            raise Unavailable("the server is shutting down; send this again in a moment")
        if self.engine.state == "failed":
            raise Unavailable(self.engine.reason)
        if self.ledger.get(request_id) is not None:
            return
        limit = self.settings.api.max_pending_requests
        if self.ledger.per_tenant[tenant] >= limit:
            raise Overloaded(
                f"{self.ledger.per_tenant[tenant]} requests are unfinished (limit {limit}, api.max_pending_requests); wait for some of them"
            )
        room = self.ledger.sequences
        if sequences and not room.has(tenant, sequences):
            raise Overloaded(
                f"{room.total} sequences are being sampled or wait, {room.held[tenant]} of them yours (limit {room.limit}, "
                "engine.queue_limit, in fair parts); send this again later"
            )

    async def _accept(self, entry: Entry, payload: bytes) -> Entry:
        entry = await self.ledger.write(lambda conn: request_log.append(conn, entry, payload), flush=entry.kind != "sample")
        if entry.existing:  # what it says, not what came now: a seed or an id may have been drawn anew
            payload = await self.ledger.read(lambda conn: request_log.payload(conn, entry.request_id) or b"")
        # `existing` alone doesn't tell: the store may have had to run the append twice. What is pending and unknown goes on.
        if entry.status != "pending" or self.ledger.known(entry.request_id):
            return entry
        pending = self.ledger.track(entry)
        if entry.kind == "sample":
            self.samples.send(pending, payload)
        else:
            self._feed(entry).add(entry.seq, entry.request_id, entry.kind, payload)
        return entry

    def _feed(self, entry: Entry) -> Feed:
        feed = self.feeds.get(entry.model_id)
        if feed is None:
            feed = self.feeds[entry.model_id] = Feed(self, entry.model_id, entry.tenant)
            feed.start()
        return feed

    # -- asking ------------------------------------------------------------------------------------------------------------

    async def wait(self, tenant: str, request_id: str, timeout: float) -> Outcome:
        """The request's outcome, or `Waiting` after `timeout` seconds (0: at once). Raises NotFound for an id that this
        tenant has not got, Expired for one whose result was dropped after the retention time."""
        deadline = time.monotonic() + timeout
        while True:
            pending = self.ledger.get(request_id)
            if pending is not None and pending.entry.tenant == tenant:
                await first(pending.future, self.stopped, deadline)
                return pending.future.result() if pending.future.done() else self._waiting(pending)
            if (answer := self.ledger.answer(tenant, request_id)) is not None:
                return answer
            entry, result, error = await self.ledger.read(lambda conn: request_log.get(conn, tenant, request_id))
            if entry.status != "pending":
                return outcome(entry, result, error)
            if self.ledger.get(request_id) is None:  # logged this very moment, and not yet on its way
                if time.monotonic() >= deadline:
                    return Waiting(entry, "active", None)
                await asyncio.sleep(0.02)

    def _waiting(self, pending: Pending) -> Waiting:
        entry = pending.entry
        ready, reason = self.engine.readiness()
        if self.draining:
            return Waiting(entry, "paused_capacity", "the server is shutting down; this request goes on at its next start")
        if not ready:
            return Waiting(entry, "paused_capacity", reason)
        if entry.kind == "sample":
            beat = self.engine.heartbeat
            busy = f"{beat.sampling_running} sequences run, {beat.sampling_waiting} wait" if beat and beat.sampling_waiting else None
            return Waiting(entry, "paused_capacity" if busy else "active", busy)
        feed = self.feeds.get(entry.model_id)
        return Waiting(entry, "active", feed.why_waiting(entry.seq) if feed else None)

    async def revive(self, model_id: str) -> None:
        """Brings a run that isn't in the engine back without a command of its own (its log is to be replaced by a snapshot)."""
        found = await self.ledger.read(lambda conn: rebuild.rebuild(conn, model_id))
        if found is not None and model_id not in self.feeds:
            feed = self.feeds[model_id] = Feed(self, model_id, found.run.tenant, wanted=True)
            feed.start()
            feed.wake.set()

    async def forget(self, model_id: str) -> None:
        """Drops a run's adapter from the engine (it is idle, closed or deleted). A later command brings it back."""
        feed = self.feeds.pop(model_id, None)
        if feed is None:
            return
        if feed.task is not None:
            feed.task.cancel()
        self._drop(feed)
        for pending in self.ledger:  # none when it was merely idle
            if pending.entry.model_id == model_id and pending.entry.kind != "sample":
                message = f"training run {model_id} was unloaded"
                self.ledger.finish(pending.entry, None, {"code": "conflict", "message": message, "param": None})

    def _drop(self, feed: Feed) -> None:
        """The engine no longer holds this run, and nothing of it is on its way."""
        if self.engine.up and feed.generation == self.engine.generation:
            self.engine.send(protocol.Unload(feed.model_id))
        request_ids = [*feed.sent, *(item.request_id for item in (*feed.backlog, *feed.queued.values()))]
        self.lost(feed.sent)
        feed.clear()
        for request_id in request_ids:
            self.let_go(request_id)

    # -- towards the engine ------------------------------------------------------------------------------------------------

    def may_send(self, request_id: str) -> bool:
        return self.quarantine.may_send(request_id, len(self._sent))

    def passed(self, request_id: str) -> None:
        """The turn of a request that has no command: it was refused at the door, or its payload is missing."""
        pending = self.ledger.get(request_id)
        if pending is not None:
            missing = {"code": "internal", "message": "its payload is missing in the log", "param": None}
            self.ledger.finish(pending.entry, None, pending.entry.meta.get("refused", missing))

    def sent(self, request_id: str, feed: Feed | None) -> None:
        self._sent[request_id] = feed

    def on_up(self) -> None:
        for feed in self.feeds.values():
            feed.wake.set()
        self.spawn(self.samples.send_all())

    def on_down(self) -> None:
        in_flight, self._sent = self._sent, {}
        culprit = self.quarantine.died(in_flight, from_outside=self.engine.last_death.from_outside)
        if culprit is None:
            return
        message = f"the engine process died again and again while it ran this request ({self.engine.reason}), so it is given up"
        error = {"code": "internal", "message": message, "param": None}
        pending, feed = self.ledger.get(culprit), in_flight.get(culprit)
        if pending is not None:
            log.error("request %s is given up: the engine dies whenever it runs it, also when it runs nothing else", culprit)
            self.ledger.finish(pending.entry, None, error)
        elif feed is not None:
            self.give_up_run(feed, f"request {culprit} can't be run again: {message}")
        else:
            self.on_given_up(culprit, message)
        self.quarantine.release(culprit)

    def give_up_run(self, feed: Feed, problem: str) -> asyncio.Task[Any]:
        """The run can't be rebuilt; its requests fail and it is marked, everything else goes on. The errors are on their way when
        this returns, so no answer that the engine may still send for the run comes before them. A later request tries again."""
        log.error("run %s is lost: %s", feed.model_id, problem)
        self._drop(feed)
        error = {
            "code": "internal",
            "message": f"run {feed.model_id} can't be restored ({problem}); load one of its checkpoints",
            "param": None,
        }
        for pending in self.ledger:
            if pending.entry.model_id == feed.model_id and pending.entry.kind != "sample":
                self.ledger.finish(pending.entry, None, error)
        return self.spawn(self.ledger.write(lambda conn: runs.mark_corrupted(conn, feed.tenant, feed.model_id)))

    # -- from the engine ---------------------------------------------------------------------------------------------------

    def on_event(self, event: protocol.AnyEvent) -> None:
        if isinstance(event, protocol.Completed):
            self._answered(event.request_id, event.result, None)
        elif isinstance(event, protocol.Failed):
            self._answered(event.request_id, None, {"code": event.code, "message": event.message, "param": event.param})
        elif isinstance(event, protocol.Snapshotted):
            task = self.spawn(self._snapshotted(event))
            self._listing.add(task)
            task.add_done_callback(self._listing.discard)
        elif isinstance(event, protocol.RestoreFailed):
            feed = self.feeds.get(event.model_id)
            if feed is not None and feed.generation == self.engine.generation:
                self.give_up_run(feed, event.message)

    def _answered(self, request_id: str, result: Result | None, error: dict[str, Any] | None) -> None:
        feed = self._sent.pop(request_id, None)
        if feed is not None:
            feed.answered(request_id)
        self.let_go(request_id)
        pending = self.ledger.get(request_id)
        if pending is None:
            if feed is not None and error is not None:  # without this effect the adapter isn't what the log says
                self.give_up_run(feed, f"request {request_id} succeeded before and fails in the replay: {error['message']}")
        elif not pending.future.done():
            written = self.ledger.finish(pending.entry, result, error)
            if error is not None and pending.entry.seq == 0 and feed is not None:  # never came to be: nobody behind it is answered else
                written.add_done_callback(lambda _: self.spawn(self.forget(feed.model_id)))

    def let_go(self, request_id: str) -> None:
        """A request that isn't in the engine (any more) holds nobody back."""
        if request_id not in self._sent and self.quarantine.release(request_id):
            self.engine.tell_up()

    async def settled(self, model_id: str) -> None:
        """Returns when all answers and snapshots that came so far are in the log: only then does it say what a rebuild must do."""
        await self.ledger.settled(model_id)
        if self._listing:
            await asyncio.wait(self._listing)

    async def _snapshotted(self, event: protocol.Snapshotted) -> None:
        """Lists a snapshot once every answer that came before it is durable: a snapshot must not hide an unanswered request."""
        await self.ledger.settled(event.model_id)
        added = await self.ledger.write(lambda conn: request_log.add_snapshot(conn, event.model_id, event.seq, event.folder, event.bytes))
        if not added:
            await asyncio.to_thread(checkpoints.remove_folder, Path(event.folder))
            return
        self.metrics.snapshots_total.inc()
        if feed := self.feeds.get(event.model_id):
            feed.snapshot_seq = max(feed.snapshot_seq, event.seq)
        self.on_snapshot()

    # -- the whole ---------------------------------------------------------------------------------------------------------

    def lost(self, request_ids: Iterable[str]) -> None:
        """A feed starts anew: what it had sent to the engine before is not in the new one."""
        for request_id in request_ids:
            self._sent.pop(request_id, None)

    def readiness(self) -> tuple[bool, str]:
        return (False, "the server is shutting down") if self.draining else self.engine.readiness()

    def stats(self) -> dict[str, float]:
        samples = sum(1 for pending in self.ledger if pending.entry.kind == "sample")
        return {
            "training_requests_pending": len(self.ledger) - samples,
            "sample_requests_pending": samples,
            "sample_sequences_pending": self.ledger.sequences.total,
            "commands_in_engine": len(self._sent),
            "runs_in_engine": sum(1 for feed in self.feeds.values() if feed.generation == self.engine.generation),
            "runs_rebuilding": sum(1 for feed in self.feeds.values() if feed.backlog),
            "unsent_bytes": self.budget.used,
        }

    async def drain(self, grace: float) -> int:
        """Accepts nothing more, waits up to `grace` seconds for what was accepted; returns how much is left for the next start."""
        self.draining = True
        futures = [pending.future for pending in self.ledger]
        if futures and self.engine.state != "failed":
            await asyncio.wait(futures, timeout=grace)
        self.stopped.set()
        return len(self.ledger)

    async def stop(self) -> None:
        self.draining = True
        self.stopped.set()
        for feed in self.feeds.values():
            if feed.task is not None:
                feed.task.cancel()
        for task in list(self._tasks):
            task.cancel()
        await self.ledger.stop()
        await asyncio.gather(*self._tasks, *(f.task for f in self.feeds.values() if f.task is not None), return_exceptions=True)

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
