"""Suites, methods and scores: what they promise, without a model; and the data sets where a user has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from everlearn.errors import InvalidRequest
from everlearn.memory import scores, study
from everlearn.memory.methods import PORTION, RULES, method
from everlearn.memory.suites import Question, longmemeval, memorybank, share, words_of
from everlearn.memory.synthetic import INJECTIONS, synthetic
from tests.memory.spelling import encode


def test_a_history_follows_from_its_seed():
    assert synthetic(400, 1) == synthetic(400, 1) != synthetic(400, 2)
    with pytest.raises(InvalidRequest, match="50 facts"):
        synthetic(400, 0, 50)


def test_every_question_has_its_evidence_once_and_in_one_turn():
    for seed in range(5):
        case = synthetic(400, seed)
        assert len(case.turns) == 400 and len(case.questions) == 20
        texts = [text for _, text in case.turns]
        assert set(INJECTIONS) <= set(texts)
        for question in case.questions:
            holding = [text for text in texts if question.words <= words_of(text)]
            assert len(holding) == 1, (question, holding)
            assert scores.kept(question, texts) == 1 and scores.kept(question, texts[:1]) in (0, float(holding[0] == texts[0]))
            assert not any(question.words <= words_of(text) for role, text in case.turns if role == "assistant")
        assert {question.kind for question in case.questions} >= {"update", "contradiction", "fact"}
        assert all(question.stale and question.stale not in question.answers for question in case.questions if question.kind == "update")


@pytest.mark.parametrize("name", [name for name in RULES if name != "full"])
def test_no_method_shows_more_than_its_budget(name):
    case = synthetic(300, 3)
    for budget in (32, 128, 512):
        found = study.run("synthetic", case, method(name, encode, budget), budget, encode)
        assert 0 < found.tokens <= budget and len(found.kept) == 20


def test_what_methods_keep_is_as_they_promise():
    case = synthetic(600, 4)
    kept = {}
    for name in RULES:
        one = study.run("synthetic", case, method(name, encode, 600), 600, encode)
        kept[name] = sum(one.kept) / len(one.kept)
    assert kept["full"] == 1.0 and kept["last"] < 0.2 and kept["random"] < 0.4
    assert kept["bm25"] > 0.6 and kept["extract"] > 0.6 and kept["forget"] > 0.4


def test_methods_that_need_a_writer_say_so_and_keep_to_the_budget():
    with pytest.raises(InvalidRequest, match="needs a model"):
        method("summary", encode, 100)
    with pytest.raises(InvalidRequest, match="'bm52' is none"):
        method("bm52", encode, 100)
    orders: list[tuple[str, int]] = []

    def write(order: str, most: int) -> str:
        orders.append((order, most))
        return "word " * 1000

    for name in ("summary", "overwrite"):
        orders.clear()
        found = study.run("synthetic", synthetic(300, 5), method(name, encode, 100, write=write), 100, encode)
        assert found.tokens <= 101 and len(orders) > 2
        assert max(len(encode(order)) for order, _ in orders) < PORTION + 300


def test_answers_are_scored_and_summed():
    case = synthetic(300, 6)
    right = {question.text: question.answers[0] for question in case.questions}
    good = study.run(
        "s", case, method("last", encode, 64), 64, encode, answers=lambda asked: [f"It is {right[text]}." for _, text in asked]
    )
    bad = study.run("s", case, method("last", encode, 64), 64, encode, answers=lambda asked: ["no idea"] * len(asked))
    assert set(good.contains) == {1.0} and set(good.exact) == {0.0} and set(bad.f1) == {0.0} and 0.3 < min(good.f1) < 1
    long = study.run("s", case, method("full", encode, 64), 64, encode, answers=lambda asked: [""] * len(asked), most=100)
    assert long.answers == [] and long.exact == []
    (row,) = study.summed([good, bad])
    assert row["contains"]["mean"] == 0.5 and row["contains"]["low"] <= 0.5 <= row["contains"]["high"] and row["questions"] == 40


def test_scores_by_hand():
    assert scores.exact("The Lion King.", ["lion king"]) == 1 and scores.exact("a lion", ["lion king"]) == 0
    assert scores.contains("it was 350,000 dollars", ["$350,000"]) == 1 and scores.contains("cart", ["art"]) == 0
    assert scores.token_f1("the red car", ["red bicycle"]) == 0.5 and scores.token_f1("", ["x"]) == 0
    mean, low, high = scores.interval([[1, 0, 1, 0], [1, 1, 1, 1]])
    assert mean == 0.75 and low < 0.75 < high <= 1
    assert scores.interval([[1.0] * 9]) == (1, 1, 1)
    question = Question("?", ("x",), frozenset({"nora", "lisbon"}), 1.0, "fact")
    assert scores.kept(question, ["Nora's flat is in Lisbon"]) == 1 and scores.kept(question, ["Nora", "Lisbon"]) == 0
    assert share(frozenset(), ["x"]) == 0


def data(name: str) -> Path:
    """The folder of a data set; see docs/guides/memory.md for where a user gets it."""
    folder = Path(os.environ.get("EVERLEARN_TEST_MEMORY_DATA", "")) / name
    if "EVERLEARN_TEST_MEMORY_DATA" not in os.environ or not folder.exists():
        pytest.skip(f"EVERLEARN_TEST_MEMORY_DATA names no folder with {name} in it")
    return folder


def test_longmemeval_pieces():
    cases = longmemeval(data("longmemeval") / "longmemeval_s_multiq.json")
    assert len(cases) == 3 and sum(len(case.questions) for case in cases) == 26
    texts = [text for _, text in cases[2].turns]
    assert all(scores.kept(question, texts) for question in cases[2].questions)


def test_memorybank():
    cases = memorybank(data("memorybank") / "en")
    assert len(cases) == 15 and sum(len(case.questions) for case in cases) >= 90
    assert all(not question.answers for case in cases for question in case.questions)


def test_files_of_another_form_are_named(tmp_path: Path):
    (tmp_path / "x.json").write_text('[{"haystack_sessions": []}]')
    with pytest.raises(InvalidRequest, match="isn't of LongMemEval's form"):
        longmemeval(tmp_path / "x.json")
    with pytest.raises(InvalidRequest, match="can't be read as JSON"):
        memorybank(tmp_path)
