"""Stop strings on text that comes in pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

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


def byte_fallback() -> Tokenizer:
    """Another kind of decoder: half a character is a replacement sign for each of its bytes."""
    names = [f"<0x{byte:02X}>" for byte in range(256)] + [chr(letter) for letter in range(97, 123)] + [" "]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
@pytest.mark.parametrize("character", ["語", "é", "🦊"])
def test_a_character_that_began_in_the_prompt_is_found_whole(tokenizer: Tokenizer, kind: str, character: str) -> None:
    used = tokenizer if kind == "byte level" else byte_fallback()
    ids = used.encode(f"ab{character}cd").ids
    end = next(i for i in range(len(ids), 0, -1) if used.decode(ids[:i]) == f"ab{character}")
    assert used.decode(ids[: end - 1]) != f"ab{character}", "its last byte is a token"
    first = next(i for i in range(1, end) if "\ufffd" in used.decode(ids[:i]))
    for start in range(first, end):  # each number of its bytes in the prompt
        for stop, at in ((character, end), (f"{character}c", end + 1), ("cd", len(ids)), ("b", None), (f"b{character}", None)):
            stops = StopStrings(used, ["not there", stop], ids[:start])
            found = next((i + 1 for i in range(start, len(ids)) if stops.add(ids[i])), None)
            assert found == at, (start, stop)


def test_half_a_character_in_the_prompt_hides_nothing_when_it_is_never_completed(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("語").ids[:2]
    for said in ("fox", "語 fox"):
        stops = StopStrings(tokenizer, ["fox"], half)
        tokens = tokenizer.encode(said).ids
        assert [stops.add(token) for token in tokens] == [False] * (len(tokens) - 1) + [True]


def test_a_replacement_sign_that_the_prompt_ends_with_is_the_prompts(tokenizer: Tokenizer) -> None:
    stops = StopStrings(tokenizer, ["\ufffd"], tokenizer.encode("ab\ufffd").ids)
    assert not any(stops.add(token) for token in tokenizer.encode(" the fox").ids)
