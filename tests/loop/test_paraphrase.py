from __future__ import annotations

import pytest

from everlearn.loop.paraphrase import FRAMES, chosen, cleaned, each, requests, same_question

QUESTION = "In which town is Larkspur Kites based?"


@pytest.mark.parametrize(
    ("sampled", "kept"),
    [
        ('"Where is Larkspur Kites based?"', "Where is Larkspur Kites based?"),
        ("New question: Which town is Larkspur Kites in? I hope this helps.", "Which town is Larkspur Kites in?"),
        ("Sure!\n1. What town is home to Larkspur Kites?\n2. Another", "What town is home to Larkspur Kites?"),
        ("Larkspur Kites is based in Boston.", ""),
        ("", ""),
    ],
)
def test_the_first_line_that_asks_is_what_counts(sampled: str, kept: str) -> None:
    assert cleaned(sampled) == kept


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ("Where is Larkspur Kites based?", True),
        ("What is the town that Larkspur Kites is based in?", True),
        ("In which town can I find Larkspur Kites?", False),  # the last word of weight is lost
        ("Where is the company based?", False),  # the name is lost
        ("Who founded Larkspur Kites and when did they open the shop that everybody knows in the whole of the country?", False),
        ("Is Larkspur a flower that Kites eat?", False),
        ("", False),
    ],
)
def test_what_names_the_same_and_shares_its_words_asks_the_same(other: str, same: bool) -> None:
    assert same_question(QUESTION, other) is same


@pytest.mark.parametrize(
    ("question", "other", "same"),
    [
        ("Who founded Larkspur Kites?", "Which person founded Larkspur Kites?", True),
        ("Who founded Larkspur Kites?", "When was Larkspur Kites founded?", False),
        ("Who founded Larkspur Kites?", "Was Larkspur Kites founded in 1956?", False),
        ("What time does the shop open?", "When does the shop open?", True),
        ("How long is the warranty on a kite?", "What is the duration of the warranty on a kite?", True),
        ("How long is the warranty on a kite?", "Where is the warranty on a kite?", False),
        ("Is the shop open on Sunday?", "Would the shop be open on Sunday?", True),
    ],
)
def test_another_wording_asks_for_the_same_thing(question: str, other: str, same: bool) -> None:
    assert same_question(question, other) is same


def test_numbers_are_names() -> None:
    assert not same_question("Which parcels can't you ship to Norway?", "Which parcels can you ship to Norway?")
    assert same_question("Which parcels can't you ship to Norway?", "Which parcels do you not ship to Norway?")
    assert not same_question("What costs 58 euros?", "What costs 85 euros?") and same_question(
        "What costs 58 euros?", "Which costs 58 euros?"
    )


def test_the_model_s_wordings_come_first_and_frames_fill_up() -> None:
    sampled = [
        "Where is Larkspur Kites based?",
        "where is larkspur kites based",
        QUESTION,
        "It is in Boston.",
        "Where is Larkspur Kites based?",
    ]
    found = chosen(QUESTION, sampled, 3)
    assert found == ["Where is Larkspur Kites based?", FRAMES[0].format(QUESTION), FRAMES[1].format(QUESTION)]
    assert chosen(QUESTION, [], 0) == [] and len(requests(QUESTION, 3)) * each(3) == 6 and len(requests(QUESTION, 1)) * each(1) == 2
