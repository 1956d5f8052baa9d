"""From rule and evidence to a verdict: every decision, every part, and the replay."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from everlearn.errors import Damaged, InvalidRequest
from everlearn.loop.evidence import Alarm, Evidence, Interval, Measure, Outcome, Pair, Retained
from everlearn.loop.gate import Verdict, course, decide, replay
from everlearn.loop.rule import read_rule

RULE = read_rule("""
owner = "ana"
promote = "automatic"
[held_out]
[corrections]
[retained]
suites = ["arithmetic"]
[kl]
most = 0.5
[parity]
most = 0.01
[canary]
max_feedback = 8000
[guardrails.refusal]
worse = "up"
margin = 0.02
""")
BETTER, SAME, WORSE = Pair(0, 1), Pair(1, 1), Pair(1, 0)
GOOD = Evidence(
    stage="offline",
    champion="support@3",
    candidate="support@4",
    held_out=(*[BETTER] * 12, *[WORSE] * 2, *[SAME] * 60),
    corrections=(BETTER, BETTER, SAME, BETTER, Pair(0, 0)),
    retained=(Retained("arithmetic", Interval(0.50, 0.48, 0.52, 2000), Interval(0.52, 0.50, 0.54, 2000)),),
    kl=Measure(0.12, 0.01, 4000),
    parity=Measure(0.001, 0.0001, 4000),
)


def change(evidence: Evidence, **fields) -> Evidence:
    return msgspec.structs.replace(evidence, **fields)


def results(verdict: Verdict) -> dict[str, str]:
    return {part.name: part.result for part in verdict.parts}


def traffic(num: int, champion: float, candidate: float, share: float = 0.5, seed: int = 0) -> tuple[Outcome, ...]:
    rng = np.random.default_rng(seed)
    arms_N = rng.random(num) < share
    values_N = rng.random(num) < np.where(arms_N, candidate, champion)
    return tuple(Outcome(bool(arm), float(value)) for arm, value in zip(arms_N, values_N, strict=True))


def live(num: int = 4000, champion: float = 0.7, candidate: float = 0.8, refusal: float = 0.01, **fields) -> Evidence:
    guards = {"refusal": traffic(num, 0.01, refusal, seed=1)}
    return change(GOOD, stage="canary", step=3, hours=9.0, feedback=traffic(num, champion, candidate), guardrails=guards, **fields)


def test_a_good_candidate_goes_from_offline_through_every_step_to_promotion():
    verdict = decide(RULE, GOOD)
    assert (verdict.decision, verdict.step, verdict.share) == ("continue", 0, 0.01), verdict.reason
    assert set(results(verdict).values()) == {"pass"}
    shares, step, feedback = [], 0, traffic(6000, 0.7, 0.85)
    for seen in range(0, 6000, 50):
        evidence = change(live(), step=step, feedback=feedback[:seen])
        verdict = decide(RULE, evidence)
        replay(verdict, RULE, evidence)
        step, shares = verdict.step, [*shares, verdict.share]
        if verdict.decision != "continue":
            break
    assert verdict.decision == "promote" and verdict.share == 1.0
    assert sorted(set(shares)) == [0.01, 0.05, 0.25, 0.5, 1.0] and shares == sorted(shares)
    assert "ana's rule promotes" in verdict.reason


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"held_out": (*[WORSE] * 12, *[SAME] * 60)}, "held_out"),
        ({"corrections": (BETTER, Pair(0, 0), Pair(0, 0))}, "corrections"),
        ({"corrections": (*[BETTER] * 9, WORSE)}, "corrections"),
        ({"retained": (Retained("arithmetic", Interval(0.5, 0.48, 0.52, 900), Interval(0.4, 0.38, 0.42, 900)),)}, "retained:arithmetic"),
        ({"kl": Measure(0.9, 0.05, 4000)}, "kl"),
        ({"parity": Measure(0.05, 0.001, 4000)}, "parity"),
        ({"alarms": (Alarm("drift", 9.0, 5.0, True, "features are 9 away, 5 allowed", 300),)}, "alarm:drift"),
    ],
)
@pytest.mark.parametrize("base", [GOOD, live()], ids=["offline", "canary"])
def test_whatever_speaks_against_it_rejects_it_at_every_stage(base: Evidence, fields, part: str):
    verdict = decide(RULE, change(base, **fields))
    assert verdict.decision == "reject" and verdict.share == 0.0
    assert [name for name, result in results(verdict).items() if result == "fail"] == [part]
    assert verdict.reason.startswith(part)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"held_out": (SAME,) * 3}, "held_out"),
        ({"held_out": (*[BETTER] * 3, *[WORSE] * 3, *[SAME] * 30)}, "held_out"),
        ({"corrections": ()}, "corrections"),
        ({"retained": ()}, "retained:arithmetic"),
        ({"kl": None}, "kl"),
        ({"kl": Measure(0.5, 0.1, 40)}, "kl"),
    ],
)
def test_what_is_missing_or_unsure_holds_it(fields, part: str):
    for base in (GOOD, live()):
        verdict = decide(RULE, change(base, **fields))
        assert (verdict.decision, verdict.share) == ("hold", 0.0)
        assert verdict.reason.startswith(part)


def test_an_owner_may_let_the_unsure_pass():
    rule = read_rule("owner = 'ana'\npromote = 'automatic'\n[held_out]\nunsure = 'pass'")
    evidence = change(GOOD, held_out=(*[BETTER] * 3, *[WORSE] * 3, *[SAME] * 30))
    assert decide(rule, evidence).decision == "promote"
    assert decide(rule, change(evidence, held_out=(*[WORSE] * 12, *[SAME] * 30))).decision == "reject"


def test_a_regression_is_rejected_and_a_crossed_guardrail_too():
    verdict = decide(RULE, live(candidate=0.6))
    assert verdict.decision == "reject" and results(verdict)["canary"] == "fail"
    verdict = decide(RULE, live(refusal=0.08))
    assert verdict.decision == "reject" and results(verdict)["guardrail:refusal"] == "fail"
    assert results(verdict)["canary"] == "pass"  # what users press on can't buy off a guardrail


def test_no_decision_in_time_keeps_the_champion():
    equal = live(num=8000, candidate=0.7)
    verdict = decide(RULE, equal)
    assert (verdict.decision, verdict.share) == ("hold", 0.0) and "no decision in 8000 outcomes" in verdict.reason
    late = decide(RULE, change(live(num=500, candidate=0.7), hours=400.0))
    assert late.decision == "hold" and "no decision in 400 hours" in late.reason


def test_an_unsigned_rule_and_one_that_asks_promote_nobody():
    for fields, told in (({"owner": ""}, "nobody signed"), ({"promote": "ask"}, "to a person")):
        verdict = decide(msgspec.structs.replace(RULE, **fields), live())
        assert verdict.decision == "hold" and told in verdict.reason and results(verdict)["owner"] == "wait"
    assert decide(msgspec.structs.replace(RULE, owner=""), live(candidate=0.6)).decision == "reject"  # but it stops one
    assert decide(read_rule("owner = 'ana'\npromote = 'automatic'"), GOOD).decision == "hold"  # nothing asked, nothing shown


def test_a_promotion_waits_for_the_last_step_and_for_every_guardrail():
    early = decide(RULE, change(live(), step=1))
    assert (early.decision, early.step) == ("continue", 2) and results(early)["canary"] == "pass"
    silent = decide(RULE, change(live(), guardrails={}))
    assert silent.decision == "continue" and "guardrail:refusal" in silent.reason


def test_a_proven_guardrail_waits_until_harm_is_excluded():
    text = "owner = 'ana'\npromote = 'automatic'\n[canary]\n[guardrails.refusal]\nworse = 'both'\nmargin = 0.05\nproven = true"
    few, many = live(num=1200, candidate=0.95), live(num=6000, candidate=0.95)
    assert "not yet surely within 0.05" in decide(read_rule(text), change(few, guardrails={"refusal": traffic(300, 0.1, 0.1)})).reason
    assert decide(read_rule(text), many).decision == "promote"


def test_lengths_are_judged_in_both_directions():
    text = "[canary]\n[guardrails.length]\nworse = 'both'\nmargin = 0.1\nlimit = 1000"
    rng = np.random.default_rng(0)
    for factor, way in ((1.6, "above"), (0.3, "below")):
        arms_N = rng.random(1500) < 0.5
        tokens = rng.gamma(4, 75, 1500) * np.where(arms_N, factor, 1.0)
        lengths = tuple(Outcome(bool(arm), float(value)) for arm, value in zip(arms_N, tokens, strict=True))
        verdict = decide(read_rule(text), change(live(num=100), guardrails={"length": lengths}))
        assert verdict.decision == "reject" and f"{way} what is tolerated" in verdict.reason


def test_the_shadow_comes_between_when_the_rule_has_one():
    rule = msgspec.structs.replace(RULE, shadow=read_rule("[shadow]\nmin_hours = 2.0").shadow)
    assert (decide(rule, GOOD).decision, decide(rule, GOOD).share) == ("continue", 0.0)
    shadow = change(GOOD, stage="shadow", hours=1.0, guardrails={"refusal": traffic(800, 0.01, 0.01)})
    waiting, over = decide(rule, shadow), decide(rule, change(shadow, hours=2.5))
    assert (waiting.decision, waiting.step, waiting.share) == ("continue", 0, 0.0) and "1 of 2 hours" in waiting.reason
    assert (over.decision, over.step, over.share) == ("continue", 0, 0.01) and "without an objection" in over.reason
    few = decide(rule, change(shadow, hours=2.5, guardrails={}))
    assert (few.decision, few.share) == ("continue", 0.0), "nobody meets a candidate whose guardrails still wait"
    harmful = change(shadow, guardrails={"refusal": traffic(800, 0.01, 0.2)})
    assert decide(rule, harmful).decision == "reject"


def test_an_alarm_that_the_rule_ignores_is_shown_and_passes():
    rule = read_rule("owner = 'ana'\npromote = 'automatic'\n[alarms]\nignore = ['drift']\n[kl]\nmost = 0.5")
    alarms = (Alarm("drift", 9.0, 5.0, True, "features are far", 300), Alarm("bullets", 0.1, 0.2, False, "as before", 300))
    verdict = decide(rule, change(GOOD, alarms=alarms))
    assert verdict.decision == "promote" and "ignored by the rule" in verdict.parts[0].reason


def test_a_verdict_survives_the_log_and_replays_from_it():
    for evidence in (GOOD, live(), live(candidate=0.6), live(refusal=0.08)):
        verdict = decide(RULE, evidence)
        read = msgspec.json.decode(msgspec.json.encode(verdict), type=Verdict)
        stored = msgspec.json.decode(msgspec.json.encode(evidence), type=Evidence)
        assert read == verdict
        replay(read, RULE, stored)


def test_a_replay_notices_another_rule_other_evidence_and_another_verdict():
    verdict = decide(RULE, live())
    with pytest.raises(Damaged, match="the rule isn't"):
        replay(verdict, msgspec.structs.replace(RULE, owner="bob"), live())
    with pytest.raises(Damaged, match="the evidence isn't"):
        replay(verdict, RULE, live(num=3999))
    with pytest.raises(Damaged, match="decision is 'promote'"):
        replay(msgspec.structs.replace(verdict, decision="reject"), RULE, live())
    forged = tuple(msgspec.structs.replace(part, low=part.low - 0.1) if part.name == "canary" else part for part in verdict.parts)
    with pytest.raises(Damaged, match="canary has the low"):
        replay(msgspec.structs.replace(verdict, parts=forged), RULE, live())


def test_the_course_of_the_interval_ends_above_0_for_a_better_candidate():
    drawn = course(RULE, live())
    assert drawn[-1][1] > 0 and drawn[0][0] < drawn[-1][0]


def test_evidence_that_cannot_be_is_refused():
    with pytest.raises(InvalidRequest, match="step is 4"):
        decide(RULE, change(live(), step=4))
    with pytest.raises(InvalidRequest, match="the rule has none"):
        decide(read_rule("[kl]\nmost = 1"), live())
    with pytest.raises(InvalidRequest, match=r"feedback\[0\] is 7"):
        decide(RULE, change(live(), feedback=(Outcome(True, 7.0),)))


def test_the_shadow_and_a_person_have_their_time_and_then_the_champion_stays():
    proven = read_rule("""
owner = "ana"
promote = "ask"
[shadow]
min_hours = 1.0
max_hours = 8.0
[guardrails.refusal]
worse = "up"
margin = 0.02
proven = true
[canary]
max_hours = 24.0
""")
    few = {"refusal": traffic(100, 0.01, 0.01)}
    waits = Evidence(stage="shadow", champion="s@1", candidate="s@2", hours=7.0, guardrails=few)
    assert decide(proven, waits).decision == "continue"
    late = decide(proven, change(waits, hours=8.0))
    assert late.decision == "hold" and "no decision in 8 hours in the shadow" in late.reason
    replay(late, proven, change(waits, hours=8.0))
    shown = change(live(), hours=23.0, guardrails={"refusal": traffic(9000, 0.01, 0.005)})
    assert decide(proven, shown).reason == decide(proven, shown).parts[-1].reason, "a person is asked"
    asked_in_vain = decide(proven, change(shown, hours=24.0))
    assert asked_in_vain.decision == "hold" and "nobody promoted it in 24 hours" in asked_in_vain.reason
