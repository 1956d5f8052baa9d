"""The gate: from a rule and the evidence to a verdict. Pure: no clock, no store, no chance.

    reject    something speaks against the candidate: it leaves at once
    hold      nothing speaks against it and not enough for it, or time is up, or a person is to be asked: the champion stays
    continue  the candidate goes on: to the next stage, to a larger share, or on with the one it has
    promote   everything that the rule asks was shown, and its owner wants this done without asking

Of a version that is live already (stage "watch") `reject` means: back to the one before; `continue` and `hold`, at the end of its time: it
stays. Whatever isn't decided keeps the champion. A verdict names the digests of its rule and its evidence, and `replay` derives it again.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from everlearn.errors import Damaged, InvalidRequest
from everlearn.loop import live, parts, sequential, sources
from everlearn.loop.evidence import Evidence, Stage, digest
from everlearn.loop.parts import Part
from everlearn.loop.rule import CanaryRule, Rule

__all__ = ["Decision", "Entry", "Part", "Verdict", "course", "decide", "entry", "read_entry", "replay"]

Decision = Literal["promote", "hold", "reject", "continue"]
UNSEEN = -1  # in the place of a step: the candidate answers nobody yet
CLOSE = 1e-6  # between figures of the same evidence on two machines


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided and why. `share` is the candidate's share of new episodes from now on; `step` the canary's step that serves next."""

    decision: Decision
    stage: Stage
    reason: str
    parts: tuple[Part, ...]
    step: int
    share: float
    rule_sha256: str
    evidence_sha256: str


def decide(rule: Rule, evidence: Evidence) -> Verdict:
    """The verdict. May be asked after every outcome: what is shown once stays shown, and how often one asks changes no probability.

    Raises InvalidRequest for evidence that can't be (outcomes outside 0 to 1, a step that the rule doesn't have).
    """
    if evidence.stage == "watch":
        return _of_live(rule, evidence)
    if rule.canary is None and evidence.stage == "canary":
        raise InvalidRequest("the evidence is of a canary, and the rule has none; add [canary] to the rule", param="stage")
    if rule.canary is not None and not 0 <= evidence.step < len(rule.canary.steps):
        raise InvalidRequest(f"step is {evidence.step}; the rule's canary has steps 0 to {len(rule.canary.steps) - 1}", param="step")
    shown = [*parts.alarms(rule, evidence), *parts.offline(rule, evidence)]
    if evidence.stage != "offline":
        shown += parts.guardrails(rule, evidence)
    if evidence.stage == "canary" and rule.canary is not None:
        shown.append(parts.canary(rule.canary, evidence, rule))
    decision, reason, step = _conclude(rule, evidence, shown)
    if decision == "promote" or (decision == "hold" and _is_shown(shown)):
        shown.append(parts.owner(rule, len(shown)))
    return _verdict(rule, evidence, decision, reason, shown, max(step, 0), _share(rule, decision, step))


def _verdict(rule: Rule, evidence: Evidence, decision: Decision, reason: str, shown: list[Part], step: int, share: float) -> Verdict:
    return Verdict(
        decision=decision,
        stage=evidence.stage,
        reason=reason,
        parts=tuple(shown),
        step=step,
        share=share,
        rule_sha256=digest(rule),
        evidence_sha256=digest(evidence),
    )


def _of_live(rule: Rule, evidence: Evidence) -> Verdict:
    """A version that answers everybody already: back to the one before, or on with it."""
    if rule.watch is None:
        raise InvalidRequest("the evidence is of a version that is live, and the rule watches none; add [watch] to the rule", param="stage")
    shown = live.shown(rule, evidence)
    failed = [part for part in shown if part.result == "fail"]
    if failed:
        return _verdict(rule, evidence, "reject", "; ".join(f"{part.name}: {part.reason}" for part in failed), shown, 0, 0.0)
    if evidence.hours >= rule.watch.hours:
        return _verdict(rule, evidence, "hold", f"{evidence.hours:g} hours without an objection: it is watched no longer", shown, 0, 1.0)
    return _verdict(rule, evidence, "continue", f"{evidence.hours:g} of {rule.watch.hours:g} hours without an objection", shown, 0, 1.0)


def _conclude(rule: Rule, evidence: Evidence, shown: list[Part]) -> tuple[Decision, str, int]:
    """The first of these that holds: something failed, something was missing offline, all is shown, time is up, otherwise go on."""
    step = evidence.step
    failed = [part for part in shown if part.result == "fail"]
    if failed:
        return "reject", "; ".join(f"{part.name}: {part.reason}" for part in failed), 0
    open_parts = [part for part in shown if part.result != "pass"]
    missing = [part for part in open_parts if not part.live]
    if missing:
        return "hold", "; ".join(f"{part.name}: {part.reason}" for part in missing), 0
    if evidence.stage == "offline" and (rule.shadow or rule.canary):
        return "continue", f"{len(shown)} offline checks passed", UNSEEN if rule.shadow else 0
    if evidence.stage == "shadow":
        return _after_shadow(rule, evidence, shown)
    if not open_parts and (rule.canary is None or step == len(rule.canary.steps) - 1):
        return _promotion(rule, evidence, shown)
    if rule.canary is not None:
        return _on_with_canary(rule, rule.canary, evidence, open_parts)
    return "hold", "; ".join(f"{part.name}: {part.reason}" for part in open_parts), 0


def _after_shadow(rule: Rule, evidence: Evidence, shown: list[Part]) -> tuple[Decision, str, int]:
    open_parts = [part for part in shown if part.result != "pass"]
    least, most = (rule.shadow.min_hours, rule.shadow.max_hours) if rule.shadow else (0.0, math.inf)
    waits = [f"{part.name}: {part.reason}" for part in open_parts]
    if open_parts and evidence.hours >= most:
        late = f"no decision in {evidence.hours:g} hours in the shadow (the rule allows {most:g}): the champion stays"
        return "hold", "; ".join([late, *waits]), 0
    if evidence.hours < least or open_parts:
        return "continue", "; ".join([f"{evidence.hours:g} of {least:g} hours in the shadow", *waits]), UNSEEN
    if rule.canary is None:
        return _promotion(rule, evidence, shown)
    return "continue", f"{evidence.hours:g} hours in the shadow without an objection", 0


def _promotion(rule: Rule, evidence: Evidence, shown: list[Part]) -> tuple[Decision, str, int]:
    """A person who is to be asked has as long as the stage: a candidate doesn't keep its share of the traffic until somebody looks."""
    asked = parts.owner(rule, len(shown))
    limits = {"shadow": rule.shadow.max_hours if rule.shadow else math.inf, "canary": rule.canary.max_hours if rule.canary else math.inf}
    if asked.result != "pass" and evidence.hours >= limits.get(evidence.stage, math.inf):
        return "hold", f"all is shown, and nobody promoted it in {evidence.hours:g} hours: the champion stays", 0
    return ("promote" if asked.result == "pass" else "hold"), asked.reason, 0


def _on_with_canary(whole: Rule, rule: CanaryRule, evidence: Evidence, open_parts: list[Part]) -> tuple[Decision, str, int]:
    total = len(evidence.feedback)
    if total >= rule.max_feedback:
        return "hold", f"no decision in {total} outcomes (the rule allows {rule.max_feedback}): the champion stays", 0
    if evidence.hours >= rule.max_hours:
        return "hold", f"no decision in {evidence.hours:g} hours (the rule allows {rule.max_hours:g}): the champion stays", 0
    step = evidence.step
    needed = rule.steps[step].min_feedback
    own = sources.counted(whole, evidence, needed)
    if own >= needed and step + 1 < len(rule.steps):
        share = rule.steps[step + 1].share
        return "continue", f"{own} outcomes of the candidate, none against it: on to {share:.0%} of the traffic", step + 1
    waits = [f"{part.name}: {part.reason}" for part in open_parts] or [f"{own} of {needed} outcomes of the candidate at this share"]
    return "continue", "; ".join(waits), step


def _is_shown(shown: list[Part]) -> bool:
    return all(part.result == "pass" for part in shown)


def _share(rule: Rule, decision: Decision, step: int) -> float:
    if decision == "promote":
        return 1.0
    if decision != "continue" or rule.canary is None or step == UNSEEN:
        return 0.0
    return rule.canary.steps[step].share


def replay(verdict: Verdict, rule: Rule, evidence: Evidence) -> None:
    """Derives the verdict again. Raises Damaged where rule, evidence and verdict don't belong together, and says what differs."""
    for name, found, written in (
        ("rule", digest(rule), verdict.rule_sha256),
        ("evidence", digest(evidence), verdict.evidence_sha256),
    ):
        if found != written:
            raise Damaged(f"the {name} isn't the one that the verdict names ({found[:12]} and {written[:12]})", param=name)
    again = decide(rule, evidence)
    for name in ("decision", "stage", "step", "share"):
        if getattr(again, name) != getattr(verdict, name):
            raise Damaged(f"replayed, {name} is {getattr(again, name)!r}, and the verdict says {getattr(verdict, name)!r}", param=name)
    ours, theirs = ([(part.name, part.result) for part in given.parts] for given in (again, verdict))
    if ours != theirs:
        raise Damaged(f"replayed, the parts are {ours}, and the verdict says {theirs}", param="parts")
    for one, other in zip(again.parts, verdict.parts, strict=True):
        for name in ("value", "low", "high"):
            a, b = getattr(one, name), getattr(other, name)
            if (a is None) != (b is None) or (a is not None and abs(a - b) > CLOSE):
                raise Damaged(f"replayed, {one.name} has the {name} {a}, and the verdict says {b}", param=one.name)


class Entry(msgspec.Struct, frozen=True):
    """A verdict with all that it stands on: one line of a log, from which it replays."""

    verdict: Verdict
    rule: Rule
    evidence: Evidence


def entry(verdict: Verdict, rule: Rule, evidence: Evidence) -> bytes:
    """One line of JSON."""
    return msgspec.json.encode(Entry(verdict, rule, evidence))


def read_entry(line: bytes) -> tuple[Verdict, Rule, Evidence]:
    """Back from the log, for `replay`. Raises Damaged where the line isn't one of these."""
    try:
        found = msgspec.json.decode(line, type=Entry)
    except msgspec.MsgspecError as error:
        raise Damaged(f"the line is no verdict with its rule and evidence: {error}", param="line") from None
    return found.verdict, found.rule, found.evidence


def course(rule: Rule, evidence: Evidence) -> list[tuple[int, float, float]]:
    """How the canary's interval came closer, for a plot: (outcomes, low, high) of candidate minus champion. Empty without a canary."""
    if rule.canary is None:
        return []
    return sequential.course(parts.canary_blocks(rule.canary, evidence), rule.canary.alpha, rule.canary.alpha_stop)
