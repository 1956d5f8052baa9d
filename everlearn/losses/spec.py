"""The losses as a table: names, inputs, configuration keys and their rules. No torch: the door reads it too (losses/checks.py).

Beside their own keys, the losses with a ratio share two groups: how the drift from the sampling policy weighs on a token
(losses/correction.py), and terms that are added to the loss (losses/terms.py). With its defaults neither does anything.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from everlearn.errors import InvalidRequest, Unsupported

# The complete configuration of a loss: numbers, and the names of what was chosen.
Config = Mapping[str, Any]

# What the server adds to a datum of a loss that trains on recorded sequences (losses/provenance.py).
SAMPLING_LOGPROBS = "sampling_logprobs"
SAMPLED_MASK = "sampled_mask"
# What the engine adds where a token's route through experts isn't known (engine/routes.py): not 0 on tokens without a part in the loss.
SILENCED = "silenced"
VALUE_TARGETS = "value_targets"

NEVER = 1e9  # above every ratio, since log-ratios are capped at 20


@dataclass(frozen=True)
class Input:
    """One entry of a datum's loss_fn_inputs. `kind` is int or float; whole numbers are welcome where floats are expected. `fill` stands
    for an optional input on datums that lack it; where it is None, all datums of a request bring it or none does (but for an input that
    replaces a configuration key of its name)."""

    kind: str
    about: str
    required: bool = True
    fill: float | None = None


@dataclass(frozen=True)
class ConfigKey:
    """One number in loss_fn_config, within [low, high]. `ways`: the choices of importance_weight that read it (empty: nothing to do with
    it). `sequence`: any value but the default looks at a datum's tokens together."""

    default: float
    low: float
    high: float
    about: str
    ways: tuple[str, ...] = ()
    sequence: bool = False


@dataclass(frozen=True)
class Choice:
    """One name in loss_fn_config, out of `options`; those in `sequence` look at a datum's tokens together."""

    default: str
    options: tuple[str, ...]
    about: str
    sequence: tuple[str, ...] = ()


@dataclass(frozen=True)
class LossSpec:
    """`per_token`: the loss of token t depends on logprob t alone, so a gradient may be taken over any chunk of tokens, unless the
    configuration looks at sequences (`per_token_with`). `own_weight`: the surrogate bounds its ratio in a way of its own, in whose place
    no truncated one can be put. `wide`: targets may be [T, K]. `spans`: every datum must say which recorded sequence each token came from.
    `behaviour`: the input that holds the sampling policy's log-probabilities ("" where there is none)."""

    name: str
    about: str
    inputs: Mapping[str, Input]
    config: Mapping[str, ConfigKey | Choice] = field(default_factory=dict)
    per_token: bool = True
    own_weight: bool = False
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
    def defaults(self) -> dict[str, Any]:
        return {name: key.default for name, key in self.config.items()}

    @property
    def corrects(self) -> bool:
        """Whether losses/correction.py weighs its tokens."""
        return "importance_weight" in self.config

    @property
    def adds_terms(self) -> bool:
        """Whether losses/terms.py may add to it."""
        return "entropy_coeff" in self.config

    def per_token_with(self, config: Config) -> bool:
        return self.per_token and not any(self._looks_at_sequences(name, value) for name, value in config.items())

    def _looks_at_sequences(self, name: str, value: Any) -> bool:
        key = self.config[name]
        return value in key.sequence if isinstance(key, Choice) else key.sequence and value != key.default


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

_RATIO_MASK = Input("float", "non-zero on the tokens whose log-ratios make the sequence's")
_SEQUENCE_MASK = Input("float", "non-zero on the tokens that form the sequence; without it, those with an advantage", required=False)
_CORRECTION_INPUTS = {
    "old_logprobs": Input("float", "log-probability of each target under the policy that the step started from", required=False),
}
_TERM_INPUTS = {
    "reference_logprobs": Input("float", "log-probability of each target under the policy that the KL term pulls to", required=False),
    "weights": Input("float", "weight of each target in a cross-entropy that is added to the loss", required=False, fill=0.0),
    VALUE_TARGETS: Input("float", "what the value head is to say at each token", required=False),
}
_EXTRA_INPUTS = {"sequence_ratio_mask": _SEQUENCE_MASK, **_CORRECTION_INPUTS, **_TERM_INPUTS}

_TIS = ("tis_token", "tis_sequence")
_CORRECTION_KEYS: dict[str, ConfigKey | Choice] = {
    "importance_weight": Choice(
        "full", ("full", "none", *_TIS, "icepop"), "how the drift from the sampling policy weighs on a token", sequence=("tis_sequence",)
    ),
    "tis_threshold": ConfigKey(2.0, 1.0, NEVER, "weights above it are cut down to it", ways=_TIS),
    "ratio_low": ConfigKey(0.5, 0.0, 1.0, "tokens whose drift is below it get no policy gradient", ways=("icepop",)),
    "ratio_high": ConfigKey(5.0, 1.0, NEVER, "tokens whose drift is above it get no policy gradient", ways=("icepop",)),
    "geometric_ratio_low": ConfigKey(0.0, 0.0, 1.0, "sequences whose geometric mean drift is below it are left out", sequence=True),
    "geometric_ratio_high": ConfigKey(NEVER, 1.0, NEVER, "sequences whose geometric mean drift is above it are left out", sequence=True),
    "product_ratio_low": ConfigKey(0.0, 0.0, 1.0, "sequences whose product of drifts is below it are left out", sequence=True),
    "product_ratio_high": ConfigKey(NEVER, 1.0, NEVER, "sequences whose product of drifts is above it are left out", sequence=True),
    "negative_drift_max": ConfigKey(
        NEVER, 0.0, NEVER, "where a sequence's mean log(sampling / trained) is above it, negative advantages are left out", sequence=True
    ),
}
_TERM_KEYS: dict[str, ConfigKey | Choice] = {
    "kl_coeff": ConfigKey(0.0, 0.0, 1e6, "weight of the KL to the reference policy"),
    "entropy_coeff": ConfigKey(0.0, 0.0, 1e6, "weight of the entropy, estimated from the sampled tokens"),
    "value_coeff": ConfigKey(0.5, 0.0, 1e6, "weight of the value head's loss"),
    "value_trunk": ConfigKey(1.0, 0.0, 1.0, "share of the value head's gradient that reaches the adapter"),
}
# Whatever depends on log-probabilities then does so at this temperature: also the terms, and what the request answers with.
_TEMPERATURE: dict[str, ConfigKey | Choice] = {
    "temperature": ConfigKey(1.0, 1e-3, 1e3, "log-probabilities are those of softmax(logits / temperature)"),
}
_EXTRA_KEYS = {**_CORRECTION_KEYS, **_TERM_KEYS, **_TEMPERATURE}


def _clip_keys(low: float, high: float) -> dict[str, ConfigKey | Choice]:
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
    LossSpec(
        "importance_sampling",
        "REINFORCE with the importance ratio",
        {**_POLICY_INPUTS, **_EXTRA_INPUTS},
        _EXTRA_KEYS,
        behaviour="logprobs",
    ),
    LossSpec(
        "ppo",
        "clipped surrogate",
        {**_POLICY_INPUTS, **_TOKEN_BOUNDS, **_EXTRA_INPUTS},
        {**_clip_keys(0.8, 1.2), **_EXTRA_KEYS},
        behaviour="logprobs",
    ),
    LossSpec(
        "cispo",
        "REINFORCE weighted by the clipped ratio",
        {**_POLICY_INPUTS, **_TOKEN_BOUNDS, **_EXTRA_INPUTS},
        {**_clip_keys(0.0, 4.0), **_EXTRA_KEYS},
        own_weight=True,
        behaviour="logprobs",
    ),
    LossSpec(
        "dro",
        "policy gradient with a quadratic penalty",
        _POLICY_INPUTS,
        {"beta": ConfigKey(0.05, 0.0, 1e6, "weight of the quadratic penalty"), **_TEMPERATURE},
        behaviour="logprobs",
    ),
    LossSpec(
        "gspo",
        "clipped surrogate with one ratio per sequence",
        {**_POLICY_INPUTS, **_EXTRA_INPUTS, "sequence_ratio_mask": _RATIO_MASK},
        {**_clip_keys(0.9997, 1.0004), **_EXTRA_KEYS},
        per_token=False,
        own_weight=True,
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
    LossSpec(
        "mirror_descent",
        "squared distance of the sequence's log-ratio from its advantage",
        {**_POLICY_INPUTS, "sequence_ratio_mask": _RATIO_MASK, **_TERM_INPUTS},
        {"tau": ConfigKey(0.5, 1e-6, 1e6, "strength of the pull to the policy that sampled"), **_TERM_KEYS, **_TEMPERATURE},
        per_token=False,
        behaviour="logprobs",
    ),
]
SPECS: dict[str, LossSpec] = {spec.name: spec for spec in _ALL}


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
