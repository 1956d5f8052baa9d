"""Weights that move with every finished episode, on a real server: a correction is learned without a night, whoever was killed is continued by
the next, what was deleted is given up, and nobody gets further ahead than allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
import tinker

from everlearn.errors import InvalidRequest
from everlearn.loop import changed, description
from everlearn.loop.moving import Moving, moving_of
from everlearn.loop.runner import Runner
from everlearn.loop.service import read
from tests.loop.test_cycle import TRUTHS, User, events
from tests.loop.test_cycle import parts as parts
from tests.loop.test_outcomes import Rows, thumb

pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"), pytest.mark.timeout(900)]
DESCRIPTION: dict[str, Any] = {
    "base": "tiny",
    "settle": 0.0,
    "triggers": {"continuous": True},
    "continuous": {"steps": 4, "gate_every": 20, "staleness": 80, "quiet": 0.0, "rewards": False},
    "update": {"rank": 8, "learning_rate": 1e-2, "batch": 6, "paraphrases": 1, "rehearsed": 1},
    "gate": {"owner": "maria", "promote": "automatic", "corrections": {"min_right": 0.9}},
}
Parts = Callable[[str, dict[str, Any]], tuple[Runner, User]]


def test_corrections_are_learned_as_they_come(http: httpx.Client, parts: Parts) -> None:
    runner, user = parts("moves", DESCRIPTION)
    assert moving_of(runner.run()).step == 0, "nothing was said"
    user.asks_all(6, corrects=True)
    now = runner.run()
    moving = moving_of(now)
    assert (now.state, now.champion) != ("collect", "moves@0"), events(http, "moves")[-1]
    assert (moving.step, moving.tried, moving.steps[now.champion]) == (20, 20, 20), "the gate is asked every 20 steps"
    assert user.asks_all(1) == 1.0
    told = events(http, "moves")
    assert told[-1]["kind"] == "promoted" and "dataset" not in {event["state"] for event in told}, "no batch was frozen to train on"
    learned = http.get(f"/v1/datasets/{moving.dataset}").raise_for_status().json()
    assert [one["version"] != "" for one in learned["versions"]], "the version is known to have learned from them"
    runner.run()
    other = Runner(runner.api, runner.service, "moves")  # it finds weights that are a version by now
    for one in (runner, other):
        assert moving_of(one.run()).step == moving.step, "nothing more was said, so nothing moves"


def test_the_next_runner_goes_on_where_the_last_was_killed(http: httpx.Client, parts: Parts) -> None:
    runner, user = parts("handed", DESCRIPTION)
    user.asks_all(6, corrects=True)
    while not (before := moving_of(read(runner.api, "handed"))).step:  # what was said of others' answers comes first
        assert runner.step()
    assert before.step == 4 and before.behind
    other = Runner(runner.api, runner.service, "handed")
    assert other.step()
    after = moving_of(read(runner.api, "handed"))
    assert (after.step, after.total > before.total) == (8, True)
    stale = runner.mover.at
    while (now := runner.run()).state != "collect":
        pass
    assert stale != runner.mover.at and now.champion != "handed@0", "the first one saw that it was behind, and went on from the note"
    assert moving_of(now).step % 4 == 0


def test_what_was_rolled_back_doesn_t_come_back_as_a_candidate(http: httpx.Client, parts: Parts) -> None:
    runner, user = parts("undone", DESCRIPTION)
    user.asks_all(6, corrects=True)
    now = runner.run()
    assert now.champion == "undone@1"
    user.say(http.get("/v1/records", params={"model": "undone"}).json()["data"][0]["id"], kind="demonstration", text="in france")
    for _ in range(5):  # as far as the gate is asked, which a slower runner would do next
        now = runner.mover.move(now, description.of(now.description)) or now
    assert moving_of(now).step - moving_of(now).tried == 20
    http.post("/v1/deployments/undone/rollback", json={"reason": "too curt"}).raise_for_status()
    now = runner.run()
    moving = moving_of(now)
    assert (now.state, now.champion, moving.serving) == ("collect", "undone@0", "undone@0"), events(http, "undone")[-1]
    assert (moving.path, moving.tried, events(http, "undone")[-1]["kind"]) == ("", 40, "rolled_back")


def test_weights_that_are_gone_are_learned_anew(http: httpx.Client, parts: Parts) -> None:
    """A day without a runner."""
    runner, user = parts("expired", DESCRIPTION)
    user.asks_all(2, corrects=True)
    while not (before := moving_of(read(runner.api, "expired"))).step:
        assert runner.step()
    weights = tinker.RestClient(base_url=runner.api.url, api_key=runner.api.key)
    told = [one for one in weights.list_user_checkpoints(limit=500).result().checkpoints if one.tinker_path == before.path]
    assert Runner(runner.api, runner.service, "expired").mover._renewed(before)
    again = [one for one in weights.list_user_checkpoints(limit=500).result().checkpoints if one.tinker_path == before.path]
    assert again[0].expires_at > told[0].expires_at, "as long as a runner looks at them they stay"
    weights.delete_checkpoint_from_tinker_path(before.path).result()
    other = Runner(runner.api, runner.service, "expired")
    assert other.step()
    after = moving_of(read(runner.api, "expired"))
    assert (after.path, after.step, after.owed) == ("", 4, 20)
    assert other.step() and moving_of(read(runner.api, "expired")).step == 8


def test_what_is_deleted_is_given_up_and_the_rest_learned_anew(http: httpx.Client, parts: Parts) -> None:
    runner, user = parts("anew", DESCRIPTION)
    user.asks_all(6, corrects=True)
    runner.run()
    moving = moving_of(read(runner.api, "anew"))
    items = runner.api.lines(f"/v1/datasets/{moving.dataset}/export", split="train", purpose="train")
    http.delete(f"/v1/records/{items[0]['record_id']}").raise_for_status()
    assert runner.step()
    again = moving_of(read(runner.api, "anew"))
    assert (again.path, again.base, again.owed, again.dataset) == ("", True, 20, ""), "from the base model, with what is left"
    now = runner.run()
    assert moving_of(now).step > moving.step and moving_of(now).dataset not in ("", moving.dataset)


def noted(http: httpx.Client, name: str) -> list[dict[str, Any]]:
    return [event for event in events(http, name) if event["kind"] == "noted"]


def test_what_is_edited_after_it_was_learned_is_learned_once_more_and_no_oftener(http: httpx.Client, parts: Parts) -> None:
    runner, user = parts("edited", DESCRIPTION)
    user.asks_all(6, corrects=True)
    runner.run()
    assert user.asks_all(1) == 1.0 and not noted(http, "edited")
    before = moving_of(runner.run())
    dataset = f"/v1/datasets/{before.dataset}/export"
    items = [one for split in ("train", "heldout") for one in runner.api.lines(dataset, split=split, purpose="evaluate")]
    about = [one["feedback_ids"][0] for one in items if one["messages"][-2]["content"] == "who is it?"]
    for said in about:
        http.patch(f"/v1/feedback/{said}", json={"text": "in france"}).raise_for_status()
    assert runner.step()
    moving = moving_of(read(runner.api, "edited"))
    assert (moving.step, moving.owed, moving.behind) == (before.step + 4, 16, before.behind), "a move, and nothing was said anew"
    (line,) = noted(http, "edited")
    assert line["evidence"]["feedback"] == dict.fromkeys(about, "edited")
    assert f"{len(about)} edited, 1 of them learned once more" in line["reason"], "the history claims no more than was done"
    assert len(line["evidence"]["learned"]) == 1, "of several about one question the newest counts, as in a dataset"
    other = Runner(runner.api, runner.service, "edited")  # the first was killed
    now = other.run()
    assert (moving_of(now).step, now.champion) == (before.step + 20, "edited@2")
    asked = {"model": "edited", "messages": [{"role": "user", "content": "who is it?"}], "temperature": 0, "max_tokens": 16}
    assert "in france" in http.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
    assert not runner.step() and not other.step() and len(noted(http, "edited")) == 1, "nobody takes it again"


def test_a_correction_deleted_before_any_candidate_is_unlearned_and_what_it_replaced_counts_again(http: httpx.Client, parts: Parts) -> None:
    runner, user = parts("unsaid", DESCRIPTION)
    user.asks_all(4, corrects=True)
    while not (before := moving_of(read(runner.api, "unsaid"))).step:
        assert runner.step()
    assert not before.dataset and before.fresh
    gone = before.fresh[-1]
    record = http.get(f"/v1/feedback/{gone}").json()["target"]["record_id"]
    user.say(record, kind="demonstration", text="in france")
    assert runner.step()
    later = moving_of(read(runner.api, "unsaid"))
    assert later.fresh[-1] not in before.fresh
    http.delete(f"/v1/feedback/{later.fresh[-1]}").raise_for_status()
    assert runner.step()
    anew = moving_of(read(runner.api, "unsaid"))
    assert (anew.path, anew.base, anew.fresh, anew.owed) == ("", True, [], 20)
    assert "deleted" in noted(http, "unsaid")[-1]["reason"]
    other = Runner(runner.api, runner.service, "unsaid")
    assert other.step()
    assert noted(http, "unsaid")[-1]["evidence"]["feedback"] == {gone: "restored"}
    now = other.run()
    assert now.champion == "unsaid@1" and user.asks_all(1) == 1.0
    assert len(noted(http, "unsaid")) == 2


def test_what_weights_that_began_anew_learned_is_unlearned_too(http: httpx.Client, parts: Parts) -> None:
    """Before they are shown to the gate, and though nothing was said since they began."""
    runner, user = parts("older", DESCRIPTION)
    user.asks_all(4, corrects=True)
    while not (before := moving_of(read(runner.api, "older"))).step:
        assert runner.step()
    tinker.RestClient(base_url=runner.api.url, api_key=runner.api.key).delete_checkpoint_from_tinker_path(before.path).result()
    other = Runner(runner.api, runner.service, "older")
    assert other.step() and moving_of(read(runner.api, "older")).fresh == []
    assert other.step()
    again = moving_of(read(runner.api, "older"))
    assert (again.path != "", again.step, again.dataset) == (True, 8, "") and set(again.fresh) <= set(before.fresh)
    http.delete(f"/v1/feedback/{again.fresh[0]}").raise_for_status()
    assert other.step()
    anew = moving_of(read(runner.api, "older"))
    assert (anew.path, anew.base, anew.fresh) == ("", True, []) and "deleted" in noted(http, "older")[-1]["reason"]


def test_what_was_learned_and_counts_no_longer_is_unlearned_when_it_is_deleted(http: httpx.Client, parts: Parts) -> None:
    """Two candidates later: of what the same person said first no dataset that is made now knows."""
    runner, user = parts("replaced", DESCRIPTION)
    user.asks_all(4, corrects=True)
    while not (now := read(runner.api, "replaced")).cycle.get("moving", {}).get("path"):
        assert runner.step()
    asked, first, frozen = description.of(now.description), moving_of(now).fresh, []
    for which in first[-2:]:  # the first before anything is frozen, the second when a dataset has it
        user.say(http.get(f"/v1/feedback/{which}").json()["target"]["record_id"], kind="demonstration", text="in france")
        assert runner.step()
        now = read(runner.api, "replaced")
        moving = runner.mover._frozen(now, asked, moving_of(now))
        assert moving is not None and (moving.fresh, moving.past) == ([], first[-2:][: len(frozen) + 1]) and moving.dataset not in frozen
        frozen.append(moving.dataset)
        runner.mover._noted(now, moving)
    dataset = http.get(f"/v1/datasets/{frozen[-1]}").json()
    http.delete(f"/v1/feedback/{first[-1]}").raise_for_status()
    assert http.get(f"/v1/datasets/{frozen[-1]}").json()["marks"] == dataset["marks"] == 0, "the newest dataset has nothing of it"
    assert runner.step()
    anew = moving_of(read(runner.api, "replaced"))
    assert (anew.path, anew.base, anew.past) == ("", True, []) and "deleted" in noted(http, "replaced")[-1]["reason"]


def test_changes_of_what_was_not_taken_or_is_known_already_are_no_matter() -> None:
    """The changes of a busy tenant, whose other feedback isn't asked for."""
    moving = Moving(behind="f2", changes=0, heard={"f1": 3})

    class Told:
        url = key = ""
        asked: list[str] = []

        def get(self, path: str, after: int = 0, limit: int = 0, **_: Any) -> Any:
            self.asked.append(path)
            if path == "/v1/feedback/changes":
                rows = [(1, "f1", "created"), (2, "f2", "created"), (3, "f1", "edited"), (4, "f3", "edited"), (5, "f2", "expired")]
                return {"data": [{"id": number, "feedback_id": which, "act": act} for number, which, act in rows if number > after]}
            raise AssertionError(path)

        post = patch = lines = get

    found = changed.since(Told(), "support", moving, 0, lambda _: True)
    assert (found.upto, found.heard, found.again, found.deleted, found.stale) == (5, {}, [], frozenset(), False)
    assert Told.asked == ["/v1/feedback/changes"], "one request"


def test_an_episode_that_goes_on_for_ever_holds_up_the_others_for_a_while_only() -> None:
    class Busy(Rows):
        """Somebody says something in the episode "long" every second."""

        def get(self, path: str, **more: Any) -> Any:
            if not path.startswith("/v1/episodes/"):
                return super().get(path, **more)
            return {"split": "train", "updated_at": self.until if path.endswith("long") else 0.0}

    said = [thumb(1, "short"), thumb(2, "long"), thumb(3, "short"), thumb(90, "long")]
    for until, taken in ((100.0, [1]), (202.0, [1, 2, 3])):
        lines: list[str] = []
        mover = Runner(Busy([], said, until), None, "support", lines.append, lambda now=until: now).mover  # type: ignore[misc]
        for _ in range(2):
            assert [one["created_at"] for one in mover._finished(Moving(), 10.0)] == taken
        assert len(lines) == 1 and "waiting for episode long" in lines[0], "what is waited for is said, once"


def test_weights_get_no_further_ahead_than_allowed() -> None:
    moving = Moving(step=100, steps={"support@3": 60}, serving="support@3")
    assert moving.ahead == 40
    with pytest.raises(InvalidRequest, match="gate_every"):
        description.of({"base": "tiny", "continuous": {"gate_every": 50, "staleness": 50}})
    with pytest.raises(InvalidRequest, match="moves by itself"):
        description.of({"base": "tiny", "triggers": {"continuous": True, "labels": 5}})


def test_a_rule_that_lets_nothing_through_bounds_how_far_they_go(http: httpx.Client, parts: Parts) -> None:
    gate = {"owner": "maria", "promote": "automatic", "kl": {"most": 1e-9}}
    runner, user = parts("bounded", {**DESCRIPTION, "gate": gate})
    user.asks_all(2, corrects=True)
    for _ in range(6):
        now = runner.run()
    moving = moving_of(now)
    assert (now.state, now.champion, moving.ahead) == ("collect", "bounded@0", 80), "it tries more of the same, as far as it may"
    assert {event["kind"] for event in events(http, "bounded")[1:]} == {"advanced", "rejected"}
    user.ask(next(iter(TRUTHS)), corrects=True)
    runner.step()
    assert moving_of(read(runner.api, "bounded")).ahead == 0, "they were given up, and begin where the champion is"
