"""The door of the losses: a request is refused here, by name, if its loss can't be computed. No torch.

Each error names the datum or the key, the value, the rule and the way out. What passes here needs no further checks in the engine,
apart from NaN in what the model itself computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from everlearn.errors import InvalidRequest
from everlearn.losses.spec import VALUE_TARGETS, Choice, ConfigKey, LossSpec, spec_of
from everlearn.types import Array, Datum

# Pairs of keys of which the first must not exceed the second.
_ORDERED = [("clip_low_threshold", "clip_high_threshold")]


def check_config(loss_fn: str, config: Mapping[str, float | str] | None) -> dict[str, float | str]:
    """The complete configuration: the client's numbers and choices where given, defaults elsewhere."""
    spec = spec_of(loss_fn)
    checked = spec.defaults
    for name, value in (config or {}).items():
        param = f"loss_fn_config.{name}"
        if name not in spec.config:
            allowed = ", ".join(spec.config) or "none"
            raise InvalidRequest(f"{param}: {loss_fn} has no such key; leave it out (keys of {loss_fn}: {allowed})", param=param)
        key = spec.config[name]
        checked[name] = _chosen(param, key, value) if isinstance(key, Choice) else _number(param, key, value)
    _check_used(spec, config or {}, checked)
    for low, high in _ORDERED:
        if low in checked and checked[low] > checked[high]:
            raise InvalidRequest(
                f"loss_fn_config.{low} is {checked[low]:g}, above {high} ({checked[high]:g}); set both so that low <= high "
                "(they bound the ratio itself, so 0.8 and 1.2, not 0.2 and 0.2)",
                param=f"loss_fn_config.{low}",
            )
    return checked


def _number(param: str, key: ConfigKey, value: float | str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequest(f"{param} is {value!r}; it must be a finite number ({key.about})", param=param)
    if not key.low <= value <= key.high:
        raise InvalidRequest(f"{param} is {value:g}; it must lie in [{key.low:g}, {key.high:g}] ({key.about})", param=param)
    return float(value)


def _chosen(param: str, key: Choice, value: float | str) -> str:
    if not isinstance(value, str) or value not in key.options:
        raise InvalidRequest(f"{param} is {value!r}; it must be one of {', '.join(key.options)} ({key.about})", param=param)
    return value


def _check_used(spec: LossSpec, given: Mapping[str, float | str], checked: Mapping[str, float | str]) -> None:
    """A number that the chosen weight doesn't read would be a wish without effect."""
    for name in given:
        key = spec.config[name]
        if isinstance(key, ConfigKey) and key.ways and checked["importance_weight"] not in key.ways:
            param = f"loss_fn_config.{name}"
            raise InvalidRequest(
                f"{param} has no effect with importance_weight {checked['importance_weight']!r}; leave it out, or set importance_weight to "
                f"{' or '.join(key.ways)} ({key.about})",
                param=param,
            )


def check_request(loss_fn: str, config: Mapping[str, float | str], data: Sequence[Datum]) -> None:
    """What concerns the datums together, or a datum and the configuration. `config` is the complete one; each datum has passed
    `check_datum`."""
    spec = spec_of(loss_fn)
    for name, entry in spec.inputs.items():
        have = [name in datum.inputs for datum in data]
        if entry.required or entry.fill is not None or name in spec.config or spec.spans or all(have) or not any(have):
            continue
        lacking, having = have.index(False), have.index(True)
        raise InvalidRequest(
            f"data[{lacking}].loss_fn_inputs lacks {name!r}, which data[{having}] has; send it on all datums of a request or on none "
            f"({entry.about})",
            param=f"data[{lacking}].loss_fn_inputs.{name}",
        )
    if spec.adds_terms and config["kl_coeff"] and "reference_logprobs" not in data[0].inputs:
        raise InvalidRequest(
            f"loss_fn_config.kl_coeff is {config['kl_coeff']:g}, but data[0].loss_fn_inputs lacks 'reference_logprobs' "
            f"({spec.inputs['reference_logprobs'].about}); send it on every datum, or leave kl_coeff out",
            param="data[0].loss_fn_inputs.reference_logprobs",
        )
    for name in ("value_coeff", "value_trunk") if spec.adds_terms else ():
        if config[name] != spec.config[name].default and VALUE_TARGETS not in data[0].inputs:
            raise InvalidRequest(
                f"loss_fn_config.{name} has no effect: data[0].loss_fn_inputs lacks {VALUE_TARGETS!r} "
                f"({spec.inputs[VALUE_TARGETS].about}); send it on every datum, or leave {name} out",
                param=f"loss_fn_config.{name}",
            )
    texts = [index for index, datum in enumerate(data) if "weights" in datum.inputs]
    if texts and config.get("temperature", 1.0) != 1.0:
        at = f"data[{texts[0]}].loss_fn_inputs.weights"
        raise InvalidRequest(
            f"{at}: text is imitated at temperature 1, and loss_fn_config.temperature is {config['temperature']:g}; send the text in a "
            "request of its own with cross_entropy, whose gradient is added, or leave temperature out",
            param=at,
        )
    weight = config.get("importance_weight")
    if spec.own_weight and weight in ("tis_token", "tis_sequence") and "old_logprobs" not in data[0].inputs:
        raise InvalidRequest(
            f"loss_fn_config.importance_weight is {weight!r}, but data[0].loss_fn_inputs lacks 'old_logprobs': without them the one ratio "
            f"of {loss_fn} is that to the sampling policy, and its clip thresholds bound it already; send old_logprobs on every datum, or "
            "leave importance_weight out",
            param="loss_fn_config.importance_weight",
        )


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
    mask, weights = datum.inputs.get("sequence_ratio_mask"), datum.inputs.get("weights")
    if mask is not None and not mask.numpy().any() and (weights is None or not weights.numpy().any() or _has_advantage(datum)):
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


def _has_advantage(datum: Datum) -> bool:
    return bool(datum.inputs["advantages"].numpy().any())


def _check_spans(spec: LossSpec, at: str, datum: Datum) -> None:
    if spec.spans and (datum.model_input_spans is None or datum.loss_input_spans is None):
        param = f"{at}.loss_fn_input_spans"
        raise InvalidRequest(
            f"{param}: {spec.name} needs provenance on every datum, and this one has none; sample with record_stability_info=True "
            "and attach the sequence ids with Datum.with_provenance, or choose another loss_fn",
            param=param,
        )
