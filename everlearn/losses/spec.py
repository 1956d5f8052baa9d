"""The losses as a table: names, inputs, configuration keys and their rules. No torch, so the door can refuse what the engine can't use.

`check_config` and `check_datum` raise an error that names the datum, the field, the value, the rule and the way out. What passes
here needs no further checks in the engine, apart from NaN in what the model itself computes.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from everlearn.errors import InvalidRequest, Unsupported
from everlearn.types import Array, Datum

# What the server adds to a datum of a loss that trains on recorded sequences (losses/provenance.py).
SAMPLING_LOGPROBS = "sampling_logprobs"
SAMPLED_MASK = "sampled_mask"


@dataclass(frozen=True)
class Input:
    """One entry of a datum's loss_fn_inputs. `kind` is int or float; whole numbers are welcome where floats are expected."""

    kind: str
    about: str
    required: bool = True


@dataclass(frozen=True)
class ConfigKey:
    """One number in loss_fn_config, within [low, high]."""

    default: float
    low: float
    high: float
    about: str


@dataclass(frozen=True)
class LossSpec:
    """`per_token`: the loss of token t depends on logprob t alone, so a gradient may be taken over any chunk of tokens.
    `wide`: targets may be [T, K]. `spans`: every datum must say which recorded sequence each token came from.
    `behaviour`: the input that holds the sampling policy's log-probabilities ("" where there is none)."""

    name: str
    about: str
    inputs: Mapping[str, Input]
    config: Mapping[str, ConfigKey] = field(default_factory=dict)
    per_token: bool = True
    wide: bool = False
    spans: bool = False
    behaviour: str = ""

    @property
    def required(self) -> list[str]:
        return [name for name, entry in self.inputs.items() if entry.required]

    @property
    def optional(self) -> list[str]:
        return [name for name, entry in self.inputs.items() if not entry.required]

    @property
    def defaults(self) -> dict[str, float]:
        return {name: key.default for name, key in self.config.items()}


_TARGETS = Input("int", "the token that each position predicts")
_POLICY_INPUTS = {
    "target_tokens": _TARGETS,
    "logprobs": Input("float", "log-probability of each target under the policy that sampled it"),
    "advantages": Input("float", "advantage of each target; 0 where nothing is to be learned"),
}
_TOKEN_BOUNDS = {
    "clip_low_threshold": Input("float", "lower bound of the ratio, per token, in place of the configured one", required=False),
    "clip_high_threshold": Input("float", "upper bound of the ratio, per token, in place of the configured one", required=False),
}


def _clip_keys(low: float, high: float) -> dict[str, ConfigKey]:
    return {
        "clip_low_threshold": ConfigKey(low, 0.0, 1e6, "lower bound of the ratio itself (0.8, not 0.2)"),
        "clip_high_threshold": ConfigKey(high, 0.0, 1e6, "upper bound of the ratio itself (1.2, not 0.2)"),
    }


_ALL = [
    LossSpec(
        "cross_entropy",
        "weighted negative log-likelihood",
        {"target_tokens": _TARGETS, "weights": Input("float", "weight of each target, shaped like target_tokens; may be negative")},
        wide=True,
    ),
    LossSpec("importance_sampling", "REINFORCE with the importance ratio", _POLICY_INPUTS, behaviour="logprobs"),
    LossSpec("ppo", "clipped surrogate", {**_POLICY_INPUTS, **_TOKEN_BOUNDS}, _clip_keys(0.8, 1.2), behaviour="logprobs"),
    LossSpec(
        "cispo", "REINFORCE weighted by the clipped ratio", {**_POLICY_INPUTS, **_TOKEN_BOUNDS}, _clip_keys(0.0, 4.0), behaviour="logprobs"
    ),
    LossSpec(
        "dro",
        "policy gradient with a quadratic penalty",
        _POLICY_INPUTS,
        {"beta": ConfigKey(0.05, 0.0, 1e6, "weight of the quadratic penalty")},
        behaviour="logprobs",
    ),
    LossSpec(
        "gspo",
        "clipped surrogate with one ratio per sequence",
        {**_POLICY_INPUTS, "sequence_ratio_mask": Input("float", "non-zero on the tokens whose mean log-ratio is the sequence's")},
        _clip_keys(0.9997, 1.0004),
        per_token=False,
        behaviour="logprobs",
    ),
    LossSpec(
        "stable_reinforce",
        "REINFORCE against recorded sampling log-probabilities, with a ratio band and a KL term",
        {
            "target_tokens": _TARGETS,
            "advantages": Input("float", "advantage of each target; must be 0 on tokens that were not sampled"),
            "logprobs": Input("float", "accepted and not used: the recorded log-probabilities count", required=False),
        },
        {
            "kl_coeff": ConfigKey(0.001, 0.0, 1e6, "weight of the squared log-ratio to the sampling policy"),
            "ratio_low": ConfigKey(0.5, 0.0, 1.0, "tokens whose ratio is below this get no policy gradient"),
            "ratio_high": ConfigKey(5.0, 1.0, 1e6, "tokens whose ratio is above this get no policy gradient"),
        },
        spans=True,
        behaviour=SAMPLING_LOGPROBS,
    ),
]
SPECS: dict[str, LossSpec] = {spec.name: spec for spec in _ALL}

# Pairs of keys of which the first must not exceed the second.
_ORDERED = [("clip_low_threshold", "clip_high_threshold")]


def spec_of(loss_fn: str) -> LossSpec:
    """The loss by its name, or an error that lists the names there are."""
    if loss_fn in SPECS:
        return SPECS[loss_fn]
    known = ", ".join(SPECS)
    if loss_fn == "custom":
        raise Unsupported(
            "loss_fn 'custom' asks the server to run a traced loss, which this server doesn't do; "
            f"use forward_backward_custom with a Python function (the client runs it), or one of {known}",
            param="loss_fn",
        )
    near = difflib.get_close_matches(loss_fn, SPECS, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise InvalidRequest(f"loss_fn {loss_fn!r} is not a loss of this server{hint}; it has {known}", param="loss_fn")


def check_config(loss_fn: str, config: Mapping[str, float | str] | None) -> dict[str, float]:
    """The complete configuration: the client's numbers where given, defaults elsewhere."""
    spec = spec_of(loss_fn)
    checked = spec.defaults
    for name, value in (config or {}).items():
        param = f"loss_fn_config.{name}"
        if name not in spec.config:
            allowed = ", ".join(spec.config) or "none"
            raise InvalidRequest(f"{param}: {loss_fn} has no such key; leave it out (keys of {loss_fn}: {allowed})", param=param)
        key = spec.config[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InvalidRequest(f"{param} is {value!r}; it must be a finite number ({key.about})", param=param)
        if not key.low <= value <= key.high:
            raise InvalidRequest(f"{param} is {value:g}; it must lie in [{key.low:g}, {key.high:g}] ({key.about})", param=param)
        checked[name] = float(value)
    for low, high in _ORDERED:
        if low in checked and checked[low] > checked[high]:
            raise InvalidRequest(
                f"loss_fn_config.{low} is {checked[low]:g}, above {high} ({checked[high]:g}); set both so that low <= high "
                "(they bound the ratio itself, so 0.8 and 1.2, not 0.2 and 0.2)",
                param=f"loss_fn_config.{low}",
            )
    return checked


def check_datum(loss_fn: str, index: int, datum: Datum, vocab_size: int | None = None) -> None:
    """Refuses a datum that the loss can't be computed for. `index` is its place in the request's data, for the message.

    For a loss with spans this comes before the spans are resolved; see losses/provenance.py for their rules.
    """
    spec = spec_of(loss_fn)
    at = f"data[{index}]"
    if len(datum.tokens.shape) != 1 or datum.tokens.shape[0] == 0:
        raise InvalidRequest(
            f"{at}.model_input has shape {datum.tokens.shape}; it needs at least one token in one dimension", param=f"{at}.model_input"
        )
    _check_tokens(f"{at}.model_input", datum.tokens, vocab_size)
    _check_names(spec, at, datum)
    for name, array in datum.inputs.items():
        entry = spec.inputs[name]
        param = f"{at}.loss_fn_inputs.{name}"
        _check_bytes(param, array)
        _check_shape(spec, param, name, datum)
        if entry.kind == "int":
            _check_tokens(param, array, vocab_size)
        else:
            _check_finite(param, array)
    _check_relations(at, datum)
    _check_spans(spec, at, datum)


def _check_names(spec: LossSpec, at: str, datum: Datum) -> None:
    for name in spec.required:
        if name not in datum.inputs:
            given = ", ".join(datum.inputs) or "none"
            raise InvalidRequest(
                f"{at}.loss_fn_inputs lacks {name!r} ({spec.inputs[name].about}); "
                f"{spec.name} needs {', '.join(spec.required)}, and the datum has {given}",
                param=f"{at}.loss_fn_inputs.{name}",
            )
    for name in datum.inputs:
        if name not in spec.inputs:
            raise InvalidRequest(
                f"{at}.loss_fn_inputs.{name}: {spec.name} has no such input; remove it before sending "
                f"(inputs of {spec.name}: {', '.join(spec.inputs)})",
                param=f"{at}.loss_fn_inputs.{name}",
            )


def _check_bytes(param: str, array: Array) -> None:
    if array.dtype not in ("float32", "int64", "int32"):
        raise InvalidRequest(f"{param} has dtype {array.dtype!r}; send float32 or int64", param=param)
    if any(size < 0 for size in array.shape) or math.prod(array.shape) * np.dtype(array.dtype).itemsize != len(array.data):
        raise InvalidRequest(
            f"{param} has shape {array.shape} of {array.dtype} but {len(array.data)} bytes; shape and data must agree", param=param
        )


def _check_shape(spec: LossSpec, param: str, name: str, datum: Datum) -> None:
    length, shape = datum.tokens.shape[0], datum.inputs[name].shape
    wanted = [length]
    if name == "weights":
        wanted = datum.inputs["target_tokens"].shape
    elif name == "target_tokens" and spec.wide and len(shape) == 2 and shape[1] > 0:
        wanted = [length, shape[1]]
    if shape == wanted:
        return
    also = f" or [{length}, K]" if spec.wide and name == "target_tokens" else ""
    reason = "weights is shaped like target_tokens" if name == "weights" else f"model_input has {length} tokens, and each needs one entry"
    raise InvalidRequest(
        f"{param} has shape {shape}; it must be {wanted}{also}: {reason} (the client shifts, so that position i predicts token i + 1)",
        param=param,
    )


def _check_tokens(param: str, array: Array, vocab_size: int | None) -> None:
    if array.dtype not in ("int64", "int32"):
        raise InvalidRequest(f"{param} has dtype {array.dtype!r}; token ids must be integers (int64)", param=param)
    _check_bytes(param, array)
    values = array.numpy()
    high = np.inf if vocab_size is None else vocab_size
    bad = np.argwhere((values < 0) | (values >= high))
    if len(bad):
        place = tuple(int(i) for i in bad[0])
        rule = "not negative" if vocab_size is None else f"in [0, {vocab_size}), the model's vocabulary"
        raise InvalidRequest(
            f"{param}[{', '.join(map(str, place))}] is {values[place]}; token ids must be {rule}: was it made with this model's tokenizer?",
            param=param,
        )


def _check_finite(param: str, array: Array) -> None:
    values = array.numpy()
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        place = tuple(int(i) for i in bad[0])
        raise InvalidRequest(
            f"{param}[{', '.join(map(str, place))}] is {values[place]}; every entry must be finite "
            "(use 0 for positions that don't count, such as those of the prompt)",
            param=param,
        )


def _check_relations(at: str, datum: Datum) -> None:
    mask = datum.inputs.get("sequence_ratio_mask")
    if mask is not None and not mask.numpy().any():
        param = f"{at}.loss_fn_inputs.sequence_ratio_mask"
        raise InvalidRequest(
            f"{param} is 0 everywhere, so the sequence has no ratio; put 1 on its sampled tokens, or leave the datum out", param=param
        )
    low, high = (datum.inputs.get(name) for name in _ORDERED[0])
    if low is not None and high is not None and (low.numpy() > high.numpy()).any():
        place = int(np.argmax(low.numpy() > high.numpy()))
        param = f"{at}.loss_fn_inputs.clip_low_threshold"
        raise InvalidRequest(
            f"{param}[{place}] is {low.numpy()[place]:g}, above clip_high_threshold ({high.numpy()[place]:g}); low must not exceed high",
            param=param,
        )


def _check_spans(spec: LossSpec, at: str, datum: Datum) -> None:
    if spec.spans and (datum.model_input_spans is None or datum.loss_input_spans is None):
        param = f"{at}.loss_fn_input_spans"
        raise InvalidRequest(
            f"{param}: {spec.name} needs provenance on every datum, and this one has none; sample with record_stability_info=True "
            "and attach the sequence ids with Datum.with_provenance, or choose another loss_fn",
            param=param,
        )
