"""The text of a stream: what decoding all tokens gives, never half a character, never a part of a stop string."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from everlearn.render.detokenize import TextStream
from everlearn.render.tokenizer import ChatTokenizer

SAMPLES = [
    "The quick brown fox\n\njumps over the lazy dog. STOP now.",
    "naïve café — 東京 🗼👩\u200d👩\u200d👧 مرحبا ꙮ\u0301 \U0001f1fa\U0001f1f3",
    "def f(x):\n\treturn {'a': [x, 1.5]}\n\n\n### END ###",
    "aaaaabaaaaab abababab <|im_star <|im_start|>user\n<|im_end|>",
]
STOPS = [
    [],
    ["STOP"],
    ["aab"],
    ["abab", "b"],
    ["\n\n"],
    ["東京 🗼"],
    ["###", "END"],
    ["\n\n", "\n\n\n", "x"],
    ["👩"],
    ["zzz", "<|im_start|>"],
]


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Slow and obvious: the stop string that ends first, the longest of those that end there."""
    ends = sorted((text.index(stop) + len(stop), text.index(stop), stop) for stop in stops if stop in text)
    return (text[: ends[0][1]], ends[0][2]) if ends else (text, None)


def test_ten_thousand_random_splits(tokenizer: ChatTokenizer):
    choose = random.Random(0)
    encoded = [tokenizer.encode(text) for text in SAMPLES]
    for turn in range(10_000):
        ids = encoded[turn % len(encoded)]
        if turn % 3 == 0:  # any tokens: broken characters, special tokens in the middle of one
            ids = [choose.randrange(tokenizer.tokenizer.get_vocab_size()) for _ in range(choose.randint(0, 12))]
        stops, skip = choose.choice(STOPS), choose.random() < 0.5
        stream = TextStream(tokenizer, stops, skip)
        whole, stopped = expected(tokenizer.decode(ids, skip_special=skip), stops)
        shown, place = "", 0
        while place < len(ids):
            size = choose.choice([1, 1, 1, 2, 3, 8])
            shown += stream.add(ids[place : place + size])
            place += size
            assert whole.startswith(shown)  # nothing that would have to be taken back
        shown += stream.finish()
        assert (shown, stream.stopped) == (whole, stopped)
        assert len(stream.offsets) == len(ids)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab<c", max_size=40),
    stops=st.lists(st.text("ab<c", min_size=1, max_size=6), max_size=4),
    places=st.lists(st.integers(0, 40), max_size=6),
)
def test_stop_strings_over_any_text(tokenizer: ChatTokenizer, text: str, stops: list[str], places: list[int]):
    ids = tokenizer.encode(text)
    edges = [0, *sorted(min(place, len(ids)) for place in places), len(ids)]
    stream = TextStream(tokenizer, stops)
    shown = "".join(stream.add(ids[start:end]) for start, end in itertools.pairwise(edges)) + stream.finish()
    assert (shown, stream.stopped) == expected(text, stops)


def test_a_character_waits_for_its_last_byte(tokenizer: ChatTokenizer):
    ids = tokenizer.encode("🗼")
    assert len(ids) > 1
    stream = TextStream(tokenizer)
    assert [stream.add([number]) for number in ids] == [""] * (len(ids) - 1) + ["🗼"]
    broken = TextStream(tokenizer)
    assert broken.add(ids[:-1]) == "" and broken.finish() == "\ufffd"


def test_only_what_may_become_a_stop_string_waits(tokenizer: ChatTokenizer):
    stream = TextStream(tokenizer, ["</end>"])
    assert stream.add(tokenizer.encode("some text <")) == "some text "
    assert stream.add(tokenizer.encode("b>")) == "<b>"
    assert stream.add(tokenizer.encode("x</en")) == "x"
    assert stream.add(tokenizer.encode("d> more")) == "" and stream.stopped == "</end>"
    assert stream.add(tokenizer.encode("more")) == "" and stream.finish() == ""


def test_special_tokens_are_skipped_but_for_those_to_keep(tokenizer: ChatTokenizer):
    start, end = tokenizer.id_of("<|im_start|>"), tokenizer.id_of("<|im_end|>")
    ids = [start, *tokenizer.encode("hi"), end]
    assert TextStream(tokenizer).add(ids) == "hi"
    assert TextStream(tokenizer, keep={start}).add(ids) == "<|im_start|>hi"
    assert TextStream(tokenizer, skip_special=False).add(ids) == "<|im_start|>hi<|im_end|>"


def test_offsets_say_where_each_token_begins(tokenizer: ChatTokenizer):
    ids = tokenizer.encode("one two 🗼 three")
    stream = TextStream(tokenizer)
    text = stream.add(ids) + stream.finish()
    for place, number in enumerate(ids):
        piece = tokenizer.token_bytes(number).decode(errors="ignore")
        assert text[stream.offsets[place] :].startswith(piece)


@pytest.mark.parametrize("continues", [False, True])
def test_the_first_space_of_sentencepiece(continues: bool):
    inner = Tokenizer(models.BPE({"<unk>": 0, "▁Hello": 1, "▁world": 2}, [], unk_token="<unk>"))
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    stream = TextStream(ChatTokenizer(inner, {}, {}), continues=continues)
    assert stream.add([1]) + stream.add([2]) + stream.finish() == (" Hello world" if continues else "Hello world")
