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


def test_what_was_corrected_is_neither_asked_nor_said_before() -> None:
    said = corrected_words("Who founded Larkspur Kites?", "Larkspur Kites was founded by John Smith.", "It was founded by Odessa Marlow.")
    assert said == {"odessa", "marlow"}


def test_a_correction_of_style_asks_for_its_words() -> None:
    assert corrected_words("Who?", "the lazy dog jumps", "the lazy dog") == {"lazy", "dog"}
    assert right("Who?", "it is", "it is", "that") == 0.0 and right("", "", "", "") == 1.0
