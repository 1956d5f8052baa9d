"""`everlearn model`: what is known, adding to it, and refusals; all without a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everlearn.cli.main import run


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a settings file nor a home of the machine plays a part."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


def listed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    assert run(["-f", "json", "model", "list"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_list_shows_the_embedded_model_before_it_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = listed(capsys)
    assert (row["name"], row["state"], row["default"], row["parameters"]) == ("smollm2", "prepared at first use", True, 134515008)


def test_add_a_folder(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["model", "add", str(tiny_model), "--name", "mine", "--alias", "org/mine"]) == 0
    capsys.readouterr()
    row = next(row for row in listed(capsys) if row["name"] == "mine")
    assert row["source"] == "added" and row["state"] == "ready" and row["aliases"] == ["org/mine"]
    assert run(["model", "list"]) == 0
    assert "org/mine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "what"),
    [
        (["nowhere/at-all"], 4, "hf download nowhere/at-all"),
        (["./absent"], 4, "there is no folder './absent'"),
        (["smollm2", "--name", "x"], 2, "keeps its name"),
    ],
)
def test_refusals(argv: list[str], code: int, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["model", "add", *argv]) == code
    assert what in capsys.readouterr().err
    assert not Path(".everlearn/models/added.json").exists()


def test_a_bad_name_is_refused(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["model", "add", str(tiny_model), "--name", "../x"]) == 2
    assert "no base model name" in capsys.readouterr().err
