"""The whole loop on a real server: users correct, a version learns it, passes the gate, shows itself to a share of them, and takes over;
then a bad one is stopped, and a rollback undoes what was promoted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import openai
import pytest
import tinker

from everlearn.cli.client import Client
from everlearn.loop.evidence import Evidence
from everlearn.loop.gate import Verdict, replay
from everlearn.loop.rule import Rule
from everlearn.loop.runner import Runner
from tests.live import AT_ONCE, KEY, LiveServer
from tests.loop.conftest import train

pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"), pytest.mark.timeout(900)]
TRUTHS = {"who is it?": "the lazy dog", "where is it?": "in france", "what jumps?": "the quick brown fox"}
DESCRIPTION: dict[str, Any] = {
    "base": "tiny",
    "settle": 0.0,
    "triggers": {"labels": 18},  # more than the mistakes that users meet while the candidate is tried, or the next cycle begins at once
    "update": {"rank": 8, "learning_rate": 2e-2, "epochs": 12, "batch": 3, "paraphrases": 2, "rehearsed": 1},
    "gate": {
        "owner": "maria",
        "promote": "automatic",
        "corrections": {"min_right": 0.9},
        "canary": {"steps": [{"share": 0.4, "min_feedback": 4}, {"share": 0.6, "min_feedback": 8}], "alpha": 0.2, "alpha_stop": 0.2},
        "guardrails": {"length": {"worse": "up", "margin": 0.5, "limit": 64.0, "min_num": 4}},
    },
}


class User:
    """Asks, and says what it thinks: a thumb, and on wish a correction."""

    def __init__(self, client: openai.OpenAI, http: httpx.Client, name: str):
        self.client, self.http, self.name, self.count = client, http, name, 0
        self.speakers: Iterator[str] | None = None  # who says it, one for each thing said; nobody is named without

    def ask(self, question: str, corrects: bool = False) -> bool:
        self.count += 1
        raw = self.client.chat.completions.with_raw_response.create(
            model=self.name,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=16,
            extra_headers={"x-everlearn-episode": f"{self.name}-{self.count}"},
        )
        text = raw.parse().choices[0].message.content or ""
        good, record = TRUTHS[question] in text, raw.headers["x-everlearn-record"]
        self.say(record, kind="boolean", value=good)
        if corrects and not good:
            self.say(record, kind="demonstration", text=TRUTHS[question])
        return good

    def say(self, record: str, **what: Any) -> None:
        who = {} if self.speakers is None else {"source_id": next(self.speakers)}
        self.http.post("/v1/feedback", json={"record_id": record, **who, **what}).raise_for_status()

    def asks_all(self, rounds: int, corrects: bool = False) -> float:
        """The share of good answers."""
        answers = [self.ask(question, corrects) for _ in range(rounds) for question in TRUTHS]
        return sum(answers) / len(answers)


@pytest.fixture
def parts(server: LiveServer, http: httpx.Client) -> Iterator[Callable[[str, dict[str, Any]], tuple[Runner, User]]]:
    """Makes a deployment; its runner and its user."""
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client,
        tinker.ServiceClient(base_url=server.url, api_key=KEY) as service,
    ):

        def make(name: str, description: dict[str, Any]) -> tuple[Runner, User]:
            http.post("/v1/deployments", json={"name": name, "description": description}).raise_for_status()
            return Runner(Client(server.url, KEY), service, name), User(client, http, name)

        yield make


def events(http: httpx.Client, name: str) -> list[dict[str, Any]]:
    """Oldest first."""
    found: list[dict[str, Any]] = http.get(f"/v1/deployments/{name}/history", params={"limit": 100}).raise_for_status().json()["data"]
    return found[::-1]


def replayed(event: dict[str, Any]) -> str:
    """The decision of an event's verdict, derived again from what stands beside it."""
    evidence = event["evidence"]
    verdict = msgspec.convert(evidence["verdict"], Verdict)
    replay(verdict, msgspec.convert(evidence["rule"], Rule), msgspec.convert(evidence["evidence"], Evidence))
    return verdict.decision


@pytest.mark.slow  # as in tests/demo/test_story.py
def test_a_correction_today_is_a_better_answer_and_there_is_a_way_back(server: LiveServer, http: httpx.Client, parts: Any) -> None:
    runner, user = parts("helpdesk", DESCRIPTION)
    assert runner.run().state == "collect", "without labels nothing is due"
    assert user.asks_all(6, corrects=True) == 0.0, "the untaught model knows nothing of it"
    tried = runner.run()
    assert (tried.state, tried.champion, tried.candidate, tried.share) == ("canary", "helpdesk@0", "helpdesk@1", 0.4)
    learned = http.get(f"/v1/datasets/{tried.cycle['dataset']}").json()
    assert [one["version"] != "" for one in learned["versions"]] == [True], "the version is known to have learned from the dataset"
    for _ in range(12):
        user.asks_all(4)
        now = runner.run()
        if now.state == "collect":
            break
    assert (now.state, now.champion, now.previous) == ("collect", "helpdesk@1", "helpdesk@0"), events(http, "helpdesk")[-1]
    assert user.asks_all(2) == 1.0, "yesterday's mistakes are gone"
    told = events(http, "helpdesk")
    assert [event["state"] for event in told] == ["collect", "dataset", "update", "gate", "canary", "canary", "collect"]
    assert told[-1]["kind"] == "promoted" and "maria" in told[-1]["reason"]
    assert [replayed(event) for event in told[4:]] == ["continue", "continue", "promote"]

    bad = train(server, "who is it?", "in france")
    http.post("/v1/adapters", json={"name": "helpdesk", "path": bad}).raise_for_status()
    runner.enter(2)
    stopped = runner.run()
    assert (stopped.state, stopped.champion, stopped.candidate) == ("collect", "helpdesk@1", None), "the gate has stopped it"
    last = events(http, "helpdesk")[-1]
    assert last["kind"] == "rejected" and "corrections" in last["reason"] and replayed(last) == "reject"
    assert user.asks_all(1) == 1.0, "nobody met it"

    began = time.monotonic()
    http.post("/v1/deployments/helpdesk/rollback", json={"reason": "just to see"}).raise_for_status()
    assert not user.ask("who is it?") and time.monotonic() - began <= AT_ONCE


def test_a_bad_version_that_fooled_the_gate_is_stopped_by_its_users(server: LiveServer, http: httpx.Client, parts: Any) -> None:
    """A rule without offline checks lets everything into the canary; there it costs a bounded number of answers."""
    gate = {"owner": "maria", "promote": "automatic", "canary": {"steps": [{"share": 0.5, "min_feedback": 1000}], "alpha_stop": 0.2}}
    runner, user = parts("fooled", {"base": "tiny", "gate": gate})
    good, bad = (train(server, "who is it?", answer) for answer in ("the lazy dog", "in france"))
    for path in (good, bad):
        http.post("/v1/adapters", json={"name": "fooled", "path": path}).raise_for_status()
    http.post("/v1/deployments/fooled/promote", json={"number": 1}).raise_for_status()
    runner.enter(2)
    assert runner.run().state == "canary"
    for _ in range(10):
        for _ in range(10):
            user.ask("who is it?")
        if runner.run().state == "collect":
            break
    last = events(http, "fooled")[-1]
    assert (last["kind"], last["champion"], last["candidate"]) == ("rejected", "fooled@1", None), json.dumps(last)
    assert all(user.ask("who is it?") for _ in range(5))


def test_a_rule_that_asks_waits_for_a_person(server: LiveServer, http: httpx.Client, parts: Any) -> None:
    gate = {"owner": "maria", "corrections": {"min_right": 0.9}}
    runner, user = parts("asking", {**DESCRIPTION, "gate": gate})
    user.asks_all(6, corrects=True)
    waiting = runner.run()
    assert (waiting.state, waiting.candidate) == ("gate", "asking@1") and "person" in waiting.cycle["asks"]
    assert runner.run().revision == waiting.revision, "it is asked once"
    assert http.post("/v1/deployments/asking/promote", json={"rule": True}).json()["error"]["code"] == "conflict"
    stricter = {**DESCRIPTION, "gate": {**gate, "corrections": {"min_right": 0.8}}}
    http.patch("/v1/deployments/asking", json={"description": stricter}).raise_for_status()
    again = runner.run()
    assert (again.state, again.candidate) == ("gate", "asking@1") and again.cycle["rule"]["corrections"]["min_right"] == 0.8
    assert runner.run().revision == again.revision, "and under the new rule once more"
    http.post("/v1/deployments/asking/promote", json={"reason": "reads well"}).raise_for_status()
    assert user.asks_all(1) == 1.0


def test_a_candidate_that_waits_for_a_person_is_judged_by_a_rule_that_changed(server: LiveServer, http: httpx.Client, parts: Any) -> None:
    runner, user = parts("rethought", {"base": "tiny", "gate": {"owner": "maria"}})
    http.post("/v1/adapters", json={"name": "rethought", "path": train(server, "who is it?", "the lazy dog")}).raise_for_status()
    for gate, ended in (({"kl": {"most": 1e-9}}, "rejected"), ({"promote": "automatic", "kl": {"most": 50.0}}, "promoted")):
        http.patch("/v1/deployments/rethought", json={"description": {"base": "tiny", "gate": {"owner": "maria"}}}).raise_for_status()
        runner.enter(1)
        assert runner.run().cycle["asks"]
        http.patch(
            "/v1/deployments/rethought", json={"description": {"base": "tiny", "gate": {"owner": "maria", **gate}}}
        ).raise_for_status()
        now = runner.run()
        last = events(http, "rethought")[-1]
        assert (now.state, last["kind"]) == ("collect", ended) and "asks" not in now.cycle and replayed(last)
    assert user.ask("who is it?")


def test_a_cycle_ends_with_its_budget_and_with_nothing_to_learn(http: httpx.Client, parts: Any) -> None:
    runner, user = parts("frugal", {**DESCRIPTION, "budget": {"tokens": 100}})
    runner.begin("by hand")
    assert runner.run().state == "collect" and events(http, "frugal")[-1]["kind"] == "ended"
    user.asks_all(6, corrects=True)
    assert runner.run().state == "collect"
    last = events(http, "frugal")[-1]
    assert last["kind"] == "rejected" and "100" in last["reason"]


def test_what_is_deleted_during_an_update_begins_it_anew(http: httpx.Client, parts: Any) -> None:
    runner, user = parts("forgetful", DESCRIPTION)
    user.asks_all(6, corrects=True)
    while runner.api.get("/v1/deployments/forgetful")["state"] != "update":
        assert runner.step()
    before = runner.api.get("/v1/deployments/forgetful")
    noted = {**before["cycle"], "wordings": {"r": ["what?"]}, "saved": {"step": 10, "path": "tinker://x", "tokens": 3}}
    runner.api.patch("/v1/deployments/forgetful", {"cycle": noted, "expected": before["revision"]})
    learned = runner.api.lines(f"/v1/datasets/{before['cycle']['dataset']}/export", split="train", purpose="train")
    http.delete(f"/v1/records/{learned[0]['record_id']}").raise_for_status()
    assert runner.step(), "there is more to do"
    now = runner.api.get("/v1/deployments/forgetful")
    made = runner.api.get(f"/v1/datasets/{now['cycle']['dataset']}")
    assert (made["rebuilt_from"], made["items"]["train"]) == (before["cycle"]["dataset"], len(learned) - 1)
    assert now["state"] == "update" and now["cycle"] == {**before["cycle"], "dataset": made["id"]}, "what learned from it is gone"
    for item in learned[1:]:
        http.delete(f"/v1/records/{item['record_id']}").raise_for_status()
    assert not runner.step()
    last = events(http, "forgetful")[-1]
    assert (last["state"], last["kind"]) == ("collect", "ended") and "deleted" in last["reason"]
