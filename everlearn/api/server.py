"""The API process in the foreground: sockets, signals, the five lines at start, the drain at the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

import uvicorn

import everlearn
from everlearn import faultpoints, telemetry
from everlearn.api.app import create_app
from everlearn.api.auth import is_loopback
from everlearn.api.services import Services
from everlearn.config import Settings, faults
from everlearn.errors import EverlearnError, InvalidRequest, Unavailable
from everlearn.store import keys
from everlearn.store.db import open_database

log = logging.getLogger(__name__)


def run(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status. Raises EverlearnError if it can't start."""
    telemetry.setup(settings.api.log_format)
    settings.home.mkdir(parents=True, exist_ok=True)
    faultpoints.arm(faults(), settings.home)
    if not is_loopback(settings.api.host):
        require_key(settings)
    listener = listen(settings.api.host, settings.api.port)
    url = f"http://{url_host(settings.api.host)}:{listener.getsockname()[1]}"
    app = create_app(settings)
    config = uvicorn.Config(
        app, loop="uvloop", http="httptools", log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=5,
        timeout_keep_alive=75, server_header=False,
    )  # fmt: skip
    server = Server(config, settings, url)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # uvicorn raises the signal again once it has ended in order
    except SystemExit:  # how it says that it couldn't start
        if server.failure is None:
            raise
    finally:
        listener.close()
        remove_server_file(settings.home)
    if server.failure is not None:
        raise server.failure
    return 0 if server.started else 1


class Server(uvicorn.Server):
    """uvicorn with our own end: SIGTERM first makes the server not ready and waits for accepted requests, while it still answers
    (/readyz, polls), and only then closes. A second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, settings: Settings, url: str):
        super().__init__(config)
        self.settings, self.url = settings, url
        # uvicorn would tell of a failed start by a traceback; `run` raises what it was.
        logging.getLogger("uvicorn.error").addFilter(lambda _: self.failure is None)
        self._drain: asyncio.Task[None] | None = None
        self._words: asyncio.Task[None] | None = None

    @property
    def services(self) -> Services:
        return self.config.app.state.services  # type: ignore[union-attr]

    @property
    def failure(self) -> EverlearnError | None:
        """Why it couldn't start."""
        return getattr(self.config.app.state, "failure", None)  # type: ignore[union-attr]

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        await self._serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if not self.should_exit:
            write_server_file(self.settings.home, self.url)
            self._words = asyncio.create_task(announce(self.services, self.url))

    def _on_signal(self, number: int) -> None:
        if self._drain is not None or not self.started:
            self.should_exit = self.force_exit = True
            return
        log.info("%s: finishing accepted requests (at most %g s)", signal.Signals(number).name, self.settings.api.shutdown_grace_seconds)
        self._drain = asyncio.create_task(self._end())

    async def _end(self) -> None:
        grace = self.settings.api.shutdown_grace_seconds
        left, _ = await asyncio.gather(self.services.dispatcher.drain(grace), self.services.serving.drain(grace))
        if left:
            log.info("%d requests are unfinished; they go on at the next start", left)
        if self._words is not None:
            self._words.cancel()
        self.should_exit = True


async def announce(svc: Services, url: str) -> None:
    """The five lines: version, model, KV cache, endpoints, ready."""
    settings, engine = svc.settings, svc.engine
    model = svc.catalog.default
    say(f"everlearn {everlearn.__version__}, home {settings.home}, store {'sqlite' if svc.db.dialect == 'sqlite' else svc.db.dialect}")
    while not engine.up:
        if engine.state == "failed":
            say(f"not ready: {engine.reason}")
            return
        await asyncio.sleep(0.05)
    ready = engine.ready
    assert ready is not None
    model = next((info for info in ready.models if info.name == model.name), model)
    size = await asyncio.to_thread(folder_bytes, Path(model.path))
    parameters = f"{model.num_parameters / 1e6:.0f} M parameters, " if model.num_parameters else ""
    say(f"model {model.name} ({parameters}{size / 2**20:.0f} MiB) on {ready.device} in {ready.dtype}")
    say(f"KV cache {ready.kv_tokens:,} tokens of {ready.kv_token_bytes:,} bytes; context {model.max_context:,}")
    say(f"endpoints {url}/v1 (OpenAI), {url}/api/v1 (Tinker), {url}/dashboard, {url}/health, {url}/metrics")
    say(f"ready in {time.time() - svc.started_at:.1f} s")


def say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def folder_bytes(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return 0


def require_key(settings: Settings) -> None:
    """Beyond this machine nobody is served without a key."""
    db = open_database(settings.store_url)
    try:
        if not db.read(keys.any_keys):
            raise InvalidRequest(
                f"api.host {settings.api.host} is reachable from other machines, and there is no key; "
                "make one with: everlearn key create NAME",
                param="api.host",
            )
    finally:
        db.close()


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise Unavailable(f"can't listen on {host}:{port}: {error.strerror}; give another --port (0 picks a free one)") from error
    listener.setblocking(False)
    return listener


def url_host(host: str) -> str:
    """An address that a client on this machine can use."""
    if host in ("0.0.0.0", ""):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host


def server_file(home: Path) -> Path:
    return home / "server.json"


def write_server_file(home: Path, url: str) -> None:
    """Tells the command line where this home's server is."""
    temporary = home / f"server.json.tmp-{os.getpid()}"
    temporary.write_text(json.dumps({"pid": os.getpid(), "url": url, "version": everlearn.__version__, "started_at": time.time()}))
    temporary.replace(server_file(home))


def remove_server_file(home: Path) -> None:
    """If it is ours: a server that couldn't start has none, and another's must stay."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads(server_file(home).read_text())["pid"] == os.getpid():
            server_file(home).unlink()
