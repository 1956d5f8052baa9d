"""Sampled tokens and their log-probabilities arrive in datums as they were, behind the prompt that they were sampled from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tinker
from hypothesis import given
from hypothesis import strategies as st
from tinker import types

from everlearn.errors import InvalidRequest
from everlearn.rl.datums import datums_of, extended
from everlearn.rl.trajectory import Action, Trajectory, Transition


def image(tokens: int = 4, data: bytes = b"png") -> types.ImageChunk:
    return types.ImageChunk(data=data, format="png", expected_tokens=tokens)


def seen(*elements: Any) -> tinker.ModelInput:
    return extended(tinker.ModelInput.empty(), [], *elements)


def values(datum: types.Datum, name: str) -> list[float]:
    return datum.loss_fn_inputs[name].to_numpy().tolist()


def flat(model_input: tinker.ModelInput) -> Iterator[Any]:
    """One entry for each position; an image's positions are None."""
    for chunk in model_input.chunks:
        yield from chunk.tokens if isinstance(chunk, types.EncodedTextChunk) else [None] * chunk.length


def test_one_turn():
    action = Action([7, 8, 9], [-0.5, -1.0, -1.5])
    (datum,) = datums_of(Trajectory([Transition(seen(1, 2), action)]), [2.0])
    assert datum.model_input.to_ints() == [1, 2, 7, 8]
    assert values(datum, "target_tokens") == [2, 7, 8, 9]
    assert values(datum, "logprobs") == [0.0, -0.5, -1.0, -1.5]
    assert values(datum, "advantages") == [0.0, 2.0, 2.0, 2.0]


def test_turns_that_go_on_share_a_datum_and_keep_their_own_advantages():
    first, second = Action([7, 8], [-0.5, -1.0]), Action([9], [-2.0])
    start = seen(1, 2)
    transitions = [Transition(start, first), Transition(extended(start, first.tokens, 3, 4), second)]
    (datum,) = datums_of(Trajectory(transitions), [1.0, -1.0])
    assert datum.model_input.to_ints() == [1, 2, 7, 8, 3, 4]
    assert values(datum, "target_tokens") == [2, 7, 8, 3, 4, 9]
    assert values(datum, "advantages") == [0.0, 1.0, 1.0, 0.0, 0.0, -1.0]
    assert values(datum, "logprobs") == [0.0, -0.5, -1.0, 0.0, 0.0, -2.0]


def test_a_history_that_was_spelled_anew_begins_another_datum():
    """Tokens 70 and 71 stand for the same text as 7, say: nothing is trained behind a prompt that it wasn't sampled from."""
    first, second = Action([7], [-0.5]), Action([9], [-2.0])
    transitions = [Transition(seen(1, 2), first), Transition(seen(1, 2, 70, 71, 3), second)]
    one, other = datums_of(Trajectory(transitions), [1.0, 1.0])
    assert one.model_input.to_ints() == [1, 2] and values(one, "target_tokens") == [2, 7]
    assert other.model_input.to_ints() == [1, 2, 70, 71, 3] and values(other, "logprobs") == [0.0] * 4 + [-2.0]


def test_an_image_takes_its_tokens_and_is_no_target():
    first, second = Action([7], [-0.5]), Action([9], [-2.0])
    start = seen(1, image(3), 2)
    (datum,) = datums_of(Trajectory([Transition(start, first), Transition(extended(start, [7], image(2, b"x"), 5), second)]), [1.0, 2.0])
    assert [chunk.type for chunk in datum.model_input.chunks] == ["encoded_text", "image", "encoded_text", "image", "encoded_text"]
    assert list(flat(datum.model_input)) == [1, None, None, None, 2, 7, None, None, 5]
    assert values(datum, "target_tokens") == [0, 0, 0, 2, 7, 0, 0, 5, 9]
    assert values(datum, "advantages") == [0, 0, 0, 0, 1, 0, 0, 0, 2]
    changed = datums_of(Trajectory([Transition(start, first), Transition(seen(1, image(3, b"y"), 2, 7, 5), second)]), [1.0, 2.0])
    assert len(changed) == 2, "another image is another history"


def test_spans_say_where_each_position_came_from():
    first, second = Action([7, 8], [-0.5, -1.0], sequence_id="a"), Action([9], [-2.0], sequence_id="b")
    start = seen(1)
    trajectory = Trajectory([Transition(start, first), Transition(extended(start, [7, 8], 3), second)])
    (datum,) = datums_of(trajectory, [1.0, 1.0], provenance=True)
    told = [(type(span).__name__[:6], span.sequence_id, span.offset, span.length) for span in datum.model_input_spans]
    assert told == [("Prompt", "a", 0, 1), ("Sample", "a", 0, 2), ("Prompt", "b", 3, 1)]
    told = [(type(span).__name__[:6], span.sequence_id, span.offset, span.length) for span in datum.loss_fn_input_spans]
    assert told == [("Sample", "a", 0, 2), ("Prompt", "b", 3, 1), ("Sample", "b", 0, 1)]
    with pytest.raises(InvalidRequest, match="no id"):
        datums_of(Trajectory([Transition(start, Action([7], [-1.0]))]), [1.0], provenance=True)


def test_what_cannot_be_meant_is_refused():
    trajectory = Trajectory([Transition(seen(1), Action([7], [-1.0]))])
    with pytest.raises(InvalidRequest, match="2 advantages for 1 turn"):
        datums_of(trajectory, [1.0, 2.0])
    with pytest.raises(InvalidRequest, match="finite"):
        datums_of(trajectory, [float("nan")])
    nameless = types.ImageChunk(data=b"png", format="png")
    with pytest.raises(InvalidRequest, match="expected_tokens"):
        datums_of(Trajectory([Transition(seen(1, nameless), Action([7], [-1.0]))]), [1.0])


@pytest.mark.parametrize("bad", [([7], []), ([], []), ([7], [float("nan")]), ([7], [0.5])])
def test_an_action_needs_a_log_probability_for_each_token(bad: tuple[list[int], list[float]]):
    with pytest.raises(InvalidRequest):
        Action(*bad).check()


tokens = st.lists(st.integers(0, 4), min_size=1, max_size=4)  # few ids, so that prefixes meet by chance


@given(st.lists(st.tuples(tokens, tokens, st.booleans(), st.floats(-2, 2)), min_size=1, max_size=5))
def test_every_sampled_token_is_trained_once_behind_its_own_prompt(turns):
    """Whether an environment goes on from the policy's own tokens or shows something else."""
    transitions, history = [], tinker.ModelInput.empty()
    for number, (shown, sampled, goes_on, _) in enumerate(turns):
        observation = extended(history, [], *shown) if goes_on else seen(*shown)
        transitions.append(Transition(observation, Action(sampled, [-0.5 - number] * len(sampled))))
        history = extended(observation, sampled)
    wanted = [
        (transition.observation.to_ints() + transition.action.tokens[:place], token, logprob, pytest.approx(turn[3]))
        for transition, turn in zip(transitions, turns, strict=True)
        for place, (token, logprob) in enumerate(zip(transition.action.tokens, transition.action.logprobs, strict=True))
    ]
    found = []
    for datum in datums_of(Trajectory(transitions), [turn[3] for turn in turns]):
        inputs, logprobs = datum.model_input.to_ints(), values(datum, "logprobs")
        for place in np.flatnonzero(logprobs):
            target, advantage = values(datum, "target_tokens")[place], values(datum, "advantages")[place]
            found.append((inputs[: place + 1], target, logprobs[place], advantage))
        quiet = [advantage for advantage, logprob in zip(values(datum, "advantages"), logprobs, strict=True) if logprob == 0.0]
        assert quiet == [0.0] * len(quiet)
    assert [entry[:3] for entry in found] == [entry[:3] for entry in wanted]
    assert [entry[3] for entry in found] == [entry[3] for entry in wanted]
