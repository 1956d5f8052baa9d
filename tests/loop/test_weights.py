from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everlearn.config import FeedbackSettings
from everlearn.loop.weights import effective, factors, share, weigh, within


class Label(NamedTuple):
    source: str
    source_id: str


def test_ten_thousand_thumbs_of_one_weigh_as_much_as_the_cap() -> None:
    crowd, others = [Label("human", "one")] * 10_000, [Label("human", f"user {number}") for number in range(50)]
    weights = weigh(crowd + others, 100.0)
    assert sum(weights[:10_000]) == pytest.approx(100.0) and weights[10_000:] == [1.0] * 50
    assert effective(crowd + others, 100.0) == pytest.approx(150.0)


def test_kinds_of_sources_have_factors_and_ids_of_their_own() -> None:
    labels = [Label("human", "x"), Label("model", "x"), Label("model", "x"), Label("program", "")]
    by_source = factors(FeedbackSettings(program_weight=0.25))
    assert weigh(labels, 1.0, by_source) == [1.0, 0.25, 0.25, 0.25]
    assert share(0, 5.0) == 0.0


@given(st.lists(st.builds(Label, st.sampled_from(["human", "model"]), st.sampled_from("abc")), max_size=60), st.floats(1, 20))
def test_no_source_is_worth_more_than_the_cap(labels: list[Label], cap: float) -> None:
    weights = weigh(labels, cap)
    for place in set(labels):
        mine = [weight for label, weight in zip(labels, weights, strict=True) if label == place]
        assert sum(mine) == pytest.approx(min(cap, len(mine)))


def test_where_what_counted_stays_counted_the_first_of_each_source_count() -> None:
    """The same cap for tests that are asked after every outcome: a weight that shrinks behind would change what was told."""
    crowd = [("one", f"episode {number}") for number in range(10_000)]
    others = [(f"user {number}", f"episode {number}") for number in range(50)]
    found = within([*crowd, *others, ("one", "episode 3")], 100.0)
    assert sum(found[:10_000]) == 100 and all(found[:100]) and all(found[10_000:]), "more about the same thing still counts"
    for num in range(0, len(crowd), 997):
        assert within(crowd[:num], 100.0) == found[:num], "what comes later changes nothing"


def test_whoever_isn_t_named_is_everybody_while_the_named_are_fewer() -> None:
    nameless = [("", number) for number in range(300)]
    assert all(within(nameless, 100.0))
    found = within([*nameless, ("ana", 0), *(("", number) for number in range(300, 600))], 100.0)
    assert all(found), "one named word among hundreds takes nobody's voice"
    crowd = [("ana", number) for number in range(10_000)]
    assert sum(within([*crowd, *nameless], 100.0)) == 100 + 300, "nor do ten thousand of one, who counts for a hundred"
    people = [(f"user {number}", 1000 + number) for number in range(300)]
    found = within([*people, *nameless], 100.0)
    assert sum(found) == 300 + 100, "beside as many people with names it is one source, and has its share"
