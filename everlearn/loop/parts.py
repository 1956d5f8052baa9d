"""The parts of a verdict: for each thing that a rule asks, what the evidence says and how sure it is. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import NormalDist
from typing import Literal

import msgspec
import numpy as np

from everlearn.loop import paired, sequential, sources
from everlearn.loop.evidence import Evidence, Measure, Retained
from everlearn.loop.paired import Interval, Pair
from everlearn.loop.rule import (
    BudgetRule,
    CanaryRule,
    CorrectionsRule,
    GuardrailRule,
    PairedRule,
    RetainedRule,
    Rule,
)
from everlearn.loop.sequential import Blocks


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was asked. `value`, `low` and `high` are what a page draws, in most parts candidate minus champion. `live`: more
    traffic may still change it; what was measured offline may not."""

    name: str
    result: Literal["pass", "fail", "unsure", "wait"]
    reason: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    num: int = 0
    live: bool = False


# ---- before any traffic ----


def offline(rule: Rule, evidence: Evidence) -> list[Part]:
    """What the rule asks of the held-out split, corrections, safety, general ability, distance and parity."""
    shown = []
    if rule.held_out is not None:
        shown.append(compared("held_out", rule.held_out, evidence.held_out))
    if rule.corrections is not None:
        shown.append(corrected(rule.corrections, evidence.corrections))
    if rule.safety is not None:
        shown.append(compared("safety", rule.safety, evidence.safety))
    if rule.retained is not None:
        shown += retained(rule.retained, evidence.retained)
    if rule.kl is not None:
        shown.append(within("kl", rule.kl, evidence.kl))
    if rule.parity is not None:
        shown.append(within("parity", rule.parity, evidence.parity))
    return shown


def compared(name: str, rule: PairedRule, pairs: Sequence[Pair]) -> Part:
    """Both versions on the same prompts."""
    if len(pairs) < rule.min_num:
        return Part(name=name, result="wait", reason=f"{len(pairs)} of {rule.min_num} prompts judged", num=len(pairs))
    found = paired.difference(paired.read(pairs, name), rule.alpha)
    wanted = -rule.margin if rule.gain is None else rule.gain
    enough = found.low >= wanted if rule.gain is None else found.low > wanted
    return _sure(name, found, wanted, enough, found.high < -rule.margin, rule.unsure)


def _sure(name: str, found: Interval, wanted: float, enough: bool, bad: bool, unsure: Literal["hold", "pass"]) -> Part:
    figures = f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f}, {found.num} prompts)"
    if bad:
        result, reason = "fail", f"worse: {figures}"
    elif enough:
        result, reason = "pass", f"{figures}, at least {wanted:+.3f} was asked"
    elif unsure == "pass":
        result, reason = "pass", f"{figures} doesn't show {wanted:+.3f}, and not the contrary either; the rule lets that pass"
    else:
        result, reason = "unsure", f"{figures} doesn't show {wanted:+.3f}; judge more prompts"
    return Part(name=name, result=result, reason=reason, value=found.mean, low=found.low, high=found.high, num=found.num)  # type: ignore[arg-type]


def corrected(rule: CorrectionsRule, pairs: Sequence[Pair]) -> Part:
    """Does it repeat the mistakes that users corrected? Right is 0.5 or more. They are all there are, so there is no interval."""
    name = "corrections"
    if len(pairs) < max(rule.min_num, 1):
        return Part(name=name, result="wait", reason=f"{len(pairs)} of {max(rule.min_num, 1)} corrections asked again", num=len(pairs))
    right_N2 = paired.read(pairs, name) >= 0.5
    right, before = float(right_N2[:, 1].mean()), float(right_N2[:, 0].mean())
    broken = float((right_N2[:, 0] & ~right_N2[:, 1]).mean())
    reason = f"{right:.0%} of {len(pairs)} are right now ({before:.0%} before, {rule.min_right:.0%} asked), {broken:.1%} newly wrong"
    good = right >= rule.min_right and broken <= rule.max_broken
    return Part(name=name, result="pass" if good else "fail", reason=reason, value=right, num=len(pairs))


def retained(rule: RetainedRule, suites: Sequence[Retained]) -> list[Part]:
    """One part for each suite, and one for each that is asked and wasn't measured."""
    shown = []
    for suite in suites:
        found = paired.between(suite.champion, suite.candidate)
        bad, enough = found.high < -rule.margin, found.low >= -rule.margin
        shown.append(_sure(f"retained:{suite.suite}", found, -rule.margin, enough, bad, rule.unsure))
    absent = [name for name in rule.suites if name not in {suite.suite for suite in suites}]
    shown += [Part(name=f"retained:{name}", result="wait", reason="wasn't measured") for name in absent]
    return shown or [Part(name="retained", result="wait", reason="no suite was measured")]


def within(name: str, rule: BudgetRule, measure: Measure | None) -> Part:
    """A measure against its budget, with a normal interval."""
    if measure is None or measure.num < rule.min_num:
        return Part(name=name, result="wait", reason=f"{measure.num if measure else 0} of {rule.min_num} measured")
    margin = NormalDist().inv_cdf(1 - rule.alpha) * measure.standard_error
    low, high = measure.mean - margin, measure.mean + margin
    result: Literal["pass", "fail", "unsure"] = "fail" if low > rule.most else "pass" if high <= rule.most else "unsure"
    reason = f"{measure.mean:.4g} ({low:.4g} to {high:.4g}), at most {rule.most:g} allowed"
    return Part(name=name, result=result, reason=reason, value=measure.mean, low=low, high=high, num=measure.num)


def alarms(rule: Rule, evidence: Evidence) -> list[Part]:
    """One part for each alarm that was looked at; a veto fails, at every stage."""
    shown = []
    for alarm in evidence.alarms:
        vetoed = alarm.veto and alarm.name not in rule.alarms.ignore
        ignored = " (ignored by the rule)" if alarm.veto and not vetoed else ""
        result: Literal["pass", "fail"] = "fail" if vetoed else "pass"
        shown.append(Part(name=f"alarm:{alarm.name}", result=result, reason=alarm.reason + ignored, value=alarm.value, num=alarm.num))
    return shown


# ---- with traffic ----


def guardrails(rule: Rule, evidence: Evidence) -> list[Part]:
    """One part for each guardrail of the rule: a stop where harm beyond the margin is shown, whenever it was."""
    return [guarded(name, guard, evidence, rule) for name, guard in rule.guardrails.items()]


def guarded(name: str, rule: GuardrailRule, evidence: Evidence, whole: Rule) -> Part:
    """`whole` is the rule that the guardrail is part of."""
    arms_N, values_N = sequential.read(evidence.guardrails.get(name, ()), rule.limit, f"guardrails.{name}")
    found = sequential.blocks(arms_N, values_N)
    ways = {"up": (True,), "down": (False,), "both": (True, False)}[rule.worse]
    alpha = rule.alpha / len(ways)
    low, high = sequential.bounds(found, alpha, alpha)
    places = sources.left_out(whole, evidence, name, len(arms_N))

    def crossed(up: bool, kept_N: np.ndarray | slice = slice(None)) -> bool:
        left = sequential.blocks(arms_N[kept_N], values_N[kept_N])
        return sequential.crossing(left, rule.margin if up else -rule.margin, alpha, up) is not None

    harmed = [up for up in ways if crossed(up) and sources.stands(places, partial(crossed, up))]
    harmless = all(high < rule.margin if up else low > -rule.margin for up in ways)
    own = int(arms_N.sum())
    figures = f"{_mean(found):+.3f} ({low:+.3f} to {high:+.3f}, {own} of {len(arms_N)} episodes the candidate's)"
    result: Literal["pass", "fail", "wait"] = "pass"
    if harmed:
        way = "above" if harmed[0] else "below"
        result, reason = "fail", f"{way} what is tolerated ({rule.margin:g}): {figures}"
    elif own < rule.min_num:
        result, reason = "wait", f"{own} of {rule.min_num} episodes of the candidate"
    elif rule.proven and not harmless:
        result, reason = "wait", f"not yet surely within {rule.margin:g}: {figures}"
    else:
        reason = f"no harm beyond {rule.margin:g} seen: {figures}"
    return Part(
        name=f"guardrail:{name}",
        result=result,
        reason=reason,
        value=_mean(found),
        low=low,
        high=high,
        num=len(arms_N),
        live=True,
    )


def canary_blocks(rule: CanaryRule, evidence: Evidence) -> Blocks:
    """Feedback as blocks; what came after the budget doesn't count, so that asking late changes nothing."""
    return sequential.blocks(*sequential.read(evidence.feedback[: rule.max_feedback], name="feedback"))


def canary(rule: CanaryRule, evidence: Evidence, whole: Rule) -> Part:
    """Human feedback on candidate and champion: better, worse, or not known yet. `whole` is the rule that has the canary."""
    arms_N, values_N = sequential.read(evidence.feedback[: rule.max_feedback], name="feedback")
    found = sequential.blocks(arms_N, values_N)
    low, high = sequential.bounds(found, rule.alpha, rule.alpha_stop)
    left_out = [kept_N[: rule.max_feedback] for kept_N in sources.left_out(whole, evidence, "feedback", len(evidence.feedback))]

    def crossed(better: bool, kept_N: np.ndarray | slice = slice(None)) -> int | None:
        left = sequential.blocks(arms_N[kept_N], values_N[kept_N])
        difference, alpha = (rule.gain, rule.alpha) if better else (-rule.tolerated_loss, rule.alpha_stop)
        return sequential.crossing(left, difference, alpha, better)

    better, worse = crossed(True), crossed(False)
    alone = ""
    if better is not None and not sources.stands(left_out, lambda kept_N: crossed(True, kept_N) is not None):
        better, alone = None, sources.ALONE
    if worse is not None and not sources.stands(left_out, lambda kept_N: crossed(False, kept_N) is not None):
        worse, alone = None, sources.ALONE
    mean = _mean(found)
    figures = f"{mean:+.3f} ({low:+.3f} to {high:+.3f}, {int(arms_N.sum())} of {len(arms_N)} outcomes the candidate's)"
    result: Literal["pass", "fail", "wait"] = "wait"
    if worse is not None and (better is None or worse <= better):
        result, reason = "fail", f"worse by more than {rule.tolerated_loss:g} since outcome {worse}: {figures}"
    elif better is not None:
        result, reason = "pass", f"better by more than {rule.gain:g} since outcome {better}: {figures}"
    else:
        reason = f"undecided: {figures}{alone}"
    return Part(name="canary", result=result, reason=reason, value=mean, low=low, high=high, num=len(arms_N), live=True)


def _mean(found: Blocks) -> float:
    """The blocks' gains, weighted by what each is worth; 0 without blocks."""
    return float(np.average(found.gains_B, weights=found.weights_B)) if len(found.gains_B) else 0.0


# ---- the last word ----


def owner(rule: Rule, num_asked: int) -> Part:
    """Automation may stop a candidate; what promotes one is a rule that somebody signed, and that asks for something."""
    if not num_asked:
        return Part(name="owner", result="wait", reason="the rule asks for nothing, and nothing promotes nobody")
    if not rule.owner:
        return Part(name="owner", result="wait", reason="all is shown, but nobody signed the rule (owner is empty)")
    if rule.promote == "ask":
        return Part(name="owner", result="wait", reason=f"all is shown; {rule.owner}'s rule leaves the promotion to a person")
    return Part(name="owner", result="pass", reason=f"all is shown, and {rule.owner}'s rule promotes")
