"""A reply says the same however its tokens arrive, and its log-probabilities leak no stop string."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everlearn.api.openai.responses_events import Growing
from everlearn.api.replies import ContentDelta, Reply, ScoredToken, ToolCallDelta
from everlearn.engine.protocol import TokenPart
from everlearn.render import tokenizer as tokenizers
from everlearn.render import tools
from everlearn.render.tokenizer import ChatTokenizer
from everlearn.types import Array, SampledSequence
from tests.tiny import make_tokenizer

TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
TEXTS = [
    "the quick brown fox",
    "déjà vu 你好 🙂 END and more",
    "<think>hm, 你好</think>so it is",
    'I look. <tool_call>\n{"name": "look_up", "arguments": {"a": "é"}}\n</tool_call>',
    "<tool_call>{broken",
    "END",
    "",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, 400)
    return tokenizers.load(folder)


def new(tokenizer: ChatTokenizer, stops: list[str] | None = None, single_call: bool = False) -> Reply:
    parser = tools.format_for(tokenizer, "LlamaForCausalLM", "llama").stream(TOOLS, "")
    return Reply(tokenizer, parser=parser, stop_tokens=[2], stop_strings=stops or [], scored=True, single_call=single_call)


def said(reply: Reply) -> tuple[str, str, list[tuple[str, str]]]:
    return "".join(reply.content), "".join(reply.reasoning), [(call.name, call.arguments) for call in reply.calls]


def parts(ids: list[int], cuts: list[int], reason: str) -> list[TokenPart]:
    places = [0, *sorted({min(cut, len(ids)) for cut in cuts}), len(ids)]
    cut = [ids[a:b] for a, b in itertools.pairwise(places)]
    return [
        TokenPart(0, piece, [-0.5] * len(piece), [[7]] * len(piece), [[-0.25]] * len(piece), reason if i == len(cut) - 1 else "")
        for i, piece in enumerate(cut)
    ]


@given(text=st.one_of(st.sampled_from(TEXTS), st.text(max_size=40)), cuts=st.lists(st.integers(0, 60), max_size=8), stop=st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_stream_says_what_the_whole_says(tokenizer: ChatTokenizer, text: str, cuts: list[int], stop: bool) -> None:
    ids = tokenizer.encode(text)
    stops = ["END"] if stop else []
    whole, streamed = new(tokenizer, stops), new(tokenizer, stops)
    first = whole.feed(parts(ids, [], "length")[0])
    steps = [streamed.feed(part) for part in parts(ids, cuts, "length")]
    assert said(streamed) == said(whole)
    assert streamed.finish == whole.finish == steps[-1].finish or stop
    assert [token.id for step in steps for token in step.scored] == [token.id for token in first.scored]
    if stop:
        assert "END" not in "".join(whole.content)


def test_stop_strings_end_the_reply_and_leave_no_trace_in_the_scores(tokenizer: ChatTokenizer) -> None:
    reply = new(tokenizer, ["END"])
    ids = tokenizer.encode("so END more")
    steps = [reply.feed(part) for part in parts(ids, list(range(len(ids))), "length")]
    assert (said(reply)[0], reply.finish, reply.stop_string) == ("so ", "stop", "END")
    shown = b"".join(tokenizer.token_bytes(token.id) for step in steps for token in step.scored)
    assert b"E" not in shown and shown.startswith(b"so")


def test_the_stop_token_is_drawn_but_not_said(tokenizer: ChatTokenizer) -> None:
    reply = new(tokenizer)
    step = reply.feed(parts([*tokenizer.encode("hello"), 2], [], "stop")[0])
    assert (said(reply)[0], step.finish, reply.ids[-1]) == ("hello", "stop", 2)
    assert [token.id for token in step.scored] == tokenizer.encode("hello")
    assert step.scored[0] == ScoredToken(tokenizer.encode("hello")[0], -0.5, [(7, -0.25)], 0)


def test_calls_end_a_reply_with_their_own_reason(tokenizer: ChatTokenizer) -> None:
    reply = new(tokenizer)
    ids = tokenizer.encode(TEXTS[3])
    steps = [reply.feed(part) for part in parts([*ids, 2], list(range(len(ids))), "stop")]
    assert steps[-1].finish == reply.finish == "tool_calls"
    assert said(reply) == ("I look.", "", [("look_up", '{"a": "é"}')])
    message = reply.message()
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"a": "é"}
    assert {type(delta) for step in steps for delta in step.deltas} == {ContentDelta, ToolCallDelta}


def test_a_second_call_ends_a_reply_that_may_have_one(tokenizer: ChatTokenizer) -> None:
    call = '<tool_call>\n{"name": "look_up", "arguments": {}}\n</tool_call>'
    ids = tokenizer.encode(f"{call}\n{call} and more")
    whole, streamed = new(tokenizer, single_call=True), new(tokenizer, single_call=True)
    whole.feed(parts(ids, [], "length")[0])
    for part in parts(ids, list(range(len(ids))), "length"):
        streamed.feed(part)
    assert said(whole) == said(streamed) == ("", "", [("look_up", "{}")]) and whole.finish == streamed.finish == "tool_calls"
    assert len(streamed.ids) < len(ids)


def test_after_its_end_a_reply_says_nothing(tokenizer: ChatTokenizer) -> None:
    reply = new(tokenizer)
    reply.feed(TokenPart(0, [40], [-1.0], stop_reason="length"))
    assert not reply.feed(TokenPart(0, [41], [-1.0])).deltas and len(reply.ids) == 1


def test_tokens_of_a_thought_are_counted_in_a_whole_sequence_too(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode(TEXTS[2])
    sequence = SampledSequence("length", array(ids), zeros(len(ids)))
    reply, streamed = new(tokenizer), new(tokenizer)
    reply.take(0, sequence, thinks=False)
    for number in ids:
        streamed.feed(TokenPart(0, [number], [-1.0]))
    assert said(reply)[:2] == ("so it is", "hm, 你好")
    assert 0 < reply.reasoning_tokens == streamed.reasoning_tokens < len(ids)


TALK = ["<think>", "hm, ", "你好", "</think>", "so it ", "is. ", '<tool_call>\n{"name": "look_up", "arguments": {"a": 1}}\n</tool_call>']


@pytest.mark.parametrize("streamed", ["whole", "in pieces", "token by token"])
@pytest.mark.parametrize(("begin", "end"), [(0, 7), (0, 6), (4, 7), (4, 6), (6, 7), (0, 3)])
def test_a_response_tells_its_tokens_with_what_they_say(tokenizer: ChatTokenizer, streamed: str, begin: int, end: int) -> None:
    """Those of the message alone, none of a thought or a call, whether they come at once or one after another."""
    text = "".join(TALK[begin:end])
    ids = tokenizer.encode(text)
    reply, growing = new(tokenizer), Growing("x", tokenizer)
    if streamed == "whole":
        growing.take(reply.take(0, SampledSequence("length", array(ids), zeros(len(ids))), thinks=begin == 0))
    else:
        told = b"".join(
            event
            for part in parts(ids, list(range(0, len(ids), 1 if streamed == "token by token" else 7)), "length")
            for event in growing.take(reply.feed(part))
        )
        deltas = [json.loads(line[6:]) for line in told.splitlines() if line.startswith(b"data: ")]
        shown = [delta for delta in deltas if delta["type"] == "response.output_text.delta"]
        assert all(delta["delta"].strip() in written(delta["logprobs"]) for delta in shown)
    growing.end("completed")
    said = [item["content"][0] for item in growing.output if item["type"] == "message"]
    assert [part["text"].strip() for part in said] == ["so it is."] * (begin <= 4 < end)
    for part in said:
        assert written(part["logprobs"]).strip() == "so it is."


def written(logprobs: list[dict[str, object]]) -> str:
    return "".join(str(token["token"]) for token in logprobs)


def array(ids: list[int]) -> Array:
    return Array("int32", [len(ids)], b"".join(i.to_bytes(4, "little") for i in ids))


def zeros(count: int) -> Array:
    return Array("float32", [count], bytes(4 * count))
