"""The accepted requests that have no durable answer yet, and how they get one.

An answer is written to the log first; only then are those who wait woken and the request forgotten here. So memory holds what is
unfinished, never what is done.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from everlearn.api.room import Room
from everlearn.errors import EverlearnError, Expired, Unavailable
from everlearn.store import log as request_log
from everlearn.store.db import Database
from everlearn.store.log import Entry
from everlearn.types import ForwardBackwardResult, OptimStepResult, Result, SampleResult

if TYPE_CHECKING:
    from everlearn.api.ops import Metrics

log = logging.getLogger(__name__)
T = TypeVar("T")

QueueState = Literal["active", "paused_capacity", "paused_rate_limit"]
RECENT = 20_000  # ids of requests that finished lately: a late duplicate must not start them again
# Small answers stay in memory for a minute: nearly every client asks for one in the moment after it is written.
KEPT_ANSWERS, KEPT_BYTES, KEPT_SECONDS = 512, 64 * 1024, 60.0
RETRY_SECONDS = 1.0
encode_result = msgspec.msgpack.Encoder().encode
decode_result = msgspec.msgpack.Decoder(Result).decode


@dataclass(frozen=True)
class Done:
    """The request succeeded; `result` is the engine's answer, `entry.meta` what the submitter gave along."""

    entry: Entry
    result: Result


@dataclass(frozen=True)
class Failed:
    """The request failed for good. `error`: {"code", "message", "param"}; code is that of a class in everlearn/errors.py or
    "cancelled"."""

    entry: Entry
    error: dict[str, Any]


@dataclass(frozen=True)
class Waiting:
    """No answer yet: why not, in the client's terms. `reason` is one sentence for people, or None when it simply runs."""

    entry: Entry
    queue_state: QueueState
    reason: str | None


Outcome = Done | Failed | Waiting


@dataclass
class Pending:
    """An accepted request without a durable answer. `generation`: the engine that a sample was sent to."""

    entry: Entry
    future: asyncio.Future[Done | Failed]
    sequences: int = 0
    generation: int = 0


class Ledger:
    def __init__(self, db: Database, metrics: Metrics, queue_limit: int):
        self.db, self.metrics = db, metrics
        self.per_tenant: Counter[str] = Counter()
        self.sequences = Room(queue_limit)  # that are sampled or wait
        self._pending: dict[str, Pending] = {}
        self._recent: OrderedDict[str, None] = OrderedDict()
        self._answers: OrderedDict[str, tuple[Done | Failed, float]] = OrderedDict()  # and until when
        self._finishing: dict[str, set[asyncio.Task[None]]] = {}
        self._finished: dict[str, asyncio.Event] = {}  # by sampler: set when one of its samples finishes

    def __len__(self) -> int:
        return len(self._pending)

    def __iter__(self) -> Iterator[Pending]:
        return iter(list(self._pending.values()))

    def get(self, request_id: str) -> Pending | None:
        return self._pending.get(request_id)

    def answer(self, tenant: str, request_id: str) -> Done | Failed | None:
        """The durable answer of a request that finished a moment ago; None says nothing, the log knows."""
        found, until = self._answers.get(request_id, (None, 0.0))
        return found if found is not None and found.entry.tenant == tenant and time.monotonic() < until else None

    def known(self, request_id: str) -> bool:
        """Whether it is on its way, or was a moment ago."""
        return request_id in self._pending or request_id in self._recent

    def track(self, entry: Entry) -> Pending:
        sequences = int(entry.meta.get("num_samples", 1)) if entry.kind == "sample" else 0
        pending = Pending(entry, asyncio.get_running_loop().create_future(), sequences)
        self._pending[entry.request_id] = pending
        self.per_tenant[entry.tenant] += 1
        self.sequences.take(entry.tenant, sequences)
        return pending

    def finished_event(self, sampler_id: str) -> asyncio.Event:
        return self._finished.setdefault(sampler_id, asyncio.Event())

    # -- answers -----------------------------------------------------------------------------------------------------------

    def finish(self, entry: Entry, result: Result | None, error: dict[str, Any] | None) -> asyncio.Task[None]:
        """Starts making an answer durable; waiters are woken when it is. The task never fails, it tries again."""
        task = asyncio.ensure_future(self._finish(entry, result, error))
        self._finishing.setdefault(entry.model_id, set()).add(task)
        task.add_done_callback(partial(self._written, entry.model_id))
        return task

    async def settled(self, model_id: str) -> None:
        """Returns when all answers that came so far for a run are durable."""
        if writes := self._finishing.get(model_id):
            await asyncio.gather(*writes, return_exceptions=True)

    def _written(self, model_id: str, task: asyncio.Task[None]) -> None:
        writes = self._finishing[model_id]
        writes.discard(task)
        if not writes:
            del self._finishing[model_id]

    async def _finish(self, entry: Entry, result: Result | None, error: dict[str, Any] | None) -> None:
        request_id, attempts = entry.request_id, 0
        while True:
            body = encode_result(result) if error is None else None
            drawn = sum(sequence.tokens.shape[0] for sequence in result.sequences) if isinstance(result, SampleResult) else 0
            told = result.metrics if error is None and isinstance(result, ForwardBackwardResult | OptimStepResult) else None
            try:
                answer = partial(request_log.finish, request_id=request_id, result=body, error=error, tokens_out=drawn, metrics=told)
                finished = await self.write(answer, flush=entry.kind != "sample")
                break
            except Unavailable as problem:  # a full disk, a database that restarts: the answer is kept until it can be written
                log.error("the answer of %s can't be stored yet: %s", request_id, problem.message)
                await asyncio.sleep(RETRY_SECONDS)
            except Exception as problem:  # the log refuses this answer; then that is the answer
                attempts += 1
                log.error("the answer of %s can't be stored", request_id, exc_info=problem)
                error = as_error(problem)
                await asyncio.sleep(min(0.05 * 2**attempts, 10.0))
        if finished is None:  # answered before, e.g. cancelled: the first answer counts
            stored = await self.read(partial(request_log.get, tenant=entry.tenant, request_id=request_id))
            self._resolve(request_id, outcome(*stored))
        elif error is None:
            assert result is not None
            self._resolve(request_id, Done(finished, result), small=len(body or b"") <= KEPT_BYTES)
        else:
            self._resolve(request_id, Failed(finished, error))

    def _resolve(self, request_id: str, answer: Done | Failed, small: bool = True) -> None:
        pending = self._pending.pop(request_id, None)
        if pending is None:
            return
        entry = pending.entry
        self.per_tenant[entry.tenant] -= 1
        if not self.per_tenant[entry.tenant]:
            del self.per_tenant[entry.tenant]
        self.sequences.give(entry.tenant, pending.sequences)
        self._recent[request_id] = None
        if len(self._recent) > RECENT:
            self._recent.popitem(last=False)
        if small:
            self._answers[request_id] = (answer, time.monotonic() + KEPT_SECONDS)
        if len(self._answers) > KEPT_ANSWERS:
            self._answers.popitem(last=False)
        if not pending.future.done():
            pending.future.set_result(answer)
        if event := self._finished.pop(entry.model_id, None):
            event.set()
        seconds = max(0.0, time.time() - entry.created_at)
        self.metrics.requests_total.labels(entry.kind, "done" if isinstance(answer, Done) else "failed").inc()
        self.metrics.request_seconds.labels(entry.kind).observe(seconds)

    async def stop(self) -> None:
        """Answers that can't be written now are computed again after the next start."""
        tasks = [task for writes in self._finishing.values() for task in writes]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=5.0)
            for task in late:
                task.cancel()

    async def read(self, fn: Callable[..., T]) -> T:
        return await asyncio.to_thread(self.db.read, fn)

    async def write(self, fn: Callable[..., T], flush: bool = True) -> T:
        return await asyncio.wrap_future(self.db.write(fn, flush))


async def first(future: asyncio.Future[Any], stopped: asyncio.Event, deadline: float) -> None:
    """Returns at the deadline, when `future` is done, or when the server stops, without cancelling anything."""
    timeout = max(0.0, deadline - time.monotonic())
    if future.done() or stopped.is_set() or timeout == 0.0:
        return
    stop = asyncio.ensure_future(stopped.wait())
    try:
        await asyncio.wait({future, stop}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop.cancel()


def as_error(problem: BaseException) -> dict[str, Any]:
    if isinstance(problem, EverlearnError):
        return {"code": problem.code, "message": problem.message, "param": problem.param}
    return {"code": "internal", "message": f"its result can't be stored ({type(problem).__name__})", "param": None}


def outcome(entry: Entry, result: bytes | None, error: dict[str, Any] | None) -> Done | Failed:
    """What the log says of a finished request."""
    if entry.status == "failed":
        return Failed(entry, error or {"code": "internal", "message": "it failed without a reason", "param": None})
    if entry.status == "expired" or result is None:
        raise Expired(f"the result of request {entry.request_id!r} was dropped after store.result_retention_seconds", param="request_id")
    return Done(entry, decode_result(result))
