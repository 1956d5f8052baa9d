"""Named points at which a test makes a process die, fail or stand still: before and after everything that lasts.

`EVERLEARN_FAULT=POINT:N:KIND` (read in config.py) arms one point: the N-th time that a process of this home comes by, KIND happens, once
in the life of the home, so that what is started again after a death goes on. Nothing here is for production: without the variable
`around` hands out an object that does nothing.
"""

from __future__ import annotations

import difflib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from everlearn.config import Fault
from everlearn.errors import InternalError, InvalidRequest

# Each effect has two points, NAME.before and NAME.after.
EFFECTS = {
    "log.append": "a request's row and payload, and the rows that it implies (not yet committed)",
    "log.finish": "a request's answer, and the rows that follow from it (not yet committed)",
    "store.commit": "one commit of the writer; nobody has been told yet",
    "checkpoint.row": "a saved checkpoint becomes listed (not yet committed)",
    "sampler.row": "an unnamed version and its sampler become usable (not yet committed)",
    "snapshot.row": "a snapshot becomes the one that a rebuild begins with (not yet committed)",
    "payloads.drop": "the log's payloads behind a snapshot go (not yet committed)",
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
    "folder.sync": "that name is made durable",
    "folder.remove": "a folder goes",
    "result.emit": "an answer leaves the engine",
}
POINTS = tuple(f"{effect}.{side}" for effect in EFFECTS for side in ("before", "after"))
DELAY_SECONDS = 2.0
FIRED = "fault.fired"  # the file that says that it has happened


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


class _Armed:
    """The one fault of this process."""

    def __init__(self, fault: Fault, home: Path):
        self.fault, self.marker = fault, home / FIRED
        self.count = 0
        self.lock = threading.Lock()

    def reach(self, point: str) -> None:
        if point != self.fault.point:
            return
        with self.lock:
            self.count += 1
            if self.count != self.fault.n:
                return
        try:
            descriptor = os.open(self.marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return
        os.write(descriptor, f"{point} {os.getpid()}\n".encode())
        os.close(descriptor)
        sys.stderr.write(f"fault point {point}: {self.fault.kind}\n")
        sys.stderr.flush()
        KINDS[self.fault.kind](point)


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


def arm(fault: Fault | None, home: Path) -> None:
    """Called by each process of a server when it begins. Raises InvalidRequest for a point or kind that there isn't."""
    global _armed
    if fault is None:
        return
    if fault.point not in POINTS:
        (close,) = difflib.get_close_matches(fault.point, POINTS, n=1, cutoff=0)
        raise InvalidRequest(f"EVERLEARN_FAULT names point {fault.point!r}; did you mean {close}?")
    if fault.kind not in KINDS:
        raise InvalidRequest(f"EVERLEARN_FAULT has kind {fault.kind!r}; it must be one of {', '.join(KINDS)}")
    home.mkdir(parents=True, exist_ok=True)
    _armed = _Armed(fault, home)


def around(effect: str) -> _Nothing | _Around:
    """`with around("optimizer.apply"): ...` has the effect's two points before and after it; the second only if it succeeds."""
    return _nothing if _armed is None else _Around(effect)


def reach(point: str) -> None:
    """One point, where `around` has no place."""
    if _armed is not None:
        _armed.reach(point)
