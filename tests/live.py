"""A real everlearn server in its own processes, with the handles that tests need: its URL, its pids, a way to kill either."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

KEY = "tml-test"
READY_SECONDS = 600.0  # a busy machine imports for minutes
AT_ONCE = 10.0  # seconds: what an idle machine does within one, a busy one still does within these


def came_to_its_end(process: subprocess.CompletedProcess[str]) -> bool:
    """Whether a program that used the SDK got to its last line. On Python 3.11 a thread of the SDK's HTTP library (pyqwest) that wants the
    interpreter while it is being taken down ends the process with SIGABRT, without a word, after everything was done."""
    return process.returncode == 0 or (process.returncode == -signal.SIGABRT and not process.stderr)


class LiveServer:
    """`url`, `home`, `model` (the base model's name)."""

    def __init__(self, process: subprocess.Popen[bytes], home: Path, url: str, log: Path, command: list[str], environment: dict[str, str]):
        self.process, self.home, self.url, self.log = process, home, url, log
        self.command, self.environment = command, environment
        self.model = "tiny"

    def get(self, path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def engine_pid(self) -> int:
        """The engine's process: the server's child that runs everlearn.engine.main."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        for child in " ".join(path.read_text() for path in children).split():
            with contextlib.suppress(OSError):
                if b"everlearn.engine.main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
        raise AssertionError("the server has no engine process")

    def kill_engine(self) -> None:
        os.kill(self.engine_pid(), signal.SIGKILL)

    def kill(self) -> None:
        """SIGKILL of the API process; the engine dies with it."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """The same command again, on the same port and home."""
        self.process = launch(self.command, self.environment, self.log)
        wait_ready(self.process, self.url, self.log)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def launch(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)


def start_server(
    home: Path,
    model: Path,
    settings: Mapping[str, object] | None = None,
    name: str = "tiny",
    variables: Mapping[str, str] | None = None,
    others: Mapping[str, Path] | None = None,
) -> LiveServer:
    """Starts `everlearn serve` on a free port, with `variables` in its environment and `others` as further base models, and waits until
    it is ready."""
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    given = {"engine.threads": 1, "engine.kv_tokens": 8192, "api.shutdown_grace_seconds": 3.0, **(settings or {})}
    lines = [f'models.default = "{name}"', *(f"{key} = {json.dumps(value)}" for key, value in given.items())]
    lines += ["[[models.base]]", f'name = "{name}"', f'path = "{model}"', 'aliases = ["Qwen/Qwen3-8B"]']
    for other, path in (others or {}).items():
        lines += ["[[models.base]]", f'name = "{other}"', f'path = "{path}"']
    text = "\n".join([*lines, ""])
    tomllib.loads(text)
    config = home / "everlearn.toml"
    config.write_text(text)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("EVERLEARN_", "TINKER_"))} | {
        "EVERLEARN_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "default",
        **(variables or {}),
    }
    command = [sys.executable, "-m", "everlearn.cli.main", "--config", str(config), "serve", "--port", str(port)]
    log = home / "server.log"
    process = launch(command, environment, log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_ready(process, url, log)
    except AssertionError:
        process.kill()
        process.wait()
        raise
    return LiveServer(process, home, url, log, command, environment)


def wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"the server ended with {process.returncode}:\n{log.read_text()[-4000:]}")
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(url + "/readyz", timeout=5) as reply:
                if reply.status == 200:
                    return
        time.sleep(0.1)
    raise AssertionError(f"the server was not ready in {READY_SECONDS} s:\n{log.read_text()[-4000:]}")


def free_port() -> int:
    """A port on which nobody listens, below those that Linux gives away by itself (from 32768): it is still free when the server comes."""
    import socket

    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port
