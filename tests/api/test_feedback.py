"""/v1/episodes, /v1/feedback and their tokens: forms, pages, refusals, and whose they are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from everlearn.api import auth, grants
from everlearn.api.app import create_app
from everlearn.config import Settings
from everlearn.store import keys, records
from everlearn.store.db import open_database
from everlearn.store.records import Record
from tests.api.test_keys import settings
from tests.store.test_records import record


class Server:
    """The app, and what its callers send: a key of tenant `a` (all scopes), one of `a` whose content isn't kept, one of `b`."""

    def __init__(self, client: TestClient, secrets: dict[str, str]):
        self.client, self.keys = client, {name: {"x-api-key": secret} for name, secret in secrets.items()}
        self.svc = client.app.state.services  # type: ignore[attr-defined]

    def ask(self, method: str, path: str, status: int = 200, key: str | None = "a", **more: Any) -> Any:
        reply = self.client.request(method, path, headers=self.keys[key] if key else {}, **more)
        assert reply.status_code == status, reply.text
        return reply.json() if reply.content else None

    def answer(self, **more: Any) -> Record:
        """A record as an answer leaves it."""
        made = record(created_at=more.pop("created_at", time.time()), record_id=more.pop("record_id", records.new_id()), **more)
        self.svc.records.add(made)
        return made

    def say(self, about: Record, status: int = 200, key: str | None = "a", **said: Any) -> Any:
        body = {"record_id": about.record_id, "kind": "boolean", "value": True} | said
        return self.ask("POST", "/v1/feedback", status, key, json={name: value for name, value in body.items() if value is not None})


@pytest.fixture(scope="module")
def app(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    given = settings(tmp_path_factory.mktemp("feedback"), tiny_model)
    given = Settings.model_validate(given.model_dump() | {"feedback": {"source_cap": 5}})
    db = open_database(given.store_url)
    made = {name: db.write(lambda conn, name=name: keys.create(conn, name, "x")).result()[1] for name in "ab"}
    made["discreet"] = db.write(lambda conn: keys.create(conn, "a", "y", content=False)).result()[1]
    db.close()
    with TestClient(create_app(given)) as client:
        yield Server(client, made)


def test_a_word_s_life(app: Server) -> None:
    about = app.answer()
    said = app.say(about, value=False, reason="too short")
    assert (said["object"], said["kind"], said["value"], said["counts"], said["revision"]) == ("feedback", "boolean", False, True, 1)
    assert said["target"] == {
        "episode_id": "ep_" + about.record_id.removeprefix("rec_"),
        "record_id": about.record_id,
        "choice": 0,
        "span": None,
    }
    edited = app.ask("PATCH", f"/v1/feedback/{said['id']}", json={"value": True})
    assert (edited["value"], edited["revision"]) == (True, 2)
    shown = app.ask("GET", f"/v1/feedback/{said['id']}")
    assert [(change["act"], change["before"]) for change in shown["history"]] == [("created", None), ("edited", {"value": 0.0})]
    listed = app.ask("GET", "/v1/feedback", params={"record_id": about.record_id})
    assert [one["id"] for one in listed["data"]] == [said["id"]] and not listed["has_more"]
    for key in ("b",):
        assert app.ask("GET", "/v1/feedback", key=key)["data"] == []
        for method, body in (("GET", None), ("PATCH", {"value": True}), ("DELETE", None)):
            app.ask(method, f"/v1/feedback/{said['id']}", 404, key, json=body)
    app.ask("DELETE", f"/v1/feedback/{said['id']}", 204)
    app.ask("GET", f"/v1/feedback/{said['id']}", 404)


def test_every_kind_by_its_own_fields(app: Server) -> None:
    better, worse = app.answer(), app.answer()
    assert app.say(better, kind="float", value=4, name="stars")["value"] == 4.0
    assert app.say(better, kind="comment", value=None, text="Nice 🙂")["text"] == "Nice 🙂"
    corrected = app.say(better, kind="demonstration", value=None, text="At seven.")
    assert corrected["text"] == corrected["answer"] == "At seven."
    preferred = app.say(better, kind="preference", value=None, over={"record_id": worse.record_id})
    assert preferred["over"] == {"record_id": worse.record_id, "choice": 0} and preferred["value"] is True
    assert app.say(better, kind="outcome", name="refund", value=False, source="program", text="declined")["source"] == "program"
    whole = app.ask("POST", "/v1/feedback", json={"episode_id": corrected["target"]["episode_id"], "kind": "boolean", "value": True})
    assert whole["target"]["record_id"] is None
    assert app.say(better, span=[1, 3])["target"]["span"] == [1, 3]


@pytest.mark.parametrize(
    ("wrong", "status", "param"),
    [
        ({"kind": "thumb"}, 400, "kind"),
        ({"value": None}, 400, "value"),
        ({"value": 1}, 400, "value"),
        ({"value": "yes"}, 400, "value"),
        ({"kind": "float", "value": True}, 400, "value"),
        ({"kind": "preference", "value": False, "over": {"record_id": "rec_x"}}, 400, "value"),
        ({"kind": "preference", "value": None, "over": {"record_id": "rec_x"}}, 404, "record_id"),
        ({"vlaue": True}, 400, "vlaue"),
        ({"episode_id": "e"}, 400, "record_id"),
        ({"record_id": None}, 400, "record_id"),
        ({"record_id": None, "episode_id": "e", "span": [0, 1]}, 400, "span"),
        ({"record_id": None, "episode_id": "nowhere"}, 404, "episode_id"),
        ({"record_id": "rec_nothing"}, 404, "record_id"),
        ({"record_id": "\0"}, 400, "record_id"),
        ({"span": [0]}, 400, "span"),
        ({"span": [0, 99]}, 400, "span"),
        ({"choice": 5}, 400, "choice"),
        ({"choice": 2**70}, 400, "choice"),
        ({"reason": "x" * 2000}, 400, "reason"),
        ({"idempotency_key": "x" * 300}, 400, "idempotency_key"),
        ({"kind": "comment", "value": None, "text": "a\0"}, 400, "text"),
    ],
)
def test_what_can_not_be_said_is_refused_by_name(app: Server, wrong: dict[str, Any], status: int, param: str) -> None:
    error = app.say(app.answer(), status, **wrong)["error"]
    assert error["param"] == param and error["message"]


def test_a_dry_run_keeps_nothing(app: Server) -> None:
    about = app.answer()
    told = app.say(about, dry_run=True)
    assert told["dry_run"] and told["target"]["record_id"] == about.record_id
    app.say(about, 400, dry_run=True, choice=9)
    assert app.ask("GET", "/v1/feedback", params={"record_id": about.record_id})["data"] == []


def test_the_same_key_again_is_the_same_word(app: Server) -> None:
    about = app.answer()
    first = app.say(about, idempotency_key="once")
    assert app.say(about, idempotency_key="once")["id"] == first["id"]
    reply = app.client.post(
        "/v1/feedback",
        headers=app.keys["a"],
        json={"record_id": about.record_id, "kind": "boolean", "value": False, "idempotency_key": "once"},
    )
    assert reply.status_code == 409 and reply.json()["error"]["code"] == "idempotency_conflict"
    assert reply.headers["x-should-retry"] == "false"
    theirs = app.answer(tenant="b")
    assert app.say(theirs, key="b", idempotency_key="once")["id"] != first["id"]


def test_what_is_gone_or_another_s(app: Server) -> None:
    about = app.answer()
    app.ask("GET", f"/v1/records/{about.record_id}")
    assert app.say(about, 404, "b")["error"]["code"] == "not_found"
    old = records.new_id(time.time() - 31 * 86_400)
    error = app.say(about, 410, record_id=old)["error"]
    assert error["code"] == "expired" and old in error["message"]
    assert app.ask("POST", "/v1/feedback/tokens", 410, json={"record_id": old})["error"]["code"] == "expired"
    app.ask("DELETE", f"/v1/records/{about.record_id}", 204)
    app.say(about, 404)


def test_what_happens_to_feedback_can_be_followed(app: Server) -> None:
    begin = app.ask("GET", "/v1/feedback/changes", params={"limit": 1})["newest"]
    said = app.say(app.answer(), kind="demonstration", value=None, text="At six.")
    app.ask("PATCH", f"/v1/feedback/{said['id']}", json={"text": "At seven."})
    app.ask("DELETE", f"/v1/feedback/{said['id']}", 204)
    acts, after = [], begin
    while True:
        page = app.ask("GET", "/v1/feedback/changes", params={"after": after, "limit": 2})
        assert page["newest"] >= page["last_id"] > after
        acts += [(one["feedback_id"], one["act"]) for one in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert acts == [(said["id"], act) for act in ("created", "edited", "deleted")] and after == page["newest"]
    assert "seven" not in str(page) and "before" not in page["data"][0], "what was said is in the history of each"
    assert app.ask("GET", "/v1/feedback/changes", params={"after": after})["data"] == []
    assert all(one["feedback_id"] != said["id"] for one in app.ask("GET", "/v1/feedback/changes", key="b")["data"])
    app.ask("GET", "/v1/feedback/changes", 400, params={"kind": "boolean"})


def test_many_thumbs_of_one_are_worth_a_few(app: Server) -> None:
    for _ in range(8):
        app.say(app.answer(), source_id="crowd")
    told = app.ask("GET", "/v1/feedback/summary")
    crowd = next(one for one in told["by_source"] if one["source_id"] == "crowd")
    assert (crowd["labels"], crowd["effective"]) == (8, 5.0)
    assert app.ask("GET", "/v1/feedback/summary", key="b")["labels"] <= 1


def test_without_content_nothing_is_said_in_words(app: Server) -> None:
    bare, kept = app.answer(content=False), app.answer()
    assert app.say(bare, source_id="jane")["source_id"].startswith("sha256:")
    for about, key in ((bare, "a"), (bare, "discreet"), (kept, "discreet")):
        assert app.say(about, 400, key, reason="because")["error"]["param"] == "reason"
        assert app.say(about, 400, key, kind="comment", value=None, text="x")["error"]["param"] == "text"
    said = app.say(kept, key="discreet")
    app.ask("PATCH", f"/v1/feedback/{said['id']}", 400, "discreet", json={"reason": "x"})
    shown = app.ask("GET", f"/v1/episodes/{app.say(bare)['target']['episode_id']}")
    assert [entry["type"] for entry in shown["timeline"]] == ["answer", "feedback", "feedback"]
    assert shown["timeline"][0]["messages"] is None and shown["user"] is None
    app.ask("POST", f"/v1/episodes/{shown['id']}/events", 400, json={"kind": "user", "text": "hm"})


def test_an_episode_tells_what_happened_in_order(app: Server) -> None:
    turns = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "There."}]
    first = app.answer(messages=turns[:1], answer=turns[1:], user="jo", episode_id="trip-1")
    app.say(first, source="model", source_id="judge")
    result = {"role": "tool", "content": "42", "tool_call_id": "c"}
    second = app.answer(messages=[*turns, {"role": "user", "content": "Thanks"}, result], user="jo", episode_id="trip-1")
    app.ask("GET", f"/v1/records/{second.record_id}")
    app.ask("POST", "/v1/episodes/trip-1/events", json={"kind": "outcome", "name": "arrived", "value": True})
    page = app.ask("GET", "/v1/episodes/trip-1", params={"limit": 1})
    assert page["has_more"] and page["last_id"] == first.record_id
    rest = app.ask("GET", "/v1/episodes/trip-1", params={"after": page["last_id"]})
    assert not rest["has_more"] and {entry["type"] for entry in rest["timeline"]} >= {"tool", "event"}
    assert len(page["timeline"]) + len(rest["timeline"]) == 7
    for wrong, param in (
        ({"kind": "x"}, "kind"),
        ({"kind": "act", "name": "\n"}, "name"),
        ({"kind": "act", "record_id": "rec_x"}, "record_id"),
    ):
        assert app.ask("POST", "/v1/episodes/trip-1/events", 404 if param == "record_id" else 400, json=wrong)["error"]["param"] == param
    shown = app.ask("GET", "/v1/episodes/trip-1")
    assert sorted(entry["type"] for entry in shown["timeline"]) == ["answer", "answer", "event", "feedback", "tool", "user", "user"]
    assert shown["timeline"][0]["message"] == turns[0] and shown["timeline"][1]["messages"] == turns[1:]
    assert next(entry for entry in shown["timeline"] if entry["type"] == "answer" and entry["continues"])["continues"] == first.record_id
    assert (shown["user"], shown["client_given"], shown["records"], shown["feedback"]) == ("jo", True, 2, 1)
    listed = app.ask("GET", "/v1/episodes", params={"user": "jo"})
    assert [one["id"] for one in listed["data"]] == ["trip-1"]
    began, said = shown["created_at"], shown["timeline"][0]["created_at"] + 3600
    for bounds, found in (({"until": began}, []), ({"since": began - 1, "until": said}, ["trip-1"]), ({"since": said}, [])):
        assert [one["id"] for one in app.ask("GET", "/v1/episodes", params={"user": "jo", **bounds})["data"]] == found, bounds
        words = app.ask("GET", "/v1/feedback", params={"episode_id": "trip-1", **bounds})
        assert len(words["data"]) == len(found), bounds
    for query in ("usr=jo", "split=test", "since=x", "after=%00", "limit=0"):
        app.ask("GET", f"/v1/episodes?{query}", 400)
    assert app.ask("GET", "/v1/episodes", key="b", params={"user": "jo"})["data"] == []
    app.ask("GET", "/v1/episodes/trip-1", 404, "b")
    app.ask("DELETE", "/v1/episodes/trip-1", 404, "b")
    app.ask("DELETE", "/v1/episodes/trip-1", 204)
    app.ask("GET", "/v1/episodes/trip-1", 404)
    app.ask("GET", f"/v1/records/{first.record_id}", 404)


def test_a_token_opens_one_answer_and_nothing_else(app: Server) -> None:
    about, other = app.answer(user="jo"), app.answer()
    made = app.ask("POST", "/v1/feedback/tokens", json={"record_id": about.record_id, "expires_in": 60})
    path = made["path"]
    reply = app.client.post(
        path, content='{"kind": "boolean", "value": true}', headers={"content-type": "text/plain", "origin": "https://shop.example"}
    )
    assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == "*", reply.text
    said = reply.json()
    assert (said["target"]["record_id"], said["source"], said["source_id"], said["key_id"]) == (about.record_id, "human", "jo", None)
    app.ask("POST", path, key=None, json={"kind": "comment", "text": "so so"})
    for body in ({"record_id": other.record_id}, {"episode_id": "x"}, {"kind": "preference"}, {"kind": "implicit"}):
        error = app.ask("POST", path, 403, None, json={"kind": "boolean", "value": True} | body)["error"]
        assert error["code"] == "forbidden"
    token = made["token"]
    for wrong in ("", "fbt_", token[:-2], token.replace("fbt_", "fbt_x"), "fbt_é.é", token + "x" * 5000):
        error = app.ask("POST", "/v1/feedback", 401, None, params={"token": wrong}, json={"kind": "boolean", "value": True})["error"]
        assert error["code"] == "unauthenticated" and error["param"] == "token"
    for method, target in (("GET", "/v1/feedback"), ("GET", f"/v1/records/{about.record_id}"), ("POST", "/v1/feedback/tokens")):
        app.ask(method, f"{target}?token={token}", 401, None)
    late = grants.sign(auth.signing_secret(app.svc.settings.home), grants.Grant("a", int(time.time()) - 1, about.record_id))
    error = app.ask("POST", "/v1/feedback", 401, None, params={"token": late}, json={"kind": "boolean", "value": True})["error"]
    assert "expired" in error["message"]


def test_a_page_of_another_site_reads_why_its_word_was_not_kept(app: Server) -> None:
    secret, hour = auth.signing_secret(app.svc.settings.home), int(time.time()) + 3600
    good, gone, dropped = (
        grants.sign(secret, grants.Grant("a", hour, record)) for record in (app.answer().record_id, "rec_none", "rec_" + "0" * 32)
    )
    good_word = '{"kind": "boolean", "value": true}'
    for token, body, status in (
        (good, good_word, 200),
        ("fbt_x", good_word, 401),
        (good, '{"kind": "implicit", "value": true}', 403),
        (gone, good_word, 404),
        (dropped, good_word, 410),
        (good, "{", 400),
        (good, "x" * (app.svc.settings.api.max_body_bytes + 1), 413),
    ):
        headers = {"content-type": "text/plain", "origin": "https://shop.example"}
        reply = app.client.post("/v1/feedback", params={"token": token}, content=body, headers=headers)
        assert (reply.status_code, reply.headers.get_list("access-control-allow-origin")) == (status, ["*"]), reply.text[:300]
    for method, path in (("POST", "/v1/feedback"), ("GET", f"/v1/feedback?token={good}"), ("POST", f"/v1/feedback/tokens?token={good}")):
        reply = app.client.request(method, path, headers={"origin": "https://shop.example"})
        assert reply.status_code == 401 and "access-control-allow-origin" not in reply.headers


def test_tokens_are_made_for_what_is_there_and_ours(app: Server) -> None:
    about = app.answer()
    app.ask("POST", "/v1/feedback/tokens", 404, "b", json={"record_id": about.record_id})
    for body in (
        {},
        {"record_id": about.record_id, "episode_id": "e"},
        {"record_id": about.record_id, "expires_in": 10**9},
        {"record_id": about.record_id, "expires_in": 0},
    ):
        app.ask("POST", "/v1/feedback/tokens", 400, json=body)
    app.ask("POST", "/v1/feedback/tokens", 404, json={"episode_id": "nowhere"})
    episode = app.say(about)["target"]["episode_id"]
    made = app.ask("POST", "/v1/feedback/tokens", json={"episode_id": episode, "source_id": "jo"})
    said = app.ask("POST", made["path"], key=None, json={"kind": "float", "value": 3, "name": "stars", "source_id": "somebody else"})
    assert (said["target"]["episode_id"], said["source_id"]) == (episode, "jo")
    made = app.ask("POST", "/v1/feedback/tokens", key="discreet", json={"record_id": about.record_id})
    app.ask("POST", made["path"], 400, None, json={"kind": "comment", "text": "x"})
