"""The inside of the sandbox: a program of its own that confines itself, then runs code that nobody has read.

Started by `sandbox.py` as `python -I cage.py`, with a job as JSON on its input; it knows nothing of everlearn. What confines it (Linux):
namespaces (no network, own process ids, so that killing it kills all that it started), Landlock (reads Python and system libraries,
writes its folder, nothing else), and resource limits. Each that is in force is named in the first line of `results.jsonl`; with
`strict`, nothing runs unless all are.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWPID, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x20000000, 0x08000000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
EXECUTE, READ_FILE, READ_DIR = 1 << 0, 1 << 2, 1 << 3
RIGHTS_OF_ABI = {1: 13, 2: 14, 3: 15, 4: 15}  # how many of the rights on files there are; from 5 on 16
READABLE = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom", "/dev/zero")
NOT_CONFINED = 77  # the exit status that says so
ERROR_LENGTH = 500

libc = ctypes.CDLL(None, use_errno=True)


def isolate() -> bool:
    """No network and process ids of its own; returns in a child, whose end its parent hands on. False where the kernel doesn't let us."""
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC) != 0:
        return False
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return True


def restrict_files(folder: Path | None, more: Iterable[str] = ()) -> bool:
    """Landlock: Python, the system's libraries and `more` can be read, `folder` can be written. False where the kernel has none."""
    abi = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)
    if abi < 1:
        return False
    everything = (1 << RIGHTS_OF_ABI.get(abi, 16)) - 1
    attributes = struct.pack("Q", everything)
    rules = libc.syscall(LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    if rules < 0:
        return False
    allowed = {Path(path): READ_FILE | READ_DIR | EXECUTE for path in (*READABLE, sys.prefix, sys.base_prefix, *more)}
    for path, rights in (allowed if folder is None else {**allowed, folder: everything}).items():
        if not path.exists():
            continue
        at = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights if path.is_dir() else rights & ~READ_DIR, at)
        added = libc.syscall(LANDLOCK_ADD_RULE, rules, 1, rule, 0)
        os.close(at)
        if added != 0:
            return False
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return bool(libc.syscall(LANDLOCK_RESTRICT_SELF, rules, 0) == 0)


def limit(job: dict[str, Any]) -> None:
    bounds = {
        resource.RLIMIT_CPU: job["cpu_seconds"],
        resource.RLIMIT_AS: job["memory_bytes"],
        resource.RLIMIT_FSIZE: job["output_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: job["processes"],
        resource.RLIMIT_CORE: 0,
    }
    for kind, bound in bounds.items():
        resource.setrlimit(kind, (bound, bound))


def call(namespace: dict[str, Any], function: str, arguments: list[Any]) -> dict[str, Any]:
    try:
        return {"value": json.loads(json.dumps(namespace[function](*arguments), allow_nan=False))}
    except BaseException as error:  # noqa: BLE001 - code that nobody has read may raise anything
        return {"error": said(error)}


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:ERROR_LENGTH]


def run(job: dict[str, Any], results: TextIO) -> int:
    """Runs the source, then the calls; a line for each, written at once, so that what ends the process doesn't take them along."""
    namespace: dict[str, Any] = {"__name__": "__main__" if not job["calls"] else "answer"}
    sys.stdin = io.StringIO(job["stdin"])
    code = 0
    try:
        exec(compile(job["source"], "answer.py", "exec"), namespace)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:  # noqa: BLE001
        traceback.print_exc()
        results.write(json.dumps({"raised": said(error)}) + "\n")
        return 1
    for function, arguments in job["calls"]:
        results.write(json.dumps(call(namespace, function, arguments)) + "\n")
        results.flush()
    return code


def main() -> None:
    job = json.loads(sys.stdin.buffer.read())
    folder = Path.cwd()
    held = ["processes and network"] if isolate() else []
    results = (folder / "results.jsonl").open("w", encoding="utf-8")
    held += ["files"] if restrict_files(folder) else []
    results.write(json.dumps({"confined": held}) + "\n")
    results.flush()
    if job["strict"] and len(held) < 2:
        os._exit(NOT_CONFINED)
    limit(job)
    code = run(job, results)
    results.close()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    os._exit(code & 0xFF)  # threads and handlers of the code that ran have nothing more to say


if __name__ == "__main__":
    main()
