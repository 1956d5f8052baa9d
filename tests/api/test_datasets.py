"""/v1/datasets: forms, lineage, refusals, and whose they are."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from everlearn.store import records
from tests.api.test_v1 import Server
from tests.api.test_v1 import app as app
from tests.store.test_records import record


def corrected(app: Server, question: str, answer: str, episode: str) -> str:
    made = record(created_at=time.time(), record_id=records.new_id(), messages=[{"role": "user", "content": question}], episode_id=episode)
    app.client.app.state.services.records.add(made)  # type: ignore[attr-defined]
    app.ask("POST", "/v1/feedback", json={"record_id": made.record_id, "kind": "demonstration", "text": answer})
    return made.record_id


def test_from_feedback_to_versions(app: Server) -> None:
    gone = corrected(app, "a?", "A.", "first")
    for number in range(30):
        corrected(app, f"{number}?", f"{number}.", f"e{number}")
    made = app.ask("POST", "/v1/datasets", json={"name": "may", "form": "sft", "filters": {"sources": ["human"]}, "reward_version": "rm-3"})
    assert sum(made["items"].values()) == 31 and made["items"]["heldout"] > 0 and made["reward_version"] == "rm-3"
    path = f"/v1/datasets/{made['id']}"
    lines: dict[str, list[Any]] = {}
    for split, purpose in (("train", "train"), ("heldout", "evaluate")):
        reply = app.client.get(f"{path}/export", headers=app.headers, params={"split": split, "purpose": purpose})
        lines[split] = [json.loads(line) for line in reply.text.splitlines()]
        assert len(lines[split]) == made["items"][split] and reply.headers["content-type"].startswith("application/x-ndjson")
    assert {line["episode_id"] for line in lines["train"]}.isdisjoint(line["episode_id"] for line in lines["heldout"])
    assert app.ask("GET", f"{path}/export?split=heldout", 403)["error"]["code"] == "forbidden"
    items = app.ask("GET", f"{path}/items", params={"limit": 7, "after": "3"})
    assert [item["id"] for item in items["data"]] == [str(number) for number in range(4, 11)] and items["has_more"]
    assert {source["kind"] for source in items["data"][0]["sources"]} == {"record", "feedback", "episode"}
    first, second = (app.ask("POST", "/v1/adapters", json={"name": "pupil", "path": given})["model"] for given in app.paths[1:])
    app.ask("POST", f"{path}/versions", json={"version": first})
    other = app.ask("POST", "/v1/datasets", json={"name": "june", "form": "sft"})
    told = app.ask("POST", f"/v1/datasets/{other['id']}/versions", json={"version": second, "parent": first})
    assert [one["inherited"] for one in told["data"]] == [False]
    assert len(app.ask("GET", path)["versions"]) == len({first, second}) == 2
    for body, status in (({"version": "tiny"}, 400), ({"version": "nobody@1"}, 404)):
        app.ask("POST", f"{path}/versions", status, json=body)
    app.ask("DELETE", f"/v1/records/{gone}", 204)
    shown = app.ask("GET", path)
    assert shown["marks"] == 1 and shown["deleted"][0]["id"] == gone
    assert app.ask("GET", f"{path}/export", 400)["error"]["code"] == "conflict"
    again = app.ask("POST", f"{path}/rebuild")
    assert sum(again["items"].values()) == 30 and again["rebuilt_from"] == made["id"] and again["filters"] == {"sources": ["human"]}
    assert [one["id"] for one in app.ask("GET", "/v1/datasets", params={"limit": 2})["data"]] == [again["id"], other["id"]]
    for method, place, body in (
        ("GET", path, None),
        ("GET", f"{path}/export", None),
        ("POST", f"{path}/rebuild", None),
        ("DELETE", path, None),
    ):
        app.ask(method, place, 404, headers=app.others, json=body)
    assert app.ask("GET", "/v1/datasets", headers=app.others)["data"] == []
    app.ask("DELETE", path, 204)
    assert app.ask("GET", path)["marks"] == 2, "versions learned from it: what it was stays"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"form": "dpo"}, "form"),
        ({"name": ""}, "name"),
        ({"filters": {"modle": "x"}}, "filters.modle"),
        ({"filters": {"sources": ["god"]}}, "filters.sources"),
        ({"filters": {"since": 4e9}}, "filters"),
        ({"filters": {"since": "x"}}, "filters.since"),
        ({"nmae": "x"}, "nmae"),
    ],
)
def test_what_can_not_be_a_dataset_is_refused_by_name(app: Server, body: dict[str, Any], param: str) -> None:
    error = app.ask("POST", "/v1/datasets", 400, json={"name": "n", "form": "sft"} | body)["error"]
    assert error["param"] == param and error["message"]


@pytest.mark.parametrize(
    "path", ["datasets/ds_x", "datasets/%00", "datasets/ds_x/items", "datasets/ds_x/export", "datasets/ds_x/items?after=x"]
)
def test_what_is_not_there(app: Server, path: str) -> None:
    assert app.client.get(f"/v1/{path}", headers=app.headers).status_code in (400, 404)
