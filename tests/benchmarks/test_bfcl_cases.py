"""Cases of the function-calling leaderboard: the schema that a grammar gets, the call that is trained, and what is judged right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bfcl_cases
from benchmarks.bfcl_cases import Case

ROW = {
    "id": "simple_0",
    "question": [[{"role": "user", "content": "Book two nights in Bonn from May 3, 2024, with breakfast."}]],
    "function": [
        {
            "name": "hotel.book",
            "description": "Books.",
            "parameters": {
                "type": "dict",
                "required": ["city", "nights"],
                "properties": {
                    "city": {"type": "string"},
                    "nights": {"type": "integer"},
                    "price": {"type": "float", "description": "at most"},
                    "extras": {"type": "array", "items": {"type": "string"}},
                    "from": {"type": "dict", "properties": {"day": {"type": "string"}, "hour": {"type": "integer"}}},
                    "range": {"type": "tuple", "items": {"type": "float"}},
                    "note": {"type": "any"},
                },
            },
        }
    ],
}
TRUTH = {
    "hotel.book": {
        "city": ["Bonn", "Bonn, Germany"],
        "nights": [2],
        "price": ["", 80.0],
        "extras": [["breakfast"], ["Breakfast", "none"]],
        "from": [{"day": ["May 3, 2024", "3.5."], "hour": [14, ""]}],
        "range": ["", [1.0, 2.5]],
        "note": ["", "none"],
    }
}
RIGHT: dict[str, Any] = {"city": "bonn", "nights": 2, "extras": ["Breakfast"], "from": {"day": "may 3 2024"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "possible_answer").mkdir()
    (tmp_path / bfcl_cases.FILE).write_text(json.dumps(ROW) + "\n")
    (tmp_path / "possible_answer" / bfcl_cases.FILE).write_text(json.dumps({"id": "simple_0", "ground_truth": [TRUTH]}) + "\n")
    return tmp_path


@pytest.fixture
def case(folder: Path) -> Case:
    [found] = bfcl_cases.load(folder)
    return found


def test_a_schema_is_one_of_json_and_closed(case: Case) -> None:
    kinds = {name: part.get("type") for name, part in case.schema["properties"].items()}
    assert kinds == {
        "city": "string", "nights": "integer", "price": "number", "extras": "array", "from": "object", "range": "array", "note": None,
    }  # fmt: skip
    assert case.schema["type"] == "object" and case.schema["additionalProperties"] is False
    assert case.schema["properties"]["from"]["additionalProperties"] is False
    assert case.strict_tool()["function"]["strict"] is True and "strict" not in case.tool["function"]


def test_the_trained_call_is_the_shortest_right_one(case: Case) -> None:
    assert case.right_call() == {"city": "Bonn", "nights": 2, "extras": ["breakfast"], "from": {"day": "May 3, 2024"}}
    assert bfcl_cases.right(case, "hotel.book", case.right_call())


@pytest.mark.parametrize(
    "change",
    [
        {}, {"city": "BONN Germany"}, {"price": 80}, {"price": 80.0}, {"range": [1.0, 2.5]}, {"note": "none"},
        {"from": {"day": "3.5.", "hour": 14}}, {"extras": ["breakfast", "None"]},
    ],
)  # fmt: skip
def test_right(case: Case, change: dict[str, Any]) -> None:
    assert bfcl_cases.right(case, "hotel.book", RIGHT | change)


@pytest.mark.parametrize(
    "change",
    [
        {"city": "Berlin"}, {"nights": "2"}, {"nights": 2.0}, {"nights": True}, {"price": 81}, {"unknown": 1}, {"extras": []},
        {"extras": "breakfast"}, {"from": {}}, {"from": {"day": "3.5.", "hour": 15}}, {"from": {"day": "3.5.", "year": 1}},
        {"range": [1.0]}, {"note": 5},
    ],
)  # fmt: skip
def test_wrong(case: Case, change: dict[str, Any]) -> None:
    assert not bfcl_cases.right(case, "hotel.book", RIGHT | change)


def test_what_is_no_call_of_it_is_wrong(case: Case) -> None:
    assert not bfcl_cases.right(case, "hotel_book", RIGHT)
    assert not bfcl_cases.right(case, "hotel.book", [RIGHT])
    for name in ("city", "from"):
        assert not bfcl_cases.right(case, "hotel.book", {key: value for key, value in RIGHT.items() if key != name})


def test_a_folder_without_the_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=bfcl_cases.FILE):
        bfcl_cases.load(tmp_path)
