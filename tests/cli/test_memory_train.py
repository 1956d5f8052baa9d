"""`everlearn memory train` against a real server, and its adapter at work in `everlearn eval memory`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everlearn.cli.main import run
from tests.live import KEY, LiveServer


def test_a_memory_is_trained_and_examined(server: LiveServer, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    there = ["--model", str(tiny_model), "--url", server.url, "--key", KEY, "--home", str(tmp_path / "home")]
    size = ["--turns", "60", "--facts", "12", "--budget", "300", "--steps", "1", "--warm", "0", "--groups", "1", "--members", "2"]
    code = run(["memory", "train", "--out", str(tmp_path / "run"), *size, "--rank", "2", "--max-tokens", "6", *there, "-f", "json"])
    told = capsys.readouterr()
    assert code == 0, told.err
    path = json.loads(told.out)["path"]
    assert path.startswith("tinker://") and f"everlearn adapter name NAME {path}" in told.err
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2  # the step, and the evaluation after it
    examined = ["eval", "memory", "--turns", "30", "--facts", "4", "--histories", "1", "--budget", "150", "--methods", "decided,policy"]
    code = run([*examined, "--ask", "--policy", path, *there])
    told = capsys.readouterr()
    assert code == 0, told.err
    assert "policy" in told.out and "decided" in told.out


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["memory", "train"]) == 2
    assert "--out" in capsys.readouterr().err
    assert run(["memory", "train", "--out", str(tmp_path), "--data", str(tmp_path / "none.json")]) == 2
    assert "can't be read" in capsys.readouterr().err
