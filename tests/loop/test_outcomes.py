"""What the gate is told of traffic, from the rows that a server lists."""

from __future__ import annotations

from typing import Any

from everlearn.api import shadow
from everlearn.loop import outcomes
from everlearn.loop.evidence import Outcome
from everlearn.loop.outcomes import Traffic
from everlearn.loop.service import Deployed
from everlearn.store import review

NOW = Deployed("support", "tiny", "canary", "support@1", "support@2", None, 0.5, 0.0, False, 3, {"base": "tiny"}, {}, 0.0)


class Rows:
    """The listings of a server, as far as one has come by `until`; newest first, as the server sends them."""

    url, key = "", ""

    def __init__(self, records: list[dict[str, Any]], feedback: list[dict[str, Any]], until: float):
        self.listed = {"/v1/records": records, "/v1/feedback": feedback, "/v1/feedback/summary": []}
        self.until = until

    def get(self, path: str, **_: Any) -> Any:
        rows = [row for row in self.listed[path] if row["created_at"] <= self.until]
        return {
            "data": sorted(rows, key=lambda row: row["created_at"], reverse=True),
            "has_more": False,
            "last_id": None,
            "source_cap": 100.0,
        }

    def post(self, path: str, body: Any = None) -> Any:
        raise AssertionError(path)

    patch = post

    def lines(self, path: str, **_: Any) -> list[dict[str, Any]]:
        raise AssertionError(path)


def answer(at: int, episode: str, version: int = 1, tokens: int = 8, route: str = "chat") -> dict[str, Any]:
    row = {"id": f"r{at:06}-{episode}-{route}", "created_at": at, "episode_id": episode, "model": f"support@{version}", "route": route}
    return {**row, "usage": {"completion_tokens": tokens}, "finish_reasons": ["stop"], "seconds": 0.1}


def thumb(at: int, episode: str) -> dict[str, Any]:
    row = {"id": f"f{at:06}", "created_at": at, "kind": "boolean", "name": "", "source": "human", "value": 1.0}
    return {**row, "answer": None, "target": {"episode_id": episode, "record_id": None, "choice": 0, "span": None}}


def traffic(records: list[dict[str, Any]], feedback: list[dict[str, Any]], until: float, settle: float = 100.0) -> Traffic:
    return Traffic(Rows(records, feedback, until), NOW, 0.0, settle, until)


def guardrails(found: Traffic, names: list[str]) -> dict[str, tuple[Outcome, ...]]:
    told: dict[str, tuple[Outcome, ...]] = outcomes.evident(found.told(names))["guardrails"]
    return told


def feedback_of(found: Traffic) -> tuple[Outcome, ...]:
    told: tuple[Outcome, ...] = outcomes.evident(found.told([]))["feedback"]
    return told


def test_feedback_alone_doesn_t_bring_an_episode_into_the_rate() -> None:
    """The same people with both versions, the candidate's share just grown: what is known so far shows no difference."""
    records = [answer(10 * number, f"e{number}", 1 + number % 2) for number in range(40)]
    feedback = [thumb(10 * number + 5, f"e{number}") for number in range(40) if number % 4 < 2]
    assert guardrails(traffic(records, feedback, until=99.0), ["feedback_rate"])["feedback_rate"] == (), "nobody's time is over"
    found = guardrails(traffic(records, feedback, until=300.0), ["feedback_rate"])["feedback_rate"]
    assert len(found) == 20
    for arm in (False, True):
        values = [outcome.value for outcome in found if outcome.candidate == arm]
        assert sum(values) / len(values) == 0.5


def test_the_rate_only_grows() -> None:
    """Feedback that comes late, and episodes that go on after their time, change nothing of what was told."""
    records = [
        answer(0, "early"),
        answer(20, "talks", 2),
        answer(90, "talks", 2),
        answer(400, "talks", 2),
        answer(30, "quiet"),
        answer(310, "late"),
    ]
    feedback = [thumb(10, "early"), thumb(150, "talks"), thumb(250, "quiet")]
    before: tuple[Outcome, ...] = ()
    for until in range(0, 600, 10):
        found = guardrails(traffic(records, feedback, float(until)), ["feedback_rate"])["feedback_rate"]
        assert found[: len(before)] == before, until
        before = found
    assert before == (Outcome(False, 1.0), Outcome(False, 0.0), Outcome(True, 1.0), Outcome(False, 0.0))


def test_answers_in_the_shadow_are_compared_as_if_both_were_cut_there() -> None:
    assert outcomes.SHADOW_TOKENS == shadow.SHADOW_TOKENS
    records = [answer(1, "e", 1, tokens=2000), answer(2, "e", 2, tokens=512, route="shadow")]
    found = traffic(records, [], 10.0).unseen(["length", "cut_off", "seconds", "tool_calls"])
    assert found == {
        "length": (Outcome(False, 512.0), Outcome(True, 512.0)),
        "tool_calls": (Outcome(False, 0.0), Outcome(True, 0.0)),
    }
    assert [one.value for one in guardrails(traffic(records, [], 10.0), ["length"])["length"]] == [2000.0], "what was shown counts whole"


def test_vectors_are_no_answers() -> None:
    """A deployment's name is asked for embeddings too. Nobody judges those, so they are no episodes, and of no episode's means."""
    vectors = [answer(5, "e", 1, tokens=0, route="embeddings"), answer(6, "only-vectors", 2, tokens=0, route="embeddings")]
    both = [answer(1, "e", 1, tokens=40), *vectors]
    found, plain = traffic(both, [], 300.0), traffic(both[:1], [], 300.0)
    assert set(found.episodes) == {"e"}
    assert guardrails(found, ["length", "feedback_rate", "cut_off"]) == guardrails(plain, ["length", "feedback_rate", "cut_off"])
    assert found.unseen(["length"]) == plain.unseen(["length"])
    assert guardrails(found, ["length"])["length"] == (Outcome(False, 40.0),)


def test_only_people_who_met_the_answer_are_feedback() -> None:
    rows, met = [answer(1, "a")], thumb(3, "a")
    others = [
        thumb(4, "a") | {"source": "model", "value": 0.0},
        thumb(5, "a") | {"source": "program", "kind": "float", "value": 0.1},
        thumb(6, "a") | {"name": review.NAME, "value": 0.0},
        thumb(7, "a") | {"name": review.NAME, "kind": "demonstration", "value": None, "answer": "in spain"},
    ]
    assert feedback_of(traffic(rows, [met, *others], 10.0)) == (Outcome(False, 1.0),)
    assert feedback_of(traffic(rows, others, 300.0)) == () and guardrails(traffic(rows, others, 300.0), ["feedback_rate"])[
        "feedback_rate"
    ] == (Outcome(False, 0.0),)


def test_an_outcome_is_theirs_on_whom_its_mean_hangs() -> None:
    """Four are content with an episode and one isn't: without that one it would be furthest from what it is, though others say more."""
    names = ("ana", "ben", "cleo", "dan")
    others = [says(12 + at, f"o{at}", "ana", 1.0) for at in range(5)]
    said = [*(says(10, "e", who, 1.0) for who in names), says(11, "e", "eve", 0.0), *others]
    records = [answer(1, "e"), *(answer(2, f"o{at}") for at in range(5))]
    found = traffic(records, said, 300.0).told(["feedback_rate"])
    first = found["feedback"][0]
    assert (first.outcome.value, first.source) == (0.8, "eve")
    assert {one.source for one in found["feedback_rate"]} == {"ana"}, "that something was said hangs on none of them"
    two = [row for row in said if row["source_id"] in ("ana", "eve")]
    assert traffic(records, two, 300.0).told([])["feedback"][0].source == "ana", "two move it by the same: who spoke of more"
    late = [*two, says(250, "e", "fay", 0.5)]
    late = [row | {"created_at": 250} if row["source_id"] == "ana" and row["target"]["episode_id"] == "e" else row for row in late]
    rate = traffic(records, late, 300.0).told(["feedback_rate"])["feedback_rate"]
    assert sorted(one.source or "" for one in rate) == ["ana"] * 5 + ["eve"], "of those who spoke in time"


def about(at: int, row: dict[str, Any], value: float) -> dict[str, Any]:
    """A word about one answer."""
    said = thumb(at, row["episode_id"]) | {"id": f"f{at:06}-{row['id']}", "value": value}
    return said | {"target": {**said["target"], "record_id": row["id"]}}


def test_an_episode_ends_for_its_arm_where_the_other_one_answers() -> None:
    """The share has grown at 100: "goes" was the champion's until then, "stays" is the candidate's. What is said of the later answers of
    the one counts for neither, whenever it comes; what was known before doesn't change."""
    goes = [answer(10, "goes", 1, tokens=8), answer(110, "goes", 2, tokens=100), answer(120, "goes", 1, tokens=100)]
    stays = [answer(20, "stays", 2, tokens=8), answer(115, "stays", 2, tokens=10)]
    bad = [about(at, row, 0.0) for at, row in ((130, goes[1]), (131, goes[2]))]
    whole = [thumb(95, "goes"), thumb(140, "goes") | {"value": 0.0}]
    later = [about(135, goes[0], 0.5), about(136, stays[1], 1.0)]
    records = sorted([*goes, *stays], key=lambda row: row["created_at"])
    before = feedback_of(traffic(records, [*bad, *whole, *later], 100.0))
    assert before == (Outcome(False, 1.0),)
    found = traffic(records, [*bad, *whole, *later], 1000.0)
    assert feedback_of(found) == (Outcome(False, 0.75), Outcome(True, 1.0)), "a late word about the first answer is about the first arm"
    assert feedback_of(traffic(records, bad, 1000.0)) == (), "the champion didn't say that, and to the candidate chance didn't give it"
    told = guardrails(found, ["length", "feedback_rate"])
    assert told["length"] == (Outcome(False, 8.0), Outcome(True, 9.0))
    assert told["feedback_rate"] == (Outcome(True, 1.0),), "it had less time to be spoken of than others"


def test_an_episode_whose_time_was_over_stays_in_the_rate() -> None:
    records = [answer(10, "goes", 1), answer(500, "goes", 2)]
    for until in (200.0, 1000.0):
        assert guardrails(traffic(records, [thumb(50, "goes"), thumb(505, "goes")], until), ["feedback_rate"])["feedback_rate"] == (
            Outcome(False, 1.0),
        )


def test_words_about_answers_from_before_are_nobody_s() -> None:
    """Said in the canary, of what the champion had answered before it began: no word about either arm's answers in it."""
    before, since = answer(10, "e", 1), answer(110, "e", 2)
    rows = Rows([before, since], [about(120, before, 0.0), about(121, since, 1.0)], 300.0)
    assert feedback_of(Traffic(rows, NOW, 100.0, 50.0, 300.0)) == (Outcome(True, 1.0),)


def says(at: int, episode: str, who: str, value: float) -> dict[str, Any]:
    return thumb(at, episode) | {"id": f"f{at:06}-{who}", "source_id": who, "value": value}
