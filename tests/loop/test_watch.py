"""A version that went live and turns out worse: the runner goes back by itself, on a real server, and the next user meets the old one."""

from __future__ import annotations

import time
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from everlearn.loop.description import Description
from everlearn.loop.evidence import Outcome
from everlearn.loop.outcomes import Traffic
from everlearn.loop.rule import WatchRule, read_rule
from everlearn.loop.service import read
from everlearn.loop.watch import Watch, cusum
from tests.live import AT_ONCE, LiveServer
from tests.loop.conftest import train
from tests.loop.test_cycle import TRUTHS, User, events, parts, replayed  # noqa: F401  (parts is a fixture)
from tests.loop.test_outcomes import NOW, Rows, answer, feedback_of, guardrails, thumb, traffic

pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"), pytest.mark.timeout(600)]
GATE: dict[str, Any] = {
    "owner": "maria",
    "watch": {"margin": 0.1, "alpha": 0.1, "min_record": 20, "labels": 0},
    "guardrails": {"length": {"worse": "both", "margin": 0.5, "limit": 64.0}},
}


def test_what_went_live_and_is_worse_is_taken_back(server: LiveServer, http: httpx.Client, parts: Any) -> None:  # noqa: F811
    runner, user = parts("watched", {"base": "tiny", "settle": 0.0, "gate": GATE})
    for said in ("the lazy dog", "in france"):
        http.post("/v1/adapters", json={"name": "watched", "path": train(server, "who is it?", said)}).raise_for_status()
    http.post("/v1/deployments/watched/promote", json={"number": 1}).raise_for_status()
    assert all(user.ask("who is it?") for _ in range(24)), "the record of the good one"
    assert runner.run().champion == "watched@1"
    http.post("/v1/deployments/watched/promote", json={"number": 2, "reason": "looked good to me"}).raise_for_status()
    for _ in range(30):
        assert not user.ask("who is it?")
        now = runner.run()
        if now.champion == "watched@1":
            break
    assert (now.champion, now.previous, now.state) == ("watched@1", None, "collect")
    last = events(http, "watched")[-1]
    assert last["kind"] == "rolled_back" and "live:feedback" in last["reason"] and replayed(last) == "reject"
    assert user.ask("who is it?"), "the old one answers"
    assert not runner.guard.look(now), "there is nothing before it to be held against"


def test_once_it_is_seen_the_old_answer_is_back_at_once(server: LiveServer, http: httpx.Client, parts: Any) -> None:  # noqa: F811
    runner, user = parts("quick", {"base": "tiny", "settle": 0.0, "gate": GATE})
    for said in ("the lazy dog", "in france"):
        http.post("/v1/adapters", json={"name": "quick", "path": train(server, "who is it?", said, steps=20)}).raise_for_status()
    for number, times in ((1, 24), (2, 30)):
        http.post("/v1/deployments/quick/promote", json={"number": number}).raise_for_status()
        user.speakers = (f"u{at}" for at in range(1000))
        if number == 2:
            user.speakers = iter(["eve"] * times)
            assert sum(user.ask("who is it?") for _ in range(times)) == 0
            assert not runner.guard.look(read(runner.api, "quick")), "one alone decides nothing, whatever they say"
            user.speakers = (f"u{at}" for at in range(1000))
        assert sum(user.ask("who is it?") for _ in range(times)) == (times if number == 1 else 0)
    began = time.monotonic()
    assert runner.guard.look(read(runner.api, "quick"))
    assert user.ask("who is it?") and time.monotonic() - began <= AT_ONCE
    time.sleep(1.1)  # records are dated in whole seconds
    http.post("/v1/deployments/quick/promote", json={"number": 2, "reason": "once more"}).raise_for_status()
    assert not runner.guard.look(read(runner.api, "quick")), "what was said while it served before is past"


def test_a_false_alarm_is_as_rare_as_promised_also_behind_a_short_record() -> None:
    """100 outcomes say little of the truth. The worst that is tolerated, the margin used up, over 2,000 outcomes."""
    asked, false = WatchRule(margin=0.05, alpha=0.01, min_record=100, labels=100_000), 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        record = [Outcome(False, float(value)) for value in rng.random(100) < 0.75]
        false += cusum(asked, record, [Outcome(True, float(value)) for value in rng.random(2000) < 0.70])[0].veto
    assert false / 300 <= 0.01 / 2 + 2000 / 100_000, "the mean of such a record taken for the truth gives 14 %"
    good = [Outcome(False, float(number % 4 > 0)) for number in range(400)]
    assert cusum(asked, good, [Outcome(True, float(number % 2)) for number in range(2000)])[0].veto, "a harm is found all the same"


def test_a_look_goes_on_behind_the_last_and_the_record_ends_with_the_promotion() -> None:
    found = [answer(at, f"e{at}", 1) for at in range(0, 2000, 100)] + [answer(at, f"e{at}", 2) for at in range(2000, 4000, 100)]
    said, seen = [thumb(row["created_at"] + 1, row["episode_id"]) for row in found], []
    server = Rows([*found, answer(2050, "late", 1)], [*said, thumb(2500, "e1900") | {"value": 0.0}], 3000.0)
    listed = server.get
    now = msgspec.structs.replace(NOW, champion="support@2", previous="support@1")
    watch = Watch(server, "support", clock=lambda: server.until)
    asked = read_rule('[watch]\nmin_record = 5\n[guardrails.refusal]\nworse = "up"\nmargin = 0.1')
    server.get = lambda path, **more: (  # type: ignore[method-assign]
        seen.append(path) or (listed(path, **more) if path in server.listed else {"content": {"answer": [{"content": "in france"}]}})
    )
    for until, live in ((3000.0, 11), (3900.0, 20)):
        server.until = until
        shown = watch.evidence(now, Description("tiny"), asked, asked.watch or WatchRule(), 1999.0)
        assert sum(one.candidate for one in shown.guardrails["refusal"]) == live
        assert [one.value for one in shown.feedback if not one.candidate] == [1.0] * 20, "what was said later is none of the record's"
    texts = [path for path in seen if path.startswith("/v1/records/")]
    assert len(texts) == len(set(texts)) == 41, "each text is read once"
    assert len(watch.known["refusal"]) == 21, "the record's are not kept"


def told(found: Traffic) -> list[tuple[bool, float]]:
    return [(one.candidate, one.value) for one in feedback_of(found)]


def test_of_a_user_whom_chance_assigned_the_first_episode_counts() -> None:
    """Ten conversations of one person are one outcome; conversations that the client named were assigned one by one."""
    found = [answer(number, f"ep_{number}", 2) | {"user": "ana"} for number in range(1, 11)]
    found += [answer(20 + number, f"named{number}", 1) | {"user": "ben"} for number in range(3)]
    said = [thumb(100 + row["created_at"], row["episode_id"]) for row in found]
    assert told(traffic(found, said, until=300.0)) == [(True, 1.0), *[(False, 1.0)] * 3]
    assert len(guardrails(traffic(found, said, until=300.0), ["length", "feedback_rate"])["feedback_rate"]) == 4


def test_tools_that_failed_are_counted_by_episode() -> None:
    rows = [answer(1, "a", 1), answer(2, "b", 2)]
    ended = [
        thumb(at, episode) | {"kind": "outcome", "source": "program", "value": value}
        for at, episode, value in ((3, "b", 0.0), (4, "b", 1.0), (5, "a", 1.0))
    ]
    assert [(one.candidate, one.value) for one in guardrails(traffic(rows, ended, 10.0), ["tool_errors"])["tool_errors"]] == [
        (True, 0.5),
        (False, 0.0),
    ]


def test_a_demonstration_of_what_was_answered_is_approval() -> None:
    """A clerk sends answers, edited or as they were."""
    rows = [answer(at, one, 1 + at % 2) | {"id": one} for at, one in enumerate("abcd", 1)]
    sent = [
        thumb(at, one)
        | {"kind": "demonstration", "answer": text, "target": {"episode_id": one, "record_id": one, "choice": choice, "span": span}}
        for at, one, text, choice, span in (
            (5, "a", "in france ", 0, None),
            (6, "b", "in france", 0, None),
            (7, "c", "in france", 1, None),
            (8, "d", "in france", 0, [0, 1]),
        )
    ]
    sent[0]["text"] = "sent as it was"
    server = Rows(rows, sent, 10.0)
    listed, texts = server.get, {"a": ["in france"], "b": ["in spain"], "c": ["in spain", "in france"], "d": ["in france"]}
    server.get = (
        lambda path, **more: (  # type: ignore[method-assign]
            {"content": {"answer": [{"content": text} for text in texts[path[12:]]]}} if path[12:] in texts else listed(path, **more)
        )
    )
    assert [value for _, value in told(Traffic(server, NOW, 0.0, 5.0, 10.0))] == [1.0, 0.0, 1.0, 0.0], "by its choice; a span is corrected"
