"""From rewards to advantages: pure functions of numbers, and the one that applies them to a group.

Axes: G members of a group (those that have a score), T turns of an episode. Everything is float64. Sources:

- GRPO: Shao et al., DeepSeekMath (arXiv 2402.03300), section 4.1; without the division: Liu et al., Dr. GRPO (arXiv 2503.20783)
- leave-one-out: Kool et al. (2019); Ahmadian et al. (arXiv 2402.14740)
- MaxRL: Tajwar et al., Maximum Likelihood Reinforcement Learning (arXiv 2602.02710)
- GAE: Schulman et al. (arXiv 1506.02438), equations 11 to 16
- overlong penalty and filter: Yu et al., DAPO (arXiv 2503.14476), section 3.4
- length reward: Kimi k1.5 (arXiv 2501.12599), section 2.3.3
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from everlearn.errors import InvalidRequest
from everlearn.rl.trajectory import TrajectoryGroup

EPSILON = 1e-6  # beside a standard deviation, as the usual implementations have it
Floats = Sequence[float] | np.ndarray


# ---- one number for each member ----


def group_mean(rewards_G: Floats) -> np.ndarray:
    """A[i] = R[i] - mean(R): GRPO without the standard deviation, whose gradient isn't biased towards easy and hard tasks."""
    rewards = _finite(rewards_G, "rewards")
    return np.zeros_like(rewards) if is_collapsed(rewards) else rewards - rewards.mean()


def group_mean_std(rewards_G: Floats) -> np.ndarray:
    """A[i] = (R[i] - mean(R)) / (std(R) + 1e-6), std with G - 1 in the denominator: GRPO as first published."""
    rewards = _finite(rewards_G, "rewards")
    return np.zeros_like(rewards) if is_collapsed(rewards) else (rewards - rewards.mean()) / (rewards.std(ddof=1) + EPSILON)


def leave_one_out(rewards_G: Floats) -> np.ndarray:
    """A[i] = R[i] - mean of the other R: group_mean times G / (G - 1), unbiased. Raises InvalidRequest for fewer than two rewards."""
    rewards = _finite(rewards_G, "rewards")
    if len(rewards) < 2:
        raise InvalidRequest("leave-one-out needs at least two rewards; play larger groups", param="rewards")
    return group_mean(rewards) * len(rewards) / (len(rewards) - 1)


def max_rl(rewards_G: Floats) -> np.ndarray:
    """A[i] = (R[i] - mean(R)) / mean(R), and 0 where nobody earned anything.

    For rewards of 0 and 1 the gradient approaches that of log(rate of success), the more members a group has: tasks that rarely succeed
    count more. Raises InvalidRequest for negative rewards, for which this means nothing.
    """
    rewards = _finite(rewards_G, "rewards")
    if np.any(rewards < 0):
        raise InvalidRequest(f"max_rl takes rewards of at least 0; {rewards.min():g} is not: use group_mean", param="rewards")
    return np.zeros_like(rewards) if is_collapsed(rewards) else (rewards - rewards.mean()) / rewards.mean()


# ---- one number for each turn ----


def returns_to_go(rewards_T: Floats, gamma: float = 1.0) -> np.ndarray:
    """What is still earned from each turn on: R[t] = r[t] + gamma R[t + 1]."""
    rewards = _finite(rewards_T, "rewards")
    returns, later = np.zeros_like(rewards), 0.0
    for turn in reversed(range(len(rewards))):
        returns[turn] = later = rewards[turn] + gamma * later
    return returns


def per_turn(rewards_GT: Sequence[Floats], gamma: float = 1.0) -> list[np.ndarray]:
    """A[i, t] = R[i, t] - mean over the members that had a turn t, R being returns to go: a turn isn't credited with what came before it.

    Members may have different numbers of turns. A member that had a turn which no other had gets 0 there: there is nobody to compare with.
    """
    returns_GT = [returns_to_go(rewards_T, gamma) for rewards_T in rewards_GT]
    advantages_GT = [np.zeros_like(returns_T) for returns_T in returns_GT]
    for turn in range(max(map(len, returns_GT), default=0)):
        members = [index for index, returns_T in enumerate(returns_GT) if turn < len(returns_T)]
        centred = group_mean([returns_GT[index][turn] for index in members])
        for index, value in zip(members, centred, strict=True):
            advantages_GT[index][turn] = value
    return advantages_GT


def gae(
    rewards_T: Floats, values_T: Floats, gamma: float = 1.0, lam: float = 0.95, last_value: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and the returns that a value function is trained towards, both [T].

        d[t] = r[t] + gamma V[t + 1] - V[t]        V[T] = last_value: 0 where the episode ended, an estimate where it was cut off
        A[t] = d[t] + gamma lam A[t + 1]           returns = A + V

    T may as well be the tokens of an action. lam 1 gives returns to go minus values, lam 0 the one-step error.
    """
    rewards, values = _finite(rewards_T, "rewards"), _finite(values_T, "values")
    if len(rewards) != len(values):
        raise InvalidRequest(f"{len(rewards)} rewards and {len(values)} values; give one value for each reward", param="values")
    advantages, later, next_value = np.zeros_like(rewards), 0.0, float(last_value)
    for turn in reversed(range(len(rewards))):
        error = rewards[turn] + gamma * next_value - values[turn]
        advantages[turn] = later = error + gamma * lam * later
        next_value = values[turn]
    return advantages, advantages + values


# ---- shaping: parts to add to a reward before anything is compared ----


def overlong_penalty(length: int, limit: int, margin: int) -> float:
    """0 up to limit - margin tokens, then falling in a line to -1 at the limit, -1 beyond (DAPO's soft punishment)."""
    if not 0 < margin <= limit:
        raise InvalidRequest(f"margin is {margin} and limit {limit}; a margin lies between 1 and the limit", param="margin")
    return -min(max((length - (limit - margin)) / margin, 0.0), 1.0)


def length_reward(lengths_G: Floats, right_G: Sequence[bool]) -> np.ndarray:
    """1/2 - (length - shortest) / (longest - shortest) for right answers, the same but at most 0 for wrong ones; 0 if all are as long.

    Right and short earns most, wrong and long is punished, wrong and short earns nothing (Kimi k1.5).
    """
    lengths = _finite(lengths_G, "lengths")
    if len(lengths) != len(right_G):
        raise InvalidRequest(f"{len(lengths)} lengths and {len(right_G)} answers; give one for each", param="lengths")
    if is_collapsed(lengths):
        return np.zeros_like(lengths)
    share = 0.5 - (lengths - lengths.min()) / (lengths.max() - lengths.min())
    return np.where(np.asarray(right_G, dtype=bool), share, np.minimum(share, 0.0))


def format_penalty(well_formed: bool, weight: float = 0.1) -> float:
    """0 for an answer of the asked form, -weight for any other, so that form alone never pays."""
    return 0.0 if well_formed else -weight


# ---- filters ----


def is_collapsed(rewards_G: Floats) -> bool:
    """Whether all members earned the same, fewer than two members included: such a group says nothing about what is better."""
    rewards = _finite(rewards_G, "rewards")
    return len(rewards) < 2 or bool(np.ptp(rewards) <= 1e-12 * max(1.0, float(np.abs(rewards).max())))


def masked(advantages_G: Floats, over_long_G: Sequence[bool]) -> np.ndarray:
    """The advantages, 0 for members whose answer was cut off: being long isn't punished as being wrong (DAPO's overlong filter)."""
    return np.where(np.asarray(over_long_G, dtype=bool), 0.0, _finite(advantages_G, "advantages"))


# ---- a group ----


ESTIMATORS: dict[str, Callable[[Floats], np.ndarray]] = {
    "group_mean": group_mean,
    "group_mean_std": group_mean_std,
    "leave_one_out": leave_one_out,
    "max_rl": max_rl,
}
PER_TURN = "per_turn"
NAMES = (*ESTIMATORS, PER_TURN)


def advantages_of(
    group: TrajectoryGroup, estimator: str = "group_mean", gamma: float = 1.0, mask_over_long: bool = False
) -> list[list[float]]:
    """For each member one advantage for each of its turns.

    Members that failed get none (an empty list) and are nobody's baseline; nor does anybody in a group of which fewer than two have a
    score, or all the same. `per_turn` credits turns with what followed them (the group's own reward comes with the last turn); the others
    give all turns of an episode the same.
    """
    if estimator not in NAMES:
        raise InvalidRequest(f"there is no estimator {estimator!r}; there are {', '.join(NAMES)}", param="estimator")
    scored = group.scored
    advantages: list[list[float]] = [[] for _ in group.trajectories_G]
    if is_collapsed([group.reward(index).total for index in scored]) and (estimator != PER_TURN or len(scored) < 2):
        return advantages
    if estimator == PER_TURN:
        found = per_turn([turn_rewards(group, index) for index in scored], gamma)
    else:
        numbers = ESTIMATORS[estimator]([group.reward(index).total for index in scored])
        found = [np.full(len(group.trajectories_G[index].transitions), number) for index, number in zip(scored, numbers, strict=True)]
    for index, values_T in zip(scored, found, strict=True):
        over_long = mask_over_long and group.trajectories_G[index].truncated
        advantages[index] = masked(values_T, [over_long] * len(values_T)).tolist()
    return advantages


def turn_rewards(group: TrajectoryGroup, index: int) -> list[float]:
    """What each turn of a scored member earned; the group's own reward comes with the last."""
    rewards = [transition.reward.total for transition in group.trajectories_G[index].transitions]
    rewards[-1] += group.group_rewards_G[index].total
    return rewards


def _finite(values: Floats, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.all(np.isfinite(array)):
        raise InvalidRequest(f"{name} must be a list of finite numbers; {values!r:.200} is not", param=name)
    return array
