"""Allocation: every promise of its docstring, on random inputs, and against water poured by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everlearn.errors import InvalidRequest
from everlearn.memory.allocate import allocate

IMPORTANCE = st.one_of(st.just(0.0), st.floats(1e-6, 1.0))
CASE = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(IMPORTANCE, min_size=n, max_size=n),
        st.lists(st.integers(1, 60), min_size=n, max_size=n),
        st.integers(0, 500),
        st.lists(st.integers(1, 12), min_size=n, max_size=n),
    )
)


@settings(max_examples=300)
@given(CASE)
def test_budgets_fit(case):
    importance, lengths, free, floors = case
    budgets = allocate(importance, lengths, free, floors)
    assert sum(budgets) <= free
    for value, length, floor, budget in zip(importance, lengths, floors, budgets, strict=True):
        assert budget == 0 or min(floor, length) <= budget <= length
        assert value > 0 or budget == 0
    kept = [i for i, budget in enumerate(budgets) if budget]
    assert sum(budgets) == free or all(budgets[i] == lengths[i] for i in kept)
    if sum(lengths) <= free:
        assert budgets == [length if value > 0 else 0 for value, length in zip(importance, lengths, strict=True)]


@settings(max_examples=300)
@given(CASE)
def test_who_is_forgotten_is_no_more_important_than_who_stays(case):
    importance, lengths, free, floors = case
    budgets = allocate(importance, lengths, free, floors)
    gone = [importance[i] for i, budget in enumerate(budgets) if not budget]
    kept = [importance[i] for i, budget in enumerate(budgets) if budget]
    assert not gone or not kept or max(gone) <= min(kept)


@settings(max_examples=300)
@given(CASE, st.integers(1, 60))
def test_more_importance_is_never_less_budget_among_equals(case, length):
    importance, _, free, floors = case
    budgets = allocate(importance, [length] * len(importance), free, floors[:1] * len(importance))
    order = sorted(range(len(importance)), key=lambda i: (-importance[i], -i))
    assert [budgets[i] for i in order] == sorted(budgets, reverse=True)


@settings(max_examples=300)
@given(CASE, st.integers(0, 11), st.floats(1.0, 50.0))
def test_a_budget_never_falls_when_its_importance_rises(case, which, factor):
    importance, lengths, free, floors = case
    which %= len(importance)
    raised = list(importance)
    raised[which] = max(raised[which], 1e-3) * factor
    assert allocate(raised, lengths, free, floors)[which] >= allocate(importance, lengths, free, floors)[which]


@settings(max_examples=200)
@given(CASE)
def test_as_much_as_poured_token_by_token(case):
    """The same as giving one token after another to whom has least for its importance, up to one token each."""
    importance, lengths, free, floors = case
    budgets = allocate(importance, lengths, free, floors)
    kept = [i for i, budget in enumerate(budgets) if budget]
    poured = {i: min(floors[i], lengths[i]) for i in kept}
    left = free - sum(poured.values())
    while left and (open_ := [i for i in kept if poured[i] < lengths[i]]):
        least = min(open_, key=lambda i: ((poured[i] - min(floors[i], lengths[i]) + 1) / importance[i], -i))
        poured[least] += 1
        left -= 1
    assert sum(poured.values()) == sum(budgets)
    assert all(abs(poured[i] - budgets[i]) <= len(kept) for i in kept)


def test_by_hand():
    assert allocate([0.5, 0.5], [100, 100], 50, [8, 8]) == [25, 25]
    assert allocate([0.75, 0.25], [100, 100], 56, [8, 8]) == [38, 18]
    assert allocate([0.9, 0.1], [10, 100], 60, [8, 8]) == [10, 50]
    assert allocate([0.9, 0.8, 0.0], [40, 40, 40], 10, [8, 8, 8]) == [10, 0, 0]
    assert allocate([0.2, 0.9], [3, 40], 5, [8, 8]) == [0, 0]
    assert allocate([0.5, 0.5, 0.5], [20, 20, 20], 17, [8, 8, 8]) == [0, 8, 9]
    assert allocate([0.6, 0.5], [20, 20], 19, [12, 4]) == [14, 5]
    assert allocate([], [], 9, []) == []


def test_what_is_no_importance_is_refused():
    with pytest.raises(InvalidRequest, match="1 importances for 2 lengths"):
        allocate([1.0], [1, 2], 3, [1, 1])
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(InvalidRequest, match="finite"):
            allocate([bad], [1], 3, [1])
