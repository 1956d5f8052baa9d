"""Code that a policy wrote, run where it can do little harm: `cage.py` in a process of its own, a folder of its own, and limits.

It has no network and no sockets, writes nothing but its folder, opens for reading nothing but Python and system libraries, and is killed
with all that it started; `cage.py` says what holds it, and what isn't held. It is confined by the kernel (Linux 5.13 or newer: user
namespaces, Landlock, seccomp), not by Python; a hole in the kernel is a way out. Where the kernel offers less, `strict` refuses to run, and
that is the default. What it writes is read here from descriptors that were open before it started, never by a path that it could have
changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import msgspec

from everlearn.errors import Unavailable, Unsupported

CAGE = Path(__file__).with_name("cage.py")
START_SECONDS = 60.0  # for Python to start and to confine itself; the code's own time begins after that


class SandboxLimits(msgspec.Struct, frozen=True):
    """`seconds` on the clock and of CPU, counted from when the code starts; `memory_bytes` of address space for each process.

    `output_bytes` for each file that it writes, standard output and error among them; `folder_bytes` for all files in its folder together
    and `files` for their number, folders included. These two and `processes` hold where there are namespaces, so always if `strict`; the
    number of processes doesn't if you are root.
    """

    seconds: float = 5.0
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20
    folder_bytes: int = 16 << 20
    files: int = 1000
    processes: int = 16
    strict: bool = True


class Outcome(msgspec.Struct, frozen=True):
    """What came of a program. `results` has one entry for each call that was answered: {"value": ...} or {"error": ...}."""

    ended: Literal["well", "raised", "out_of_time", "killed"]
    results: list[dict[str, Any]]
    stdout: str
    stderr: str
    message: str = ""
    seconds: float = 0.0


async def run_code(
    source: str, calls: Sequence[tuple[str, Sequence[Any]]] = (), stdin: str = "", limits: SandboxLimits | None = None
) -> Outcome:
    """Runs `source`, then each call (function, arguments) in it, without holding up the event loop.

    Arguments and values go through JSON. Raises Unsupported where the kernel can't confine and `strict` is set, and Unavailable where
    the sandbox itself fails before the code starts; all that the code itself does is an Outcome.
    """
    return await asyncio.to_thread(_run, source, calls, stdin, limits or SandboxLimits())


def _run(source: str, calls: Sequence[tuple[str, Sequence[Any]]], stdin: str, limits: SandboxLimits) -> Outcome:
    job: dict[str, Any] = {"source": source, "calls": [[function, list(given)] for function, given in calls], "stdin": stdin}
    job |= {"cpu_seconds": max(1, round(limits.seconds + 0.5)), **msgspec.to_builtins(limits)}
    with contextlib.ExitStack() as stack:
        asked, out, err, results = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(4))
        asked.write(json.dumps(job).encode())
        asked.seek(0)
        folder = stack.enter_context(_folder())
        code, seconds = _process((asked, out, err, results), folder, limits)
        lines = _lines(_text(results, limits.output_bytes), len(calls) + 1)
        stdout, stderr = _text(out, limits.output_bytes), _text(err, limits.output_bytes)
    raised = next((line["raised"] for line in lines if isinstance(line.get("raised"), str)), "")
    answered = [line for line in lines if "value" in line or isinstance(line.get("error"), str)][: len(calls)]
    if code is None:
        return Outcome("out_of_time", answered, stdout, stderr, f"not over after {limits.seconds:g} s", seconds)
    if raised:
        return Outcome("raised", answered, stdout, stderr, _printable(raised), seconds)
    if len(answered) < len(calls) or code >= 128 or code < 0:
        return Outcome("killed", answered, stdout, stderr, f"ended with status {code}; {stderr[-200:].strip()}", seconds)
    return Outcome("well", answered, stdout, stderr, "", seconds)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """An empty folder. What code leaves in it when nothing is mounted there can be too deep for Python to remove."""
    folder = Path(tempfile.mkdtemp(prefix="everlearn-code-"))
    try:
        yield folder
    finally:
        try:
            folder.rmdir()
        except OSError:
            remove = shutil.which("rm")
            if remove:
                subprocess.run([remove, "-rf", "--", str(folder)], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def _process(files: tuple[IO[bytes], IO[bytes], IO[bytes], IO[bytes]], folder: Path, limits: SandboxLimits) -> tuple[int | None, float]:
    """The exit status and the seconds that the code took; None for the status where it had to be killed because its time was over."""
    asked, out, err, results = files
    status, told = os.pipe()
    with os.fdopen(status, "rb", buffering=0) as pipe:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(CAGE), str(told), str(results.fileno())],
                cwd=folder,
                stdin=asked,
                stdout=out,
                stderr=err,
                env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"},
                pass_fds=(told, results.fileno()),
                start_new_session=True,
            )
        except OSError as error:
            raise Unavailable(f"no process for code can be started: {error}") from None
        finally:
            os.close(told)
        try:
            _wait_until_ready(pipe, err)
            started = time.monotonic()
            try:
                return process.wait(limits.seconds), time.monotonic() - started
            except subprocess.TimeoutExpired:
                return None, time.monotonic() - started
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_ready(pipe: IO[bytes], err: IO[bytes]) -> None:
    """Returns when the code is about to start. What happens before that is no fault of the code's, and no judgement of it."""
    line, deadline = b"", time.monotonic() + START_SECONDS
    poll = select.poll()  # not select.select, which takes no descriptor over 1023
    poll.register(pipe, select.POLLIN)
    while not line.endswith(b"\n"):
        if not poll.poll(1000 * max(deadline - time.monotonic(), 0.0)):
            raise Unavailable(f"the sandbox was not ready within {START_SECONDS:g} s; is the machine overloaded?")
        piece = pipe.read(4096)
        if not piece:
            raise Unavailable(f"the sandbox failed before the code started: {_text(err, 1 << 20)[-500:].strip() or 'it was killed'}")
        line += piece
    status = json.loads(line)
    if not status["ready"]:
        raise Unsupported(
            f"this machine ({platform.machine()}) can't confine code: {' and '.join(status['missing'])} can't be had; that takes Linux "
            "5.13 or newer on x86_64 or aarch64, with user namespaces, Landlock and seccomp, not forbidden by the container; run it "
            "elsewhere, or set SandboxLimits(strict=False) if nothing here is worth protecting"
        )


def _lines(text: str, most: int) -> list[dict[str, Any]]:
    """The first whole lines of JSON objects; what the code itself scribbled there is no line of ours and worth nothing."""
    found: list[dict[str, Any]] = []
    for line in text.split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
        if len(found) == most:
            break
    return found


def _text(file: IO[bytes], most: int) -> str:
    """What is in a file now, wherever the code left its position; never more than `most` bytes."""
    return os.pread(file.fileno(), most, 0).decode("utf-8", "replace")


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
