"""SIGKILL at seeded moments: the engine, the whole server, or an engine that has only just started."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from dataclasses import dataclass

from tests.durability.workload import Plan
from tests.live import LiveServer

VICTIMS = ("engine", "server", "engine", "engine twice")


@dataclass(frozen=True)
class Kill:
    step: int
    phase: str
    delay: float  # seconds after the phase began
    victim: str


def plan_kills(seed: int, plan: Plan, count: int) -> list[Kill]:
    """`count` kills over distinct steps, in turn in each phase and of each victim; the delays cover a step's few milliseconds."""
    rng = random.Random(seed)
    wanted = [("before", "training", "saving", "training", "sampling")[i % 5] for i in range(count)]
    victims = [VICTIMS[i % len(VICTIMS)] for i in range(count)]
    rng.shuffle(victims)
    free = list(range(1, plan.steps))
    rng.shuffle(free)
    kills = []
    for phase, victim in zip(wanted, victims, strict=True):
        extras = {"saving": ("save_state", "publish"), "sampling": ("sample",)}.get(phase)
        step = next((s for s in free if extras is None or plan.extra(s) in extras), None)
        if step is None:
            step, phase = free[0], "training"
        free.remove(step)
        kills.append(Kill(step, phase, rng.choice([0.0, rng.uniform(0, 0.02), rng.uniform(0, 0.12)]), victim))
    return sorted(kills, key=lambda kill: kill.step)


class Killer:
    """Pass `on_phase` to the workload. Each kill runs on a thread of its own while the workload goes on; one at a time."""

    def __init__(self, server: LiveServer, kills: list[Kill]):
        self.server = server
        self.waiting = {(kill.step, kill.phase): kill for kill in kills}
        self.done: list[Kill] = []
        self.failure: BaseException | None = None
        self.thread: threading.Thread | None = None

    def on_phase(self, step: int, phase: str) -> None:
        kill = self.waiting.pop((step, phase), None)
        if kill is None:
            return
        self.finish()
        self.thread = threading.Thread(target=self._run, args=(kill,))
        self.thread.start()
        if phase == "before":  # nothing is in flight: wait for the blow, so that it comes between two steps
            self.thread.join(kill.delay + 0.05)

    def finish(self) -> None:
        """Waits for the last kill, and for the server to be there again if it was killed."""
        if self.thread is not None:
            self.thread.join()
        if self.failure is not None:
            raise self.failure

    def _run(self, kill: Kill) -> None:
        try:
            time.sleep(kill.delay)
            if kill.victim == "server":
                self.server.kill()
                self.server.restart()
            else:
                first = self._kill_engine(None)
                if kill.victim == "engine twice":
                    self._kill_engine(first)
            self.done.append(kill)
        except BaseException as error:  # noqa: BLE001  # told by `finish`
            self.failure = error

    def _kill_engine(self, other_than: int | None) -> int:
        """Kills the engine as soon as there is one, but not `other_than` again; returns its pid."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(AssertionError, ProcessLookupError):
                pid = self.server.engine_pid()
                if pid != other_than:
                    if other_than is not None:
                        time.sleep(random.Random(pid).uniform(0, 3))  # while it loads, or while it is told the log again
                    self.server.kill_engine()
                    return pid
            time.sleep(0.02)
        raise AssertionError("there was no engine to kill for a minute")
