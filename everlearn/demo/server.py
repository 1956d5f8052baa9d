"""A server of its own for the demo: started on a free port of this machine, watched until it is ready, ended afterwards."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from everlearn.errors import Unavailable

START_SECONDS = 180.0  # loading takes about ten on an idle machine; a busy one is slower
STOP_SECONDS = 30.0

OnWait = Callable[[float, str], None]  # (seconds so far, what the server says of itself)


@contextmanager
def serving(home: Path, log: Path, config: Path | None, on_wait: OnWait) -> Iterator[str]:
    """The base URL of a ready server on `home`. Its output goes to `log`; it ends with the block, however the block ends."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "everlearn.cli.main", "serve", "--home", str(home), "--host", "127.0.0.1", "--port", str(port)]
    if config is not None:
        command += ["--config", str(config)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        _await_ready(process, url, log, on_wait)
        yield url
    finally:
        _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _await_ready(process: subprocess.Popen[bytes], url: str, log: Path, on_wait: OnWait) -> None:
    started = time.monotonic()
    state = "starting"
    with httpx.Client(base_url=url, timeout=5.0, trust_env=False) as client:
        while (waited := time.monotonic() - started) < START_SECONDS:
            if process.poll() is not None:
                raise Unavailable(f"the demo's server ended (exit {process.returncode}): {_last_line(log)}; its whole output is in {log}")
            try:
                response = client.get("/readyz")
                if response.is_success:
                    return
                state = response.text.strip()[:200]
            except httpx.TransportError:
                pass  # not listening yet
            on_wait(waited, state)
            time.sleep(0.2)
    raise Unavailable(f"the demo's server wasn't ready after {START_SECONDS:.0f} s (it says: {state}); its output is in {log}")


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
