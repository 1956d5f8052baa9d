"""Code that a policy wrote, run where it can do little harm: `cage.py` in a process of its own, a folder of its own, and limits.

It has no network, writes nothing but its folder, reads nothing but Python and system libraries, and is killed with all that it started. It
is confined by the kernel (Linux, user namespaces, Landlock), not by Python; a hole in the kernel is a way out. Where the kernel offers
less, `strict` refuses to run, and that is the default.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from everlearn.errors import Unavailable, Unsupported

CAGE = Path(__file__).with_name("cage.py")
NOT_CONFINED = 77


class SandboxLimits(msgspec.Struct, frozen=True):
    """`seconds` on the clock and of CPU; `memory_bytes` of address space for each process; `output_bytes` for each file it writes."""

    seconds: float = 5.0
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20
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

    Arguments and values go through JSON. Raises Unsupported where the kernel can't confine and `strict` is set, and Unavailable where no
    process can be started; all that the code itself does is an Outcome.
    """
    return await asyncio.to_thread(_run, source, calls, stdin, limits or SandboxLimits())


def _run(source: str, calls: Sequence[tuple[str, Sequence[Any]]], stdin: str, limits: SandboxLimits) -> Outcome:
    job: dict[str, Any] = {"source": source, "calls": [[function, list(given)] for function, given in calls], "stdin": stdin}
    job |= {"cpu_seconds": max(1, round(limits.seconds + 0.5)), "strict": limits.strict, "processes": limits.processes}
    job |= {"memory_bytes": limits.memory_bytes, "output_bytes": limits.output_bytes}
    with tempfile.TemporaryDirectory(prefix="everlearn-code-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        started = time.monotonic()
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            code = _process(json.dumps(job).encode(), folder, out, err, limits.seconds)
        seconds = time.monotonic() - started
        lines = _lines(folder / "results.jsonl", limits.output_bytes)
        stdout, stderr = (_text(folder / file, limits.output_bytes) for file in ("stdout", "stderr"))
    if code == NOT_CONFINED and len((lines or [{}])[0].get("confined", ())) < 2:
        raise Unsupported(
            "this machine can't confine code: that takes user namespaces and Landlock (Linux 5.13 or newer, not forbidden by the "
            "container); run it elsewhere, or set SandboxLimits(strict=False) if nothing here is worth protecting"
        )
    results = [line for line in lines[1:] if "raised" not in line]
    raised = next((str(line["raised"]) for line in lines[1:] if "raised" in line), "")
    if code is None:
        return Outcome("out_of_time", results, stdout, stderr, f"not over after {limits.seconds:g} s", seconds)
    if raised:
        return Outcome("raised", results, stdout, stderr, raised, seconds)
    if len(results) < len(job["calls"]) or code >= 128 or code < 0:
        return Outcome("killed", results, stdout, stderr, f"ended with status {code}; {stderr[-200:].strip()}", seconds)
    return Outcome("well", results, stdout, stderr, "", seconds)


def _process(job: bytes, folder: Path, out: Any, err: Any, seconds: float) -> int | None:
    """The exit status; None where it had to be killed because its time was over."""
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(CAGE)],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    except OSError as error:
        raise Unavailable(f"no process for code can be started: {error}") from None
    try:
        process.communicate(job, timeout=seconds + 0.5)  # half a second for Python to start
        return process.returncode
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _lines(path: Path, most: int) -> list[dict[str, Any]]:
    """Whole lines of JSON objects; what the code itself scribbled there is no line of ours and worth nothing."""
    found = []
    for line in _text(path, most).split("\n"):
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found


def _text(path: Path, most: int) -> str:
    try:
        with path.open("rb") as file:
            return file.read(most).decode("utf-8", "replace")
    except OSError:
        return ""
