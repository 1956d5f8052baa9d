"""The study of memories: which runs it has, where a long history is cut, and what its plot needs."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from everlearn.memory.study import Run, summed
from everlearn.memory.suites import Case, evident

STUDY = "memory_study"


def test_runs_without_data_are_synthetic_and_name_what_there_is(study: ModuleType, tmp_path: Path):
    assert study.runs_of(None) == ["synthetic-300/all/rules", "synthetic-2000/all/rules", "synthetic-300/all/methods+answers"]
    assert {run.split("/")[0] for run in study.runs_of(tmp_path)} == set(study.BUDGETS)
    assert [case.name for case in study.cases("synthetic-300", "all", None, True)] == [f"synthetic-100-{100 + seed}" for seed in range(3)]
    assert len(study.cases("synthetic-300", "2", None, True)) == 1
    for history in ("3", "0-5"):
        with pytest.raises(SystemExit, match="it has 0 to 2, or all"):
            study.cases("synthetic-300", history, None, True)
    with pytest.raises(SystemExit, match="needs --data"):
        study.cases("memorybank", "all", None, True)


def test_pieces_hold_the_evidence_of_their_questions_in_order(study: ModuleType, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    turns = [("user", f"This is turn {number} of many, and nothing else is said in it.") for number in range(60)]
    turns[3], turns[50] = ("user", "The code of the lab is 6370."), ("user", "My sister Nora lives in Lisbon.")
    asked = [evident("Where does Nora live?", ("Lisbon",), "Nora Lisbon", "fact", turns)]
    asked.append(evident("What is the code?", ("6370",), "code lab 6370", "fact", turns))
    monkeypatch.setattr(study, "PIECE", 400)
    monkeypatch.setattr(study, "model_folder", lambda name: tiny_model)
    found = study.pieces([Case("long", turns, asked)])
    assert [len(piece.questions) for piece in found] == [1, 1] and sum(len(piece.turns) for piece in found) < len(turns)
    assert turns[3] in found[0].turns and turns[50] in found[1].turns
    assert found[1].turns == [turn for turn in turns if turn in found[1].turns] and found[0].name == "long-0"


def test_the_plot_takes_whatever_was_run(study: ModuleType):
    runs = [
        Run("synthetic-300", "h", method, budget, 0, 300, ["fact"] * 4, [kept] * 4, 100.0, 0.0)
        for budget in (256, 512)
        for method, kept in (("bm25", 1.0), ("policy", 0.5))
    ]
    text = "".join(ElementTree.fromstring(study.plot(summed(runs))).itertext())
    assert "synthetic-300: evidence kept, by budget" in text and "policy" in text and "summary" not in text
    assert set(study.COLOURS) == set(study.ORDER) and len(set(study.COLOURS.values())) == len(study.ORDER)


def test_results_with_answers_take_the_place_of_those_without(study: ModuleType, tmp_path: Path):
    facts = {"command": "", "when": "", "commit": "", "hardware": {}, "load_average": [], "seconds": 0.0}
    for name, answers in (("a+answers", ["Oslo"]), ("b", [])):
        run = Run("memorybank", "h", "last", 512, 0, 3, ["fact"], [1.0], 100.0, 0.0, answers=answers)
        row = {field: getattr(run, field) for field in run.__struct_fields__}
        (tmp_path / f"{name}.json").write_text(json.dumps(facts | {"runs": [row]}))
    (run,), origins = study.collected(tmp_path)
    assert run.answers == ["Oslo"] and len(origins) == 2


def test_what_fails_among_jobs_leaves_out_those_that_have_not_begun(study: ModuleType):
    from common import side_by_side

    begun: list[int] = []

    def job(number: int) -> int:
        begun.append(number)
        if number == 2:
            raise ValueError("the third")
        return number

    assert sorted(side_by_side(3, [functools.partial(job, number) for number in (0, 1, 3)])) == [0, 1, 3]
    begun.clear()
    with pytest.raises(ValueError, match="the third"):
        list(side_by_side(1, [functools.partial(job, number) for number in range(2, 50)]))
    assert len(begun) < 48
