"""Deployments on both databases: what serves, what is tried, the log, and acts that arrive twice, too late or out of turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everlearn.errors import Conflict, InvalidRequest, NotFound
from everlearn.store import deployments, names
from everlearn.store.db import Database
from everlearn.store.deployments import Act, Deployment
from tests.store.acts import do, new_run
from tests.store.test_names import give, save

ASKS: dict[str, Any] = {"base": "tiny"}
SIGNED: dict[str, Any] = {"base": "tiny", "gate": {"owner": "maria", "promote": "automatic", "canary": {}}}


@pytest.fixture
def two(db: Database) -> Database:
    """A store with support@1 and support@2."""
    run = new_run(db)
    for seq in (1, 2):
        give(db, "support", save(db, run, seq, f"ck{seq}"))
    return db


def create(db: Database, description: dict[str, Any] = ASKS, champion: int | None = None, name: str = "support") -> Deployment:
    return do(db, lambda conn: deployments.create(conn, "a", name, "tiny", description, Act("ana", "first"), champion))


def get(db: Database) -> Deployment:
    return db.read(lambda conn: deployments.get(conn, "a", "support"))


def advance(db: Database, to: str, expected: int | None = None, reason: str = "because", **more: Any) -> Deployment:
    act = Act("runner", reason, {"why": to}, get(db).revision if expected is None else expected)
    return do(db, lambda conn: deployments.advance(conn, "a", "support", to, act, **more))


def promote(db: Database, **more: Any) -> Deployment:
    return do(db, lambda conn: deployments.promote(conn, "a", "support", Act("ana", "good"), **more))


def rollback(db: Database, **more: Any) -> Deployment:
    return do(db, lambda conn: deployments.rollback(conn, "a", "support", Act("ana", "bad"), **more))


def to_canary(db: Database, candidate: int = 2) -> Deployment:
    advance(db, "gate", candidate=candidate)
    advance(db, "shadow", shadow=0.5)
    return advance(db, "canary", share=0.25)


def log(db: Database) -> list[str]:
    return [event.kind for event in db.read(lambda conn: deployments.history(conn, "a", "support"))][::-1]


def test_a_name_serves_what_it_meant_and_a_new_one_the_base_model(two: Database) -> None:
    assert create(two).champion == 1 and create(two, name="fresh").champion == 0
    assert create(two) == create(two), "the same again is the same"
    with pytest.raises(Conflict, match="another description"):
        create(two, {"base": "tiny", "settle": 1.0})
    with pytest.raises(Conflict, match="of base model tiny, and deployment other of big"):
        give(two, "other", save(two, new_run(two), 9, "ck9"))
        do(two, lambda conn: deployments.create(conn, "a", "other", "big", ASKS, Act("ana")))
    with pytest.raises(NotFound, match="no deployment"):
        two.read(lambda conn: deployments.get(conn, "b", "support"))


def test_a_cycle_from_label_to_champion_and_back(two: Database) -> None:
    create(two)
    advance(two, "dataset", cycle={"id": "c1"})
    advance(two, "update")
    advance(two, "gate", candidate=2)
    shadow = advance(two, "shadow", shadow=0.5)
    assert (shadow.candidate, shadow.shadow, shadow.share, shadow.cycle) == (2, 0.5, 0.0, {"id": "c1"})
    canary = advance(two, "canary", share=0.05)
    assert (canary.share, canary.shadow, canary.champion) == (0.05, 0.0, 1)
    assert advance(two, "canary", share=0.25).share == 0.25
    live = promote(two)
    assert (live.champion, live.previous, live.candidate, live.state, live.share) == (2, 1, None, "collect", 0.0)
    assert two.read(lambda conn: names.get(conn, "a", "support")).number == 2, "the name follows"
    back = rollback(two)
    assert (back.champion, back.previous) == (1, None) and two.read(lambda conn: names.get(conn, "a", "support")).number == 1
    assert log(two) == ["created", *["advanced"] * 6, "promoted", "rolled_back"]
    events = two.read(lambda conn: deployments.history(conn, "a", "support"))
    assert events[2].evidence == {"why": "canary"} and events[1].actor == "ana" and events[2].was == "canary"


def test_a_rollback_gives_up_what_is_tried_before_it_moves_the_champion(two: Database) -> None:
    create(two)
    to_canary(two)
    stopped = rollback(two)
    assert (stopped.champion, stopped.candidate, stopped.share, stopped.state) == (1, None, 0.0, "collect")
    assert log(two)[-1] == "rejected"
    with pytest.raises(Conflict, match="one champion only"):
        rollback(two)
    assert rollback(two, number=0).champion == 0, "the base model is a version like any other"


def test_the_champion_named_again_gives_up_the_candidate_and_keeps_what_was_before(two: Database) -> None:
    create(two)
    promote(two, number=2)
    for act in (promote, rollback):
        to_canary(two, candidate=1)
        stopped = act(two, number=2)
        assert (stopped.champion, stopped.candidate, stopped.previous, stopped.state) == (2, None, 1, "collect")
        assert log(two)[-1] == "rejected" and act(two, number=2) == stopped
    to_canary(two, candidate=2)
    assert promote(two).previous == 1, "a candidate that is the champion changes nothing but the log"
    assert rollback(two).champion == 1


def test_a_log_stays_until_its_name_means_nothing(two: Database) -> None:
    create(two)
    create(two, name="fresh")
    soon = time.time() + 60.0
    assert do(two, lambda conn: deployments.sweep_log(conn, soon)) == 0
    for name in ("support", "fresh"):
        do(two, lambda conn, name=name: deployments.delete(conn, "a", name))
    assert do(two, lambda conn: deployments.sweep_log(conn, soon - 7200.0)) == 0, "it is asked how that name came to its end"
    assert do(two, lambda conn: deployments.sweep_log(conn, soon)) == 1
    assert log(two) == ["created"], "support has versions yet"
    do(two, lambda conn: names.delete(conn, "a", "support"))
    assert do(two, lambda conn: deployments.sweep_log(conn, soon)) == 1


def test_a_name_given_up_on_the_base_model_means_its_first_version_again(two: Database) -> None:
    create(two, champion=0)
    promote(two, number=2)
    rollback(two, number=0)
    do(two, lambda conn: deployments.delete(conn, "a", "support"))
    assert two.read(lambda conn: names.get(conn, "a", "support")).number == 1, "not the one that was rolled back"
    create(two, name="fresh")
    do(two, lambda conn: deployments.delete(conn, "a", "fresh"))
    with pytest.raises(NotFound):
        two.read(lambda conn: names.get(conn, "a", "fresh"))


def test_what_an_update_noted_of_users_words_ends_with_it(two: Database) -> None:
    create(two)
    noted = {"id": "c1", "wordings": {"rec_1": ["where does Nora live?"]}}
    ends: list[Callable[[], Deployment]] = [
        lambda: advance(two, "gate", candidate=2),
        lambda: advance(two, "collect", kind="ended"),
        lambda: promote(two, number=2),
        lambda: rollback(two, number=1),
    ]
    for end in ends:
        advance(two, "dataset", cycle={"id": "c1"})
        begun = advance(two, "update")
        there = do(two, lambda conn, seen=begun.revision: deployments.note(conn, "a", "support", noted, seen))
        assert there.cycle == noted, "the next runner goes on with it"
        assert end().cycle == {"id": "c1"}
        if get(two).state != "collect":
            advance(two, "collect", kind="rejected")


def test_states_follow_each_other_in_one_order(two: Database) -> None:
    create(two)
    for wrong in ("update", "canary", "shadow", "collect", "nowhere"):
        with pytest.raises((Conflict, InvalidRequest)):
            advance(two, wrong, candidate=2, share=0.1, kind="ended" if wrong == "collect" else "advanced")
    with pytest.raises(InvalidRequest, match="needs a candidate"):
        advance(two, "gate")
    with pytest.raises(NotFound, match="support@9"):
        advance(two, "gate", candidate=9)
    advance(two, "gate", candidate=2)
    with pytest.raises(InvalidRequest, match="only `promote`"):
        advance(two, "collect")
    with pytest.raises(InvalidRequest, match="share"):
        advance(two, "canary", share=1.5)
    assert advance(two, "collect", kind="rejected").candidate is None


def test_the_same_act_twice_has_one_effect_and_another_one_is_refused(two: Database) -> None:
    create(two)
    begun = advance(two, "dataset", expected=1, reason="20 labels")
    assert advance(two, "dataset", expected=1, reason="20 labels") == begun, "its answer was lost, so it is sent again"
    with pytest.raises(Conflict):
        advance(two, "dataset", expected=1, reason="somebody else's")
    noted = do(two, lambda conn: deployments.note(conn, "a", "support", {"saved": 10}, begun.revision))
    assert do(two, lambda conn: deployments.note(conn, "a", "support", {"saved": 10}, begun.revision)) == noted
    with pytest.raises(Conflict, match="revision"):
        do(two, lambda conn: deployments.note(conn, "a", "support", {"saved": 20}, begun.revision))
    assert log(two) == ["created", "advanced"], "a note changes nothing for anybody"
    act = Act("runner", "1 edited", {"feedback": {"fb_1": "edited"}})
    for _ in range(2):
        do(two, lambda conn: deployments.note(conn, "a", "support", {"saved": 30}, noted.revision, act))
    assert log(two) == ["created", "advanced", "noted"], "with a reason it is a line, and one"


def test_only_a_signed_rule_promotes_and_only_what_is_in_the_canary(two: Database) -> None:
    create(two)
    to_canary(two)
    with pytest.raises(Conflict, match="promoted by a person"):
        promote(two, rule=True)
    do(two, lambda conn: deployments.change(conn, "a", "support", SIGNED, Act("ana", "signed")))
    do(two, lambda conn: deployments.pause(conn, "a", "support", True, Act("ana", "wait")))
    with pytest.raises(Conflict, match="paused"):
        promote(two, rule=True)
    do(two, lambda conn: deployments.pause(conn, "a", "support", False, Act("ana", "on")))
    with pytest.raises(Conflict, match="tried"):
        promote(two, rule=True, number=1)
    assert promote(two, rule=True).champion == 2
    advance(two, "gate", candidate=1)
    with pytest.raises(Conflict, match="in 'gate'"):
        promote(two, rule=True)


def test_the_versions_of_a_deployment_stay_and_its_name_moves_with_it_alone(two: Database) -> None:
    create(two)
    to_canary(two)
    for number in (None, 1, 2):
        with pytest.raises(Conflict, match="deployment support answers with"):
            two.read(lambda conn, number=number: deployments.guard_delete(conn, "a", "support", number))
    with pytest.raises(Conflict, match="follows the deployment"):
        two.read(lambda conn: deployments.guard_move(conn, "a", "support"))
    do(two, lambda conn: deployments.delete(conn, "a", "support"))
    two.read(lambda conn: deployments.guard_move(conn, "a", "support"))
    assert log(two)[0] == "created", "the log outlives it"


@given(st.text(max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_a_share_that_grows_keeps_its_episodes(episode: str, one: float, other: float) -> None:
    place = deployments.bucket("salt", episode)
    assert 0 <= place < 1 and place == deployments.bucket("salt", episode)
    assert not (place < min(one, other)) or place < max(one, other)


def test_a_share_is_a_share_and_salts_differ() -> None:
    places = [deployments.bucket("salt", f"episode {number}") for number in range(4000)]
    for share in (0.01, 0.05, 0.25, 0.5):
        error = 4 * (share * (1 - share) / len(places)) ** 0.5
        assert abs(sum(place < share for place in places) / len(places) - share) < error
    others = [deployments.bucket("other", f"episode {number}") for number in range(4000)]
    both = sum(a < 0.5 and b < 0.5 for a, b in zip(places, others, strict=True)) / len(places)
    assert abs(both - 0.25) < 0.03, "who was unlucky with one candidate isn't with the next"
