"""Named points at which a test makes a process die, fail or stand still: before and after everything that lasts.

`EVERLEARN_FAULT=POINT:N:KIND` (read in config.py; several with commas) arms a point: the N-th time that a process of this home comes by,
KIND happens, once in the life of the home, so that what is started again after a death goes on. Nothing here is for production:
without the variable `around` hands out an object that does nothing.
"""

from __future__ import annotations

import difflib
import errno
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from everlearn.config import Fault
from everlearn.errors import InternalError, InvalidRequest

# Each effect has two points, NAME.before and NAME.after. Those of rows lie within a transaction, where a kill undoes both alike, and have a
# third one, NAME.committed: the rows last, and nobody has been told.
ROWS = {
    "log.append": "a request's row and payload, and the rows that it implies",
    "log.finish": "a request's answer, and the rows that follow from it",
    "checkpoint.row": "a saved checkpoint becomes listed",
    "sampler.row": "an unnamed version and its sampler become usable",
    "snapshot.row": "a snapshot becomes the one that a rebuild begins with",
    "payloads.drop": "the log's payloads behind a snapshot go",
    "record.row": "records of answers, and what they count in the usage",
    "name.row": "an adapter's name gets a version, or means another one",
    "deployment.row": "a deployment changes, with its line of the log",
    "key.row": "a key is made, changed or revoked",
    "feedback.row": "a word about an answer is kept, edited or forgotten",
    "dataset.row": "a dataset becomes listed, with all its items",
    "memory.row": "turns of a memory are forgotten, or all of it; their bytes are still on the disk",
    "reward.labels": "labels join a reward model's, with how far its feedback was read",
    "reward.version": "a version of a reward model becomes listed",
    "garbage.row": "rows go whose folders are gone",
}
ACTS = {
    "store.commit": "one commit of the writer; nobody has been told yet",
    "command.send": "a command goes to the engine",
    "restore.send": "a rebuild begins: the engine is told of the newest snapshot",
    "run.create": "the engine makes a new adapter",
    "gradient.join": "a request's gradient joins its adapter's",
    "optimizer.apply": "an optimizer step",
    "weights.load": "a checkpoint replaces an adapter's state",
    "version.publish": "a version enters the bank",
    "snapshot.copy": "an adapter's state is copied for a snapshot",
    "folder.file": "one file of a folder, fsynced",
    "folder.manifest": "a folder's manifest, fsynced",
    "folder.rename": "a whole folder gets its name",
    "folder.swap": "a whole folder takes the name of an older one, which is removed then",
    "folder.sync": "a folder's new name is made durable",
    "folder.remove": "a folder goes",
    "result.emit": "an answer leaves the engine",
    "spool.put": "an answer's record outlives the process from here on",
    "spool.drop": "records leave the spool: the database has them",
    "cycle.act": "a deployment's runner does the work of a state, or asks for the next one",
}
EFFECTS = ROWS | ACTS
POINTS = tuple(
    f"{effect}.{side}" for effect in EFFECTS for side in ("before", "after", "committed") if side != "committed" or effect in ROWS
)
DELAY_SECONDS = 2.0
FIRED = "faults.fired"  # a folder with a file for each fault that has happened


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        pass


class _Around:
    def __init__(self, effect: str):
        self.effect = effect

    def __enter__(self) -> None:
        reach(f"{self.effect}.before")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            reach(f"{self.effect}.after")
            if self.effect in ROWS and _armed is not None:
                _armed.uncommitted.effects.append(self.effect)


class _Uncommitted(threading.local):
    def __init__(self) -> None:
        self.effects: list[str] = []


class _Armed:
    """The faults of this process."""

    def __init__(self, faults: Sequence[Fault], folder: Path):
        self.faults, self.folder = faults, folder
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.uncommitted = _Uncommitted()  # rows of this thread's transaction

    def reach(self, point: str) -> None:
        self._reach(point)
        if point == "store.commit.after":
            effects, self.uncommitted.effects = self.uncommitted.effects, []
            for effect in effects:
                self._reach(f"{effect}.committed")

    def _reach(self, point: str) -> None:
        with self.lock:
            self.counts[point] += 1
            fault = next((f for f in self.faults if f.point == point and f.n == self.counts[point]), None)
        if fault is None:
            return
        try:
            descriptor = os.open(self.folder / ":".join(map(str, fault)), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return
        os.close(descriptor)
        sys.stderr.write(f"fault point {point}: {fault.kind}\n")
        sys.stderr.flush()
        if fault.kind != "delay":
            self.uncommitted.effects = []
        KINDS[fault.kind](point)


def kill(point: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def error(point: str) -> None:
    raise InternalError(f"fault point {point}")


def full_disk(point: str) -> None:
    raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: fault point {point}")


def delay(point: str) -> None:
    time.sleep(DELAY_SECONDS)


KINDS: dict[str, Callable[[str], None]] = {"kill": kill, "error": error, "full-disk": full_disk, "delay": delay}
_nothing = _Nothing()
_armed: _Armed | None = None  # set once, when the process begins


def arm(faults: Sequence[Fault], home: Path) -> None:
    """Called by each process when it begins. Raises InvalidRequest for a point or kind that there isn't."""
    global _armed
    if not faults:
        return
    for fault in faults:
        if fault.point not in POINTS:
            (close,) = difflib.get_close_matches(fault.point, POINTS, n=1, cutoff=0)
            raise InvalidRequest(f"EVERLEARN_FAULT names point {fault.point!r}; did you mean {close}?")
        if fault.kind not in KINDS:
            raise InvalidRequest(f"EVERLEARN_FAULT has kind {fault.kind!r}; it must be one of {', '.join(KINDS)}")
    folder = home / FIRED
    folder.mkdir(parents=True, exist_ok=True)
    _armed = _Armed(faults, folder)


def around(effect: str) -> _Nothing | _Around:
    """`with around("optimizer.apply"): ...` has the effect's two points before and after it; the second only if it succeeds."""
    return _nothing if _armed is None else _Around(effect)


def reach(point: str) -> None:
    """One point, where `around` has no place."""
    if _armed is not None:
        _armed.reach(point)
