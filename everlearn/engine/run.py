"""A training run in the engine: its adapter, what it still has to do, and what a replay must not leave out.

After a crash the requests of the log run again. One that succeeded before may fail now, for want of memory say, while what stands behind
it in the log is in the queue already. Nothing may run upon an adapter without its effect: the log says that it has it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from everlearn.engine.adapter import TrainingAdapter
from everlearn.engine.protocol import ForwardBackward, Load, OptimStep, Publish, Save, TakeSnapshot
from everlearn.engine.trainer import Job

QUEUED = ForwardBackward | OptimStep | Save | Publish | Load | TakeSnapshot


class Run:
    """An adapter and its queue; `job` is its forward_backward that is in the trainer. `replays`: requests that succeeded
    before and have yet to do so again. Once one of them is known not to, the run is `lost`: nothing more happens to it."""

    def __init__(self, adapter: TrainingAdapter, replays: Iterable[int] = ()):
        self.adapter = adapter
        self.replays = deque(replays)
        self.lost = False
        self.queue: deque[QUEUED] = deque()
        self.job: Job | None = None
        self.seconds_since_snapshot = 0.0
        self.steps_since_snapshot = 0
        self.snapshot_running = False
        self.last_job = 0.0

    def lacks(self, command: QUEUED) -> bool:
        """Whether `command` came although one before it has yet to succeed again."""
        return bool(self.replays) and not isinstance(command, TakeSnapshot) and self.replays[0] < command.seq

    def settle(self, seq: int, succeeded: bool) -> bool:
        """Request `seq` was run: the adapter has its effect, or is as before. False where it had to succeed, because the log says so."""
        if self.replays and self.replays[0] == seq:
            if not succeeded:
                return False
            self.replays.popleft()
        self.adapter.seq = seq
        return True
