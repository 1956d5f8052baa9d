"""Everything wrong that a client may send: one clear answer, a status that no SDK repeats, and a run that goes on as if nothing was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import zstandard

from tests.live import LiveServer, start_server
from tests.wire.raw import Raw, batch, sample

REPEATED = {408, 409, 429, *range(500, 600)}
NAN = float("nan")


@pytest.fixture(scope="module")
def raw(server: LiveServer) -> Raw:
    return Raw(server.url, server.model)


@pytest.fixture(scope="module")
def run(raw: Raw) -> str:
    return raw.create(0)


class Numbers:
    """The next seq of each run: a refused request has used up its own."""

    def __init__(self) -> None:
        self.last: dict[str, int] = {}

    def __call__(self, name: str) -> int:
        self.last[name] = self.last.get(name, 0) + 1
        return self.last[name]


number = Numbers()


def refused(reply: httpx.Response, status: int, word: str) -> None:
    assert reply.status_code == status and status not in REPEATED, reply.text
    body = reply.json()
    assert word.lower() in body["detail"].lower() and body["error"]["message"] == body["detail"] and body["error"]["code"]


def still_trains(raw: Raw, run: str) -> None:
    """The next request of the run is answered, with the loss that an untouched adapter gives."""
    answer = raw.forward_backward(batch(run, number(run), forward_only=True).SerializeToString()).json()
    loss = raw.result(answer["request_id"])["metrics"]["loss:sum"]
    fresh = raw.create(1000 + number("fresh"))
    answer = raw.forward_backward(batch(fresh, 1, forward_only=True).SerializeToString()).json()
    assert loss == pytest.approx(raw.result(answer["request_id"])["metrics"]["loss:sum"], abs=1e-5)


BAD_BATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "token beyond the vocabulary": ({"tokens": [1, 512, 3, 4]}, "vocabulary"),
    "negative token": ({"tokens": [1, -1, 3, 4]}, "vocabulary"),
    "no tokens": ({"tokens": []}, "at least one"),
    "too many tokens": ({"tokens": [1] * 1025}, "1024"),
    "target beyond the vocabulary": ({"inputs": {"target_tokens": np.array([1, 2, 3, 512])}}, "vocabulary"),
    "lengths disagree": ({"inputs": {"weights": np.ones(3, np.float32)}}, "shape"),
    "NaN weight": ({"inputs": {"weights": np.array([1, NAN, 1, 1], np.float32)}}, "finite"),
    "infinite weight": ({"inputs": {"weights": np.array([1, np.inf, 1, 1], np.float32)}}, "finite"),
    "unknown loss": ({"loss_fn": "cross_entropi"}, "cross_entropy"),
    "unknown input": ({"inputs": {"mask": np.ones(4, np.float32)}}, "mask"),
    "missing input": ({"inputs": {"weights": None}}, "weights"),
    "float targets": ({"inputs": {"target_tokens": np.ones(4, np.float32)}}, "integer"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batches_are_refused_and_their_seq_is_used_up(raw: Raw, run: str, case: str) -> None:
    changes, word = BAD_BATCHES[case]
    message = batch(run, number(run), **changes)
    refused(raw.forward_backward(message.SerializeToString()), 400, word)
    refused(raw.forward_backward(message.SerializeToString()), 400, word)


def test_an_unknown_configuration_key_is_refused(raw: Raw, run: str) -> None:
    message = batch(run, number(run))
    message.loss_fn_config["clip_hi"] = 1.0
    refused(raw.forward_backward(message.SerializeToString()), 400, "clip_hi")


def test_the_run_is_untouched_after_all_that(raw: Raw, run: str) -> None:
    still_trains(raw, run)


@pytest.mark.parametrize("body", [b"\xff\xff\xff", b"not protobuf at all", b""])
def test_malformed_protobuf_is_refused(raw: Raw, body: bytes) -> None:
    assert raw.forward_backward(body).status_code == 400
    assert raw.forward_backward(body, **{"content-encoding": "zstd"}).status_code == 400 or body == b""


def test_seq_ids_must_be_positive(raw: Raw, run: str) -> None:
    refused(raw.forward_backward(batch(run, 0).SerializeToString()), 400, "seq_id")
    refused(raw.post("/optim_step", model_id=run, adam_params={}), 400, "seq_id")
    refused(raw.post("/optim_step", model_id=run, seq_id=2**63, adam_params={}), 400, "seq_id")


def test_another_payload_under_a_used_seq_is_a_conflict_that_nobody_repeats(raw: Raw) -> None:
    run = raw.create(7)
    first = raw.forward_backward(batch(run, 1).SerializeToString())
    assert raw.forward_backward(batch(run, 1).SerializeToString()).json() == first.json()
    reply = raw.forward_backward(batch(run, 1, tokens=[1, 2, 3]).SerializeToString())
    refused(reply, 400, "seq")
    assert reply.json()["error"]["code"] == "conflict"


BIG = {"tokens": [1] * 20_000, "inputs": {"target_tokens": np.full(20_000, 43), "weights": np.ones(20_000, np.float32)}}


@pytest.fixture(scope="module")
def narrow(tiny_model, tmp_path_factory) -> Iterator[Raw]:
    """A server that takes 100,000 bytes at once, and long waits for nobody."""
    live = start_server(tmp_path_factory.mktemp("narrow"), tiny_model, {"api.max_body_bytes": 100_000})
    yield Raw(live.url, live.model)
    live.stop()


def goes_on(raw: Raw, run: str, seq: int) -> None:
    assert raw.result(raw.ok("/optim_step", model_id=run, seq_id=seq, adam_params={})["request_id"])["type"] == "optim_step"


def test_a_request_that_is_too_large_uses_up_its_seq(narrow: Raw) -> None:
    """Announced, in pieces, compressed, or in the JSON of old clients: what it belongs to is read off its ends."""
    run, protobuf = narrow.create(0), {"content-type": "application/x-protobuf"}
    body = batch(run, 1, **BIG).SerializeToString()
    assert [narrow.forward_backward(body).status_code for _ in range(2)] == [413, 413]
    goes_on(narrow, run, 2)
    body = batch(run, 3, **BIG).SerializeToString()
    pieces = (body[start : start + 5000] for start in range(0, len(body), 5000))
    assert narrow.http.post("/forward_backward", content=pieces, headers=protobuf).status_code == 413
    goes_on(narrow, run, 4)
    packed = zstandard.ZstdCompressor().compress(batch(run, 5, **BIG).SerializeToString())
    assert len(packed) < 100_000
    assert narrow.forward_backward(packed, **{"content-encoding": "zstd"}).status_code == 413
    goes_on(narrow, run, 6)
    text = json.dumps({"forward_backward_input": {"data": [1] * 50_000}, "model_id": run, "seq_id": 7})
    assert narrow.http.post("/forward_backward", content=text, headers={"content-type": "application/json"}).status_code == 413
    goes_on(narrow, run, 8)
    assert narrow.result(f"{run}:7")["category"] == "user"
    assert "limited to 100,000 bytes" in narrow.result(f"{run}:1")["error"]


def test_a_damaged_request_uses_up_its_seq_where_it_can_be_read(raw: Raw) -> None:
    run = raw.create(12)
    assert raw.forward_backward(batch(run, 1).SerializeToString()[:-3]).status_code == 400
    goes_on(raw, run, 2)
    body = batch(run, 3).SerializeToString()
    packed = zstandard.ZstdCompressor().compress(body + np.random.default_rng(0).bytes(300_000))[:-100]
    assert raw.forward_backward(packed, **{"content-encoding": "zstd"}).status_code == 400
    goes_on(raw, run, 4)
    text = f'{{"model_id": "{run}", "seq_id": 5, "adam_params": {{"learning_rate": oops}}}}'
    assert raw.http.post("/optim_step", content=text, headers={"content-type": "application/json"}).status_code == 400
    goes_on(raw, run, 6)


def test_a_stranger_takes_no_places(raw: Raw) -> None:
    """Another run's number in a request that nobody could read: it is the run's owner, or nothing happens."""
    assert raw.forward_backward(batch("sess-x:train:0", 1).SerializeToString()[:-3]).status_code == 400
    assert raw.poll("sess-x:train:0:1").status_code == 404


def test_a_body_over_the_limit_is_refused(raw: Raw) -> None:
    reply = raw.http.post("/forward_backward", content=b"\0" * (65 * 2**20), headers={"content-type": "application/x-protobuf"})
    assert reply.status_code == 413


BAD_MODELS: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown base model": ({"base_model": "nobody/knows"}, 404, "known are"),
    "a path as base model": ({"base_model": "../../etc"}, 404, "known are"),
    "rank 0": ({"lora_config": {"rank": 0}}, 400, "rank"),
    "rank 10^6": ({"lora_config": {"rank": 10**6}}, 400, "rank"),
    "rank as text": ({"lora_config": {"rank": "eight"}}, 400, "rank"),
    "nothing to train": ({"lora_config": {"rank": 2, "train_attn": False, "train_mlp": False, "train_unembed": False}}, 400, "nothing"),
    "all weights": ({"lora_config": None}, 400, "lora"),
    "another optimizer": ({"optimizer_config": {"type": "dimuon", "version": 1}}, 400, "dimuon"),
    "unknown wish": ({"lora_config": {"rank": 2, "use_dora": True}}, 400, "use_dora"),
    "routers": ({"lora_config": {"rank": 2, "train_router": True}}, 400, "train_router"),
    "unknown session": ({"session_id": "sess-nobody"}, 404, "sess-nobody"),
    "negative number": ({"model_seq_id": -1}, 400, "model_seq_id"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_runs_are_refused(raw: Raw, case: str) -> None:
    changes, status, word = BAD_MODELS[case]
    body = {"session_id": raw.session, "model_seq_id": 500, "base_model": raw.model, "lora_config": {"rank": 2}} | changes
    refused(raw.post("/create_model", **body), status, word)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"adam_params": {"learning_rate": -1.0}}, "learning_rate"),
        ({"adam_params": {"beta1": 1.0}}, "beta1"),
        ({"adam_params": {"eps": 0.0}}, "adam_params.eps is 0.0; it must be at least 1e-30"),
        ({"adam_params": {"eps": 1e-50}}, "adam_params.eps"),
        ({"adam_params": {"momentum": 0.9}}, "momentum"),
        ({"optimizer_params": {"type": "dimuon", "learning_rate": 0.1}}, "dimuon"),
    ],
)
def test_bad_steps_are_refused(raw: Raw, run: str, fields: dict[str, Any], word: str) -> None:
    refused(raw.post("/optim_step", model_id=run, seq_id=number(run), **fields), 400, word)


@pytest.mark.parametrize("name", ["../up", "a/b", "..", ".", "", "x" * 129, "nul\0", "new\nline", "%2e%2e", "üñ"])
@pytest.mark.parametrize("route", ["/save_weights", "/save_weights_for_sampler", "/save_weights_external"])
def test_names_that_are_paths_are_refused(raw: Raw, run: str, route: str, name: str) -> None:
    refused(raw.post(route, model_id=run, seq_id=number(run), path=name), 400, "path holds NUL" if "\0" in name else "name")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("tinker://nobody:train:0/weights/x", 404),
        ("tinker://../weights/x", 404),
        ("tinker://a/weights/../../x", 400),
        ("tinker://a/other/x", 400),
        ("file:///etc/passwd", 400),
        ("/etc/passwd", 400),
        ("tinker://a/weights/x/y", 400),
        ("", 400),
    ],
)
def test_paths_that_lead_nowhere_are_refused_everywhere(raw: Raw, run: str, path: str, status: int) -> None:
    assert raw.post("/weights_info", tinker_path=path).status_code == status
    assert raw.post("/load_weights", model_id=run, seq_id=number(run), path=path, optimizer=False).status_code == status
    assert raw.post("/load_weights", session_id=raw.session, model_seq_id=77, path=path, optimizer=False).status_code == status
    assert raw.post("/copy_weights", source_path=path, destination_project_id="p").status_code == status
    body = {"session_id": raw.session, "sampling_session_seq_id": 900, "model_path": path}
    assert raw.post("/create_sampling_session", **body).status_code == status


def test_a_damaged_checkpoint_is_a_permanent_error_of_its_own(raw: Raw, run: str, server: LiveServer) -> None:
    """The SDK sends what ends in a 5xx again, for minutes."""
    saved = raw.result(raw.ok("/save_weights", model_id=run, seq_id=number(run), path="spoilt")["request_id"])["path"]
    (file,) = [path for path in (server.home / "checkpoints").rglob("adapter.safetensors") if "spoilt" in str(path)]
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    before = raw.http.get("/training_runs").json()["cursor"]["total_count"]
    refused(raw.post("/copy_weights", source_path=saved, destination_project_id="p"), 400, "damaged")
    assert raw.post("/copy_weights", source_path=saved, destination_project_id="p").json()["error"]["code"] == "damaged"
    assert raw.http.get("/training_runs").json()["cursor"]["total_count"] == before, "no run is left of a copy that never was"
    archive = raw.http.get(f"/training_runs/{run}/checkpoints/weights/spoilt/archive", follow_redirects=False)
    assert archive.status_code == 400 and archive.json()["error"]["code"] == "damaged", archive.text


def test_loading_asks_for_what_the_checkpoint_has(raw: Raw, run: str) -> None:
    saved = raw.result(raw.ok("/save_weights_for_sampler", model_id=run, seq_id=number(run), path="s")["request_id"])["path"]
    refused(raw.post("/load_weights", model_id=run, seq_id=number(run), path=saved, optimizer=True), 400, "optimizer")
    other = raw.create(8, lora_config={"rank": 4})
    refused(raw.post("/load_weights", model_id=other, seq_id=1, path=saved, optimizer=False), 400, "rank")
    refused(raw.post("/load_weights", path=saved, optimizer=False), 400, "either")
    refused(raw.post("/save_weights", model_id=run, seq_id=number(run), path="t", ttl_seconds=5), 400, "ttl")
    refused(
        raw.post("/save_weights_external", model_id=run, seq_id=number(run), path="t", age_encryption_recipients=["age1x"]), 400, "encrypt"
    )
    refused(raw.post("/save_weights_for_sampler", model_id=run, seq_id=number(run), path="s"), 400, "exists")
    still_trains(raw, run)


BAD_SAMPLES: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"tokens": []}, "prompt"),
    "token beyond the vocabulary": ({"tokens": [1, 512]}, "512"),
    "token beyond 32 bits": ({"tokens": [1, 2**40]}, "32 bits"),
    "negative token": ({"tokens": [-1]}, "-1"),
    "text as token": ({"tokens": ["a"]}, "tokens"),
    "too long": ({"tokens": [1] * 1025}, "1024"),
    "no room": ({"params": {"max_tokens": 1024}}, "room"),
    "nothing to draw": ({"params": {"max_tokens": 0}}, "max_tokens"),
    "temperature": ({"params": {"temperature": -0.1}}, "temperature"),
    "top_p": ({"params": {"top_p": 0}}, "top_p"),
    "top_k": ({"params": {"top_k": 0}}, "top_k"),
    "seed": ({"params": {"seed": 2**64}}, "seed"),
    "empty stop text": ({"params": {"stop": [""]}}, "stop"),
    "mixed stops": ({"params": {"stop": ["a", 1]}}, "stop"),
    "stop token": ({"params": {"stop": [512]}}, "stop"),
    "unknown wish": ({"params": {"min_p": 0.1}}, "min_p"),
    "no samples": ({"num_samples": 0}, "num_samples"),
    "too many samples": ({"num_samples": 10**6}, "num_samples"),
    "last n alone": ({"prompt_logprobs_last_n": 1}, "prompt_logprobs"),
    "last n too large": ({"prompt_logprobs": True, "prompt_logprobs_last_n": 3}, "1..2"),
    "topk": ({"topk_prompt_logprobs": 513}, "topk_prompt_logprobs"),
    "alternatives": ({"prompt_alt_tokens_k": -1}, "prompt_alt_tokens_k"),
    "targets of another length": ({"target_prompt_logprobs": {"data": [1], "dtype": "int64", "shape": [1, 1]}}, "[2, K]"),
    "float targets": ({"target_prompt_logprobs": {"data": [1, 2], "dtype": "float32", "shape": [2, 1]}}, "int64"),
    "empty targets": ({"target_prompt_logprobs": {"data": [-1, -1], "dtype": "int64", "shape": [2, 1]}}, "at least one"),
    "an image": ({"prompt": {"chunks": [{"type": "image", "data": "aGk=", "format": "png"}]}}, "reads text alone"),
    "the address of an image": (
        {"prompt": {"chunks": [{"type": "image_asset_pointer", "location": "/etc/passwd", "format": "png"}]}},
        "reads text alone",
    ),
    "no sampler": ({"sampling_session_id": None}, "sampling_session_id"),
    "a base model as well": ({"base_model": "tiny"}, "create_sampling_session"),
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_bad_samples_are_refused(raw: Raw, case: str) -> None:
    changes, word = BAD_SAMPLES[case]
    refused(raw.post("/asample", **sample(raw.sampler(), 0, **changes)), 400, word)


def test_unknown_ids_are_not_found(raw: Raw) -> None:
    for path in ("/training_runs/x", "/training_runs/x/checkpoints", "/sessions/x", "/samplers/x", "/sessions/x/trace_export"):
        assert raw.http.get(path).status_code == 404
    assert raw.http.delete("/training_runs/x/checkpoints/weights/y").status_code == 404
    assert raw.http.delete("/training_runs/x/checkpoints/y").status_code == 400
    assert raw.http.get("/training_runs/x/checkpoints/weights/..%2F../external_weights_urls").status_code in (400, 404)
    assert raw.http.get("/files/x/weights/y/z").status_code == 404
    assert raw.poll("x").status_code == 404
    refused(raw.post("/get_info", model_id="x"), 404, "x")
    refused(raw.forward_backward(batch("x:train:0", 1).SerializeToString()), 404, "x:train:0")
    refused(raw.post("/asample", **sample("x:sample:0", 0)), 404, "x:sample:0")
    assert raw.post("/session_heartbeat", session_id="x").status_code == 404


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"\xff", b'{"session_id": 1}'])
def test_malformed_json_is_refused_on_every_route(raw: Raw, body: bytes) -> None:
    routes = "create_session session_heartbeat create_model get_info optim_step save_weights load_weights asample retrieve_future"
    for route in routes.split():
        reply = raw.http.post(f"/{route}", content=body, headers={"content-type": "application/json"})
        assert reply.status_code == 400, (route, reply.text)
        assert reply.json()["detail"]


def test_foreign_tenants_see_nothing(new_server, tmp_path) -> None:
    """Two keys, two tenants: the other's ids are as unknown as made-up ones, unless a checkpoint is published."""
    from everlearn.store import keys
    from everlearn.store.db import open_database

    home = tmp_path / "home"
    home.mkdir()
    db = open_database(f"sqlite:///{home / 'everlearn.db'}")
    mine, theirs = (db.write(lambda conn, tenant=tenant: keys.create(conn, tenant, tenant)).result()[1] for tenant in ("a", "b"))
    db.close()
    live = new_server(home)
    a, b = Raw(live.url, live.model, mine), Raw(live.url, live.model, theirs)
    assert httpx.get(f"{live.url}/api/v1/sessions", headers={"x-api-key": "tml-wrong"}).status_code == 401
    assert httpx.get(f"{live.url}/api/v1/sessions").status_code == 401
    run = a.create(0)
    saved = a.result(a.ok("/save_weights", model_id=run, seq_id=1, path="w")["request_id"])["path"]
    sampler = a.sampler(5)
    for path in (f"/training_runs/{run}", f"/training_runs/{run}/checkpoints", f"/sessions/{a.session}", f"/samplers/{sampler}"):
        assert a.http.get(path).status_code == 200 and b.http.get(path).status_code == 404
    assert b.poll(f"{run}:0").status_code == 404 and b.post("/cancel_future", request_id=f"{run}:0").status_code == 404
    assert b.forward_backward(batch(run, 2).SerializeToString()).status_code == 404
    assert b.post("/asample", **sample(sampler, 0)).status_code == 404
    assert b.post("/session_heartbeat", session_id=a.session).status_code == 404
    assert b.post("/create_model", session_id=a.session, model_seq_id=9, base_model=b.model, lora_config={"rank": 1}).status_code == 404
    assert b.http.delete(f"/training_runs/{run}/checkpoints/weights/w").status_code == 404
    load = {"session_id": b.session, "model_seq_id": 3, "path": saved, "optimizer": True}
    assert b.post("/load_weights", **load).status_code == 404
    copy = b.http.post(
        "/copy_weights", json={"source_path": saved, "destination_project_id": "p"}, headers={"x-tinker-weights-access-token": mine}
    )
    assert copy.status_code == 200 and copy.json()["tinker_path"] != saved
    assert b.ok("/load_weights", **load | {"weights_access_token": mine, "model_seq_id": 4})["model_id"].endswith(":train:4")
    assert a.http.post(f"/training_runs/{run}/checkpoints/weights/w/publish").status_code == 204
    assert b.ok("/weights_info", tinker_path=saved)["lora_rank"] == 2
    b.result(b.ok("/load_weights", **load)["request_id"])
    assert b.http.get(f"/training_runs/{run}/checkpoints/weights/w/external_weights_urls").status_code == 404
    assert [item["training_run_id"] for item in a.http.get("/training_runs").json()["training_runs"]] == [run]
    assert a.http.get("/auth/apikey/me").json()["name"] == "a" and a.http.delete("/auth/apikey/me").status_code == 204
