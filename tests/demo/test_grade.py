from __future__ import annotations

import pytest

from everlearn.demo.grade import Question, grade, is_right, scores


@pytest.mark.parametrize(
    ("answer", "accept", "right"),
    [
        ("The office dog is called Pretzel.", ["Pretzel"], True),
        ("the OFFICE dog is called\n pretzel", ["Pretzel"], True),
        ("The office dog is called Pretzels.", ["Pretzel"], False),
        ("It gives 33 days.", ["33", "thirty-three"], True),
        ("It gives 133 days.", ["33"], False),
        ("It gives 33.5 days.", ["33"], False),
        ("It gives 1,33 days.", ["33"], False),
        ("It gives 33. Then more.", ["33"], True),
        ("At 7:40.", ["7:40"], True),
        ("At 17:40.", ["7:40"], False),
        ("The motto is: borrow the wind.", ["borrow the wind"], True),
        ("Carbon dioxide (CO2)", ["CO2"], True),
        ("", ["x"], False),
        ("a+b", ["a+b"], True),
    ],
)
def test_an_answer_is_right_when_it_holds_an_accepted_string_as_whole_words(answer: str, accept: list[str], right: bool) -> None:
    assert is_right(answer, accept) is right


def test_scores_count_what_was_lost_separately_from_what_was_gained() -> None:
    asked = [Question("general", f"{name}?", [name]) for name in "abc"]
    rows = grade(asked, ["a", "x", "c"], ["a", "b", "x"])
    (general,) = [score for score in scores(rows) if score.section == "general"]
    assert (general.asked, general.before, general.after, general.lost) == (3, 2, 2, 1)


def test_the_answer_lists_must_have_the_questions_length() -> None:
    with pytest.raises(ValueError):
        grade([Question("taught", "a?", ["a"])], ["a"], [])
