"""Texts that not every database takes, in every field and address of the Tinker routes: a 400 by name on both databases, never a 500."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from everlearn.api.app import create_app
from everlearn.api.tinker import codec
from everlearn.config import Settings
from tests.api.test_keys import routes, settings
from tests.postgres import new_database, postgres_server
from tests.wire.raw import batch

__all__ = ["postgres_server"]

NUL = "a\0b"
RUN, SESSION = "sess-1:train:0", "sess-1"
ADAM = {"learning_rate": 1e-4}
SAVE = {"model_id": RUN, "path": "one", "seq_id": 1, "user_metadata": {"a": "b"}}
# A body for each route that reads one: all of its texts, each of which is spoilt in turn.
BODIES: dict[str, dict[str, Any]] = {
    "/api/v1/create_session": {"sdk_version": "1", "tags": ["t"], "user_metadata": {"k": "v"}, "project_id": "p", "display_name": "d"},
    "/api/v1/session_heartbeat": {"session_id": SESSION},
    f"/api/v1/sessions/{SESSION}/finish": {"reason": {"type": "success"}, "detail": "d"},
    "/api/v1/telemetry": {"events": [], "session_id": SESSION, "platform": "p", "sdk_version": "1", "process_uuid": "u"},
    "/api/v1/create_model": {"session_id": SESSION, "model_seq_id": 0, "base_model": "tiny", "user_metadata": {"k": "v"}, "lora_config": {"rank": 4}},
    "/api/v1/get_info": {"model_id": RUN},
    "/api/v1/unload_model": {"model_id": RUN},
    "/api/v1/forward": {"forward_input": {"data": [], "loss_fn": "cross_entropy"}, "model_id": RUN, "seq_id": 1},
    "/api/v1/forward_backward": {"forward_backward_input": {"data": [], "loss_fn": "cross_entropy"}, "model_id": RUN, "seq_id": 1},
    "/api/v1/optim_step": {"model_id": RUN, "seq_id": 1, "adam_params": ADAM},
    "/api/v1/save_weights": SAVE,
    "/api/v1/save_weights_for_sampler": SAVE,
    "/api/v1/save_weights_external": {"model_id": RUN, "path": "one", "seq_id": 1},
    "/api/v1/load_weights": {"model_id": RUN, "seq_id": 1, "path": f"tinker://{RUN}/weights/one", "weights_access_token": "tml-x"},
    "/api/v1/copy_weights": {"source_path": f"tinker://{RUN}/weights/one", "session_id": SESSION, "model_seq_id": 0, "destination_project_id": "p"},
    "/api/v1/create_sampling_session": {"session_id": SESSION, "sampling_session_seq_id": 0, "base_model": "tiny"},
    "/api/v1/join_sampling_session": {"sampling_session_id": "s"},
    "/api/v1/asample": {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]}, "sampling_params": {}, "sampling_session_id": "s", "seq_id": 0},
    "/api/v1/retrieve_future": {"request_id": f"{RUN}:1", "model_id": RUN},
    "/api/v1/retrieve_futures": {"target": {"sampling_session_id": "s", "type": "sampling_session"}, "retrieved_request_ids": ["r"], "timeout": 0.1},
    "/api/v1/cancel_future": {"request_id": f"{RUN}:1"},
    "/api/v1/weights_info": {"tinker_path": f"tinker://{RUN}/weights/one"},
    "/v1/feedback": {"kind": "boolean", "record_id": "rec_x", "name": "n", "text": "t", "over": {"record_id": "rec_y"}, "source": "human", "source_id": "s", "reason": "r", "idempotency_key": "k"},
    "/v1/feedback/tokens": {"record_id": "rec_x", "source_id": "s"},
    "/v1/episodes/e/events": {"kind": "act", "name": "n", "text": "t", "record_id": "rec_x", "source": "human"},
    "/v1/datasets": {"name": "n", "form": "sft", "reward_version": "r", "filters": {"model": "m", "user": "u", "after_feedback": "f", "names": ["n"]}},
    "/v1/datasets/ds_x/versions": {"version": "v", "parent": "p"},
    "/api/v1/sessions/search": {"session_id": SESSION, "project_ids": ["p"], "user_metadata": {"k": "v"}, "display_name": "d", "statuses": [{"type": "active"}]},
}  # fmt: skip


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def client(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    given = settings(tmp_path_factory.mktemp("hostile"), tiny_model)
    with contextlib.ExitStack() as stack:
        if request.param == "postgresql":
            url = stack.enter_context(new_database(request.getfixturevalue("postgres_server")))
            given = Settings.model_validate(given.model_dump() | {"store": {"url": url}})
        yield stack.enter_context(TestClient(create_app(given), raise_server_exceptions=False))


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if isinstance(value, str):
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from leaves(item, (*path, key))


def spoilt(body: dict[str, Any], path: tuple[str | int, ...], text: str) -> dict[str, Any]:
    made = copy.deepcopy(body)
    place: Any = made
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = text
    return made


def test_every_text_of_every_form(client: TestClient) -> None:
    fields = [(route, body, path) for route, body in BODIES.items() for path in leaves(body)]
    assert len(fields) > 50
    for route, body, path in fields:
        reply = client.post(route, json=spoilt(body, path, NUL))
        assert reply.status_code == 400, (route, path, reply.text)
        name = reply.json()["error"]["param"] or ""
        assert str(path[0]) in name or name in ("type", "path"), (route, path, name)
        half = client.post(route, content=json.dumps(spoilt(body, path, "\ud800")), headers={"content-type": "application/json"})
        assert half.status_code == 400, (route, path, half.text)


def test_names_inside_of_metadata(client: TestClient) -> None:
    reply = client.post("/api/v1/create_session", json={"sdk_version": "1", "user_metadata": {NUL: "v"}})
    assert reply.status_code == 400 and "user_metadata" in reply.json()["detail"]


def test_what_only_looks_like_one_is_text(client: TestClient) -> None:
    said = "the six characters \\u0000 and a clef \U0001d11e"
    reply = client.post("/api/v1/create_session", json={"sdk_version": "1", "display_name": said, "tags": [said]})
    assert reply.status_code == 200
    session = client.get(f"/api/v1/sessions/{reply.json()['session_id']}")
    assert session.json()["display_name"] == said


def test_reports_may_hold_anything(client: TestClient) -> None:
    event = {"event": "GENERIC_EVENT", "event_data": {"text": NUL}}
    assert client.post("/api/v1/telemetry", json={"events": [event], "session_id": SESSION}).status_code == 200


def test_messages(client: TestClient) -> None:
    for model_id in (NUL, RUN):
        message = batch(model_id, 1)
        message.loss_fn = NUL
        for body in (message.SerializeToString(), message.SerializeToString()[:-3]):
            reply = client.post("/api/v1/forward_backward", content=body, headers={"content-type": codec.CONTENT_TYPE})
            assert reply.status_code in (400, 404), reply.text


def test_every_address(client: TestClient) -> None:
    """NUL in each place of each path, and in a parameter that any route might read."""
    asked = 0
    for method, template in routes(client):
        if "{" in template:
            path = "/".join(quote(NUL) if part.startswith("{") else part for part in template.split("/"))
            reply = client.request(method, path, json={"project_id": "p", "reason": {"type": "success"}})
            assert 400 <= reply.status_code < 500, (method, template, reply.text)
            asked += 1
        for name in ("project_id", "model", "user", "after", "key_id"):
            if method == "GET" and "{" not in template:
                query = {name: NUL, "starting_on": "2026-01-01T00:00:00Z", "ending_before": "2026-01-02T00:00:00Z"}
                reply = client.get(template, params=query)
                assert reply.status_code < 500 or template in ("/readyz", "/health"), (template, name, reply.text)
    assert asked > 15
