"""What code that nobody has read can and can't do."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from everlearn.errors import Unavailable, Unsupported
from everlearn.rewards import sandbox
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
        ("import os; os.stat('/proc/1')", "raised", "Error"),
        ("import os; os.remove('/usr/bin/env')", "raised", "Read-only"),
        ("import socket; socket.create_connection(('127.0.0.1', 1), 1)", "raised", "PermissionError"),
        ("import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)", "raised", "PermissionError"),
        ("import os; [open(str(n), 'w').close() for n in range(2000)]", "raised", "No space left"),
        ("for n in range(40): open(str(n), 'w').write('x' * 1000_000)", "raised", "No space left"),
        ("import ctypes; ctypes.string_at(0)", "killed", "status 139"),
        ("raise BaseException('odd')", "raised", "odd"),
        ("def f(: pass", "raised", "SyntaxError"),
        ("\x00", "raised", ""),
    ],
)
def test_what_it_does_to_others_is_stopped(source: str, ended: str, word: str):
    outcome = run(source, seconds=1 if ended == "out_of_time" else 20)
    assert outcome.ended == ended and word in outcome.message, outcome


def test_what_most_programs_do_is_let_through():
    source = """
import asyncio, json, math, multiprocessing, re, subprocess, sys, threading
said = []
thread = threading.Thread(target=lambda: said.append(sorted([3, 1, 2])))
thread.start(); thread.join()
said.append(json.loads(json.dumps(re.findall(r"\\d+", "a1b22"))))
said.append(asyncio.run(asyncio.sleep(0.01, math.floor(2.5))))
said.append(subprocess.run([sys.executable, "-c", "print(4)"], capture_output=True, text=True).stdout)
print(said)
"""
    outcome = run(source, seconds=60)
    assert outcome.stdout == "[[1, 2, 3], ['1', '22'], 2, '4\\n']\n", outcome


STEAL = """
import os
for name in ("stdout", "stderr", "results.jsonl"):
    if os.path.exists(name):
        os.remove(name)
    {put}
"""


def test_it_can_t_have_files_read_for_it(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text('{"confined": []}\n{"value": "the secret"}\n')
    outcome = run(STEAL.format(put=f"os.symlink({str(secret)!r}, name)"))
    assert outcome.ended == "well" and "secret" not in f"{outcome.results} {outcome.stdout} {outcome.stderr}", outcome


def test_it_can_t_make_its_reader_wait():
    started = time.monotonic()
    outcome = run(STEAL.format(put="os.mkfifo(name)"), seconds=20)
    assert outcome.ended == "well" and outcome.seconds < 20 and time.monotonic() - started < 60


def test_no_server_of_the_machine_can_be_reached(tmp_path: Path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        outcome = run(f"import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect({path!r})\nprint('reached')")
        assert outcome.ended == "raised" and "PermissionError" in outcome.message, outcome


def test_modes_owners_and_times_of_files_stay(tmp_path: Path):
    mine = tmp_path / "mine"
    mine.write_text("kept")
    os.utime(mine, (1, 1))
    before = mine.stat()
    source = """
import os
attempts = [lambda: os.chmod(p, 0o777), lambda: os.utime(p), lambda: os.chown(p, os.getuid(), -1), lambda: os.truncate(p, 0),
            lambda: os.setxattr(p, "user.x", b"1"), lambda: open(p, "a"), lambda: os.open(p, os.O_RDONLY | os.O_TRUNC)]
for attempt in attempts:
    try:
        attempt()
    except OSError:
        print("refused")
"""
    outcome = run(f"p = {str(mine)!r}\n{source}")
    after = mine.stat()
    assert outcome.stdout == "refused\n" * 7, outcome
    assert mine.read_text() == "kept" and (after.st_mode, after.st_mtime, after.st_ctime) == (
        before.st_mode,
        before.st_mtime,
        before.st_ctime,
    )


def test_it_has_no_capabilities_and_gets_no_namespaces():
    source = """
import ctypes, os, struct
libc = ctypes.CDLL(None, use_errno=True)
held = ctypes.create_string_buffer(24)
assert libc.capget(struct.pack("Ii", 0x20080522, 0), held) == 0
print(held.raw == bytes(24), [n for n in range(41) if libc.prctl(23, n, 0, 0, 0) == 1])
for number in (0x10000000, 0x20000, 0x40000000):
    print(libc.unshare(number), os.strerror(ctypes.get_errno()))
print(libc.ptrace(16, 1, None, None), libc.mount(b"none", b".", b"tmpfs", 0, None))
"""
    assert run(source).stdout == "True []\n" + "-1 Operation not permitted\n" * 3 + "-1 -1\n"


LIVES_ON = {
    "a session of its own": "subprocess.Popen(command, start_new_session=True)",
    "a daemon that nobody's end ends": """
if os.fork() == 0:
    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
    os.setsid()
    if os.fork() == 0:
        os.execv(command[0], command)
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
os.setsid()
""",
}


@pytest.mark.parametrize("ending", ["", "time.sleep(60)", "os.kill(os.getppid(), 9)\ntime.sleep(60)", "os._exit(1)"])
@pytest.mark.parametrize("way", LIVES_ON)
def test_nothing_that_it_started_lives_on(way: str, ending: str):
    mark = f"time.sleep({random.randrange(10**8, 10**9)})"
    source = f"import ctypes, os, subprocess, sys, time\ncommand = [sys.executable, '-c', 'import time; {mark}']\n{LIVES_ON[way]}\n{ending}"

    def alive() -> list[Path]:
        return [path for path in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in _read(path)]

    run(source, seconds=1)
    assert _soon(lambda: not alive()), alive()


def test_it_ends_with_the_trainer(tmp_path: Path):
    run("pass")  # skips where nothing can be confined
    mark = f"time.sleep({random.randrange(10**8, 10**9)})"
    trainer = (
        "import asyncio\nfrom everlearn.rewards.sandbox import SandboxLimits, run_code\n"
        "source = 'import subprocess, sys; subprocess.run([sys.executable, \"-c\", \"import time; MARK\"])'.replace('MARK', input())\n"
        "asyncio.run(run_code(source, limits=SandboxLimits(seconds=120)))"
    )

    def alive() -> list[Path]:
        return [path for path in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in _read(path)]

    with subprocess.Popen(
        [sys.executable, "-c", trainer], stdin=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    ) as process:
        assert process.stdin is not None
        process.stdin.write(f"{mark}\n")
        process.stdin.close()
        started = _soon(lambda: bool(alive()), 60)
        process.kill()
    assert started and _soon(lambda: not alive()), alive()


def _soon(holds: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("source", "ended"),
    [
        ("import os\nfor n in range(3, 64):\n    try: os.ftruncate(n, 0)\n    except OSError: pass\nos._exit(77)", "killed"),
        ("import os\nfor n in range(3, 64):\n    try: os.write(n, b'[' * 100_000)\n    except OSError: pass\nos._exit(0)", "killed"),
        (
            "import os\nfor n in range(3, 64):\n    try: os.write(n, b'{\"raised\": ' + b'[' * 900)\n    except OSError: pass\nos._exit(0)",
            "killed",
        ),
        ("import os\nfor _ in range(990):\n    os.mkdir('d')\n    os.chdir('d')\nos._exit(0)", "killed"),
        ("import os\nfor _ in range(9000):\n    os.mkdir('d')\n    os.chdir('d')\n", "raised"),
        ("class Odd(Exception):\n    def __str__(self): raise self\nraise Odd", "raised"),
    ],
)
def test_whatever_it_does_is_its_own_outcome(source: str, ended: str):
    outcome = run(source, [("f", [1])])
    assert outcome.ended == ended and outcome.results == []


def test_what_is_left_in_a_folder_is_removed_however_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    with sandbox._folder() as folder:
        made = subprocess.run(
            [sys.executable, "-c", "import os\nfor _ in range(3000):\n os.mkdir('d')\n os.chdir('d')"], cwd=folder, check=False
        )
        assert made.returncode == 0
    assert not list(tmp_path.iterdir())


def test_the_sandbox_s_own_failures_are_no_outcome(monkeypatch: pytest.MonkeyPatch):
    run("pass")  # skips where nothing can be confined
    program = (
        "import asyncio, resource\nfrom everlearn.errors import Unavailable\nfrom everlearn.rewards.sandbox import run_code\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\nresource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "try:\n    print(asyncio.run(run_code('pass')))\nexcept Unavailable as error:\n    print('unavailable:', error)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("unavailable: the sandbox failed before the code started") and "limit" in ran.stdout, ran
    monkeypatch.setattr(sandbox, "START_SECONDS", 0.001)
    with pytest.raises(Unavailable, match=r"not ready within 0\.001 s"):
        run("pass")


def test_secrets_of_the_environment_are_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_OF_THE_TRAINER", "x")
    assert "SECRET_OF_THE_TRAINER" not in run("import os; print(sorted(os.environ))").stdout
    assert os.environ["SECRET_OF_THE_TRAINER"] == "x"


def test_many_at_once_do_not_wait_for_each_other():
    async def all_() -> list[Outcome]:
        limits = SandboxLimits(seconds=60, strict=False)
        source = "import time\nprint(time.monotonic())\ntime.sleep(15)\nprint(time.monotonic())"
        return await asyncio.gather(*(run_code(source, limits=limits) for _ in range(4)))

    outcomes = asyncio.run(all_())
    assert [outcome.ended for outcome in outcomes] == ["well"] * 4
    starts, ends = zip(*([float(line) for line in outcome.stdout.split()] for outcome in outcomes), strict=True)
    assert max(starts) < min(ends), "the last one started before the first one ended"


def test_a_trainer_with_many_descriptors_has_a_sandbox():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip(f"this machine allows a process {hard} descriptors; this takes 1200")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1050)]
    try:
        assert run("print(1)").stdout == "1\n"
    finally:
        for one in held:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
