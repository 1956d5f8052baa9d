"""What every step of a run is measured by. Pure: trajectories, datums and outputs in, numbers by name out.

Symbols: mu is the policy that sampled, whose log-probabilities were recorded; pi is the policy at the moment of training, whose
log-probabilities came back. On tokens that mu drew, with l = log pi - log mu:

- KL(mu || pi) is the mean of -l (k1) and of exp(l) - 1 - l (k3, never negative): Schulman, Approximating KL divergence (2020)
- the effective sample size is (sum of ratios)^2 / sum of their squares, here as a share of the tokens (Kish 1965)
- the entropy of mu is estimated by the mean of -log mu, which is unbiased at temperature 1
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from everlearn.rl.advantages import is_collapsed
from everlearn.rl.datums import sampled_of
from everlearn.rl.rollouts import count
from everlearn.rl.trajectory import TrajectoryGroup

CAP = 20.0  # of a log-ratio, as the losses have it


def of_rollouts(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """Rewards by part, lengths, failures, collapsed groups."""
    found: dict[str, float] = {name: float(value) for name, value in count(groups).items()}
    scored = [(group, index) for group in groups for index in group.scored]
    if scored:
        rewards = [group.reward(index) for group, index in scored]
        found["reward/total"] = float(np.mean([reward.total for reward in rewards]))
        found |= {f"reward/{name}": value for name, value in _means([reward.values for reward in rewards], absent=0.0).items()}
        found |= _means([_metrics(group, index) for group, index in scored])
        lengths = [group.trajectories_G[index].num_tokens for group, index in scored]
        found |= {"tokens/sampled": float(sum(lengths)), "tokens/mean": float(np.mean(lengths)), "tokens/max": float(max(lengths))}
        found["turns/mean"] = float(np.mean([len(group.trajectories_G[index].transitions) for group, index in scored]))
        found["truncated"] = float(np.mean([group.trajectories_G[index].truncated for group, index in scored]))
        logprobs = [x for group, index in scored for turn in group.trajectories_G[index].transitions for x in turn.action.logprobs]
        found["entropy"] = -float(np.mean(logprobs))
        found["seconds/episode_max"] = max(group.trajectories_G[index].seconds for group, index in scored)
    compared = [[group.reward(index).total for index in group.scored] for group in groups]
    found["groups/collapsed"] = float(np.mean([is_collapsed(rewards) for rewards in compared])) if compared else 0.0
    return found


def of_batch(data_G: Sequence[Sequence[Any]]) -> dict[str, float]:
    """How many groups are trained on: those of which there is a datum."""
    return {"groups/trained": float(sum(map(bool, data_G)))}


def of_training(data: Sequence[Any], outputs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How far the policy had moved from the one that sampled. `data` are datums with `sequence_mask`, `outputs` the `loss_fn_outputs` of
    the same, in order."""
    mu, pi = [], []
    for datum, output in zip(data, outputs, strict=True):
        sampled = sampled_of(datum)
        mu.append(datum.loss_fn_inputs["logprobs"].to_numpy()[sampled])
        pi.append(np.asarray(output["logprobs"].to_numpy())[sampled])
    gap = np.concatenate(pi).astype(np.float64) - np.concatenate(mu).astype(np.float64) if mu else np.zeros(0)
    if not gap.size:
        return {"tokens/trained": 0.0}
    ratios = np.exp(np.clip(gap, -CAP, CAP))
    return {
        "tokens/trained": float(gap.size),
        "kl/k1": float(-gap.mean()),
        "kl/k3": float((ratios - 1.0 - np.clip(gap, -CAP, CAP)).mean()),
        "ratio/max": float(ratios.max()),
        "ratio/min": float(ratios.min()),
        "ess": float(ratios.sum() ** 2 / (gap.size * (ratios**2).sum())),
    }


def of_staleness(ages: Sequence[tuple[int, int]]) -> dict[str, float]:
    """`ages`: for each group that is trained on, how many versions ago its own was the newest, and how many tokens it sampled.

    `staleness/K` is how many tokens are K versions old; mean and max are over tokens.
    """
    tokens: Counter[int] = Counter()
    for age, number in ages:
        tokens[age] += number
    total = sum(tokens.values())
    if not total:
        return {}
    mean = sum(age * number for age, number in tokens.items()) / total
    histogram = {f"staleness/{age}": float(tokens[age]) for age in sorted(tokens)}
    return {"staleness/mean": mean, "staleness/max": float(max(tokens)), **histogram}


def merged(rows: Sequence[Mapping[str, float]], tokens: str = "trained_tokens:sum") -> dict[str, float]:
    """The server's metrics of requests whose gradients made one step: `:sum` adds up, `:max` and `:min` are what they say, `:mean` is
    weighted by the tokens of each request. Others add up."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values, weights = [row[name] for row in rows if name in row], [row.get(tokens, 1.0) for row in rows if name in row]
        how = name.rpartition(":")[2]
        if how == "mean":
            found[name] = float(np.average(values, weights=weights if sum(weights) else None))
        else:
            found[name] = float(np.max(values) if how == "max" else np.min(values) if how == "min" else np.sum(values))
    return found


def _metrics(group: TrajectoryGroup, index: int) -> dict[str, float]:
    """A member's metrics: means over its turns, and the group's own."""
    turns = _means([turn.metrics for turn in group.trajectories_G[index].transitions])
    return {f"env/{name}": value for name, value in {**turns, **(group.metrics_G[index] if group.metrics_G else {})}.items()}


def _means(rows: Sequence[Mapping[str, float]], absent: float | None = None) -> dict[str, float]:
    """The mean for each name over the rows that have it, or over all with `absent` for the others."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row.get(name, absent) for row in rows] for name in names}
    return {name: float(np.mean([value for value in own if value is not None])) for name, own in values.items()}
