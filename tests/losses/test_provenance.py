"""Spans to arrays, on datums built the way the Tinker cookbook builds them."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from everlearn.errors import InvalidRequest
from everlearn.losses.checks import check_datum
from everlearn.losses.provenance import RecordedSequence, attach, resolve, sequence_ids
from everlearn.types import Array, Datum, ProvenanceSpan


def ints(*values: int, dtype: type = np.int32) -> Array:
    return Array.of(np.array(values, dtype))


def floats(*values: float) -> Array:
    return Array.of(np.array(values, np.float32))


def prompt(sequence_id: str, offset: int, length: int) -> ProvenanceSpan:
    return ProvenanceSpan("prompt", sequence_id, offset, length)


def sampled(sequence_id: str, offset: int, length: int) -> ProvenanceSpan:
    return ProvenanceSpan("sampled", sequence_id, offset, length)


# Two turns: [10 11 12] -> 20 21, then the same conversation grown by [30] -> 22.
RECORDED = {
    "a": RecordedSequence(ints(10, 11, 12), ints(20, 21), floats(-0.5, -0.25)),
    "b": RecordedSequence(ints(10, 11, 12, 20, 21, 30), ints(22), floats(-2.0), "v1"),
}


def two_turns() -> Datum:
    return Datum(
        ints(10, 11, 12, 20, 21, 30),
        {
            "target_tokens": ints(0, 0, 20, 21, 0, 22, dtype=np.int64),
            "logprobs": floats(0, 0, -0.5, -0.25, 0, -2),
            "advantages": floats(0, 0, 1, 1, 0, 1),
        },
        model_input_spans=[prompt("a", 0, 3), sampled("a", 0, 2), prompt("b", 5, 1)],
        loss_input_spans=[prompt("a", 1, 2), sampled("a", 0, 2), prompt("b", 5, 1), sampled("b", 0, 1)],
    )


def test_two_turns_resolve_to_the_recorded_logprobs() -> None:
    datum = two_turns()
    check_datum("stable_reinforce", 0, datum, 100)
    ready = attach(0, datum, RECORDED)
    assert sequence_ids([datum]) == {"a", "b"}
    np.testing.assert_array_equal(ready.inputs["sampling_logprobs"].numpy(), np.float32([0, 0, -0.5, -0.25, 0, -2]))
    np.testing.assert_array_equal(ready.inputs["sampled_mask"].numpy(), np.float32([0, 0, 1, 1, 0, 1]))
    assert set(ready.inputs) == {*datum.inputs, "sampling_logprobs", "sampled_mask"}
    assert ready.tokens == datum.tokens


def test_one_sampled_token_leaves_an_empty_run_in_the_input() -> None:
    datum = Datum(
        ints(10, 11, 12),
        {"target_tokens": ints(11, 12, 20, dtype=np.int64), "advantages": floats(0, 0, -1)},
        [prompt("a", 0, 3), sampled("a", 0, 0)],
        [prompt("a", 1, 2), sampled("a", 0, 1)],
    )
    np.testing.assert_array_equal(attach(0, datum, RECORDED).inputs["sampled_mask"].numpy(), np.float32([0, 0, 1]))


def test_resolve_returns_tokens_in_span_order() -> None:
    resolved = resolve([sampled("a", 1, 1), prompt("b", 3, 3), sampled("b", 0, 1)], RECORDED, 5)
    assert resolved.tokens_T.tolist() == [21, 20, 21, 30, 22]
    assert resolved.sampled_T.tolist() == [True, False, False, False, True]


def change(datum: Datum, name: str, array: Array) -> Datum:
    return replace(datum, inputs={**datum.inputs, name: array})


REFUSED = {
    "don't tile": (lambda d: replace(d, loss_input_spans=d.loss_input_spans[:-1]), ["data[4].loss_fn_input_spans", "cover 5", "has 6"]),
    "out of range": (
        lambda d: replace(d, loss_input_spans=[prompt("a", 1, 2), sampled("a", 0, 3), sampled("b", 0, 1)]),
        ["data[4].loss_fn_input_spans[1]", "sampled tokens [0, 3)", "'a'", "which has 2"],
    ),
    "prompt out of range": (
        lambda d: replace(d, model_input_spans=[prompt("a", 0, 3), sampled("a", 0, 2), prompt("b", 6, 1)]),
        ["data[4].model_input_spans[2]", "prompt tokens [6, 7)", "which has 6"],
    ),
    "unknown": (
        lambda d: replace(d, model_input_spans=[prompt("gone", 0, 6)]),
        ["data[4].model_input_spans[0]", "'gone'", "record_stability_info=True"],
    ),
    "other input": (lambda d: replace(d, tokens=ints(10, 11, 12, 20, 99, 30)), ["data[4].model_input[4]", "token 99", "token 21"]),
    "other target": (
        lambda d: change(d, "target_tokens", ints(0, 0, 20, 99, 0, 22, dtype=np.int64)),
        ["data[4].loss_fn_inputs.target_tokens[3]", "token 99", "token 21"],
    ),
    "advantage on a prompt": (
        lambda d: change(d, "advantages", floats(0.5, 0, 1, 1, 0, 1)),
        ["data[4].loss_fn_inputs.advantages[0]", "0.5", "must be 0"],
    ),
    "negative": (
        lambda d: replace(d, model_input_spans=[prompt("a", -1, 6)]),
        ["data[4].model_input_spans[0]", "offset -1"],
    ),
    "kind": (lambda d: replace(d, model_input_spans=[ProvenanceSpan("dreamt", "a", 0, 6)]), ["'dreamt'"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_span_that_is_wrong_is_named(case: str) -> None:
    spoil, words = REFUSED[case]
    with pytest.raises(InvalidRequest) as caught:
        attach(4, spoil(two_turns()), RECORDED)
    for word in words:
        assert word in caught.value.message
    assert caught.value.param is not None
    assert caught.value.message.startswith(caught.value.param)
