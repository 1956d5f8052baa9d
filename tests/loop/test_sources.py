"""Ten thousand thumbs of one source: they decide nothing, neither in the canary nor after a promotion, and every verdict replays."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from everlearn.errors import InvalidRequest
from everlearn.loop import sources
from everlearn.loop.description import Description
from everlearn.loop.evidence import Evidence, Outcome
from everlearn.loop.gate import Verdict, decide, entry, read_entry, replay
from everlearn.loop.outcomes import Traffic, evident
from everlearn.loop.rule import Rule, WatchRule, read_rule
from everlearn.loop.watch import Watch, cusum
from tests.loop.test_outcomes import NOW, Rows, answer, thumb

RULE = read_rule("""
owner = "maria"
promote = "automatic"
[canary]
steps = [{share = 0.5, min_feedback = 10}]
max_feedback = 3000
[guardrails.feedback_rate]
worse = "both"
margin = 0.2
[watch]
min_record = 50
""")
MANY = 10_000


def judged(rule: Rule, evidence: Evidence) -> Verdict:
    """The verdict, which its line of the log gives again."""
    verdict = decide(rule, evidence)
    replay(*read_entry(entry(verdict, rule, evidence)))
    return verdict


def says(at: int, episode: str, who: str, good: bool) -> dict[str, Any]:
    return thumb(at, episode) | {"id": f"f{at:06}-{who}", "source_id": who, "key_id": "key_1", "value": float(good)}


def canary(said: list[dict[str, Any]], found: list[dict[str, Any]], cap: float = 100.0) -> Evidence:
    traffic = Traffic(Rows(found, said, 1e6), NOW, 0.0, 100.0, 1e6, cap=cap)
    return Evidence(stage="canary", champion="support@1", candidate="support@2", hours=1.0, **evident(traffic.told(["feedback_rate"])))


@pytest.mark.parametrize("of_candidate", [True, False], ids=["boosts the candidate", "fells it"])
@pytest.mark.parametrize("first", [True, False], ids=["before the others", "among them"])
def test_one_source_doesn_t_decide_a_canary(of_candidate: bool, first: bool) -> None:
    """Both versions are equal to everybody else. One calls whatever one of them answers good, and the other's answers bad."""
    rng = np.random.default_rng(0)
    rows = [answer(at, f"e{at}", 1 + int(rng.integers(2))) for at in range(MANY)]
    crowd = [says(at + 1, f"e{at}", "eve", (rows[at]["model"] == "support@2") == of_candidate) for at in range(MANY)]
    others = [says(at + (20_000 if first else 2), f"e{at}", f"u{at}", bool(rng.random() < 0.75)) for at in range(0, MANY, 25)]
    told = canary(sorted([*crowd, *others], key=lambda row: (row["created_at"], row["id"])), rows)
    assert len(told.feedback) < 100 + len(others) + 1 <= RULE.canary.max_feedback, "nor does it use up the budget"  # type: ignore[union-attr]
    verdict = judged(RULE, told)
    assert verdict.decision == "continue", verdict.reason
    alone = msgspec.structs.replace(RULE, min_sources=1)
    assert judged(alone, told).decision == ("promote" if of_candidate else "reject") or not first, "it would, if the rule let it"


def test_nor_what_becomes_of_the_version_that_went_live() -> None:
    """A thousand people are as pleased as ever; one says of each answer that it is bad, or, before the promotion, that it was good."""
    rng = np.random.default_rng(1)
    rows = [answer(at, f"e{at}", 1 if at < 5000 else 2) for at in range(MANY)]
    people = [says(at + 1, f"e{at}", f"u{at}", bool(rng.random() < 0.75)) for at in range(0, MANY, 10)]
    crowd = [says(at + 2, f"e{at}", "eve", at < 5000) for at in range(MANY)]
    server = Rows(rows, sorted([*people, *crowd], key=lambda row: (row["created_at"], row["id"])), 1e6)
    now = msgspec.structs.replace(NOW, champion="support@2", previous="support@1")
    watch = Watch(server, "support", clock=lambda: 20_000.0)
    asked = msgspec.structs.replace(RULE, canary=None)
    shown = watch.evidence(now, Description("tiny"), asked, asked.watch or WatchRule(), 4999.5)
    verdict = judged(asked, shown)
    assert verdict.decision == "continue", verdict.reason
    assert next(part for part in verdict.parts if part.name == "live:feedback").reason.endswith(sources.ALONE)
    assert not any(alarm.veto for alarm in shown.alarms)
    assert isinstance(shown.sources, dict) and len(shown.sources["feedback"]) == len(shown.feedback)
    worse = [
        row | {"value": 0.0} if row["source_id"] != "eve" and row["created_at"] > 5000 else row for row in server.listed["/v1/feedback"]
    ]
    server.listed["/v1/feedback"] = worse
    fallen = watch.evidence(now, Description("tiny"), asked, asked.watch or WatchRule(), 4999.5)
    assert judged(asked, fallen).decision == "reject", "what a thousand people say is heard all the same"


def test_praise_of_one_doesn_t_hide_what_the_others_say() -> None:
    record = [Outcome(False, 1.0)] * 200
    live = [Outcome(True, 1.0)] * 100 + [Outcome(True, 0.0)] * 100
    told = Evidence(
        stage="watch", champion="s@1", candidate="s@2", hours=1.0, feedback=(*record, *live),
        sources={"feedback": (*range(200), *[777] * 100, *range(200, 300))},
    )  # fmt: skip
    assert judged(msgspec.structs.replace(RULE, guardrails={}), told).decision == "reject"
    assert cusum(WatchRule(), record, live, sources.masks(told.sources["feedback"], [one.candidate for one in told.feedback]))[0].veto  # type: ignore[index]


def test_nobody_s_name_leaves_the_evidence_and_its_digest_as_they_were() -> None:
    rows = [answer(at, f"e{at}", 1 + at % 2) for at in range(20)]
    told = canary([says(at + 1, f"e{at}", who, True) for at, who in enumerate(["key_1", ""] * 10)], rows)
    assert told.sources is msgspec.UNSET and b"sources" not in msgspec.json.encode(told) and b"counting" not in msgspec.json.encode(told)
    assert b"min_sources" not in msgspec.json.encode(RULE)


def test_a_step_of_the_canary_isn_t_taken_on_one_source_s_words() -> None:
    outcomes = tuple(Outcome(at % 2 == 0, 1.0) for at in range(100))
    told = Evidence(stage="canary", champion="s@1", candidate="s@2", feedback=outcomes, sources={"feedback": (*[0] * 98, 1, 2)})
    assert (sources.counted(RULE, told, 10), sources.counted(RULE, told, 1)) == (6, 2)
    assert sources.counted(msgspec.structs.replace(RULE, min_sources=1), told, 10) == 50
    with pytest.raises(InvalidRequest, match="each has one"):
        decide(RULE, msgspec.structs.replace(told, sources={"feedback": (0, 1)}))


@pytest.mark.parametrize("needed", [1, 2, 3, 5, 25])
def test_two_sources_are_enough_for_a_step_and_one_is_not(needed: int) -> None:
    two = (Outcome(True, 1.0),) * (2 * needed)
    told = Evidence(
        stage="canary", champion="s@1", candidate="s@2", feedback=two, sources={"feedback": (0, 1) * needed}, counting=sources.COUNTING,
    )  # fmt: skip
    assert sources.counted(RULE, told, needed) >= needed
    alone = msgspec.structs.replace(told, sources={"feedback": (0,) * (2 * needed)})
    assert sources.counted(RULE, alone, needed) < needed or needed == 1
    before = msgspec.structs.replace(told, counting=msgspec.UNSET)
    assert sources.counted(RULE, before, needed) == 2 * max(1, needed // 2), "what was written before replays as it was decided"


def newcomer(regulars: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Answers and words: regulars have a record of a hundred each, and are pleased; then one comes who says forty times that it is bad."""
    count = 100 * regulars
    rows = [answer(at, f"e{at}", 1 if at < count else 2) for at in range(count + 60)]
    said = [says(at + 1, f"e{at}", f"regular-{at % regulars}", at % 20 > 0) for at in range(count + 20)]
    return rows, [*said, *(says(at + 1, f"e{at}", "eve", False) for at in range(count + 20, count + 60))]


def test_a_newcomer_doesn_t_roll_back_alone_beside_many_with_a_long_record() -> None:
    rows, said = newcomer(25)
    now = msgspec.structs.replace(NOW, champion="support@2", previous="support@1")
    asked = msgspec.structs.replace(RULE, canary=None, guardrails={})
    watch = Watch(Rows(rows, said, 1e6), "support", clock=lambda: 5000.0)
    shown = watch.evidence(now, Description("tiny"), asked, asked.watch or WatchRule(), 2499.5)
    verdict = judged(asked, shown)
    assert verdict.decision == "continue" and verdict.parts[-1].reason.endswith(sources.ALONE), verdict.reason
    assert shown.alarms[0].reason.endswith(sources.ALONE) and not shown.alarms[0].veto
    first = judged(asked, msgspec.structs.replace(shown, counting=msgspec.UNSET))
    assert first.decision == "reject", "the first edition left out those with most of both, and replays as it decided"
    many = [row | {"source_id": f"new-{at % 3}"} if row["source_id"] == "eve" else row for at, row in enumerate(said)]
    watch = Watch(Rows(rows, many, 1e6), "support", clock=lambda: 5000.0)
    assert judged(asked, watch.evidence(now, Description("tiny"), asked, asked.watch or WatchRule(), 2499.5)).decision == "reject"


def test_who_speaks_of_the_champion_alone_is_left_out_as_well() -> None:
    """Thirty people speak of both, mostly of the candidate; one of the champion only."""
    numbers = [*range(30), *range(30), *[30] * 40]
    arms = [*[True] * 60, *[False] * 40]
    assert len(sources.masks(numbers, arms)) == 21 and any(not kept_N[-1] for kept_N in sources.masks(numbers, arms))


@pytest.mark.parametrize("praises", [True, False], ids=["praised", "blamed"])
def test_one_named_word_among_the_unnamed_stops_no_stop(praises: bool) -> None:
    rng = np.random.default_rng(2)
    rows = [answer(at, f"e{at}", 1 + at % 2) for at in range(2000)]
    said = [says(at + 1, f"e{at}", "", bool(rng.random() < (0.8, 0.3)[at % 2])) for at in range(2000)]
    said[3] = says(4, "e3", "ana", praises)
    told = canary(said, rows)
    assert len(told.feedback) == 2000 and isinstance(told.sources, dict) and set(told.sources["feedback"]) == {0, sources.NOBODY}
    assert judged(RULE, told).decision == "reject"
    went = [row | {"model": f"support@{1 if at < 1000 else 2}"} for at, row in enumerate(rows)]
    worse = [says(at + 1, f"e{at}", "ana" if at in (3, 1003) else "", bool(rng.random() < (0.8, 0.3)[at >= 1000])) for at in range(2000)]
    now = msgspec.structs.replace(NOW, champion="support@2", previous="support@1")
    watch = Watch(Rows(went, worse, 1e6), "support", clock=lambda: 5000.0)
    asked = msgspec.structs.replace(RULE, canary=None, guardrails={})
    verdict = judged(asked, watch.evidence(now, Description("tiny"), asked, asked.watch or WatchRule(), 999.5))
    assert {part.name for part in verdict.parts if part.result == "fail"} == {"alarm:cusum", "live:feedback"}


def test_the_unnamed_are_one_source_where_they_are_the_fewer_of_both_versions() -> None:
    def who(nameless: int, candidate: int) -> Any:
        """Of a hundred answers of each version."""
        rows = [answer(at, f"e{at}", 1 + at % 2) for at in range(200)]
        count = (nameless, candidate)
        return canary([says(at + 1, f"e{at}", "" if at // 2 < count[at % 2] else f"u{at}", True) for at in range(200)], rows).sources

    assert sources.NOBODY not in who(50, 50)["feedback"] and sources.NOBODY not in who(0, 30)["feedback"]
    assert sources.NOBODY in who(51, 0)["feedback"] and sources.NOBODY in who(10, 60)["feedback"]
