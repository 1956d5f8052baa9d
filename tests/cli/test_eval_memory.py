"""`everlearn eval memory` from the command line: without a model's answers, and with them from a real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everlearn.cli.main import run
from tests.live import KEY, LiveServer


def test_retention_without_a_model(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "runs.json"
    arguments = ["eval", "memory", "--turns", "120", "--facts", "8", "--histories", "2", "--budget", "150,600"]
    assert run([*arguments, "--model", str(tiny_model), "--home", str(tmp_path / "home"), "--out", str(out), "-f", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["budget"], row["method"]) for row in rows][:5] == [(150, name) for name in ("last", "random", "bm25", "forget", "extract")]
    assert all(row["questions"] == 16 and row["tokens"] <= row["budget"] and "f1" not in row for row in rows)
    told = json.loads(out.read_text())
    assert len(told["runs"]) == 20 and told["settings"]["suite"] == "synthetic"


def test_answers_from_a_server(server: LiveServer, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["eval", "memory", "--turns", "60", "--facts", "4", "--histories", "1", "--budget", "120", "--methods", "last,summary"]
    arguments += ["--ask", "--model", str(tiny_model), "--url", server.url, "--key", KEY, "--home", str(tmp_path / "home")]
    code = run(arguments)
    told = capsys.readouterr()
    assert code == 0, told.err
    assert "summary" in told.out and "f1" in told.out


def test_mistakes_are_named(tiny_model: Path, capsys: pytest.CaptureFixture[str]):
    for arguments, message in (
        (["--methods", "last,lst"], "'lst' is none"),
        (["--methods", "generate"], "add --ask"),
        (["--suite", "longmemeval"], "--data belongs to"),
        (["--data", "x"], "--data belongs to"),
    ):
        assert run(["eval", "memory", "--model", str(tiny_model), *arguments]) == 2
        assert message in capsys.readouterr().err
