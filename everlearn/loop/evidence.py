"""What a verdict stands on: everything that was measured of a candidate, in one value that can be written down.

Nothing here decides. A measurement that wasn't made is absent, and a rule that asks for it waits.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

from everlearn.loop.paired import Interval, Pair
from everlearn.loop.sequential import Outcome
from everlearn.rewards.guard import Alarm

__all__ = ["Alarm", "Evidence", "Interval", "Measure", "Outcome", "Pair", "Retained", "Stage", "digest"]

Stage = Literal["offline", "shadow", "canary", "watch"]


class Retained(msgspec.Struct, frozen=True):
    """What both versions reach on one suite of general ability, each with its interval (95 %)."""

    suite: str
    champion: Interval
    candidate: Interval


class Measure(msgspec.Struct, frozen=True):
    """A mean over `num` tokens or answers and its standard error."""

    mean: float
    standard_error: float
    num: int


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of a candidate at one time. Lists only grow while a candidate is judged.

    `held_out`, `corrections` and `safety` are judgements of both versions on the same prompts: of the held-out split, of what users had
    corrected, of probes where 1 is good. `kl` is in nats per token, candidate against champion; `parity` the mean absolute difference of
    the sampler's and the trainer's log-probabilities. `feedback` has one outcome for each episode that got any (the mean of its
    feedback, 0 bad, 1 good), `guardrails` one for each episode, both in order of arrival.

    `sources` tells, for `feedback` and for guardrails that are made of people's words, who said each outcome, by a number; -1 where nobody
    is named or nothing was said, and for the unnamed where they are taken for everybody. It is absent where nobody at all is named.
    `counting` goes with it: by which edition of everlearn/loop/sources.py it is to be read; absent in what the first one wrote.

    At the stage "watch" `candidate` is live and answers everybody, and `champion` is what answered before: its outcomes are its record,
    and `hours` is the time since the promotion.
    """

    stage: Stage
    champion: str
    candidate: str
    step: int = 0
    hours: float = 0.0
    held_out: tuple[Pair, ...] = ()
    corrections: tuple[Pair, ...] = ()
    safety: tuple[Pair, ...] = ()
    retained: tuple[Retained, ...] = ()
    kl: Measure | None = None
    parity: Measure | None = None
    feedback: tuple[Outcome, ...] = ()
    guardrails: dict[str, tuple[Outcome, ...]] = {}
    alarms: tuple[Alarm, ...] = ()
    sources: dict[str, tuple[int, ...]] | msgspec.UnsetType = msgspec.UNSET  # absent, so that what was written before it still replays
    counting: Literal[2] | msgspec.UnsetType = msgspec.UNSET  # likewise


def digest(value: msgspec.Struct) -> str:
    """sha256 of a value's JSON, keys sorted, as it is after a way through the log (where 1 is 1.0): the same value, the same digest."""
    written = msgspec.json.decode(msgspec.json.encode(value), type=type(value))
    return hashlib.sha256(msgspec.json.encode(written, order="sorted")).hexdigest()
