"""Live requests: chats and completions on their way to the engine and back, past the durable log.

What a client waits for with an open connection needs no log: a sample is a function of (version, prompt, parameters, seed). If the
engine dies, the request is sent to the next one with the same seed, and what was delivered before is not delivered again. If the
client goes, the engine is told within the same turn of the loop. Everything here runs on the event loop; of HTTP it knows nothing.

    generation = await svc.serving.generate(spec)
    async for parts in generation:     # streamed: batches of TokenPart as they are drawn
        ...
    result = await generation.result()
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from array import array
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from everlearn.api.room import Room
from everlearn.engine import protocol
from everlearn.engine.protocol import TokenPart
from everlearn.errors import BY_CODE, EverlearnError, InternalError, Overloaded, Unavailable
from everlearn.types import Array, ImageSpan, SampleResult, SamplingParams

if TYPE_CHECKING:
    from everlearn.api.dispatch import Dispatcher
    from everlearn.api.meters import ServingMetrics
    from everlearn.api.supervise import EngineProcess
    from everlearn.api.target import Target
    from everlearn.config import Settings

log = logging.getLogger(__name__)

HELD_SECONDS = 40.0  # how long a request waits for an engine that is being restarted before it is told so
GRAMMAR_PARAM = "response_format"  # what the engine calls the field of a grammar: it doesn't know where one came from
OVERDUE_SECONDS = 15.0  # beyond its deadline; the engine ends requests itself, so this is a fault


class GenerationSpec(msgspec.Struct, frozen=True):
    """What to draw. `params.seed` is set. `prompt_logprobs`: None for none, else how many alternatives of each prompt token beside
    its own log-probability. `deadline` in seconds from now; what was drawn by then is the result, with stop_reason "deadline".
    `bound_by`: the request's field from which its grammar was made, for errors that concern it."""

    tenant: str
    target: Target
    prompt: list[int]
    params: SamplingParams
    images: list[ImageSpan] = []
    n: int = 1
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    pooling: str = ""
    deadline: float = 0.0
    stream: bool = False
    bound_by: str = GRAMMAR_PARAM


class Generation:
    """One live request. Iterate for the parts (only if spec.stream), await `result()` for the whole; `cancel()` frees it at once."""

    __slots__ = (
        "_done", "_overdue", "_parts", "_serving", "_waiter", "cached", "command", "created", "engine", "error", "finished",
        "first_token", "last_token", "received", "replayed", "request_id", "seen", "spec", "times", "value",
    )  # fmt: skip

    def __init__(self, serving: Serving, spec: GenerationSpec, request_id: str):
        self.spec, self.request_id = spec, request_id
        self.command = protocol.encode(command_of(spec, request_id))
        self.created = time.perf_counter()
        self.first_token = self.last_token = 0.0
        self.engine = 0  # the engine process that has it; 0: none
        self.cached = 0
        self.value: SampleResult | None = None
        self.times: protocol.Times | None = None
        self.error: EverlearnError | None = None
        self.received: list[list[int]] = [[] for _ in range(spec.n)] if spec.stream else []
        self.finished: set[int] = set()
        self.replayed = False  # it was sent to more than one engine
        self.seen = [0] * spec.n  # tokens of each sample that the present engine has sent
        self._parts: list[TokenPart] = []
        self._waiter: asyncio.Future[None] | None = None
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._overdue: asyncio.TimerHandle | None = None
        self._serving = serving

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> list[TokenPart]:
        """What came since the last call; waits if that is nothing. Raises the error that ended the request."""
        while not self._parts:
            if self._done.done():
                if self.error is not None:
                    raise self.error
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        parts, self._parts = self._parts, []
        return parts

    async def result(self) -> SampleResult:
        await asyncio.shield(self._done)
        if self.error is not None:
            raise self.error
        assert self.value is not None
        return self.value

    async def begun(self, timeout: float) -> None:
        """Returns once something was drawn, or after `timeout` seconds. Raises the error that ended the request before."""
        if not self._parts and not self._done.done():
            self._waiter = asyncio.get_running_loop().create_future()
            await asyncio.wait({self._waiter}, timeout=timeout)
        if not self._parts and self.error is not None:
            raise self.error

    def cancel(self) -> None:
        """Its client has gone, or needs no more. Nothing happens if it had ended."""
        self._serving.cancel(self)

    def enough(self) -> None:
        """What was drawn says it all; the rest needn't be drawn."""
        self._serving.cancel(self, EverlearnError("no more was needed", code="cancelled"))

    @property
    def done(self) -> bool:
        return self._done.done()

    # -- for Serving -------------------------------------------------------------------------------------------------------

    def take(self, part: TokenPart) -> None:
        if part.index in self.finished:
            return
        if self.replayed:
            fresh = self._skip(part)
            if fresh is None:
                return
            part = fresh
        self.received[part.index].extend(part.tokens)
        if part.stop_reason:
            self.finished.add(part.index)
        self._parts.append(part)

    def _skip(self, part: TokenPart) -> TokenPart | None:
        """The part without what an earlier engine had sent. Raises InternalError if it differs: two texts must not be spliced."""
        known, start = self.received[part.index], self.seen[part.index]
        self.seen[part.index] += len(part.tokens)
        old = min(len(known) - start, len(part.tokens))
        if old <= 0:
            return part
        if part.tokens[:old] != known[start : start + old]:
            raise InternalError("the engine was restarted and drew other tokens than those delivered before; send the request again")
        if old == len(part.tokens) and not part.stop_reason:
            return None
        return TokenPart(part.index, part.tokens[old:], part.logprobs[old:], part.top_ids[old:], part.top_logprobs[old:], part.stop_reason)

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def end(self, value: SampleResult | None, error: EverlearnError | None) -> None:
        self.value, self.error = value, error
        if self._overdue is not None:
            self._overdue.cancel()
        if not self._done.done():
            self._done.set_result(None)
        self.wake()

    def overdue_at(self, timer: asyncio.TimerHandle) -> None:
        self._overdue = timer


class Serving:
    """All live requests. A listener of the engine process, beside the dispatcher, with which it shares the quarantine of requests
    that kill engines."""

    def __init__(self, settings: Settings, engine: EngineProcess, dispatcher: Dispatcher, metrics: ServingMetrics):
        self.settings, self.engine, self.dispatcher, self.metrics = settings, engine, dispatcher, metrics
        self.live: dict[str, Generation] = {}
        self.sequences = Room(settings.engine.max_batch + settings.api.live_queue)  # of all live requests
        self._down_since = 0.0
        self._ended: deque[tuple[float, int]] = deque(maxlen=64)  # when a request ended, and how many sequences it had
        engine.listeners.append(self)
        dispatcher.on_given_up = self._given_up

    # -- what routes call --------------------------------------------------------------------------------------------------

    async def generate(self, spec: GenerationSpec) -> Generation:
        """Sends the request to the engine. Raises Overloaded if the queue is full, Unavailable without an engine."""
        self.check_room(spec.tenant, spec.target, spec.n)
        generation = Generation(self, spec, f"live-{secrets.token_hex(12)}")
        self.live[generation.request_id] = generation
        self.sequences.take(spec.tenant, spec.n)
        loop = asyncio.get_running_loop()
        if spec.deadline:
            generation.overdue_at(loop.call_later(spec.deadline + OVERDUE_SECONDS, self._overdue, generation))
        if not self.engine.up:
            loop.call_later(HELD_SECONDS + 0.01, self._tell_held)
        self._send(generation)
        return generation

    def cancel(self, generation: Generation, error: EverlearnError | None = None) -> None:
        """Frees what the request holds in the engine within one step. `error` is what whoever still waits for it is told."""
        if generation.done:
            return
        request_id = generation.request_id
        if self.engine.up and generation.engine == self.engine.generation:
            self.engine.send(protocol.Cancel(request_id))  # its Failed ends the bookkeeping in the dispatcher
        else:
            self.dispatcher.let_go(request_id)
        if error is None:
            self.metrics.cancelled.inc()
        self._end(generation, None, error or EverlearnError("the request was cancelled", code="cancelled"))

    def check_room(self, tenant: str, target: Target, n: int = 1) -> None:
        """Raises what `generate` would for `n` sequences now: a full queue refuses before the work of a prompt is done. A tenant that
        holds no more than its fair part of the queue is let in, however much others have queued."""
        if self.dispatcher.draining:
            raise Unavailable("the server is shutting down; send this again in a moment")
        if not self.engine.up and self.engine.state != "restarting":
            raise Unavailable(f"the engine isn't ready: {self.engine.reason}")
        room = self.sequences
        if not room.has(tenant, n):
            self.metrics.queue_full(target.base.name)
            wait = self.retry_after()
            raise Overloaded(
                f"{room.total} sequences decode or wait, {room.held[tenant]} of them yours (limit {room.limit}: engine.max_batch and "
                f"api.live_queue, in fair parts); try again in {wait} s",
                retry_after=wait,
            )

    def retry_after(self) -> int:
        """Seconds until half of the queue should have passed, by the pace of the last requests."""
        if len(self._ended) < 2:
            return 1
        seconds = max(time.monotonic() - self._ended[0][0], 0.001)
        pace = sum(count for _, count in self._ended) / seconds
        return int(min(max(1.0, self.settings.api.live_queue / 2 / pace), 30.0))

    # -- the engine --------------------------------------------------------------------------------------------------------

    def _send(self, generation: Generation) -> None:
        if not self.engine.up or generation.engine == self.engine.generation or not self.dispatcher.may_send(generation.request_id):
            return
        if generation.engine and generation.received:
            generation.replayed, generation.seen = True, [0] * generation.spec.n
        generation.engine = self.engine.generation
        self.engine.send(generation.command)
        self.dispatcher.sent(generation.request_id, None)

    def on_up(self) -> None:
        for generation in list(self.live.values()):
            self._send(generation)

    def on_down(self) -> None:
        self._down_since = time.perf_counter()
        if self.engine.state == "failed":
            for generation in list(self.live.values()):
                self._end(generation, None, Unavailable(self.engine.reason))
        elif self.live:
            asyncio.get_running_loop().call_later(HELD_SECONDS + 0.01, self._tell_held)

    def on_event(self, event: protocol.AnyEvent) -> None:
        if not isinstance(event, (protocol.Tokens, protocol.Completed, protocol.Failed)):
            return
        generation = self.live.get(event.request_id)
        if generation is None:
            return
        if isinstance(event, protocol.Tokens):
            self._tokens(generation, event)
        elif isinstance(event, protocol.Failed):
            kind = BY_CODE.get(event.code, EverlearnError)
            param = generation.spec.bound_by if event.param == GRAMMAR_PARAM else event.param
            self._end(generation, None, kind(event.message, param=param, code=event.code))
        elif isinstance(event.result, SampleResult):
            generation.times = event.times
            self._end(generation, event.result, None)

    def _tokens(self, generation: Generation, event: protocol.Tokens) -> None:
        now = time.perf_counter()
        if generation.last_token:
            self.metrics.between_tokens(generation.spec.target.base.name, now - generation.last_token)
        else:
            generation.first_token = now
            self.metrics.first_token(generation.spec.target.base.name, now - generation.created)
        generation.last_token = now
        generation.cached = event.cached
        try:
            for part in event.parts:
                generation.take(part)
        except InternalError as error:
            self.cancel(generation, error)
        generation.wake()

    def _end(self, generation: Generation, value: SampleResult | None, error: EverlearnError | None) -> None:
        if self.live.pop(generation.request_id, None) is None:
            return
        self.sequences.give(generation.spec.tenant, generation.spec.n)
        self._ended.append((time.monotonic(), generation.spec.n))
        generation.end(value, error)
        self.metrics.ended(generation)

    # -- ends that the engine doesn't tell ---------------------------------------------------------------------------------

    def _given_up(self, request_id: str, message: str) -> None:
        if generation := self.live.get(request_id):
            self._end(generation, None, InternalError(message))

    def _overdue(self, generation: Generation) -> None:
        self.cancel(generation, Unavailable(f"no answer within its deadline of {generation.spec.deadline:.0f} s"))

    def _tell_held(self) -> None:
        """Nobody waits for an engine without being told: whoever has waited long enough hears why."""
        if self.engine.up:
            return
        for generation in list(self.live.values()):
            if time.perf_counter() - max(generation.created, self._down_since) >= HELD_SECONDS:
                self._end(generation, None, Unavailable(f"the engine is away: {self.engine.reason}"))

    async def drain(self, grace: float) -> int:
        """Waits up to `grace` seconds for what is live (nothing more is admitted), ends the rest; returns how much that was."""
        running = [generation._done for generation in self.live.values()]
        if running:
            await asyncio.wait(running, timeout=grace)
        left = list(self.live.values())
        for generation in left:
            self._end(generation, None, Unavailable("the server is shutting down; send this again in a moment"))
        return len(left)

    def stats(self) -> dict[str, float]:
        return {"live_requests": len(self.live), "live_sequences": self.sequences.total}


def command_of(spec: GenerationSpec, request_id: str) -> protocol.Sample:
    tokens = array("i", spec.prompt)
    return protocol.Sample(
        request_id=request_id,
        base=spec.target.base.name,
        version=spec.target.version,
        folder=spec.target.folder,
        cache_salt=spec.tenant,
        prompt=Array("int32", [len(tokens)], tokens.tobytes()),
        num_samples=spec.n,
        params=spec.params,
        prompt_logprobs=spec.prompt_logprobs is not None,
        topk_prompt_logprobs=spec.prompt_logprobs or 0,
        topk_sample_logprobs=spec.top_logprobs,
        pooling=spec.pooling,
        stream=spec.stream,
        deadline=spec.deadline,
        images=spec.images,
    )
