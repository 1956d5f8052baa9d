"""Refills by rule: what they keep, and that they keep to their caps."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from everlearn.memory.importance import BY_HAND, SENTENCES, split
from everlearn.memory.plan import Plan
from everlearn.memory.refill import Extract, Forget, fitted
from everlearn.memory.window import Chunk, Window, chunk_of, line
from tests.memory.spelling import encode

TEXT = "Thanks, that sounds great! My sister Nora lives in Lisbon since 2019. What do you think? The weather was nice."


def filled(text: str, cap: int) -> str:
    chunk = chunk_of(encode, "user", text, 0)
    (found,) = Extract(encode, BY_HAND.score).fill(plan_of(chunk, cap))
    return found


def plan_of(chunk: Chunk, cap: int) -> Plan:
    """A plan with one hole. A budget of the whole chunk is none, so there is a token more to it."""
    longer = msgspec.structs.replace(chunk, tokens=(*chunk.tokens, *[0] * (1 + max(0, cap - len(chunk.tokens)))))
    return Plan(Window(4), (longer,), 0, (0,), (cap,))


def test_the_sentence_that_matters_stays_word_for_word():
    sentence = "My sister Nora lives in Lisbon since 2019."
    assert filled(TEXT, len(encode(line("user", sentence)))) == sentence


def test_more_room_keeps_more_in_the_order_in_which_it_was_said():
    found = filled(TEXT, len(encode(line("user", TEXT))) - 3)
    assert "My sister Nora" in found and len(found) > 60
    assert [piece for piece in split(TEXT, SENTENCES) if piece in found] == split(found, SENTENCES)


def test_a_clause_stays_where_no_sentence_fits():
    text = "My name is Ada, and the rest of this very long sentence goes on about nothing in particular for quite a while"
    found = filled(text, 10)
    assert found.startswith("My name is Ada,") and len(found) < 30


def test_nothing_stays_where_nothing_fits():
    assert filled("Incomprehensibilities" * 3, 4) == ""
    assert Forget().fill(plan_of(chunk_of(encode, "user", TEXT, 0), 9)) == [""]


@settings(max_examples=200)
@given(st.text(max_size=300), st.integers(1, 60))
def test_never_over_the_cap(text, cap):
    for found in (filled(text, cap), fitted(text, "user", cap, encode)):
        assert not found or len(encode(line("user", found))) <= cap


def test_a_long_text_is_cut_in_no_time():
    assert filled("word " * 200_000, 20) != "x"
    assert fitted("word " * 200_000, "user", 20, encode).count("word") > 5
