"""What the pages of deployments show: what answers, what is tried beside it, and why; from rows of the store to plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection

from everlearn.api.dashboard.looks import Look, Looks, Past
from everlearn.api.deployments import deployment_json, event_json
from everlearn.config import Settings
from everlearn.errors import NotFound
from everlearn.loop.gate import Verdict
from everlearn.loop.parts import Part
from everlearn.loop.rule import Rule
from everlearn.store import datasets, deployments, names
from everlearn.store.deployments import Deployment, Event

STATES = ("collect", "dataset", "update", "gate", "shadow", "canary")  # the line of a cycle, in order
EVENTS = 50  # of the history, on one page


def listed(conn: Connection, tenant: str, after: str | None = None, limit: int = 50) -> dict[str, Any]:
    found = deployments.list_all(conn, tenant, limit + 1, after)
    last = found[limit - 1].name if len(found) > limit else None
    return {"object": "list", "data": [row(one) for one in found[:limit]], "has_more": len(found) > limit, "last_id": last}


def row(found: Deployment) -> dict[str, Any]:
    """A deployment without the notes of its cycle, which may hold users' words."""
    told = deployment_json(found)
    cycle: dict[str, Any] = {
        name: found.cycle[name] for name in ("id", "began", "why", "labels", "dataset", "step", "asks") if name in found.cycle
    }
    if isinstance(moving := found.cycle.get("moving"), Mapping):  # weights that move with every episode (everlearn/loop/continuous.py)
        cycle["moving"] = {name: moving.get(name) for name in ("step", "owed", "tried", "total")}
    return told | {"cycle": cycle, "states": STATES}


def shown(conn: Connection, found: Deployment, looks: Looks, settings: Settings, after: int | None = None) -> dict[str, Any]:
    """A deployment, its versions, what its present or last candidate has shown (`verdict`), the interval of its canary (`course`), and its
    history."""
    events = deployments.history(conn, found.tenant, found.name, EVENTS + 1, after)
    home = settings.home
    past = {event.id: looks.past(found, event, home) for event in events if "verdict" in event.evidence}
    look, fresh_in = looks.now(conn, found, home, settings.feedback.source_cap)
    told = row(found) | {"versions": versions(conn, found)}
    told["verdict"] = verdict_now(found, look) or next((past_json(one) for one in past.values() if one.look), None)
    course = course_of(events, past, look)
    told["course"] = course | {"fresh_in": fresh_in} if course else None
    told["history"] = [told_event(found.name, event, past.get(event.id)) for event in events[:EVENTS]]
    return told | {"has_more": len(events) > EVENTS, "last_id": events[EVENTS - 1].id if len(events) > EVENTS else None}


def verdict_now(found: Deployment, look: Look | None) -> dict[str, Any] | None:
    """Of the candidate that is tried now: as its traffic stands, or as it was when the runner began to wait for a person."""
    if look is not None:
        return verdict_json(look.verdict, look.rule) | {"now": True, "at": look.taken_at, "differs": None}
    if found.candidate is None or not found.cycle.get("asks"):
        return None
    try:
        verdict, asked = msgspec.convert(found.cycle.get("verdict"), Verdict), msgspec.convert(found.cycle.get("rule"), Rule)
    except msgspec.ValidationError:
        return None
    return verdict_json(verdict, asked) | {"now": False, "at": found.changed_at, "differs": None}


def versions(conn: Connection, found: Deployment) -> list[dict[str, Any]]:
    """The versions of the name, newest first, with the datasets that they learned from; number 0 is the base model."""
    try:
        known = names.versions(conn, found.tenant, found.name)
    except NotFound:
        known = []
    roles = {found.champion: "champion", found.candidate: "candidate", found.previous: "previous"}
    told = [
        {
            "name": str(one),
            "number": one.number,
            "role": roles.get(one.number, ""),
            "note": one.note,
            "created_at": int(one.created_at),
            "learned_from": [
                {"id": use.dataset_id, "inherited": use.inherited, "marks": use.marks}
                for use in datasets.datasets_of(conn, found.tenant, one.version)
            ],
        }
        for one in known
    ]
    base = {"name": f"{found.name}@0", "number": 0, "role": roles.get(0, ""), "note": f"the base model {found.base_model}"}
    return [*told, base | {"created_at": None, "learned_from": []}]


def told_event(name: str, event: Event, past: Past | None) -> dict[str, Any]:
    """A line of the history; of its evidence the verdict, and not the lists that it stands on (`GET .../history` has them)."""
    told = event_json(name, event)
    told["verdict"] = past_json(past) if past is not None else None
    told["evidence"] = {key: value for key, value in event.evidence.items() if key not in ("verdict", "rule", "evidence")}
    return told


def past_json(past: Past) -> dict[str, Any] | None:
    """`differs`: "" where the verdict, derived again from its evidence, comes out the same."""
    if past.look is None:
        return None
    return verdict_json(past.look.verdict, past.look.rule) | {"now": False, "at": past.look.taken_at, "differs": past.differs}


def verdict_json(verdict: Verdict, asked: Rule) -> dict[str, Any]:
    parts = [part_json(part, asked) for part in verdict.parts]
    told = {name: getattr(verdict, name) for name in ("decision", "stage", "reason", "step", "share")}
    return told | {"parts": parts, "owner": asked.owner, "promote": asked.promote}


def part_json(part: Part, asked: Rule) -> dict[str, Any]:
    """One thing that was asked, with what the rule asks of it: in words (`asks`), and the figures that bound it, for a plot."""
    told, bounds = asks(part.name, asked)
    return msgspec.to_builtins(part) | {"asks": told, "bounds": bounds, "span": span(part, bounds)}


def asks(name: str, asked: Rule) -> tuple[str, list[float]]:
    """What a rule asks of the part `name`."""
    head, _, rest = name.partition(":")
    if head in ("held_out", "safety") and (paired := asked.held_out if head == "held_out" else asked.safety) is not None:
        if paired.gain is not None:
            return f"above {paired.gain:+g}", [paired.gain]
        return f"at least {-paired.margin:+g}", [-paired.margin]
    if head == "corrections" and asked.corrections is not None:
        told = f"at least {asked.corrections.min_right:.0%} right, at most {asked.corrections.max_broken:.0%} newly wrong"
        return told, [asked.corrections.min_right]
    if head == "retained" and asked.retained is not None:
        return f"at least {-asked.retained.margin:+g}", [-asked.retained.margin]
    if head in ("kl", "parity") and (budget := asked.kl if head == "kl" else asked.parity) is not None:
        return f"at most {budget.most:g}", [budget.most]
    if head == "guardrail" and (guard := asked.guardrails.get(rest)) is not None:
        if guard.worse == "both":
            return f"within ±{guard.margin:g}", [-guard.margin, guard.margin]
        return (f"at most {guard.margin:+g}", [guard.margin]) if guard.worse == "up" else (f"at least {-guard.margin:+g}", [-guard.margin])
    if head == "canary" and asked.canary is not None:
        return f"above {asked.canary.gain:+g}; stopped below {-asked.canary.tolerated_loss:+g}", [asked.canary.gain]
    if head == "alarm":
        return "no veto", []
    return ("signed by its owner, and promote = automatic" if head == "owner" else ""), []


def span(part: Part, bounds: Sequence[float]) -> tuple[float, float] | None:
    """From where to where an axis has to go to show the interval, what bounds it, and 0; None where there is no figure."""
    if part.value is None:
        return None
    figures = [part.value, 0.0, *bounds, *(end for end in (part.low, part.high) if end is not None)]
    low, high = min(figures), max(figures)
    room = 0.08 * (high - low or 1.0)
    return low - room, high + room


def course_of(events: Sequence[Event], past: Mapping[int, Past], look: Look | None) -> dict[str, Any]:
    """The canary's interval: of the one that runs (`live`), else of the last one that the history knows; nothing where there was none.
    `points`: (outcomes, low, high). `steps`: after how many outcomes the candidate's share was changed, and to what."""
    known = [one.look for one in past.values() if one.look is not None and one.look.evidence.stage == "canary"]
    shown = look if look is not None else next(iter(known), None)
    if shown is None or shown.rule.canary is None:
        return {}
    evidence, canary = shown.evidence, shown.rule.canary
    part = next((one for one in shown.verdict.parts if one.name == "canary"), None)  # sharper than the course, which is on a grid
    low, high = (-1.0, 1.0) if part is None or part.low is None or part.high is None else (part.low, part.high)
    steps = []
    for event in reversed(events):
        stored = event.evidence.get("evidence")
        if isinstance(stored, Mapping) and event.state == "canary" and stored.get("candidate") == evidence.candidate:
            steps.append({"outcomes": len(stored.get("feedback") or ()), "share": event.share})
    figures = {"outcomes": len(evidence.feedback), "own": sum(one.candidate for one in evidence.feedback), "low": low, "high": high}
    told = {"champion": evidence.champion, "candidate": evidence.candidate, "live": look is not None, **figures}
    return told | {"gain": canary.gain, "loss": -canary.tolerated_loss, "points": shown.course, "steps": steps}
