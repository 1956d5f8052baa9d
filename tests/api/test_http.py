"""What every answer of a real server has in common, and its life: readiness, metrics, limits, errors, signals."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import zstandard

from tests.live import AT_ONCE, LiveServer

LIMIT = 64 * 2**20


@pytest.fixture
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def test_health_says_ready_with_numbers(http: httpx.Client) -> None:
    assert http.get("/livez").json() == {"status": "alive"}
    assert http.get("/readyz").json() == {"status": "ready", "reason": "ready"}
    health = http.get("/health").json()
    assert health["engine"]["state"] == "ready" and health["engine"]["heartbeat_age_seconds"] < 5


def test_metrics_have_vllm_names_and_bounded_labels(http: httpx.Client) -> None:
    for number in range(20):
        http.get(f"/nothing/{number}")
        http.get(f"/api/v1/training_runs/sess-{number}")
    text = http.get("/metrics").text
    for name in (
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
        "vllm:generation_tokens_total",
        "everlearn_engine_up",
        "everlearn_http_request_seconds_bucket",
    ):
        assert re.search(rf"^{name}[ {{]", text, re.M), name
    routes = set(re.findall(r'route="([^"]*)"', text))
    assert not any("sess-" in route or "nothing" in route for route in routes), routes


def test_every_answer_has_an_id_and_every_error_the_envelope(http: httpx.Client) -> None:
    ids = set()
    for reply in (
        http.get("/livez"),
        http.get("/no/such"),
        http.delete("/livez"),
        http.post("/api/v1/get_info", content=b"{"),
        http.get("/api/v1/samplers/x"),
    ):
        ids.add(reply.headers["x-request-id"])
        if reply.status_code >= 400:
            body = reply.json()
            assert set(body["error"]) == {"message", "type", "param", "code"} and body["detail"] == body["error"]["message"]
            assert reply.status_code in (400, 404, 405)
    assert len(ids) == 5
    assert http.get("/livez", headers={"x-request-id": "forged\tid"}).headers["x-request-id"].startswith("req_")


def test_a_body_over_the_limit_is_refused_and_the_server_goes_on(http: httpx.Client) -> None:
    reply = http.post(
        "/api/v1/client/config", content=zstandard.ZstdCompressor().compress(bytes(LIMIT + 1)), headers={"content-encoding": "zstd"}
    )
    assert reply.status_code == 413 and "api.max_body_bytes" in reply.json()["detail"]
    assert http.post("/api/v1/client/config", json={"sdk_version": "0.38.0"}).status_code == 200


def test_hostile_headers_get_an_answer(server: LiveServer) -> None:
    host, port = "127.0.0.1", int(server.url.rsplit(":", 1)[1])
    for request in (
        b"GET /livez HTTP/1.1\r\nHost: [\r\n\r\n",
        b"GET /openapi.json HTTP/1.1\r\nHost: [::1\r\n\r\n",
        b"GET /%00%ff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ):
        with socket.create_connection((host, port), timeout=10) as connection:
            connection.sendall(request)
            assert re.match(rb"HTTP/1.1 [24]\d\d", connection.recv(1000)), request


def test_a_dead_engine_is_told_at_once_and_replaced(new_server: Callable[..., LiveServer]) -> None:
    live = new_server()
    assert json.loads((live.home / "server.json").read_text())["url"] == live.url
    first = live.engine_pid()
    live.kill_engine()
    killed = time.monotonic()
    while (reply := live.get("/readyz"))[0] == 200:
        assert time.monotonic() - killed < AT_ONCE
        time.sleep(0.02)
    assert "SIGKILL" in json.loads(reply[1])["reason"]
    assert live.get("/livez")[0] == 200 and live.get("/api/v1/healthz")[0] == 200
    while live.get("/readyz")[0] != 200:
        assert time.monotonic() - killed < 90
        time.sleep(0.1)
    second = live.engine_pid()
    assert second != first
    live.process.send_signal(signal.SIGTERM)
    assert live.process.wait(30) == 0
    assert not (live.home / "server.json").exists() and not Path(f"/proc/{second}").exists()
    log = live.log.read_text()
    for line in ("everlearn 0", "model tiny", "KV cache 8,192 tokens", "endpoints http://127.0.0.1", "ready in"):
        assert line in log, line
