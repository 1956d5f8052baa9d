"""The sink that tells the server: a folder is told once and whole, lines that aren't finished wait, and a server that is away stops nothing."""

from __future__ import annotations

import json
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import tinker

from everlearn.rl.runfolder import append, note_run
from everlearn.rl.server_sink import MAX_FAILURES, MAX_LINE, ServerSink
from everlearn.rl.sinks import Sinks
from tests.live import LiveServer, free_port


@pytest.fixture
def folder(service: tinker.ServiceClient, tmp_path: Path) -> Path:
    note_run(tmp_path, service.create_lora_training_client("tiny", rank=4).result().model_id, {"loss": "ppo"})
    return tmp_path


def told(server: LiveServer, folder: Path, what: str) -> list[dict[str, Any]]:
    run = json.loads((folder / "run.json").read_text())["run_id"]
    status, body = server.get(f"/v1/runs/{run}/{what}?limit=100")
    assert status == 200
    return json.loads(body)["data"]  # type: ignore[no-any-return]


def record(step: int, text: str = "") -> str:
    return json.dumps({"step": step, "tags": ["t"], "failures": [], "members": [], "text": text}) + "\n"


def wide(step: int, text: str) -> str:
    """As everlearn/rl/records.py writes it: characters beyond ASCII as they are."""
    return json.dumps({"step": step, "tags": [], "failures": [], "members": [], "text": text}, ensure_ascii=False) + "\n"


def test_a_folder_is_told_whole_and_once(server: LiveServer, folder: Path):
    sink = ServerSink(folder, server.url)
    for step in range(3):
        append(folder / "metrics.jsonl", {"step": step, "reward/total": step / 2, "seconds/step": float("inf")})
    groups = folder / "rollouts.jsonl"
    groups.write_text(record(0) + record(0) + record(1)[:20])  # the last line is being written
    sink.write(2, {})
    assert [(row["number"], row["metrics"]) for row in told(server, folder, "steps")] == [(n, {"reward/total": n / 2}) for n in range(3)]
    assert [(row["step"], row["number"]) for row in told(server, folder, "rollouts")] == [(0, 0), (0, 1)]
    groups.write_text(record(0) + record(0) + record(1) + record(2, "y" * MAX_LINE))
    with pytest.warns(UserWarning, match="too large"):
        sink.close()
    assert [(row["step"], row["number"]) for row in told(server, folder, "rollouts")] == [(1, 0), (0, 0), (0, 1)]
    again = ServerSink(folder, server.url)  # a run that goes on tells all of it again, to the run that it is then
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        again.close()
    assert len(told(server, folder, "steps")) == 3 and len(told(server, folder, "rollouts")) == 3


def test_a_server_that_is_away_is_told_later(server: LiveServer, folder: Path):
    sink = ServerSink(folder, f"http://127.0.0.1:{free_port()}")
    append(folder / "metrics.jsonl", {"step": 0, "reward/total": 1.0})
    with Sinks([sink]) as sinks:
        sinks({"step": 0})
        assert sinks.names == ["ServerSink"] and sink.failures == 1
        sink.client.base_url = httpx.URL(server.url)  # it is back
        sinks({"step": 0})
        assert sink.failures == 0
    assert [row["number"] for row in told(server, folder, "steps")] == [0]


def test_a_group_that_the_server_cannot_keep_is_left_out(server: LiveServer, folder: Path):
    """Text that no database takes, and text whose characters are few enough and whose bytes are not: what comes after is told."""
    append(folder / "metrics.jsonl", {"step": 0, "reward/total": 1.0})
    (folder / "rollouts.jsonl").write_text(record(0) + record(0, "a\0b") + wide(0, "é" * (MAX_LINE * 2 // 3)) + record(0) + record(1))
    with (
        pytest.warns(UserWarning, match="the server refuses a group of step 0 .*NUL") as warned,
        Sinks([ServerSink(folder, server.url)]) as sinks,
    ):
        sinks({"step": 0})
        assert sinks.names == ["ServerSink"]
    assert len(warned) == 1, "it is said once"
    assert [(row["step"], row["number"]) for row in told(server, folder, "rollouts")] == [(1, 0), (0, 0), (0, 1)]


@pytest.mark.parametrize("status", [500, 502, 504])
def test_a_server_in_trouble_is_told_later(folder: Path, status: int):
    class Trouble(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(status)

    with HTTPServer(("127.0.0.1", 0), Trouble) as proxy:
        thread = Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        sink = ServerSink(folder, f"http://127.0.0.1:{proxy.server_port}")
        sink.write(0, {})
        proxy.shutdown()
        thread.join()
    assert sink.failures == 1
    sink.client.close()


def test_one_that_never_answers_and_one_that_refuses_are_switched_off(server: LiveServer, folder: Path):
    away = ServerSink(folder, f"http://127.0.0.1:{free_port()}")
    away.failures = MAX_FAILURES - 1
    note_run(folder, "sess-0:train:0", {})
    refused = ServerSink(folder, server.url)
    with pytest.warns(RuntimeWarning, match="switched off"), Sinks([away, refused]) as sinks:
        sinks({"step": 0})
        assert sinks.names == []
