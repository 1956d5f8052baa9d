"""/v1/adapters, /v1/records, /v1/usage and /v1/capabilities: forms, pages, refusals, and whose they are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from everlearn.api.app import create_app
from everlearn.api.housekeeping import Housekeeping
from everlearn.store import keys, records
from everlearn.store.db import Database, open_database
from tests.api.test_keys import settings
from tests.store.acts import SAVED, append, finish, new_run, save_entry
from tests.store.test_records import record


class Server:
    """The app, and what a client of tenant `a` sees of it. `paths` are two checkpoints of a run of theirs."""

    def __init__(self, client: TestClient, db: Database, headers: dict[str, str], others: dict[str, str], run: str, paths: list[str]):
        self.client, self.db, self.headers, self.others, self.run, self.paths = client, db, headers, others, run, paths

    def ask(self, method: str, path: str, status: int = 200, headers: dict[str, str] | None = None, **more: Any) -> Any:
        reply = self.client.request(method, path, headers=headers or self.headers, **more)
        assert reply.status_code == status, reply.text
        return reply.json() if reply.content else None


@pytest.fixture(scope="module")
def app(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    given = settings(tmp_path_factory.mktemp("v1"), tiny_model)
    db = open_database(given.store_url)
    secrets = [db.write(lambda conn, tenant=tenant: keys.create(conn, tenant, "x")).result()[1] for tenant in "ab"]
    run = new_run(db)
    for seq, name in ((1, "one"), (2, "two"), (3, "three")):
        finish(db, append(db, save_entry(run, seq, name, folder=str(given.home / name))), SAVED)
    db.close()
    with TestClient(create_app(given)) as client:
        paths = [f"tinker://{run}/weights/{name}" for name in ("one", "two", "three")]
        yield Server(client, client.app.state.services.db, {"x-api-key": secrets[0]}, {"x-api-key": secrets[1]}, run, paths)  # type: ignore[attr-defined]


def test_a_name_s_life(app: Server) -> None:
    first = app.ask("POST", "/v1/adapters", json={"name": "support", "path": app.paths[0], "note": "the first"})
    assert (first["model"], first["current"], first["base_model"], first["path"]) == ("support@1", True, "tiny", app.paths[0])
    assert app.ask("POST", "/v1/adapters", json={"name": "support", "path": app.paths[0]})["model"] == "support@1"
    second = app.ask("POST", "/v1/adapters", json={"name": "support", "path": app.paths[1]})
    assert (second["model"], second["current"]) == ("support@2", False)
    assert app.ask("POST", "/v1/adapters/support/move", json={"number": 2, "expected": 1})["current"]
    reply = app.ask("POST", "/v1/adapters/support/move", 400, json={"number": 1, "expected": 1})
    assert reply["error"]["code"] == "conflict"
    third = app.ask("POST", "/v1/adapters", json={"name": "support", "path": app.paths[2], "move": True})
    assert third["current"]
    shown = app.ask("GET", "/v1/adapters/support")
    assert [item["model"] for item in shown["versions"]] == ["support@3", "support@2", "support@1"]
    assert [item["number"] for item in shown["history"]] == [3, 2, 1]
    assert app.ask("GET", "/v1/adapters/support@2")["path"] == app.paths[1]
    app.ask("POST", "/v1/adapters", json={"name": "another", "path": app.paths[0]})
    listed = app.ask("GET", "/v1/adapters", params={"limit": 1})
    assert [item["id"] for item in listed["data"]] == ["another"] and listed["has_more"] and listed["object"] == "list"
    listed = app.ask("GET", "/v1/adapters", params={"limit": 1, "after": listed["last_id"]})
    assert [item["id"] for item in listed["data"]] == ["support"] and not listed["has_more"]
    path = f"/api/v1/training_runs/{app.run}/checkpoints/weights/one"
    assert (
        "is another@1" in app.ask("DELETE", path, 400)["error"]["message"]
        or "is support@1" in app.ask("DELETE", path, 400)["error"]["message"]
    )
    app.ask("DELETE", "/v1/adapters/support@3", 400)
    app.ask("DELETE", "/v1/adapters/support@1", 204)
    app.ask("GET", "/v1/adapters/support@1", 404)
    app.ask("DELETE", "/v1/adapters/another", 204)
    app.ask("DELETE", path, 204)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"name": "tiny"}, 400, "name"),
        ({"name": "a/b"}, 400, "name"),
        ({"name": "x@3"}, 400, "name"),
        ({"path": "weights/one"}, 400, "path"),
        ({"path": "tinker://nobody:train:0/weights/one"}, 404, "path"),
        ({"colour": "red"}, 400, "colour"),
        ({"note": 3}, 400, None),
    ],
)
def test_what_can_not_be_named_is_refused(app: Server, body: dict[str, Any], status: int, param: str | None) -> None:
    error = app.ask("POST", "/v1/adapters", status, json={"name": "fine", "path": app.paths[1]} | body)["error"]
    assert error["param"] == param and error["message"]


def test_others_see_no_name_of_ours(app: Server) -> None:
    app.ask("POST", "/v1/adapters", json={"name": "mine", "path": app.paths[1]})
    assert app.ask("GET", "/v1/adapters", headers=app.others)["data"] == []
    for method, path, body in (("GET", "mine", None), ("POST", "mine/move", {"number": 1}), ("DELETE", "mine", None)):
        assert app.ask(method, f"/v1/adapters/{path}", 404, headers=app.others, json=body)["error"]["code"] == "not_found"
    app.ask("POST", "/v1/adapters", 404, headers=app.others, json={"name": "theirs", "path": app.paths[1]})
    app.ask("GET", "/v1/adapters/mine")


def test_records_are_there_as_soon_as_the_answer_is(app: Server) -> None:
    recorder = app.client.app.state.services.records  # type: ignore[attr-defined]
    made = record(created_at=time.time(), record_id=records.new_id())
    recorder.add(made)
    shown = app.ask("GET", f"/v1/records/{made.record_id}")
    assert shown["content"]["choices"] == [{"token_ids": [0, 1, 2], "logprobs": [-0.25] * 3, "finish_reason": "stop"}]
    assert shown["content"]["messages"] == made.messages and shown["content"]["prompt_token_ids"] == [7, 8, 9, 10]
    assert shown["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "cached_tokens": 2} and shown["has_content"]
    bare = record(content=False, created_at=time.time(), record_id=records.new_id())
    recorder.add(bare)
    shown = app.ask("GET", f"/v1/records/{bare.record_id}")
    assert shown["content"] is None and not shown["has_content"]
    app.ask("GET", f"/v1/records/{made.record_id}", 404, headers=app.others)
    app.ask("DELETE", f"/v1/records/{made.record_id}", 404, headers=app.others)
    listed = app.ask("GET", "/v1/records", params={"limit": 1, "model": "support"})
    assert [item["id"] for item in listed["data"]] == [bare.record_id] and listed["has_more"]
    listed = app.ask("GET", "/v1/records", params={"after": listed["last_id"], "key_id": "key-1", "user": "someone"})
    assert [item["id"] for item in listed["data"]] == [made.record_id] and not listed["has_more"]
    assert app.ask("GET", "/v1/records", headers=app.others)["data"] == []
    app.ask("DELETE", f"/v1/records/{made.record_id}", 204)
    app.ask("GET", f"/v1/records/{made.record_id}", 404)


def test_records_of_a_time(app: Server) -> None:
    """From `since` on, and before `until`; so that pages that begin at one end where the ones before did."""
    recorder, began = app.client.app.state.services.records, time.time() - 500  # type: ignore[attr-defined]
    made = [record(created_at=began + 10 * place, record_id=records.new_id(began + 10 * place), model="timed@1") for place in range(5)]
    for one in made:
        recorder.add(one)
    app.ask("GET", f"/v1/records/{made[-1].record_id}")

    def between(**bounds: float) -> list[int]:
        listed = app.ask("GET", "/v1/records", params={"model": "timed", **bounds})
        return [next(place for place, one in enumerate(made) if one.record_id == item["id"]) for item in listed["data"]]

    assert between(until=made[2].created_at) == [1, 0] and between(since=made[2].created_at) == [4, 3, 2]
    assert between(since=made[1].created_at, until=made[3].created_at) == [2, 1]
    assert between(since=made[3].created_at, until=made[1].created_at) == [], "no time lies between"
    page = app.ask("GET", "/v1/records", params={"model": "timed", "until": made[3].created_at, "limit": 2})
    assert [item["id"] for item in page["data"]] == [made[2].record_id, made[1].record_id] and page["has_more"]


@pytest.mark.parametrize(
    "query",
    [
        "modle=support",
        "limit=0",
        "limit=1001",
        "limit=x",
        f"after={'x' * 300}",
        "model=%00",
        "after=%00",
        "until=soon",
        "since=-1",
        "until=nan",
        "until=inf",
        "untill=1",
    ],
)
def test_a_misspelt_filter_lists_nothing(app: Server, query: str) -> None:
    assert app.ask("GET", f"/v1/records?{query}", 400)["error"]["message"]


@pytest.mark.parametrize("path", ["records/rec_", "records/%00", "records/rec_%F0%9F%99%82", "adapters/nobody", "records/" + "x" * 4000])
def test_what_is_not_there_is_not_found(app: Server, path: str) -> None:
    app.ask("GET", f"/v1/{path}", 404)
    app.ask("DELETE", f"/v1/{path}", 404)


def test_housekeeping_forgets_old_records(app: Server) -> None:
    svc = app.client.app.state.services  # type: ignore[attr-defined]
    old, young = (record(created_at=moment, record_id=records.new_id(moment)) for moment in (time.time() - 31 * 86_400, time.time()))
    svc.records.add(old)
    svc.records.add(young)
    app.ask("GET", f"/v1/records/{old.record_id}")
    app.client.portal.call(Housekeeping(svc)._expire)  # type: ignore[union-attr]
    app.ask("GET", f"/v1/records/{old.record_id}", 404)
    app.ask("GET", f"/v1/records/{young.record_id}")


def test_usage_by_day_and_key(app: Server) -> None:
    recorder = app.client.app.state.services.records  # type: ignore[attr-defined]
    yesterday = datetime.now(UTC) - timedelta(days=1)
    for key in ("key-7", "key-7", None):
        made = record(key_id=key, created_at=yesterday.timestamp(), model="used@1", record_id=records.new_id(yesterday.timestamp()))
        recorder.add(made)
    app.ask("GET", f"/v1/records/{made.record_id}")
    found = [line for line in app.ask("GET", "/v1/usage")["data"] if line["model"] == "used@1"]
    assert [(line["key_id"], line["requests"], line["tokens_in"], line["tokens_cached"], line["tokens_out"]) for line in found] == [
        (None, 1, 4, 2, 3),
        ("key-7", 2, 8, 4, 6),
    ]
    assert {line["day"] for line in found} == {str(yesterday.date())} and found[1]["seconds"] == 1.0
    day = str(yesterday.date())
    assert len(app.ask("GET", "/v1/usage", params={"since": day, "until": day})["data"]) >= 2
    assert app.ask("GET", "/v1/usage", headers=app.others)["data"] == []
    for query in (
        {"since": "2020-01-02", "until": "2020-01-01"},
        {"since": "1960-01-01", "until": "1960-01-02"},
        {"since": "x"},
        {"by": "day"},
    ):
        app.ask("GET", "/v1/usage", 400, params=query)


def test_capabilities_say_what_is_enforced(app: Server) -> None:
    told = app.ask("GET", "/v1/capabilities")
    assert told["models"][0]["id"] == "tiny" and told["limits"]["body_bytes"] == 64 * 2**20
    assert told["limits"]["request"]["top_logprobs"] == 20
    limits = keys.Limits(rpm=60, models=["tiny"])
    _, secret = app.db.write(lambda conn: keys.create(conn, "a", "limited", ("sample",), limits, content=False)).result()
    told = app.ask("GET", "/v1/capabilities", headers={"x-api-key": secret})["key"]
    assert told["limits"] == {"rpm": 60, "tpm": None, "concurrency": None, "models": ["tiny"]}
    assert (told["scopes"], told["content_recorded"]) == (["sample"], False)


def test_a_key_whose_texts_are_not_kept_leaves_none_in_a_memory(app: Server) -> None:
    _, secret = app.db.write(lambda conn: keys.create(conn, "a", "discreet", content=False)).result()
    discreet, chat = {"x-api-key": secret}, {"model": "tiny", "messages": [{"role": "user", "content": "My sister is Nora."}]}
    memory = {"x-everlearn-memory": "ann", "x-everlearn-memory-budget": "100"}
    for headers, body in ((discreet | memory, chat), (discreet, chat | {"memory": {"id": "ann", "budget": 100}})):
        error = app.ask("POST", "/v1/chat/completions", 400, headers=headers, json=body)["error"]
        assert (error["code"], error["param"]) == ("unsupported", "memory") and "isn't kept" in error["message"]
    app.ask("GET", "/v1/memories/ann", 404)
    error = app.ask("POST", "/v1/memories/ann/correct", 400, headers=discreet, json={"number": 0, "text": "Nora is my aunt."})["error"]
    assert (error["code"], error["param"]) == ("unsupported", "text")


def test_who_may_only_sample_sees_no_cycle(app: Server) -> None:
    _, secret = app.db.write(lambda conn: keys.create(conn, "a", "shop", ("sample",))).result()
    app.ask("POST", "/v1/deployments", json={"name": "learner", "description": {"base": "tiny"}})
    cycle = {"id": "c1", "wordings": {"rec_1": ["where does Nora live?"]}}
    made = app.ask("POST", "/v1/deployments/learner/advance", json={"to": "dataset", "expected": 1, "cycle": cycle})
    assert made["cycle"] == app.ask("GET", "/v1/deployments/learner")["cycle"] == cycle
    shop = {"x-api-key": secret}
    shown = [app.ask("GET", "/v1/deployments/learner", headers=shop), *app.ask("GET", "/v1/deployments", headers=shop)["data"]]
    assert [one["cycle"] for one in shown] == [{}, {}] and shown[0]["state"] == "dataset"
