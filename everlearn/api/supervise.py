"""The engine process: started, watched, started again.

It knows processes, sockets and heartbeats, and nothing of requests: what an engine has to be told after a start is its
listeners' affair (`on_up`). Every start is a new `generation` with a new socket, so nothing that was meant for a dead engine
reaches its successor.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import zmq
from zmq.asyncio import Context, Socket

from everlearn.api import deaths
from everlearn.config import Settings, engine_environ
from everlearn.engine import protocol
from everlearn.engine.main import UNLOADABLE
from everlearn.errors import Unavailable

log = logging.getLogger(__name__)

LATE_SECONDS = 5.0  # heartbeats come once a second; later than this and /readyz says so
HUNG_SECONDS = 30.0  # later than this and the process is killed
LOADING_HUNG_SECONDS = 600.0  # the same before it is ready: importing from a slow disk, or on a busy machine, may hold up every thread
STUCK_SECONDS = 300.0  # heartbeats come, but the work doesn't move: /readyz says so (engine.stuck_seconds: it is killed)
WATCH_SECONDS = 0.5
RESTART_WINDOW = 600.0
BACKOFF_MAX = 10.0
TAIL_LINES = 20
MESSAGES = 256  # taken in a row before others get their turn


class State(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


class Listener(Protocol):
    """Who sends commands and waits for events. All three run on the event loop and must not block."""

    def on_event(self, event: protocol.AnyEvent) -> None:
        """In the order in which the engine sent; events of other listeners' commands come too."""

    def on_up(self) -> None:
        """After each Ready, and when commands that had to be held back may be sent."""

    def on_down(self) -> None:
        """After each death, and when the engine is given up."""


class EngineProcess:
    """One engine at a time. `state` and `reason` are the truth that /readyz and waiting clients are told. `listeners` are told of
    everything in their order."""

    def __init__(self, settings: Settings, *, module: str = "everlearn.engine.main"):
        self.settings = settings
        self.module = module
        self.state = State.STARTING
        self.reason = "the engine process is being started"
        self.generation = 0
        self.restarts = 0
        self.pid: int | None = None
        self.ready: protocol.Ready | None = None
        self.heartbeat: protocol.Heartbeat | None = None
        self.kv_tokens: dict[str, int] = {}  # what the caches of the base models hold that this engine has loaded
        self.last_token_at: float | None = None  # of the first heartbeat that told of the newest sampled token
        self._step_sizes = [0] * (len(protocol.STEP_TOKENS) + 1)  # of the engines that died
        self.totals: dict[str, int] = {}  # the counters of engines that have died
        self.last_death = deaths.Death("", False)
        self.listeners: list[Listener] = []
        self.prepare: Callable[[EngineProcess], Awaitable[None]] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._socket: Socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._deaths: deque[float] = deque()
        self._heard = 0.0
        self._spawned = 0.0
        self._stopping = False
        self._ordered = ""  # why this engine was killed from here
        self._kills_before: int | None = None
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)

    # -- what others ask and tell ------------------------------------------------------------------------------------------

    @property
    def up(self) -> bool:
        return self.state is State.READY

    def readiness(self) -> tuple[bool, str]:
        """Whether requests can be served now, and one sentence that says why (not)."""
        if self.state is State.STARTING and self.pid:
            return False, f"{self.reason} ({time.monotonic() - self._spawned:.0f} s so far)"
        if not self.up:
            return False, self.reason
        age = time.monotonic() - self._heard
        if age > LATE_SECONDS:
            return (
                False,
                f"the engine (pid {self.pid}) has sent no heartbeat for {age:.0f} s; it is killed and restarted after {HUNG_SECONDS:.0f} s",
            )
        beat = self.heartbeat
        if beat and beat.activity not in ("", "idle") and beat.unix_time - beat.last_progress > STUCK_SECONDS:
            return (
                False,
                f"the engine has been busy with '{beat.activity}' without progress for {beat.unix_time - beat.last_progress:.0f} s",
            )
        return True, "ready"

    def send(self, command: protocol.Command | bytes) -> None:
        """Queues a command for the present engine. Raises Unavailable if there is none."""
        if self._socket is None or not self.up:
            raise Unavailable(self.reason)
        self._socket.send(command if isinstance(command, bytes) else protocol.encode(command), copy=False)

    def start(self) -> None:
        self._task = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def stop(self, grace: float) -> None:
        """Asks the engine to finish and leave, then makes it."""
        self._stopping = True
        if self.up:
            with contextlib.suppress(Unavailable):
                self.send(protocol.Shutdown())
        process = self._process
        if process is not None and process.returncode is None:
            try:
                await asyncio.wait_for(process.wait(), grace if self.up else 0.1)
            except TimeoutError:
                self._signal(signal.SIGKILL)
            if self._task is not None:  # it reads what is left, and closes what belongs to the process
                await asyncio.wait({self._task}, timeout=3.0)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.state, self.reason = State.STOPPED, "the server is shutting down"

    # -- the life of a process ---------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        if self.prepare is not None:
            try:
                await self.prepare(self)
            except Exception as error:  # whatever it is, the server must stay up and be able to say it
                self.state, self.reason = State.FAILED, f"the base model can't be prepared: {error}"
                log.error("%s", self.reason, exc_info=error)
                self._tell_down()
                return
        with tempfile.TemporaryDirectory(prefix="everlearn-") as folder:  # ipc paths are limited to 107 bytes, a home folder isn't
            failures = 0
            while not self._stopping:
                was_ready = await self._live_once(Path(folder))
                if self._stopping:
                    return
                failures = 0 if was_ready else failures + 1
                if self._give_up():
                    return
                await asyncio.sleep(min(0.05 * 2**failures, BACKOFF_MAX))

    async def _live_once(self, folder: Path) -> bool:
        """One process from start to end; returns whether it ever became ready."""
        self.generation += 1
        self.ready, self.heartbeat, self.kv_tokens = None, None, {}
        endpoint = f"ipc://{folder}/engine-{self.generation}"
        context = Context.instance()
        socket = context.socket(zmq.PAIR)
        socket.setsockopt(zmq.LINGER, 0)
        socket.set_hwm(0)
        socket.bind(endpoint)
        self._socket = socket
        tasks: list[asyncio.Task[Any]] = []
        try:
            process = await self._spawn(endpoint)
            tasks = [asyncio.create_task(work) for work in (self._receive(socket), self._watch(), self._read_log(process))]
            await process.wait()
            tasks[0].cancel()
            await self._receive_rest(socket)
            tail = f"; its last words: {self._tail[-1][:300]}" if self._tail and process.returncode and process.returncode > 0 else ""
            self.last_death = deaths.describe(process.returncode, self._ordered, self._kills_before)
            self._died(f"the engine process (pid {process.pid}) {self.last_death.text}{tail}")
        except OSError as error:
            self._died(f"the engine process can't be started: {error}")
        finally:
            self._signal(signal.SIGKILL)
            if tasks:
                await asyncio.wait(tasks[2:], timeout=1.0)  # the last lines of its log
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._socket = None
            socket.close()
        return self.ready is not None

    async def _spawn(self, endpoint: str) -> asyncio.subprocess.Process:
        self._tail.clear()
        self._spawned = self._heard = time.monotonic()
        self._ordered, self._kills_before = "", deaths.out_of_memory_kills()
        # An own session: Ctrl-C in a terminal reaches this process only, which then drains.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", self.module, endpoint,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            start_new_session=True, limit=1 << 20, env=engine_environ(),
        )  # fmt: skip
        self._process, self.pid = process, process.pid
        if self.state is State.STARTING:
            self.reason = f"the engine (pid {process.pid}) is loading {self.settings.models.default}"
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it died at once; wait() tells
            process.stdin.write(self.settings.model_dump_json().encode())
            await process.stdin.drain()
            process.stdin.close()
        return process

    async def _receive(self, socket: Socket) -> None:
        # To be woken costs as much as dozens of messages, and a step of the sampler sends one for each stream.
        waiting: zmq.Socket[bytes] = zmq.Socket.shadow(socket.underlying)
        while True:
            self._take(await socket.recv())
            with contextlib.suppress(zmq.Again):
                for _ in range(MESSAGES):
                    self._take(waiting.recv(zmq.NOBLOCK))

    async def _receive_rest(self, socket: Socket) -> None:
        """What a dead engine managed to send still counts: it is work that needn't be done again."""
        with contextlib.suppress(TimeoutError, zmq.ZMQError):
            async with asyncio.timeout(0.5):
                while await socket.poll(50):
                    self._take(await socket.recv())

    def _take(self, message: bytes) -> None:
        self._heard = time.monotonic()
        try:
            event = protocol.decode_event(message)
        except ValueError:
            log.error("the engine sent %d bytes that are no event; dropped", len(message))
            return
        if isinstance(event, protocol.Heartbeat):
            self.last_token_at = event.unix_time if self._sampled_since(event) else self.last_token_at
            self.heartbeat = event
        if isinstance(event, protocol.Loaded):
            self.kv_tokens[event.base] = event.kv_tokens
        if isinstance(event, protocol.Ready):
            self.ready, self.state, self.reason = event, State.READY, "ready"
            self.tell_up()
        else:
            for listener in self.listeners:
                self._guarded(listener.on_event, event)

    def tell_up(self) -> None:
        for listener in self.listeners:
            self._guarded(listener.on_up)

    def _tell_down(self) -> None:
        for listener in self.listeners:
            self._guarded(listener.on_down)

    def _guarded(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            callback(*arguments)
        except Exception as error:  # one bad event must not end the loop that reads all others
            log.error("an event of the engine could not be handled", exc_info=error)

    async def _watch(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(WATCH_SECONDS)
            slept = time.monotonic() - before
            if slept > LATE_SECONDS:  # this process stood still, and perhaps the whole machine: that is no silence of the engine's
                self._heard += slept
            if (why := self._hopeless()) and not self._ordered:
                self._ordered = why
                log.error("the engine (pid %s) is killed: %s", self.pid, why)
                self._signal(signal.SIGKILL)

    def _hopeless(self) -> str:
        """Why this engine won't get any further, or nothing."""
        now, limit = time.monotonic(), self.settings.engine.stuck_seconds
        silence = HUNG_SECONDS if self.up else LOADING_HUNG_SECONDS
        if now - self._heard > silence:
            return f"it sent no heartbeat for {silence:.0f} s"
        if not self.up and now - self._spawned > limit:
            return f"it wasn't ready after {limit:g} s (engine.stuck_seconds)"
        beat = self.heartbeat
        if self.up and beat and beat.activity not in ("", "idle") and beat.unix_time - beat.last_progress > limit:
            return f"it was busy with '{beat.activity}' without progress for {limit:g} s (engine.stuck_seconds)"
        return ""

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # a line longer than the limit: skipped by the reader
                continue
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip()
            if text:
                self._tail.append(text)
                log.info("engine: %s", text)

    def _died(self, reason: str) -> None:
        if beat := self.heartbeat:
            for name in COUNTERS:
                self.totals[name] = self.totals.get(name, 0) + getattr(beat, name)
            self._step_sizes = self.step_sizes()
        self.heartbeat = None
        self.pid = None
        self.state, self.reason = State.RESTARTING, f"{reason}; it is being restarted"
        if not self._stopping:
            log.warning("%s", self.reason)
            self.restarts += 1
            self._deaths.append(time.monotonic())
            self._tell_down()

    def _give_up(self) -> bool:
        if self._process is not None and self._process.returncode == UNLOADABLE:
            return self._failed(f"the base model can't be loaded: {self._tail[-1] if self._tail else 'see the log'}")
        now = time.monotonic()
        while self._deaths and now - self._deaths[0] > RESTART_WINDOW:
            self._deaths.popleft()
        if len(self._deaths) <= self.settings.engine.restart_limit:
            return False
        last = self.reason.removesuffix("; it is being restarted")
        return self._failed(
            f"the engine died {len(self._deaths)} times within ten minutes (engine.restart_limit), so it isn't restarted any more; {last}"
        )

    def _failed(self, reason: str) -> bool:
        self.state, self.reason = State.FAILED, reason
        log.error("%s", reason)
        self._tell_down()
        return True

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def counter(self, name: str) -> int:
        """A counter of the heartbeat, summed over all engines since the server started."""
        return self.totals.get(name, 0) + (getattr(self.heartbeat, name) if self.heartbeat else 0)

    def _sampled_since(self, beat: protocol.Heartbeat) -> bool:
        return beat.sampled_tokens > (self.heartbeat.sampled_tokens if self.heartbeat else 0)

    def step_sizes(self) -> list[int]:
        """The heartbeat's, summed likewise."""
        now = self.heartbeat.step_sizes if self.heartbeat else []
        return [before + size for before, size in zip(self._step_sizes, now, strict=True)] if now else self._step_sizes


COUNTERS = (
    "trained_tokens", "sampled_tokens", "prefix_hit_tokens", "prompt_tokens", "optimizer_steps", "preemptions", "grammar_compiles",
    "deadlines_passed", "step_tokens",
)  # fmt: skip
