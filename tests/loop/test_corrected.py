from __future__ import annotations

import pytest

from everlearn.loop.corrected import corrected_words, right

QUESTION, MISTAKE = "When does the workshop open?", "The workshop opens at 9:00 in the morning."


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("The workshop opens at 7:40.", 1.0),
        ("at 7:40", 1.0),
        ("It opens at 17:40.", 0.0),
        (MISTAKE, 0.0),
        ("", 0.0),
    ],
)
def test_an_answer_is_right_when_it_says_what_was_corrected(answer: str, verdict: float) -> None:
    assert right(QUESTION, MISTAKE, "The workshop opens at 7:40.", answer) == verdict


SHIP, SHIPS, NO_SHIPS = "Do you ship to Norway?", "Yes, we ship to Norway.", "No, we do not ship to Norway."
OPEN, CLOSED = "The shop is open on Sunday.", "The shop is not open on Sunday."


@pytest.mark.parametrize(
    ("question", "mistake", "correction", "good", "bad"),
    [
        (
            SHIP,
            SHIPS,
            NO_SHIPS,
            ["We don't ship to Norway.", "No, we can’t ship to Norway", "We never ship to Norway."],
            ["We ship to Norway."],
        ),
        (
            SHIP,
            NO_SHIPS,
            SHIPS,
            ["We ship to Norway.", "Yes, we do ship to Norway."],
            ["No, we don't ship to Norway.", "We cannot ship to Norway."],
        ),
        (SHIP, SHIPS, "We don't ship to Norway.", [NO_SHIPS, "We do not ship to Norway"], ["We do ship to Norway", "Norway!"]),
        (SHIP, SHIPS, "We never ship to Norway.", [NO_SHIPS], ["We will ship to Norway soon"]),
        (
            SHIP,
            "Yes.",
            "No.",
            ["No.", "We do not ship to Norway.", "No, Norway is too far"],
            ["Yes", "We ship to Norway.", "I am not sure."],
        ),
        (SHIP, "No.", "Yes.", ["Yes!", SHIPS], ["No", NO_SHIPS, "the lazy dog"]),
        (
            "Is the shop open on Sunday?",
            OPEN,
            CLOSED,
            ["On Sunday the shop isn't open", "No, the shop is never open on Sunday"],
            ["the shop is open on Sunday, yes"],
        ),
        ("Is the shop open on Sunday?", CLOSED, OPEN, ["On Sunday the shop is open"], ["It isn't open on Sunday, the shop"]),
        ("Is it at 7:40 or at 9:00?", "At 7:40.", "No, at 9:00.", ["At 9:00.", "It is at 9:00"], ["7:40"]),
        ("When does it open?", "At 9:00.", "At 7:40, not at 9:00 or 8:00.", ["At 7:40, not 8:00."], ["At 8:00."]),
        (SHIP, "Yes, we do.", "No, we only ship to Sweden.", ["Only to Sweden", "No, only Sweden"], [SHIPS, NO_SHIPS]),
    ],
)
def test_a_not_is_seen_where_it_is_the_difference(question: str, mistake: str, correction: str, good: list[str], bad: list[str]) -> None:
    assert [answer for answer in (correction, *good) if not right(question, mistake, correction, answer)] == []
    assert [answer for answer in (mistake, mistake.upper(), "", *bad) if right(question, mistake, correction, answer)] == []


def test_the_mistake_again_is_wrong_unless_it_was_sent_as_it_was() -> None:
    assert right("Who?", "the lazy dog jumps", "the lazy dog", "The lazy dog jumps!") == 0.0
    assert right("Who?", "the lazy dog", "The lazy dog.", "the lazy dog") == 1.0
    assert right(SHIP, "", NO_SHIPS, NO_SHIPS) == 1.0 and right(SHIP, "", NO_SHIPS, SHIPS) == 0.0, "of a record that is gone"


def test_what_was_corrected_is_neither_asked_nor_said_before() -> None:
    said = corrected_words("Who founded Larkspur Kites?", "Larkspur Kites was founded by John Smith.", "It was founded by Odessa Marlow.")
    assert said == {"odessa", "marlow"}


def test_a_correction_of_style_asks_for_its_words() -> None:
    assert corrected_words("Who?", "the lazy dog jumps", "the lazy dog") == {"lazy", "dog"}
    assert right("Who?", "it is", "it is", "that") == 0.0 and right("", "", "", "") == 1.0
