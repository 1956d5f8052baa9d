"""What code that nobody has read can and can't do."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from everlearn.errors import Unsupported
from everlearn.rewards.sandbox import Outcome, SandboxLimits, run_code


def run(source: str, calls=(), stdin: str = "", **limits) -> Outcome:
    try:
        return asyncio.run(run_code(source, calls, stdin, SandboxLimits(**{"seconds": 10, **limits})))
    except Unsupported as error:
        pytest.skip(str(error))


def test_calls_are_answered_one_by_one():
    outcome = run("def f(a, b):\n    return [a + b, None]", [("f", [1, 2]), ("f", [1, "x"]), ("g", []), ("f", ["a", "b"])])
    assert outcome.ended == "well" and outcome.results[0] == {"value": [3, None]} and outcome.results[3] == {"value": ["ab", None]}
    assert "TypeError" in outcome.results[1]["error"] and "KeyError" in outcome.results[2]["error"]


def test_a_program_reads_and_writes():
    outcome = run("import sys\nfor line in sys.stdin: print(line.strip()[::-1])", stdin="ab\ncd\n")
    assert outcome.stdout == "ba\ndc\n" and outcome.ended == "well"
    assert run("import json, math, collections, re; print(math.pi)").stdout.startswith("3.14")
    assert run("open('kept', 'w').write('x'); print(open('kept').read())").stdout == "x\n"


def test_results_before_the_end_are_kept():
    outcome = run("import os\ndef f(n):\n    if n == 2: os._exit(0)\n    return n", [("f", [n]) for n in range(4)])
    assert outcome.ended == "killed" and outcome.results == [{"value": 0}, {"value": 1}]


@pytest.mark.parametrize(
    ("source", "ended", "word"),
    [
        ("while True: pass", "out_of_time", "not over after 1 s"),
        ("import time; time.sleep(60)", "out_of_time", "not over after 1 s"),
        ("x = bytearray(1 << 33)", "raised", "MemoryError"),
        ("while True: print('x' * 1000)", "raised", "File too large"),
        ("open('/etc/passwd').read()", "raised", "PermissionError"),
        ("import os; os.listdir('/')", "raised", "PermissionError"),
        ("import os; os.remove('/usr/bin/env')", "raised", "PermissionError"),
        ("import socket; socket.create_connection(('127.0.0.1', 1), 1)", "raised", "unreachable"),
        ("import ctypes; ctypes.string_at(0)", "killed", "status 139"),
        ("raise BaseException('odd')", "raised", "odd"),
        ("def f(: pass", "raised", "SyntaxError"),
        ("\x00", "raised", ""),
    ],
)
def test_what_it_does_to_others_is_stopped(source: str, ended: str, word: str):
    outcome = run(source, seconds=1 if ended == "out_of_time" else 20)
    assert outcome.ended == ended and word in outcome.message, outcome


def test_nothing_that_it_started_lives_on(tmp_path: Path):
    source = (
        "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3141)'], start_new_session=True)"
    )
    for ending in ("", "\ntime.sleep(60)"):
        run(source + ending, seconds=1)
        time.sleep(0.3)
        alive = [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"sleep(3141)" in _read(path)]
        assert not alive


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_secrets_of_the_environment_are_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_OF_THE_TRAINER", "x")
    assert "SECRET_OF_THE_TRAINER" not in run("import os; print(sorted(os.environ))").stdout
    assert os.environ["SECRET_OF_THE_TRAINER"] == "x"


def test_many_at_once_do_not_wait_for_each_other():
    async def all_() -> list[Outcome]:
        limits = SandboxLimits(seconds=20, strict=False)
        return await asyncio.gather(*(run_code("import time; time.sleep(2)", limits=limits) for _ in range(4)))

    started = time.monotonic()
    assert [outcome.ended for outcome in asyncio.run(all_())] == ["well"] * 4
    assert time.monotonic() - started < 7.5
