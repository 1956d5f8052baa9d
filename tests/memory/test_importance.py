"""Heads: what they prefer, that distillation finds the minimum, and their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from everlearn.errors import InvalidRequest
from everlearn.memory.importance import BUCKETS, BY_HAND, FEATURES, Head, Surface, best, counted, distilled, features, load, rarity, save
from everlearn.memory.window import Window

CHATTER = ("Thanks, that sounds great!", "What do you think about it?", "Ok, good to know.", "Hello!", "The bus was late again.")


def used() -> Window:
    """A window that has heard the same chatter again and again."""
    words = b""
    for number in range(100):
        words = counted(words, CHATTER[number % 5])
    return Window(64, words=words)


def test_by_hand_facts_are_worth_more_than_chatter():
    facts = ("My sister Nora lives in Lisbon.", "The code of the garage is 4711.", "I never eat shellfish.")
    window = used()
    assert min(BY_HAND.score(window, "user", text) for text in facts) > max(BY_HAND.score(window, "user", text) for text in CHATTER)
    assert all(0 < BY_HAND.score(window, "user", text) < 1 for text in ("", "x" * 100_000, "1 " * 50_000))
    assert best(BY_HAND, window, "user", f"{CHATTER[0]} {facts[0]} {CHATTER[1]}") == BY_HAND.score(window, "user", facts[0])
    assert best(BY_HAND, window, "user", "  ") == 0.0


def test_rare_words_are_those_that_few_turns_held():
    words = used().words
    assert rarity(words, "Nora Lisbon") == 1.0 and rarity(words, "the of and") == 0.0
    assert 0 < rarity(words, "bus") < rarity(words, "bus Lisbon") < 1
    assert rarity(b"", "anything") == 1.0 and rarity(counted(b"", "anything"), "anything") == 0.0
    assert len(words) == len(counted(words, "word " * 1000)) == 2 * (BUCKETS + 1)


def test_counts_are_halved_before_they_overflow():
    words = b""
    table = np.full(BUCKETS + 1, 59_999, dtype=np.uint16)
    words = counted(table.tobytes(), "one more")
    assert np.frombuffer(words, dtype=np.uint16)[0] == 30_000 and np.frombuffer(words, dtype=np.uint16).max() == 30_000


def test_a_head_is_distilled_to_the_minimum():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(400, len(FEATURES)))
    true = np.zeros(len(FEATURES))
    true[[1, 6]] = 2.0, -1.5
    targets = 1 / (1 + np.exp(-(inputs @ true - 0.5)))
    head = distilled(inputs, targets, ridge=1e-9)
    assert abs(head.weights["digits"] - 2.0) < 1e-4 and abs(head.weights["question"] + 1.5) < 1e-4 and abs(head.bias + 0.5) < 1e-4
    assert np.abs(head.scores(inputs) - targets).max() < 1e-5

    def loss(weights: np.ndarray, bias: float, ridge: float) -> float:
        p = 1 / (1 + np.exp(-(inputs @ weights + bias)))
        cross = -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum()
        return float(cross + 0.5 * ridge * len(targets) * (weights**2).sum())

    pulled = distilled(inputs, targets, ridge=0.05)
    found = np.array([pulled.weights[name] for name in FEATURES])
    least = loss(found, pulled.bias, 0.05)
    for step in rng.normal(scale=1e-3, size=(20, len(FEATURES) + 1)):
        assert loss(found + step[:-1], pulled.bias + step[-1], 0.05) > least


def test_a_head_is_kept_in_a_file(tmp_path: Path):
    head = Head({"digits": 1.5, "names": -0.25}, 0.5, "a test")
    save(head, tmp_path / "head.json")
    assert load(tmp_path / "head.json") == head
    (tmp_path / "bad.json").write_text('{"weights": {"charm": 1}}')
    with pytest.raises(InvalidRequest, match="weighs 'charm'"):
        load(tmp_path / "bad.json")
    with pytest.raises(InvalidRequest, match="holds no head"):
        load(tmp_path / "absent.json")


def test_surprisal_needs_somebody_who_tells_it():
    with pytest.raises(InvalidRequest, match="weighs surprisal"):
        Surface(Head({"surprisal": 1.0}))
    head = Head({"surprisal": 1.0})
    assert head.score(Window(9), "user", "x", 4.0) > head.score(Window(9), "user", "x", 0.0)


def test_what_cannot_be_distilled_is_refused():
    with pytest.raises(InvalidRequest, match="features must be"):
        distilled(np.zeros((3, 2)), np.zeros(3))
    with pytest.raises(InvalidRequest, match="targets must lie"):
        distilled(np.zeros((3, len(FEATURES))), np.full(3, 2.0))
    assert features(Window(9), "user", "").shape == (len(FEATURES),)
