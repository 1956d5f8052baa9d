"""A reward: a sum of named parts, each with a reason that a person can read.

A number that nobody can take apart can't be debugged, and what can't be debugged gets gamed. Nothing here scores anything; rules and
environments make the parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from everlearn.errors import InvalidRequest


class Part(msgspec.Struct, frozen=True):
    """One summand. `reason` says why it has this value, in words for a person; it may be empty."""

    name: str
    value: float
    reason: str = ""


class Reward(msgspec.Struct, frozen=True):
    """The sum of its parts; no parts is 0. Names are unique, so that a curve can be drawn for each."""

    parts: tuple[Part, ...] = ()

    @classmethod
    def of(cls, value: Reward | float, name: str = "reward") -> Reward:
        """A reward as it is; a bare number as one part of that name."""
        return value if isinstance(value, Reward) else cls((Part(name, float(value)),))

    @property
    def total(self) -> float:
        return math.fsum(part.value for part in self.parts)

    @property
    def values(self) -> dict[str, float]:
        return {part.name: part.value for part in self.parts}

    def check(self) -> Reward:
        """Itself. Raises InvalidRequest for a part that is not a finite number, and for a name that comes twice."""
        for part in self.parts:
            if not math.isfinite(part.value):
                raise InvalidRequest(f"the reward part {part.name!r} is {part.value}; it must be a finite number", param="reward")
        names = [part.name for part in self.parts]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise InvalidRequest(f"the reward has more than one part called {', '.join(twice)}; name each differently", param="reward")
        return self


def total_of(rewards: Iterable[Reward]) -> Reward:
    """The sum of rewards, part by part under their names; reasons are joined, in order."""
    values: dict[str, list[float]] = {}
    reasons: dict[str, list[str]] = {}
    for reward in rewards:
        for part in reward.parts:
            values.setdefault(part.name, []).append(part.value)
            if part.reason:
                reasons.setdefault(part.name, []).append(part.reason)
    return Reward(tuple(Part(name, math.fsum(all_), "; ".join(reasons.get(name, ()))) for name, all_ in values.items()))
