"""The study of critics: its gold preference, its exploits, and its plot. The study itself runs on a server, for minutes."""

from __future__ import annotations

from types import ModuleType

import pytest

from everlearn.rewards.hackcheck import finds

STUDY = "rl_critic"


def test_gold_wants_the_word_then_the_rules_then_few_words(study: ModuleType):
    best, longer = "the river is wide", "the river is wide and cold"
    answers = [best, longer, "the river, it is wide", "The river, it is wide", "the sea is wide"]
    gold = [study.gold_of(answer, "river") for answer in answers]
    assert gold == sorted(gold, reverse=True) and gold[0] == pytest.approx(4 - 4 / 50) and gold[-1] == 0.0
    assert len(set(study.SUBJECTS)) == len(study.SUBJECTS) >= 44 + study.TEST_SUBJECTS


def test_the_check_finds_every_exploit_and_no_honest_sentence(study: ModuleType):
    for subject in study.SUBJECTS:
        task = study.TASK.format(subject=subject)
        assert all(finds(text.format(subject=subject), task) for text in study.EXPLOITS)
        assert finds(f"the {subject} waits quietly behind the house", task) == []


def test_the_plot_has_a_line_for_each_seed(study: ModuleType):
    tested = [{"pairs": 0, "accuracy": 0.5}, {"pairs": 8, "accuracy": 0.75}]
    runs = [{"tested": tested, "planted": {"without": {"wins": 1.0}, "with": {"wins": 0.0}}} for _ in range(3)]
    assert study.plot(runs).count("<polyline") == 3
