"""A server of its own for one command: started on a free port of this machine, watched until it is ready, ended afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from everlearn.errors import Unavailable

START_SECONDS = 600.0  # loading takes about ten on an idle machine; a busy one is much slower
STOP_SECONDS = 30.0

OnWait = Callable[[float, str], None]  # (seconds so far, what the server says of itself)


@contextmanager
def serving(home: Path, log: Path, config: Path | None, on_wait: OnWait, model: Path | None = None) -> Iterator[str]:
    """The base URL of a ready server on `home`, of the folder `model` or of the settings' default model.
    Its output goes to `log`; it ends with the block, however the block ends."""
    command = [sys.executable, "-m", "everlearn.cli.main", "serve", "--home", str(home), "--host", "127.0.0.1", "--port", "0"]
    if config is not None:
        command += ["--config", str(config)]
    if model is not None:
        command.append(str(model))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield _await_ready(process, home / "server.json", log, on_wait)
    finally:
        _stop(process)


def _await_ready(process: subprocess.Popen[bytes], whereabouts: Path, log: Path, on_wait: OnWait) -> str:
    """The URL, once the server there says that it is ready. The server writes the file `whereabouts` as soon as it listens."""
    started = time.monotonic()
    state = "starting"
    with httpx.Client(timeout=5.0, trust_env=False) as client:
        while (waited := time.monotonic() - started) < START_SECONDS:
            if process.poll() is not None:
                raise Unavailable(
                    f"the server of this command ended (exit {process.returncode}): {_last_line(log)}; its whole output is in {log}"
                )
            if url := _address(whereabouts, process.pid):
                try:
                    response = client.get(f"{url}/readyz")
                    if response.is_success:
                        return url
                    state = str(response.json().get("reason", "not ready"))
                except httpx.TransportError as error:
                    state = f"no answer ({error})"
            on_wait(waited, state)
            time.sleep(0.2)
    raise Unavailable(f"the server of this command wasn't ready after {START_SECONDS:.0f} s (it says: {state}); its output is in {log}")


def _address(whereabouts: Path, pid: int) -> str | None:
    """The URL of server `pid`. A file of another process is one that was killed, or a server that already runs on this home."""
    try:
        known = json.loads(whereabouts.read_bytes())
    except FileNotFoundError:
        return None
    return str(known["url"]) if known["pid"] == pid else None


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # The command line prints "error: what" and then a remedy, indented: the first says more.
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["it printed nothing"])[-1]


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
