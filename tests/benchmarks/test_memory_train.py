"""The study of trained memories: where its histories come from, and what its plot and its small model's lessons are made of."""

from __future__ import annotations

import random
from types import ModuleType
from xml.etree import ElementTree

from everlearn.memory.study import Run

STUDY = "memory_train"


def test_no_history_is_both_learned_from_and_looked_at(study: ModuleType):
    import listener

    looked_at = {study.HELD_OUT + seed + len(study.SEEDS) * number for seed in study.SEEDS for number in range(50)}
    distilled = {
        study.TRAINED_ON + size.heads * seed + n for size in study.SIZES.values() for seed in study.SEEDS for n in range(size.heads)
    }
    trained = {study.TRAINED_ON * (1 + seed) * 10 + number for seed in study.SEEDS for number in range(9000)}
    assert not looked_at & distilled and not looked_at & trained and not distilled & trained
    assert max(looked_at | distilled | trained) < listener.FIRST_SEED - 100


def test_the_plot_has_a_curve_for_each_seed_that_has_all_places(study: ModuleType):
    runs = [
        Run(f"small-{turns}", "h", method, budget, seed, turns, ["fact"] * 4, [kept] * 4, 100.0, 0.0, contains=[kept] * 4)
        for seed in (0, 1)
        for method, kept in (("trained", 1.0), ("last", 0.0))
        for turns, budget in ((2000, 256), (2000, 512), (2000, 1024), (300, 512))
        if (method, seed, budget) != ("last", 1, 1024)
    ]
    drawn = ElementTree.fromstring(study.plot(runs))
    text = "".join(drawn.itertext())
    assert "evidence kept, 2000 turns, by budget" in text and "answers right, 512 tokens, by turns" in text
    assert study.seeds_of([(run.budget, run) for run in runs if run.method == "last" and run.turns == 2000], "kept") == [
        [(256.0, 0.0), (512.0, 0.0), (1024.0, 0.0)]
    ]


def test_lessons_hold_the_answers_that_they_ask_for(study: ModuleType):
    import listener

    tokenizer = listener.make_tokenizer()
    lessons = listener.Lessons(listener.by_line(tokenizer), random.Random(3))
    for _ in range(10):
        tokens, weights = lessons._recall(lessons._case(4), 400)
        told = tokenizer.decode(tokens, skip_special_tokens=False)
        assert listener.UNKNOWN not in told and len(tokens) == len(weights)
        context, *asked = told.split("Question:")
        answers = [part.split("assistant")[1].split(listener.END)[0].strip() for part in asked]
        assert answers and all(answer in context for answer in answers)
    ids = tokenizer.encode("user: The code of the lab is 6370.\n").ids
    assert len(ids) == 14 and tokenizer.decode(ids).strip() == "user: The code of the lab is 6370."
