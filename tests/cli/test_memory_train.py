"""`everlearn memory train` against a real server, and its adapter at work in `everlearn eval memory`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everlearn.cli.main import run
from everlearn.cli.memory_train import _histories
from everlearn.errors import InvalidRequest
from tests.live import KEY, LiveServer


def test_a_memory_is_trained_and_examined(server: LiveServer, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    there = ["--model", str(tiny_model), "--url", server.url, "--key", KEY, "--home", str(tmp_path / "home")]
    size = ["--turns", "60", "--facts", "12", "--budget", "300", "--warm", "1", "--groups", "1", "--members", "2", "--rank", "2"]
    train = ["memory", "train", "--out", str(tmp_path / "run"), *size, "--max-tokens", "6", *there, "-f", "json"]
    code = run([*train, "--steps", "1"])
    told = capsys.readouterr()
    assert code == 0, told.err
    path = json.loads(told.out)["path"]
    assert path.startswith("tinker://") and f"everlearn adapter name NAME {path}" in told.err
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2  # the step, and the evaluation after it
    assert run([*train, "--steps", "2"]) == 0  # the same run, made longer
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
    assert run([*train, "--steps", "2", "--groups", "2"]) != 0 and run([*train, "--steps", "2", "--facts", "11"]) != 0
    told = capsys.readouterr()
    assert "groups_per_batch 1 -> 2" in told.err and "facts 12 -> 11" in told.err
    examined = ["eval", "memory", "--turns", "30", "--facts", "4", "--histories", "1", "--budget", "150", "--methods", "decided,policy"]
    code = run([*examined, "--ask", "--policy", path, *there])
    told = capsys.readouterr()
    assert code == 0, told.err
    assert "policy" in told.out and "decided" in told.out


def test_no_history_is_both_trained_on_and_looked_at(tmp_path: Path):
    def trained_on(number: int, **options: int) -> str:
        return _histories(None, 60, 12, options.get("seed", 0))[0](number).name

    looked_at = {_histories(None, 60, 12, 0)[1](number).name for number in range(8)}
    near = (*range(8), *range(998, 1010), 9_999, 10_000, 19_999, 20_000)
    assert len(looked_at) == 8 and not looked_at & {trained_on(number, seed=seed) for number in near for seed in range(3)}
    said = [[{"role": "user", "content": "The code of the lab is 6370."}]]
    rows = [
        {"question_id": str(number), "question_type": "fact", "haystack_sessions": said, "question": "Which code?", "answer": "6370"}
        for number in range(21)
    ]
    (tmp_path / "some.json").write_text(json.dumps(rows))
    mine, others, noted = _histories(tmp_path / "some.json", 60, 12, 0)
    assert {mine(number).name for number in range(2000)} == {str(number) for number in range(18)}
    assert {others(number).name for number in range(2000)} == {"18", "19", "20"}
    (tmp_path / "one.json").write_text(json.dumps(rows[:1]))
    assert len(noted["data"]) == 64
    with pytest.raises(InvalidRequest, match="has 1 histories"):
        _histories(tmp_path / "one.json", 60, 12, 0)


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["memory", "train"]) == 2
    assert "--out" in capsys.readouterr().err
    assert run(["memory", "train", "--out", str(tmp_path), "--data", str(tmp_path / "none.json")]) == 2
    assert "can't be read" in capsys.readouterr().err
