"""What goes on after a promotion: outcomes of the live version against the record of the one before."""

from __future__ import annotations

import math

import numpy as np
import pytest

from everlearn.errors import InvalidRequest
from everlearn.loop import live
from everlearn.loop.evidence import Alarm, Evidence, Outcome
from everlearn.loop.gate import decide, replay
from everlearn.loop.rule import read_rule

RULE = read_rule("""
owner = "ana"
[watch]
margin = 0.05
alpha = 0.05
hours = 100.0
[guardrails.refusal]
worse = "up"
margin = 0.05
[guardrails.length]
worse = "both"
margin = 0.1
limit = 1000.0
""")


def outcomes(rng: np.random.Generator, before: float, num: int, *rates: float) -> tuple[Outcome, ...]:
    """A record of 400, then `num` outcomes at each of the rates."""
    record = [Outcome(False, float(value)) for value in rng.random(400) < before]
    return (*record, *(Outcome(True, float(value)) for rate in rates for value in rng.random(num) < rate))


def evidence(feedback: tuple[Outcome, ...], hours: float = 1.0, **others) -> Evidence:
    return Evidence(stage="watch", champion="support@1", candidate="support@2", hours=hours, feedback=feedback, **others)


def test_wealth_is_what_the_formula_says():
    """Against the sum over all beginnings, written out."""
    values_N, mean = np.array([0.2, 1.0, 0.0, 0.0]), 0.6
    shares = [1 / math.log2(k + 1) - 1 / math.log2(k + 2) for k in range(1, 5)]
    whole = [
        np.mean([sum(shares[k] * np.prod(1 + stake * (mean - values_N[k:t])) for k in range(t)) for stake in live.STAKES_J])
        + 1 / math.log2(t + 2)
        for t in range(1, 5)
    ]
    for t, wealth in enumerate(whole, 1):
        assert live.crossing(values_N[:t], mean, 1 / (max(whole[:t]) * 0.999)) is not None
        assert live.crossing(values_N[:t], mean, min(1 / (max(whole[:t]) * 1.001), 0.999)) is None, wealth


def test_as_good_as_before_is_hardly_ever_rolled_back_however_often_one_looks():
    """A crossing counts wherever it was, so one look at the end has all looks in it. The worst that is tolerated: the margin used up."""
    rolled_back = [
        decide(RULE, evidence(outcomes(np.random.default_rng(seed), 0.75, 1500, 0.70))).decision == "reject" for seed in range(200)
    ]
    assert np.mean(rolled_back) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 200)


def test_harm_is_found_at_once_and_after_a_long_good_time():
    early = decide(RULE, evidence(outcomes(np.random.default_rng(1), 0.75, 1000, 0.55)))
    late = decide(RULE, evidence(outcomes(np.random.default_rng(1), 0.75, 1500, 0.78, 0.55)))
    assert early.decision == late.decision == "reject" and (early.share, late.share) == (0.0, 0.0)
    assert "live:feedback: below the version before by more than 0.05 since outcome" in late.reason


def test_guardrails_go_on_and_alarms_too():
    good = outcomes(np.random.default_rng(2), 0.75, 300, 0.75)
    refusals = outcomes(np.random.default_rng(3), 0.01, 300, 0.3)
    assert decide(RULE, evidence(good, guardrails={"refusal": refusals})).reason.startswith("live:refusal: above")
    rng = np.random.default_rng(4)
    for mean in (300, 900):  # either way
        lengths = (
            *(Outcome(False, one) for one in rng.normal(600, 50, 200).tolist()),
            *(Outcome(True, one) for one in rng.normal(mean, 50, 200).tolist()),
        )
        assert "live:length" in decide(RULE, evidence(good, guardrails={"length": lengths})).reason
    vetoed = decide(RULE, evidence(good, alarms=(Alarm("cusum", 11.0, 9.9, True, "it promises too much", 300),)))
    assert vetoed.decision == "reject" and "alarm:cusum" in vetoed.reason


def test_verdicts_replay_and_time_ends_the_watch():
    good = evidence(outcomes(np.random.default_rng(5), 0.75, 200, 0.75))
    for found in (good, evidence(good.feedback, hours=100.0), evidence(good.feedback[:500])):
        replay(decide(RULE, found), RULE, found)
    assert [decide(RULE, evidence(good.feedback, hours=hours)).decision for hours in (99.0, 100.0)] == ["continue", "hold"]


def test_without_a_record_nothing_is_compared():
    alone = evidence(tuple(Outcome(True, 0.0) for _ in range(500)))
    verdict = decide(RULE, alone)
    assert verdict.decision == "continue" and {part.result for part in verdict.parts} == {"wait"}
    with pytest.raises(InvalidRequest, match=r"add \[watch\]"):
        decide(read_rule(""), alone)
