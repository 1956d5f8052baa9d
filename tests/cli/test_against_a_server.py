"""The commands that talk to a running server, on what the official SDK left there."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from everlearn.cli.main import run
from everlearn.errors import Unavailable
from tests.live import KEY, LiveServer


@pytest.fixture(scope="module")
def saved(server: LiveServer) -> tuple[str, str]:
    """A training run with one checkpoint: (run id, path)."""
    import tinker

    with tinker.ServiceClient(base_url=server.url, api_key=KEY) as service:
        trainer = service.create_lora_training_client(base_model=server.model, rank=4).result()
        path = trainer.save_state("kept").result().path
    return path.removeprefix("tinker://").split("/")[0], path


def answer(capsys: pytest.CaptureFixture[str], server: LiveServer, *argv: str) -> Any:
    """What the command prints as JSON."""
    capsys.readouterr()
    assert run([*argv, "--url", server.url, "-f", "json"]) == 0
    return json.loads(capsys.readouterr().out or "null")


def test_runs_are_listed_and_shown(server, saved, capsys):
    run_id, path = saved
    listed = {row["training_run_id"]: row for row in answer(capsys, server, "run", "list", "--limit", "1000")}
    assert listed[run_id]["lora_rank"] == 4
    shown = answer(capsys, server, "run", "show", run_id)
    assert [checkpoint["tinker_path"] for checkpoint in shown["checkpoints"]] == [path]
    assert run(["run", "show", run_id, "--url", server.url]) == 0
    assert path in capsys.readouterr().out


def test_the_home_s_server_is_found_without_a_url(server, saved, capsys):
    assert run(["run", "list", "--home", str(server.home)]) == 0
    assert saved[0] in capsys.readouterr().out


def test_a_second_server_on_the_same_home_says_so_and_leaves_the_first_alone(server):
    where = (server.home / "server.json").read_bytes()
    command = [*server.command[: server.command.index("--port")], "--port", "0"]
    ended = subprocess.run(command, env=server.environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1, ended.stderr
    lines = ended.stderr.strip().splitlines()
    assert len(lines) <= 3 and any("another everlearn server uses" in line for line in lines), ended.stderr
    assert (server.home / "server.json").read_bytes() == where


def test_a_command_that_would_start_its_own_server_names_the_one_that_runs(server, tiny_model, tmp_path):
    from everlearn.demo.server import serving

    with (
        pytest.raises(Unavailable, match=f"this home already has a server, at {server.url} .*; to use that one add --url {server.url}"),
        serving(server.home, tmp_path / "log", None, lambda *_: None, tiny_model),
    ):
        pass


def test_an_unknown_run_is_exit_code_4(server, capsys):
    assert run(["run", "show", "nobody:train:0", "--url", server.url]) == 4
    assert "nobody:train:0" in capsys.readouterr().err


def test_ps_says_what_the_engine_does(server, capsys):
    state = answer(capsys, server, "ps")
    assert state["status"] == "ready"
    assert state["engine"]["models"]
    assert run(["ps", "--url", server.url]) == 0
    assert "engine.state" in capsys.readouterr().out


def test_a_checkpoint_s_life(server, saved, capsys):
    run_id, path = saved
    listed = answer(capsys, server, "checkpoint", "list", "--run", run_id)
    assert [row["tinker_path"] for row in listed] == [path]
    assert path in {row["tinker_path"] for row in answer(capsys, server, "checkpoint", "list")}
    assert answer(capsys, server, "checkpoint", "show", path)["lora_rank"] == 4
    assert run(["checkpoint", "set-ttl", path, "--ttl", "7d", "--url", server.url]) == 0
    assert answer(capsys, server, "checkpoint", "list", "--run", run_id)[0]["expires_at"]
    assert run(["checkpoint", "set-ttl", path, "--remove", "--url", server.url]) == 0
    assert not answer(capsys, server, "checkpoint", "list", "--run", run_id)[0].get("expires_at")
    assert run(["checkpoint", "set-ttl", path, "--ttl", "1s", "--url", server.url]) == 2
    assert run(["checkpoint", "delete", path, "--yes", "--url", server.url]) == 0
    assert answer(capsys, server, "checkpoint", "list", "--run", run_id) == []
    assert run(["checkpoint", "delete", path, "--yes", "--url", server.url]) == 4
