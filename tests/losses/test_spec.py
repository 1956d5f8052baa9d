"""The door: what passes, and that each refusal names the datum, the field, the value and the way out."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from msgspec.structs import replace

from everlearn.errors import InvalidRequest, Unsupported
from everlearn.losses.checks import check_config, check_datum, check_request
from everlearn.losses.correction import WAYS
from everlearn.losses.spec import SPECS, spec_of
from everlearn.losses.table import LOSSES
from everlearn.types import Array, Datum, ProvenanceSpan

VOCAB = 50


def array(values: object, dtype: type = np.float32) -> Array:
    return Array.of(np.array(values, dtype))


def sft(**inputs: Array) -> Datum:
    given = {"target_tokens": array([2, 3, 4], np.int64), "weights": array([0, 1, -0.5])}
    return Datum(array([1, 2, 3], np.int32), {**given, **inputs})


def rl(**inputs: Array) -> Datum:
    given = {"target_tokens": array([2, 3, 4], np.int64), "logprobs": array([0, -1, -2]), "advantages": array([0, 1, 1])}
    return Datum(array([1, 2, 3], np.int32), {**given, **inputs})


def without(datum: Datum, name: str) -> Datum:
    return replace(datum, inputs={key: value for key, value in datum.inputs.items() if key != name})


def test_every_specification_has_a_function_and_the_names_of_the_protocol() -> None:
    assert list(LOSSES) == list(SPECS)
    protocol = {"cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce"}
    assert set(SPECS) == protocol | {"mirror_descent"}
    assert [name for name, spec in SPECS.items() if not spec.per_token] == ["gspo", "mirror_descent"]
    assert all(way in WAYS for way in SPECS["ppo"].config["importance_weight"].options)


def test_the_specifications_and_the_resolver_need_no_torch() -> None:
    code = "import sys, everlearn.losses.spec, everlearn.losses.checks, everlearn.losses.provenance; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_clients_send_passes() -> None:
    check_datum("cross_entropy", 0, sft(), VOCAB)
    check_datum("cross_entropy", 0, sft(weights=array([0, 1, 1], np.int64)), VOCAB)
    wide = sft(target_tokens=array(np.zeros((3, 4)), np.int64), weights=array(np.ones((3, 4))))
    check_datum("cross_entropy", 0, wide, VOCAB)
    for name in ("importance_sampling", "ppo", "cispo", "dro"):
        check_datum(name, 0, rl(), VOCAB)
    check_datum("gspo", 0, rl(sequence_ratio_mask=array([0, 1, 1])), VOCAB)
    check_datum("ppo", 0, rl(clip_low_threshold=array([0.9, 0.9, 0.9])), VOCAB)
    span = [ProvenanceSpan("sampled", "s", 0, 3)]
    check_datum("stable_reinforce", 0, replace(rl(), model_input_spans=span, loss_input_spans=span), VOCAB)


REFUSED: dict[str, tuple[str, Datum, list[str]]] = {
    "missing weights": ("cross_entropy", without(sft(), "weights"), ["'weights'", "target_tokens, weights"]),
    "missing mask": ("gspo", rl(), ["'sequence_ratio_mask'"]),
    "unknown input": ("ppo", rl(mask=array([0, 1, 1])), [".mask", "remove it", "advantages"]),
    "the server's own": ("stable_reinforce", rl(sampling_logprobs=array([0, 1, 1])), [".sampling_logprobs"]),
    "short": ("ppo", rl(advantages=array([0, 1])), [".advantages", "[2]", "[3]", "3 tokens"]),
    "weights unlike targets": ("cross_entropy", sft(weights=array([[1], [1], [1]])), [".weights", "[3, 1]", "[3]"]),
    "wide targets for rl": ("ppo", rl(target_tokens=array([[2], [3], [4]], np.int64)), [".target_tokens", "[3, 1]"]),
    "K of 0": ("cross_entropy", sft(target_tokens=array(np.zeros((3, 0)), np.int64)), [".target_tokens", "[3, 0]", "[3, K]"]),
    "nan": ("ppo", rl(logprobs=array([math.nan, -1, -2])), [".logprobs[0]", "nan", "finite"]),
    "infinite": ("cross_entropy", sft(weights=array([0, math.inf, 1])), [".weights[1]", "inf"]),
    "outside the vocabulary": ("ppo", rl(target_tokens=array([2, VOCAB, 4], np.int64)), [".target_tokens[1]", "50", "[0, 50)"]),
    "negative token": ("cross_entropy", sft(target_tokens=array([2, 3, -100], np.int64)), [".target_tokens[2]", "-100"]),
    "float targets": ("cross_entropy", sft(target_tokens=array([2, 3, 4])), [".target_tokens", "float32", "integers"]),
    "input token": ("cross_entropy", replace(sft(), tokens=array([1, 99, 3], np.int32)), [".model_input[1]", "99"]),
    "no tokens": ("cross_entropy", replace(sft(), tokens=array([], np.int32)), [".model_input", "at least one token"]),
    "bytes": ("ppo", rl(advantages=Array("float32", [3], b"1234")), [".advantages", "4 bytes"]),
    "empty mask": ("gspo", rl(sequence_ratio_mask=array([0, 0, 0])), [".sequence_ratio_mask", "0 everywhere"]),
    "advantages outside an empty mask": (
        "gspo",
        rl(sequence_ratio_mask=array([0, 0, 0]), weights=array([0, 1, 1])),
        [".sequence_ratio_mask", "0 everywhere"],
    ),
    "weights beside wide targets": ("ppo", rl(weights=array([[0], [1], [1]])), [".weights", "[3, 1]", "[3]"]),
    "crossed bounds": (
        "ppo",
        rl(clip_low_threshold=array([0.9, 1.3, 1]), clip_high_threshold=array([1, 1.2, 1])),
        [".clip_low_threshold[1]", "1.3", "1.2"],
    ),
    "no spans": ("stable_reinforce", rl(), ["loss_fn_input_spans", "with_provenance", "record_stability_info=True"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_datum_that_breaks_a_rule_is_refused_by_name(case: str) -> None:
    loss_fn, datum, words = REFUSED[case]
    with pytest.raises(InvalidRequest) as caught:
        check_datum(loss_fn, 7, datum, VOCAB)
    for word in ["data[7]", *words]:
        assert word in caught.value.message
    assert (caught.value.param or "").startswith("data[7].")


def test_configuration_is_completed_with_defaults() -> None:
    assert check_config("ppo", None) == SPECS["ppo"].defaults
    assert SPECS["ppo"].defaults.items() >= {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2, "importance_weight": "full"}.items()
    assert check_config("cispo", {"clip_high_threshold": 5}) == {**SPECS["cispo"].defaults, "clip_high_threshold": 5.0}
    assert check_config("stable_reinforce", {"kl_coeff": 0}) == {"kl_coeff": 0.0, "ratio_low": 0.5, "ratio_high": 5.0}
    assert check_config("cross_entropy", {}) == {}
    chosen = {"importance_weight": "tis_token", "tis_threshold": 3}
    assert check_config("ppo", chosen) == {**SPECS["ppo"].defaults, "importance_weight": "tis_token", "tis_threshold": 3.0}


@pytest.mark.parametrize(
    ("loss_fn", "config", "words"),
    [
        ("ppo", {"clip_high": 1.2}, ["clip_high:", "clip_high_threshold"]),
        ("cross_entropy", {"beta": 1.0}, ["beta", "none"]),
        ("importance_sampling", {"beta": 1.0}, ["beta", "importance_weight"]),
        ("ppo", {"importance_weight": "tis"}, ["importance_weight", "'tis'", "tis_token", "icepop"]),
        ("ppo", {"importance_weight": 1.0}, ["importance_weight", "1.0", "full, none"]),
        ("ppo", {"tis_threshold": 2.0}, ["tis_threshold", "no effect", "'full'", "tis_token or tis_sequence"]),
        ("ppo", {"importance_weight": "tis_token", "ratio_low": 0.5}, ["ratio_low", "no effect", "'tis_token'", "icepop"]),
        ("ppo", {"importance_weight": "tis_token", "tis_threshold": 0.5}, ["tis_threshold", "0.5", "[1, "]),
        ("ppo", {"kl_coeff": "much"}, ["kl_coeff", "'much'", "number"]),
        ("mirror_descent", {"tau": 0}, ["tau", "0", "[1e-06, "]),
        ("dro", {"kl_coeff": 0.1}, ["kl_coeff", "beta"]),
        ("ppo", {"clip_low_threshold": 0.2, "clip_high_threshold": 0.1}, ["0.2", "0.1", "low <= high"]),
        ("dro", {"beta": -1.0}, ["loss_fn_config.beta", "-1", "[0, "]),
        ("dro", {"beta": math.nan}, ["nan", "finite"]),
        ("dro", {"beta": "0.05"}, ["'0.05'", "number"]),
        ("stable_reinforce", {"ratio_high": 0.5}, ["ratio_high", "0.5", "[1, "]),
    ],
)
def test_a_configuration_that_breaks_a_rule_is_refused_by_name(loss_fn: str, config: dict[str, float | str], words: list[str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_config(loss_fn, config)
    for word in words:
        assert word in caught.value.message
    assert (caught.value.param or "").startswith("loss_fn_config.")


def extra(**inputs: Array) -> Datum:
    return rl(**{"old_logprobs": array([0, -1, -2]), "reference_logprobs": array([0, -1, -2]), **inputs})


REFUSED_TOGETHER: dict[str, tuple[str, dict[str, float | str], list[Datum], list[str]]] = {
    "kl without a reference": ("ppo", {"kl_coeff": 0.1}, [rl(), rl()], ["kl_coeff", "0.1", "data[0]", "'reference_logprobs'"]),
    "a value's weight without targets": ("ppo", {"value_coeff": 1.0}, [rl()], ["value_coeff", "no effect", "'value_targets'"]),
    "old log-probabilities on some": ("ppo", {}, [extra(), without(extra(), "old_logprobs")], ["data[1]", "'old_logprobs'", "data[0] has"]),
    "a mask on some": ("ppo", {}, [rl(), rl(sequence_ratio_mask=array([0, 1, 1]))], ["data[0]", "'sequence_ratio_mask'", "data[1] has"]),
    "truncating cispo's own weight": (
        "cispo",
        {"importance_weight": "tis_token"},
        [rl()],
        ["importance_weight", "'tis_token'", "'old_logprobs'", "clip thresholds"],
    ),
}


@pytest.mark.parametrize("case", REFUSED_TOGETHER)
def test_datums_that_do_not_go_together_are_refused_by_name(case: str) -> None:
    loss_fn, config, data, words = REFUSED_TOGETHER[case]
    with pytest.raises(InvalidRequest) as caught:
        check_request(loss_fn, check_config(loss_fn, config), data)
    for word in words:
        assert word in caught.value.message
    assert caught.value.param


def test_what_goes_together_passes() -> None:
    masked = {"sequence_ratio_mask": array([0, 1, 1])}
    text = rl(advantages=array([0, 0, 0]), sequence_ratio_mask=array([0, 0, 0]), weights=array([0, 1, 1]))
    for loss_fn in ("importance_sampling", "ppo", "gspo", "mirror_descent"):
        for datum in (rl(**masked), text):
            check_datum(loss_fn, 0, datum, VOCAB)
        check_request(loss_fn, check_config(loss_fn, {"entropy_coeff": 0.1}), [rl(**masked), text])
    bounds = [rl(clip_low_threshold=array([0.9, 0.9, 0.9])), rl()]
    check_request("ppo", check_config("ppo", {"importance_weight": "tis_token"}), bounds)
    check_request("gspo", check_config("gspo", {"importance_weight": "tis_token", "kl_coeff": 1}), [extra(**masked)])


def test_unknown_losses_are_refused_with_the_names_there_are() -> None:
    with pytest.raises(InvalidRequest, match=r"did you mean 'cross_entropy'.*stable_reinforce"):
        spec_of("crossentropy")
    with pytest.raises(Unsupported, match="forward_backward_custom"):
        spec_of("custom")
