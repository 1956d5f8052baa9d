"""LoCoMo and MSC, on small files in their published forms, written here: nothing of the data sets is part of the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from everlearn.cli.main import run
from everlearn.errors import InvalidRequest
from everlearn.memory.dialogues import locomo, msc


def turn(number: str, speaker: str, text: str, **more: str) -> dict[str, Any]:
    return {"speaker": speaker, "dia_id": number, "text": text, **more}


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    conversation = {
        "speaker_a": "Ada",
        "speaker_b": "Ben",
        "session_1_date_time": "1:56 pm on 8 May, 2023",
        "session_1": [
            turn("D1:1", "Ada", "I moved from Sweden to Porto."),
            turn("D1:2", "Ben", "Lovely.", blip_caption="a photo of a harbour", img_url="u"),
        ],
        "session_10_date_time": "9:00 am on 2 June, 2023",
        "session_10": [turn("D10:1", "Ada", "Yesterday I ran for charity.")],
        "session_2_date_time": "3:00 pm on 20 May, 2023",
        "session_2": [turn("D2:1", "Ben", "My dog is called Pepper."), turn("D2:2", "Ada", "Nice name.")],
    }
    asked = [
        {"question": "Where did Ada move from?", "answer": "Sweden", "evidence": ["D1:1"], "category": 4},
        {"question": "When did Ada run?", "answer": "1 June 2023", "evidence": ["D10:1"], "category": 2},
        {"question": "What pets and places are named?", "answer": "Pepper, Porto", "evidence": ["D:2:01; D1:1"], "category": 1},
        {"question": "How old is the harbour?", "answer": 3, "evidence": ["D9:9"], "category": 3},
        {"question": "What is Ben's cat called?", "adversarial_answer": "Pepper", "evidence": ["D2:1"], "category": 5},
        {"question": "What is Ben's  dog called?", "answer": "Waffle", "evidence": ["D2:1"], "category": 4},
    ]
    path = tmp_path / "locomo10.json"
    path.write_text(json.dumps([{"sample_id": "conv-1", "conversation": conversation, "qa": asked, "event_summary": {}}]))
    return path


def test_locomo_in_order_with_what_can_be_traced(talks: Path, tmp_path: Path):
    audit = tmp_path / "wrong.json"
    audit.write_text(json.dumps([{"sample_id": "conv-1", "question": "What is Ben's dog called?"}, "Unheard of"]))
    (case,), left_out = locomo(talks, audit)
    assert [text for _, text in case.turns] == [
        "[1:56 pm on 8 May, 2023] Ada: I moved from Sweden to Porto.",
        "Ben: Lovely. (shows a photo of a harbour)",
        "[3:00 pm on 20 May, 2023] Ben: My dog is called Pepper.",
        "Ada: Nice name.",
        "[9:00 am on 2 June, 2023] Ada: Yesterday I ran for charity.",
    ]
    kinds = {question.kind: question for question in case.questions}
    assert list(kinds) == ["single-hop", "temporal", "multi-hop"]
    assert kinds["single-hop"].words == {"sweden"} and kinds["single-hop"].need == 0.8
    assert kinds["multi-hop"].need == pytest.approx(0.4), "the best of its turns holds one of the two words"
    assert "june" in kinds["temporal"].words
    assert left_out == {
        "whose evidence names no turn": 1,
        "adversarial": 1,
        "with a gold that the audit calls wrong": 1,
    }
    assert len(locomo(talks).cases[0].questions) == 4, "without the audit its questions count"
    for text in ('{"a": 1}', "[1]", "[{}]"):
        audit.write_text(text)
        if text != '{"a": 1}':
            with pytest.raises(InvalidRequest, match="list of questions"):
                locomo(talks, audit)
    talks.write_text('[{"sample_id": "x", "conversation": {}, "qa": []}]')
    with pytest.raises(InvalidRequest, match="isn't of LoCoMo's form: 'session_1'"):
        locomo(talks)


def test_msc_shows_the_sessions_before_and_nothing_that_holds_the_answer(tmp_path: Path):
    def row(answer: str, *sessions: list[str]) -> str:
        before = [
            {
                "personas": [["SECRET"]],
                "dialog": [{"text": text} for text in texts],
                "time_num": 2,
                "time_unit": "days",
                "time_back": "2 weeks ago",
            }
            for texts in sessions
        ]
        told = {"personas": [["SECRET"], []], "summary_speaker_1": [["SECRET"]], "dialog": [{"text": "SECRET", "id": "Speaker 1"}]}
        return json.dumps(
            told | {"previous_dialogs": before, "metadata": {"initial_data_id": "v1"}, "self_instruct": {"B": "Who sang?", "A": answer}}
        )

    path = tmp_path / "msc_self_instruct.jsonl"
    lines = [row("Taylor Swift!", ["Hi!", "I could get into Taylor Swift."], ["I work at a bank."]), row("a golden retriever", ["Hello."])]
    path.write_text("\n".join(lines) + "\n")
    (case,), left_out = msc(path)
    assert [text for _, text in case.turns] == [
        "[2 weeks ago] Speaker 1: Hi!",
        "Speaker 2: I could get into Taylor Swift.",
        "[2 weeks ago] Speaker 1: I work at a bank.",
    ]
    assert case.questions[0].words == {"taylor", "swift"} and left_out == {"whose answer no turn holds a word of": 1}
    path.write_text("{}\n")
    with pytest.raises(InvalidRequest, match="line 1 of msc_self_instruct.jsonl isn't of MSC's form"):
        msc(path)


def test_both_from_the_command_line(talks: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    where = ["--model", str(tiny_model), "--home", str(tmp_path / "home"), "-f", "json"]
    assert run(["eval", "memory", "--suite", "locomo", "--data", str(talks), "--budget", "600", "--methods", "last,bm25", *where]) == 0
    told = capsys.readouterr()
    rows = json.loads(told.out)["rows"]
    assert [(row["method"], row["questions"]) for row in rows] == [("last", 4), ("bm25", 4)] and rows[0]["kept"]["mean"] == 1.0
    assert "left out: 1 questions adversarial" in told.err
    assert run(["eval", "memory", "--suite", "msc", "--data", str(talks), "--audit", str(talks), *where]) == 2
