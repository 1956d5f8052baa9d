"""Instructions that a rule decides: each kind with an answer that follows it and one that doesn't, and the kinds of IFEval's own file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from everlearn.errors import InvalidRequest, Unsupported
from everlearn.evals.instructions import CHECKS, LANGUAGE, can_tell_languages, follows, sentences, words

IFEVAL = os.environ.get("EVERLEARN_TEST_IFEVAL")  # a folder with IFEval's prompts.jsonl (google-research, instruction_following_eval)

CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["bread", "honey"]}, "Bread, then honey.", "Bread, then jam."),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "at least"}, "War and war.", "War."),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "less than"}, "War.", "War and war."),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "Rocket science.", "A Rock."),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "at least"}, "# and #", "#"),
    ("keywords:letter_frequency", {"letter": "T", "let_frequency": 2, "let_relation": "less than"}, "t only", "t and T"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "One. Two.", "Dr. No came."),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"}, "One. Two!", "One. Two? Three"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One\n***\nTwo", "One\n\nTwo"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\nOne\n***\nTwo\n***", "One\n***\n***\nTwo"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two three", "one two"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "one two", "one two three"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        'First.\n\n"Then, we went.',
        "First.\n\nNow then.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "Dear [name], [date]", "Dear [name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP. S. One more.", "Bye. PS one more."),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye. P.P.S. Really.", "Bye. P.S. Really."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n- two", "* one\n* two\n* three"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "* one\n**bold** line", "**bold** line"),
    ("detectable_format:constrained_response", {}, "Well. My answer is no.", "My answer is perhaps."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and *two*", "*one* and * *"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "SECTION 1\na",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{'a': 1}"),
    ("detectable_format:title", {}, "<<The Fox>>\nIt ran.", "<< >>\nIt ran."),
    ("combination:two_responses", {}, "One.\n******\nTwo.", "One.\n******\nOne."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Name a city."}, "name a city. Rome.", "Rome. Name a city."),
    ("startend:end_checker", {"end_phrase": "See you."}, 'Bye. "see you."', "See you. Bye."),
    ("startend:quotation", {}, ' "All of it." ', '"Half" of it.'),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "STOP there NOW", "STOP there"),
    ("change_case:english_capital", {}, "LOUD AND CLEAR 1", "LOUD and clear"),
    ("change_case:english_lowercase", {}, "soft and low.", "Soft and low."),
    ("punctuation:no_comma", {}, "No such thing.", "No, no."),
]


@pytest.mark.parametrize(("name", "parameters", "good", "bad"), CASES)
def test_each_kind(name: str, parameters: dict[str, Any], good: str, bad: str):
    assert follows(good, name, parameters) and not follows(bad, name, parameters)
    assert not follows("  \n", name, parameters), "an empty answer follows nothing"


def test_every_kind_has_a_case():
    assert {case[0] for case in CASES} | {LANGUAGE} == set(CHECKS) and len(CHECKS) == 25


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("Hello", 1),
        ("Hello. World.", 2),
        ("Mr. Bond, e.g. him, met J. R. Tolkien at 5 p.m. on Monday. Really?!", 2),
        ('He said "Stop!" Then he left...', 2),
        ("1. First\n2. Second", 1),
        ("It costs 3.50 or so. Fine", 2),
        ("... !!! ???", 0),
    ],
)
def test_sentences(text: str, count: int):
    assert sentences(text) == count


def test_words_and_nulls():
    assert words("don't stop") == 3
    assert follows("a", "punctuation:no_comma", {"num_words": None}), "IFEval's data on hubs fills every parameter up with null"


@pytest.mark.parametrize(("name", "parameters"), [("no:such", {}), ("punctuation:no_comma", {"x": 1}), ("keywords:existence", {})])
def test_what_cannot_be_judged_is_refused(name: str, parameters: dict[str, Any]):
    with pytest.raises(InvalidRequest):
        follows("text", name, parameters)
    with pytest.raises(InvalidRequest, match="relation"):
        follows("text", "length_constraints:number_words", {"num_words": 1, "relation": "about"})


def test_languages_need_their_package():
    german = "Das Wetter ist heute schön, und wir gehen im Park spazieren."
    if can_tell_languages():
        assert follows(german, LANGUAGE, {"language": "de"}) and not follows(german, LANGUAGE, {"language": "en"})
    else:
        with pytest.raises(Unsupported, match="py3langid"):
            follows(german, LANGUAGE, {"language": "de"})


@pytest.mark.skipif(IFEVAL is None, reason="EVERLEARN_TEST_IFEVAL names no folder with IFEval's prompts.jsonl")
def test_ifeval_s_own_file_can_be_judged():
    rows = [json.loads(line) for line in (Path(str(IFEVAL)) / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    checks = [pair for row in rows for pair in zip(row["instruction_id_list"], row["kwargs"], strict=True) if pair[0] != LANGUAGE]
    assert len(rows) > 500
    assert {name for name, _ in checks} | {LANGUAGE} == set(CHECKS)
    assert all(follows(text, name, parameters) in (True, False) for name, parameters in checks for text in ("Yes.", "* A, b\n\n***\n"))
