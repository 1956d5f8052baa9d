from __future__ import annotations

from typing import Any

import pytest

from everlearn.loop.implicit import corrects, praises, repeats, signals


@pytest.mark.parametrize(
    "said",
    [
        "No, the other one",
        "no that's wrong",
        "That's not what I asked.",
        "that is incorrect",
        "Wrong!",
        "I meant the blue one",
        "Actually, it is in Ghent",
        "You forgot the tax",
        "... not quite",
        "you're mistaken",
    ],
)
def test_what_corrects(said: str) -> None:
    assert corrects(said)


@pytest.mark.parametrize(
    "said", ["No problem, thanks!", "Now tell me more", "Nothing else", "Is that not wrong?", "Notes please", "what else?", ""]
)
def test_what_does_not(said: str) -> None:
    assert not corrects(said)


@pytest.mark.parametrize(
    ("said", "praise"),
    [("Thanks!", True), ("perfect, that works", True), ("Great, but it is still wrong", False), ("the greatest of all?", False)],
)
def test_praise(said: str, praise: bool) -> None:
    assert praises(said) == praise


def test_what_asks_again() -> None:
    assert repeats("Where is my parcel now, please?", "where is my parcel now please")
    assert repeats("Where can I find the opening hours?", "Where can I find your opening hours?")
    assert not repeats("Where is my parcel?", "Where is my refund for it?")
    assert repeats("why", "Why?") and not repeats("why", "how") and not repeats("", "")


def turns(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]


def test_signals_are_about_the_answer_before() -> None:
    assert signals(turns("Where is it?", "There."), 0) == []
    assert signals(turns("Where is it?", "There.", "No, the other one"), 2)[0][:2] == ("correction", 0)
    assert signals(turns("Where is my big parcel?", "There.", "where is my big parcel"), 2)[0][:2] == ("repeat", 0)
    assert signals(turns("Where is it?", "There.", "Thanks"), 2)[0][:2] == ("thanks", 1)
    assert signals(turns("Where is it?", "There.", "And how big is it?"), 2) == []
    assert signals([*turns("Where is it?", "There."), {"role": "tool", "content": "x"}, *turns("No!")], 2) == []
    parts = [{"role": "user", "content": [{"type": "text", "text": "No, wrong"}, {"type": "image_url", "image_url": {}}]}]
    assert [one.noise for one in signals([*turns("a", "b"), *parts], 2)] == [0.2]
