"""Verifiers in processes of their own, each killed when it takes too long. A verifier that hangs or raises is no judgement.

Processes are started when they are needed, kept for the next question (sympy takes a second to import), and ended by `close`.
"""

from __future__ import annotations

import asyncio
import json
import queue
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Self, TypeVar

from everlearn.errors import InvalidRequest, Unavailable

T = TypeVar("T")
START_SECONDS = 60.0  # what a process gets to start, and to import what a verifier needs; a question's own time begins after that
MAX_JUDGEMENT = 1 << 20  # bytes


class VerifierFailed(Unavailable):
    """A verifier hung, raised, or died. Whatever it was to judge has no score; an episode that raises this fails, and is counted."""


async def judge(function: Callable[..., T], *given: Any, seconds: float) -> T:
    """What `function` says, run in a thread of its own. Raises VerifierFailed where it raises, or says nothing in time.

    For verifiers that can't be moved to a process. Python can't end a thread: one that hangs keeps its processor until the program ends,
    and does not keep the program from ending.
    """
    said: Future[T] = Future()

    def run() -> None:
        try:
            said.set_result(function(*given))
        except BaseException as error:  # noqa: BLE001 - it is for whoever waits
            said.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(said)), seconds)
    except TimeoutError:
        raise VerifierFailed(f"{function.__qualname__} gave no judgement within {seconds:g} s") from None
    except Exception as error:
        raise VerifierFailed(f"{function.__qualname__} raised {type(error).__name__}: {error}") from error


class Verifiers:
    """At most `processes` at a time, each question answered within `seconds`, which begin when the process is ready for that verifier.

    Close it, or use it as a context manager.
    """

    def __init__(self, processes: int = 2, seconds: float = 5.0):
        if processes < 1 or seconds <= 0:
            raise InvalidRequest(f"{processes} processes with {seconds:g} s each can verify nothing; give more than 0 of both")
        self.seconds = seconds
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()  # None: room for one more
        for _ in range(processes):
            self._idle.put(None)
        self._lock = threading.Lock()
        self._alive: set[_Worker] = set()

    async def ask(self, verifier: str, *given: Any) -> dict[str, Any]:
        """The judgement. Raises VerifierFailed where there is none."""
        return await asyncio.to_thread(self._ask, verifier, given)

    def _ask(self, verifier: str, given: tuple[Any, ...]) -> dict[str, Any]:
        worker = self._idle.get()
        try:
            if worker is None:
                worker = _Worker()
                with self._lock:
                    self._alive.add(worker)
            answer = worker.make_ready(verifier)
            if "raised" not in answer:
                answer = worker.ask({"verifier": verifier, "given": given}, self.seconds)
        except (TimeoutError, OSError, ValueError, TypeError, RecursionError) as error:
            self._drop(worker)
            worker = None
            raise VerifierFailed(f"the verifier {verifier!r} gave no judgement: {error}") from None
        finally:
            self._idle.put(worker)
        if "raised" in answer:
            raise VerifierFailed(f"the verifier {verifier!r} raised {answer['raised']}")
        return answer

    def _drop(self, worker: _Worker | None) -> None:
        if worker is not None:
            worker.kill()
            with self._lock:
                self._alive.discard(worker)

    def close(self) -> None:
        """Ends the processes; a question that is being answered fails."""
        for worker in list(self._alive):
            self._drop(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """One process, asked by one thread at a time."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\nfrom everlearn.rewards.worker import main\nmain()"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin", "HOME": "/", "OMP_NUM_THREADS": "1"},  # nothing secret
        )
        self.ready: set[str] = set()

    def make_ready(self, verifier: str) -> dict[str, Any]:
        """Has it imported what the verifier needs; what it says to that, {"raised": ...} where it can't."""
        if verifier in self.ready:
            return {}
        answer = self.ask({"verifier": verifier}, START_SECONDS)
        if "raised" not in answer:
            self.ready.add(verifier)
        return answer

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question).encode() + b"\n")
        self.process.stdin.flush()
        answer, deadline = b"", time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not answer.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise TimeoutError(f"not over after {seconds:g} s")
                piece = self.process.stdout.read1()  # type: ignore[attr-defined]
                if not piece:
                    raise OSError(f"its process ended with {self.process.wait()}")
                answer += piece
                if len(answer) > MAX_JUDGEMENT:
                    raise ValueError(f"it said more than {MAX_JUDGEMENT} bytes")
        return dict(json.loads(answer))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue  # what was still to be written has no reader any more
