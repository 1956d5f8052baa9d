"""A server of its own for one command: started on a free port of this machine, watched until it is ready, ended afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
                raise Unavailable(_ended(process.returncode, whereabouts, log, client))
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
    known = _known(whereabouts)
    return str(known["url"]) if known.get("pid") == pid else None


def _known(whereabouts: Path) -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads(whereabouts.read_bytes())
    except FileNotFoundError:
        return {}
    return known


def _ended(code: int, whereabouts: Path, log: Path, client: httpx.Client) -> str:
    """Why there is no server, and the way out. Where the home has one already: its URL."""
    what, remedy = _last_words(log)
    url = str(_known(whereabouts).get("url", ""))
    if what.startswith("another everlearn server uses") and url and _answers(client, url):
        return f"this home already has a server, at {url} ({what}); to use that one add --url {url}, else stop it"
    return f"the server of this command ended (exit {code}): {what}; {remedy + '. Its' if remedy else 'its'} whole output is in {log}"


def _answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(f"{url}/livez").is_success
    except httpx.TransportError:
        return False


def _last_words(log: Path) -> tuple[str, str]:
    """The last error of a command line, which prints "error: what" and then a remedy, indented; else the last line alone."""
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [at for at, line in enumerate(lines) if line.startswith("error: ")]
    if not errors:
        return (lines or ["it printed nothing"])[-1].strip(), ""
    following = lines[errors[-1] + 1 :][:1]
    return lines[errors[-1]].removeprefix("error: "), "".join(line.strip() for line in following if line.startswith(" "))


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
