"""What the pages say of rules, verdicts and conversations, without a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from everlearn.api.dashboard import rollouts
from everlearn.api.dashboard.deploy_views import asks, course_of, past_json, span
from everlearn.api.dashboard.looks import Looks, past
from everlearn.api.dashboard.review_views import conversation, merged
from everlearn.loop import gate
from everlearn.loop.evidence import Evidence, Outcome, Pair
from everlearn.loop.parts import Part
from everlearn.loop.rule import DEFAULT_RULE, Rule, read_rule, rule_of
from everlearn.store.deployments import Deployment, Event
from everlearn.store.review import Waiting
from everlearn.store.steps import Group

RULE = rule_of(
    {"owner": "maria", "corrections": {}, "canary": {"steps": [{"share": 0.5, "min_feedback": 4}], "alpha": 0.2, "alpha_stop": 0.2}}
)
BETTER = Evidence(
    stage="canary",
    champion="support@1",
    candidate="support@2",
    corrections=(Pair(0.0, 1.0),) * 5,
    feedback=tuple(Outcome(n % 2 == 0, float(n % 2 == 0)) for n in range(60)),
)


def event(evidence: dict[str, Any], number: int = 1, **more: Any) -> Event:
    fields: dict[str, Any] = {
        "kind": "advanced",
        "was": "gate",
        "state": "canary",
        "champion": 1,
        "candidate": 2,
        "share": 0.5,
        "actor": "key-1",
    }
    return Event(number, reason="", evidence=evidence, created_at=1.0 * number, **(fields | more))


def told(rule: Rule, evidence: Evidence) -> dict[str, Any]:
    """As the runner keeps it."""
    verdict = gate.decide(rule, evidence)
    return {"verdict": msgspec.to_builtins(verdict), "rule": msgspec.to_builtins(rule), "evidence": msgspec.to_builtins(evidence)}


@pytest.mark.parametrize(
    ("name", "words", "bounds"),
    [
        ("held_out", "at least -0.02", [-0.02]),
        ("corrections", "at least 80% right, at most 5% newly wrong", [0.8]),
        ("retained:general", "at least -0.05", [-0.05]),
        ("kl", "at most 0.5", [0.5]),
        ("canary", "above +0; stopped below -0", [0.0]),
        ("guardrail:refusal", "at most +0.02", [0.02]),
        ("guardrail:length", "within ±0.1", [-0.1, 0.1]),
        ("alarm:length", "no veto", []),
        ("safety", "at least -0.05", [-0.05]),
        ("parity", "at most 0.05", [0.05]),
        ("owner", "signed by its owner, and promote = automatic", []),
    ],
)
def test_what_a_rule_asks_in_words_and_figures(name: str, words: str, bounds: list[float]) -> None:
    assert asks(name, read_rule(DEFAULT_RULE)) == (words, bounds)


def test_an_axis_shows_the_interval_its_bounds_and_zero() -> None:
    low, high = span(Part(name="kl", result="pass", reason="", value=0.3, low=0.2, high=0.4), [0.5]) or (0, 0)
    assert low < 0 and high > 0.5
    assert span(Part(name="owner", result="wait", reason=""), []) is None


def test_a_verdict_of_the_history_is_derived_again_and_forged_evidence_shows() -> None:
    honest = past(event(told(RULE, BETTER)))
    shown = past_json(honest)
    assert shown is not None and (shown["decision"], shown["differs"]) == ("hold", "") and shown["parts"][-1]["name"] == "owner"
    forged = told(RULE, BETTER)
    forged["evidence"]["feedback"] = [[one[0], 1.0 - one[1]] for one in forged["evidence"]["feedback"]]
    assert "isn't the one that the verdict names" in past(event(forged)).differs
    for other in ({}, {"verdict": 1, "rule": {}, "evidence": {}}, {"verdict": forged["verdict"], "rule": {"no": 1}}):
        assert past_json(past(event(other))) is None, "evidence may be of any form"


def test_the_course_is_of_the_newest_canary_and_says_when_its_share_grew() -> None:
    start = told(RULE, msgspec.structs.replace(BETTER, feedback=(), stage="offline"))
    events = [event(told(RULE, BETTER), 3, kind="promoted", state="collect"), event(start, 2), event({}, 1, kind="created")]
    looks, found = Looks(), Deployment("a", "support", "tiny", "collect", 2, None, 1, 0.0, 0.0, False, "", 3, {}, {}, 0.0, 0.0)
    known = {one.id: looks.past(found, one, Path("home")) for one in events if one.evidence}
    course = course_of(events, known, None)
    assert (course["candidate"], course["outcomes"], course["own"], course["live"]) == ("support@2", 60, 30, False)
    assert (
        course["steps"] == [{"outcomes": 0, "share": 0.5}] and course["low"] > 0.0 and 0 <= course["low"] - course["points"][-1][1] < 0.01
    )
    assert looks.past(found, events[0], Path("home")) is known[3], "worked out once"
    assert course_of([], {}, None) == {}


def test_an_answer_waits_once_in_the_order_of_the_reasons() -> None:
    waiting = [
        Waiting("rec_1", 0, "sign", 3.0),
        Waiting("rec_2", 0, "wrong", 1.0),
        Waiting("rec_1", 0, "unsure", 2.0),
        Waiting("rec_1", 1, "sign", 1.0),
    ]
    assert [(one.key, one.why) for one in merged(waiting)] == [("rec_2:0", "wrong"), ("rec_1:0", "unsure"), ("rec_1:1", "sign")]


def test_conversations_of_every_route_are_shown() -> None:
    parts = [{"type": "text", "text": "what is"}, {"type": "image_url", "image_url": {"url": "data:"}}, {"type": "text", "text": "this?"}]
    chat = {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]}
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    shown = conversation(chat | {"answer": [{"role": "assistant", "content": "", "tool_calls": [call]}]}, 0)
    assert shown == {"earlier": [{"role": "system", "text": "be brief"}], "asked": "what is this?", "answer": "", "calls": [call]}
    completion = conversation({"messages": "once upon", "answer": ["a time", "a mattress"]}, 1)
    assert (completion["asked"], completion["answer"], completion["earlier"]) == ("once upon", "a mattress", [])
    assert conversation({}, 0) == {"earlier": [], "asked": None, "answer": None, "calls": []}


def test_a_page_draws_so_many_tokens_and_short_answers_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "MAX_DRAWN", 10)
    members = [{"turns": [{"action": {"tokens": [7] * length, "logprobs": [-0.1] * length}}]} for length in (2, 9, 30)]
    shown = rollouts.shown(Group(0, 0, {}, 1, 0.0, {"members": members}), None)
    turns = [member["turns"][0] for member in shown["members"]]
    assert [(len(turn["drawn"]), turn["left_out"]) for turn in turns] == [(2, 0), (4, 5), (4, 26)]
    assert shown["tokens_left_out"] == 31
    assert rollouts.fair([], 10) == 0 and rollouts.fair([3, 4], 10) == 4
