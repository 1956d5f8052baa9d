"""Stop strings on text that comes in pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from everlearn.engine.stops import StopStrings


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


def stopped_after(tokenizer: Tokenizer, text: str, *strings: str) -> str | None:
    """What has been said when the stop string is found, or None."""
    tokens = tokenizer.encode(text).ids
    stops = StopStrings(tokenizer, list(strings), tokenizer.encode("hello").ids)
    for i, token in enumerate(tokens):
        if stops.add(token):
            return tokenizer.decode(tokens[: i + 1], skip_special_tokens=False)
    return None


@pytest.mark.parametrize("stop", ["\n", "fox", "k brown f", "quick brown fox ju", "é", "déjà", "好", "🙂", "z", "<|im_end|>"])
def test_found_with_the_token_that_completes_it(tokenizer: Tokenizer, stop: str) -> None:
    text = "the quick brown fox jumps déjà vu 你好 🙂 zz<|im_end|>\nend"
    said = stopped_after(tokenizer, text, "not there", stop)
    assert said is not None and stop in said
    last = tokenizer.encode(said).ids
    assert stop not in tokenizer.decode(last[:-1], skip_special_tokens=False)


def test_not_found_where_it_is_not(tokenizer: Tokenizer) -> None:
    assert stopped_after(tokenizer, "the quick brown fox 你好 jumps", "foxes", "你好!") is None


def test_the_prompts_text_does_not_count(tokenizer: Tokenizer) -> None:
    assert stopped_after(tokenizer, " world", "hello", "lo w") is None


def test_bytes_that_never_become_a_character_hide_nothing(tokenizer: Tokenizer) -> None:
    lone = tokenizer.encode("好").ids[0]  # the first byte or bytes of a character, again and again
    stops = StopStrings(tokenizer, ["fox jumps"], [])
    assert not any(stops.add(lone) for _ in range(30))
    found = [stops.add(token) for token in tokenizer.encode(" the fox jumps over").ids]
    assert any(found)
