"""Slow references of the losses: one token at a time, in Python floats, from the formulas."""

from __future__ import annotations

import math

import numpy as np
import torch

from everlearn.losses.spec import SAMPLED_MASK, SAMPLING_LOGPROBS, SPECS
from everlearn.losses.table import LOSSES, loss_and_grad

SEGMENTS = [(0, 4), (4, 5), (5, 12)]
LENGTH = 12
OVERRIDES: dict[str, dict[str, float]] = {
    "gspo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.15},
    "stable_reinforce": {"kl_coeff": 0.3, "ratio_low": 0.7, "ratio_high": 1.4},
    "cispo": {"clip_low_threshold": 0.6, "clip_high_threshold": 1.3},
    "dro": {"beta": 0.7},
    "mirror_descent": {"tau": 0.3},
}
CORRECTED = ["importance_sampling", "ppo", "cispo", "gspo"]
POLICY = [*CORRECTED, "dro", "stable_reinforce", "mirror_descent"]


def config_of(name: str, **changes: float | str) -> dict[str, float | str]:
    return {**SPECS[name].defaults, **OVERRIDES.get(name, {}), **changes}


def example(seed: int = 0, length: int = LENGTH, spread: float = 0.4) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Log-probabilities of the trained policy, and inputs of every policy loss at once; the first token of each third is a prompt's."""
    rng = np.random.default_rng(seed)
    behaviour = -rng.exponential(1.0, length)
    logprobs = behaviour + spread * rng.standard_normal(length)
    sampled = (np.arange(length) % 3 > 0).astype(np.float64)
    sampled[[0, 4, 5]] = [0, 1, 0]
    inputs = {
        "logprobs": behaviour,
        SAMPLING_LOGPROBS: behaviour * sampled,
        "advantages": rng.standard_normal(length) * sampled,
        SAMPLED_MASK: sampled,
        "sequence_ratio_mask": sampled,
    }
    return logprobs, inputs


def torch_inputs(inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in inputs.items()}


def run(name: str, logprobs: np.ndarray, inputs: dict[str, np.ndarray], config: dict[str, float | str], segments=SEGMENTS):
    loss_D, grad = loss_and_grad(LOSSES[name], torch.tensor(logprobs), torch_inputs(inputs), config, segments)
    return loss_D.numpy(), grad.numpy()


def bounded(x: float, low: float, high: float) -> float:
    return low if x < low else high if x > high else x


def reference_token(name: str, t: int, logp: np.ndarray, inputs: dict[str, np.ndarray], config: dict[str, float | str], segment) -> float:
    p, q, a = float(logp[t]), float(inputs["logprobs"][t]), float(inputs["advantages"][t])
    r = math.exp(p) / math.exp(q)
    if name == "importance_sampling":
        return -r * a
    if name == "ppo":
        return -min(r * a, bounded(r, config["clip_low_threshold"], config["clip_high_threshold"]) * a)
    if name == "cispo":
        return -bounded(r, config["clip_low_threshold"], config["clip_high_threshold"]) * p * a
    if name == "dro":
        return -(p * a - config["beta"] / 2 * (p - q) ** 2)
    if name == "gspo":
        marked = [i for i in range(*segment) if inputs["sequence_ratio_mask"][i]]
        s = math.prod(math.exp(logp[i]) / math.exp(inputs["logprobs"][i]) for i in marked) ** (1 / len(marked))
        return -min(s * a, bounded(s, config["clip_low_threshold"], config["clip_high_threshold"]) * a)
    if name == "mirror_descent":
        marked = [i for i in range(*segment) if inputs["sequence_ratio_mask"][i]]
        advantage = sum(float(inputs["advantages"][i]) for i in marked) / len(marked)
        log_ratio = math.log(math.prod(math.exp(logp[i]) / math.exp(inputs["logprobs"][i]) for i in marked))
        return (advantage - config["tau"] * log_ratio) ** 2 / len(marked) if t in marked else 0.0
    assert name == "stable_reinforce"
    if not inputs[SAMPLED_MASK][t]:
        return 0.0
    policy = -r * a if config["ratio_low"] <= r <= config["ratio_high"] else 0.0
    return policy + config["kl_coeff"] / 2 * (p - q) ** 2


def frozen_loss(name: str, inputs: dict[str, np.ndarray], config: dict[str, float | str], anchor: np.ndarray):
    """The scalar function whose ordinary gradient the loss must have: stopped gradients are evaluated at `anchor`."""

    def value(logp: np.ndarray) -> float:
        total = 0.0
        for segment in SEGMENTS:
            for t in range(*segment):
                a = float(inputs["advantages"][t])
                if name == "cispo":
                    r = bounded(math.exp(anchor[t] - inputs["logprobs"][t]), config["clip_low_threshold"], config["clip_high_threshold"])
                    total -= r * a * logp[t]
                elif name == "gspo":
                    marked = [i for i in range(*segment) if inputs["sequence_ratio_mask"][i]]
                    s = math.exp(sum(anchor[i] - inputs["logprobs"][i] for i in marked) / len(marked)) * math.exp(logp[t] - anchor[t])
                    total -= min(s * a, bounded(s, config["clip_low_threshold"], config["clip_high_threshold"]) * a)
                else:
                    total += reference_token(name, t, logp, inputs, config, segment)
        return total

    return value
