"""One training run's road from the log into the engine.

A feed sends a run's commands in seq order, holds what comes before its turn, and after an engine start brings the adapter back
first: newest snapshot, then the logged commands after it, then what is new. The log is the truth; a feed holds only what hasn't
been sent yet, and payloads only as far as a common budget allows (the rest is read again when its turn comes).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from contextvars import Context
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from everlearn.engine import protocol
from everlearn.errors import Conflict, EverlearnError, Unavailable
from everlearn.faultpoints import around
from everlearn.store import checkpoints, rebuild
from everlearn.store import log as request_log

if TYPE_CHECKING:
    from everlearn.api.dispatch import Dispatcher

log = logging.getLogger(__name__)

WINDOW_COMMANDS, WINDOW_BYTES = 64, 32 * 2**20  # what the engine may hold of one run unanswered: more only where one command is larger
MAX_GAP = 1024  # numbers that are passed over at most
EFFECTS = ("create", "load", "forward_backward", "optim_step")


class PayloadBudget:
    """How many bytes of unsent commands may stay in memory, over all feeds."""

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0

    def keep(self, payload: bytes) -> bytes | None:
        if self.used + len(payload) > self.limit:
            return None
        self.used += len(payload)
        return payload

    def drop(self, payload: bytes | None) -> None:
        if payload is not None:
            self.used -= len(payload)


@dataclass
class Item:
    """A durable command that waits for its turn; `payload` None: read it from the log."""

    seq: int
    request_id: str
    kind: str
    payload: bytes | None = None


@dataclass
class Feed:
    """State of one run on its way. `generation`: the engine process that holds the adapter, 0 for none. `next_seq`: what is
    sent next. `backlog`: replayed commands that go out first, regardless of gaps, because they ran in this order before."""

    dispatcher: Dispatcher
    model_id: str
    tenant: str
    generation: int = 0
    next_seq: int = 0
    backlog: deque[Item] = field(default_factory=deque)
    backlog_size: int = 0
    queued: dict[int, Item] = field(default_factory=dict)
    sent: dict[str, tuple[int, int]] = field(default_factory=dict)  # unanswered in the engine: seq, bytes
    effect_seq: int = -1  # the last command sent that changes the adapter, and the newest snapshot
    snapshot_seq: int = -1
    gap: tuple[int, float] = (-1, 0.0)  # the seq whose turn it is and which hasn't come, and since when
    wanted: bool = False  # to be brought into the engine though nothing waits
    active_at: float = field(default_factory=time.monotonic)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def start(self) -> None:
        # A context of its own: the HTTP request that happened to start it must not sign the feed's log lines.
        self.task = asyncio.create_task(self._run(), name=f"feed {self.model_id}", context=Context())

    def add(self, seq: int, request_id: str, kind: str, payload: bytes | None) -> None:
        """A command is durable. Adding it twice, or after it was sent, does nothing."""
        self.active_at = time.monotonic()
        if seq in self.queued or (self.generation == self.dispatcher.engine.generation and seq < self.next_seq):
            return
        kept = self.dispatcher.budget.keep(payload) if payload is not None else None
        self.queued[seq] = Item(seq, request_id, kind, kept)
        self.wake.set()

    def answered(self, request_id: str) -> None:
        self.active_at = time.monotonic()
        if self.sent.pop(request_id, None) is not None and (self.backlog or self.queued):
            self.wake.set()

    @property
    def idle(self) -> bool:
        return not (self.queued or self.backlog or self.sent or self.wake.is_set())

    def why_waiting(self, seq: int) -> str | None:
        """One sentence for the client of request `seq`, None when it is simply its turn."""
        if self.backlog:
            done = self.backlog_size - len(self.backlog)
            return f"the adapter is being rebuilt from the log after a restart ({done} of {self.backlog_size} requests sent again)"
        if seq > self.next_seq and self.next_seq not in self.queued and self.generation:
            return f"request {seq} waits for request {self.next_seq} of the same run, which has not arrived"
        ahead = sum(1 for other, _ in self.sent.values() if other < seq) + sum(1 for other in self.queued if other < seq)
        return f"{ahead} requests of the same run are ahead of it" if ahead else None

    # -- the task ----------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await self.wake.wait()
            self.wake.clear()
            try:
                await self._advance()
            except Unavailable as error:  # the engine went away: its start wakes us. Or the store did: look again soon
                if self.dispatcher.engine.up:
                    log.warning("run %s waits: %s", self.model_id, error.message)
                    self._wake_later()
            except Exception as error:  # a fault in one run's rebuild must neither end its feed nor touch other runs
                log.error("run %s can't go on, trying again", self.model_id, exc_info=error)
                self._wake_later()

    def _wake_later(self) -> None:
        asyncio.get_running_loop().call_later(1.0, self.wake.set)

    async def _advance(self) -> None:
        engine = self.dispatcher.engine
        if not engine.up or not (self.queued or self.backlog or self.sent or self.wanted):
            return
        if self.generation != engine.generation:
            await self._rebuild(engine.generation)
        while self.generation == engine.generation and engine.up and not self._full():
            if self.backlog:
                item = self.backlog[0]
            elif self.next_seq in self.queued:
                item = self.queued[self.next_seq]
            else:
                await self._mind_the_gap()
                return
            payload = (
                item.payload
                if item.payload is not None
                else await self.dispatcher.ledger.read(lambda conn, item=item: request_log.payload(conn, item.request_id))
            )
            if self.generation != engine.generation or not engine.up:
                return
            if payload is None and self.backlog and self.dispatcher.ledger.get(item.request_id) is None:
                await self.dispatcher.give_up_run(self, f"the payload of request {item.request_id} is missing in the log")
                return
            if not self.dispatcher.may_send(item.request_id):
                return
            self._send(item, payload)

    async def _mind_the_gap(self) -> None:
        """A request that never comes must not hold up the others for ever: its client has given it up, or it was refused and nobody
        could tell where it belonged. If it comes later all the same, it is told so. (Numbers far ahead are a client's mistake.)"""
        now, patience = time.monotonic(), self.dispatcher.settings.api.gap_seconds
        missing = range(self.next_seq, min(self.queued, default=0))
        if not 0 < len(missing) <= MAX_GAP:
            return
        if self.gap[0] == missing[0] and now - self.gap[1] >= patience:
            for seq in missing:
                await self._pass_over(seq, patience)
        if self.gap[0] != missing[0] or now - self.gap[1] >= patience:  # from now on, or again if the store couldn't be written
            self.gap = missing[0], now
            asyncio.get_running_loop().call_later(patience, self.wake.set)

    async def _pass_over(self, seq: int, patience: float) -> None:
        log.warning("run %s goes on without request %d, which has not come for %g s", self.model_id, seq, patience)
        error = Conflict(
            f"request {seq} of {self.model_id} did not come within {patience:g} s of those after it (api.gap_seconds), "
            "so the run went on without it",
            param="seq_id",
        )
        request_id = f"{self.model_id}:{seq}"
        await self.dispatcher.refuse(self.tenant, model_id=self.model_id, seq=seq, request_id=request_id, fingerprint="", error=error)

    def _full(self) -> bool:
        return len(self.sent) >= WINDOW_COMMANDS or sum(size for _, size in self.sent.values()) >= WINDOW_BYTES

    def _send(self, item: Item, payload: bytes | None) -> None:
        """Sends one command and takes it off its queue: no await in between, so it is sent once per engine."""
        if payload:
            with around("command.send"):
                self.dispatcher.engine.send(payload)
            self.sent[item.request_id] = (item.seq, len(payload))
            self.dispatcher.sent(item.request_id, self)
            if item.kind in EFFECTS:
                self.effect_seq = item.seq
        else:
            self.dispatcher.passed(item.request_id)
        if self.backlog and self.backlog[0] is item:
            self.backlog.popleft()
            self.dispatcher.metrics.replayed_total.inc()
        else:
            self.dispatcher.budget.drop(item.payload)
            del self.queued[item.seq]
            self.next_seq = item.seq + 1

    async def _rebuild(self, generation: int) -> None:
        """Restore and the commands after it become the backlog. Until this has run, nothing of the run is sent."""
        await self.dispatcher.settled(self.model_id)
        replay = await self.dispatcher.ledger.read(lambda conn: rebuild.rebuild(conn, self.model_id))
        self.dispatcher.lost(self.sent)
        self.sent.clear()
        self.backlog.clear()
        if replay is None:  # the run failed or was closed meanwhile: whoever still waits for it is told
            await self.dispatcher.forget(self.model_id)
            return None
        if replay.snapshot is not None:
            problem = await asyncio.to_thread(verify, Path(replay.snapshot.folder))
            if problem:
                await self.dispatcher.give_up_run(self, problem)
                return None
        if generation != self.dispatcher.engine.generation:
            return self.wake.set()
        run, base_seq = replay.run, -1
        again = [entry.seq for entry in replay.entries if entry.status != "pending" and entry.seq > 0]
        if again:  # seq 0 makes the run: where that fails there is none
            self.dispatcher.engine.send(protocol.Replay(run.run_id, again))
        if replay.snapshot is not None:
            base_seq = replay.snapshot.seq
            with around("restore.send"):
                self.dispatcher.engine.send(protocol.Restore(run.run_id, run.tenant, run.base_model, run.lora, replay.snapshot.folder))
        self.generation, self.wanted = generation, False
        self.next_seq = max(replay.finished_seq, base_seq) + 1
        self.effect_seq = self.snapshot_seq = base_seq
        for entry in replay.entries:
            if entry.status == "pending" and not self.dispatcher.ledger.known(entry.request_id):
                self.dispatcher.ledger.track(entry)  # durable this very moment: its answer must find somebody who expects it
            if entry.seq < self.next_seq:
                self.backlog.append(Item(entry.seq, entry.request_id, entry.kind))
            else:
                self.queued.setdefault(entry.seq, Item(entry.seq, entry.request_id, entry.kind))
        for seq in [seq for seq in self.queued if seq < self.next_seq]:
            self.dispatcher.budget.drop(self.queued.pop(seq).payload)
        self.backlog_size = len(self.backlog)
        if self.backlog_size or base_seq >= 0:
            log.info(
                "run %s is rebuilt: snapshot at %d, %d requests again, then from %d",
                self.model_id,
                base_seq,
                self.backlog_size,
                self.next_seq,
            )
        return None

    def clear(self) -> None:
        """Nothing of the run is in the engine or on its way there."""
        self.generation = 0
        self.sent.clear()
        for item in self.queued.values():
            self.dispatcher.budget.drop(item.payload)
        self.queued.clear()
        self.backlog.clear()


def verify(folder: Path) -> str | None:
    """What is wrong with a snapshot folder, or None."""
    try:
        checkpoints.verify_folder(folder)
    except (EverlearnError, OSError, ValueError) as error:
        return str(error)
    return None
