"""How processes end, and what a client is told meanwhile: SIGTERM drains, orphans die, an engine that is away has a reason."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tinker
from tinker import types

from tests.durability.workload import datum
from tests.live import AT_ONCE, KEY, LiveServer

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"), pytest.mark.timeout(400)]

BIG = [datum([3 + (7 * i + j) % 500 for j in range(400)]) for i in range(60)]  # a second or more of training


@pytest.fixture
def client_of(new_server) -> Iterator[Callable[[LiveServer], tinker.TrainingClient]]:
    """Makes clients, and stops their heartbeats before the servers end."""
    services: list[tuple[LiveServer, tinker.ServiceClient]] = []

    def make(server: LiveServer) -> tinker.TrainingClient:
        services.append((server, tinker.ServiceClient(base_url=server.url, api_key=KEY)))
        return services[-1][1].create_lora_training_client(server.model, rank=4, seed=1).result(timeout=120)

    yield make
    for server, service in services:
        if server.process.poll() is None:
            service.close("success").result(timeout=60)


def gone(pid: int) -> bool:
    """No such process, or a zombie that nobody has reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def until(condition: Callable[[], bool], seconds: float) -> float:
    """Waits for `condition`; returns how long it took, fails after `seconds`."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds} s"
        time.sleep(0.01)
    return time.monotonic() - started


def readiness(server: LiveServer) -> tuple[int, str]:
    status, body = server.get("/readyz")
    return status, json.loads(body)["reason"]


def in_flight(server: LiveServer) -> int:
    return int(json.loads(server.get("/health")[1])["requests"]["training_requests_pending"])


def test_sigterm_finishes_what_was_accepted(new_server, client_of) -> None:
    server = new_server(**{"api.shutdown_grace_seconds": 120.0})
    client = client_of(server)
    futures = [client.forward_backward(BIG, "cross_entropy") for _ in range(2)]
    update = client.optim_step(types.AdamParams(learning_rate=1e-3))
    until(lambda: in_flight(server) >= 3, 60)
    engine = server.engine_pid()
    server.process.send_signal(signal.SIGTERM)
    until(lambda: readiness(server) == (503, "the server is shutting down"), AT_ONCE)
    assert [future.result(timeout=120).metrics["loss:sum"] > 0 for future in futures] == [True, True]
    assert update.result(timeout=120).metrics["optimizer_step:max"] == 1
    assert server.process.wait(60) == 0
    assert gone(engine)


def test_an_engine_ends_with_its_server(new_server, client_of) -> None:
    server = new_server()
    client = client_of(server)
    busy = threading.Thread(target=_swallow, args=(client.forward_backward(BIG[:20], "cross_entropy"),), daemon=True)
    busy.start()
    engine = server.engine_pid()
    server.kill()
    assert until(lambda: gone(engine), AT_ONCE) < AT_ONCE
    server.restart()  # so that the client, which tries again and again, comes to its end
    busy.join(120)
    assert not busy.is_alive()


def _swallow(future) -> None:
    assert future.result(timeout=120).metrics["loss:sum"] > 0


def test_a_client_is_told_why_it_waits(new_server, client_of) -> None:
    """The engine is killed and its successor stopped while it starts: readiness, polls and the answer after it goes on."""
    server = new_server(**{"api.long_poll_seconds": 3.0})
    client = client_of(server)
    client.forward_backward(BIG[:2], "cross_entropy").result(timeout=60)
    first = server.engine_pid()
    os.kill(first, signal.SIGKILL)
    assert until(lambda: readiness(server)[0] == 503, AT_ONCE) < AT_ONCE
    assert f"pid {first}" in readiness(server)[1] and "SIGKILL" in readiness(server)[1]
    second: list[int] = []
    until(lambda: _engine(server, second), 30)
    os.kill(second[0], signal.SIGSTOP)
    try:
        future = client.forward_backward(BIG[:2], "cross_entropy")
        until(lambda: in_flight(server) == 1, 30)
        started = time.monotonic()
        answer = poll(server, f"{client.model_id}:2")
        assert time.monotonic() - started < 45
        assert answer["type"] == "try_again" and answer["queue_state"] == "paused_capacity"
        assert "SIGKILL" in answer["queue_state_reason"]
        assert readiness(server)[0] == 503
    finally:
        os.kill(second[0], signal.SIGCONT)
    assert future.result(timeout=120).metrics["loss:sum"] > 0
    assert readiness(server) == (200, "ready")


def _engine(server: LiveServer, found: list[int]) -> bool:
    try:
        found.append(server.engine_pid())
    except AssertionError:
        return False
    return True


def poll(server: LiveServer, request_id: str) -> dict[str, str]:
    body = json.dumps({"request_id": request_id}).encode()
    headers = {"x-api-key": KEY, "content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(server.url + "/api/v1/retrieve_future", body, headers), timeout=60) as reply:
        return dict(json.loads(reply.read()))
