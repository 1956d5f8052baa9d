"""A server with two base models: an adapter stays with its own, and a setting of images speaks only to the one that sees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live import LiveServer, start_server
from tests.tiny_vision import make_tiny_vision_model
from tests.wire.raw import Raw, sample
from tests.wire.test_bad_input import refused


@pytest.fixture(scope="module")
def live(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    seeing = make_tiny_vision_model(tmp_path_factory.mktemp("models") / "seeing")
    server = start_server(tmp_path_factory.mktemp("home"), tiny_model, {"images.train_tower": True}, others={"seeing": seeing})
    yield server
    server.stop()


@pytest.fixture(scope="module")
def raw(live: LiveServer) -> Raw:
    return Raw(live.url, "tiny")


def saved(raw: Raw, run: str, seq: int = 1) -> str:
    return raw.result(raw.ok("/save_weights", model_id=run, seq_id=seq, path="kept")["request_id"])["path"]


def test_an_adapter_of_another_base_model_is_refused(raw: Raw) -> None:
    text, sees = raw.create(1), raw.create(2, base_model="seeing", lora_config={"rank": 2, "seed": 1, "train_vision": False})
    path = saved(raw, text)
    said = "belongs to base model 'tiny'"
    refused(raw.post("/load_weights", model_id=sees, seq_id=1, path=path, optimizer=False), 400, said)
    new: dict[str, Any] = {"session_id": raw.session, "model_seq_id": 3, "path": path, "optimizer": False}
    refused(raw.post("/load_weights", **new, base_model="seeing"), 400, said)
    loaded = raw.result(raw.ok("/load_weights", **new | {"model_seq_id": 4}, base_model="tiny")["request_id"])
    assert raw.ok("/get_info", model_id=loaded["model_id"])["model_name"] == "tiny"
    body = {"session_id": raw.session, "sampling_session_seq_id": 5, "model_path": path}
    refused(raw.post("/create_sampling_session", **body, base_model="seeing"), 400, "tiny")
    assert saved(raw, sees, 2)  # a request that was refused used up its number, and the run goes on


@pytest.mark.parametrize(("base", "wish", "trains"), [("seeing", None, True), ("seeing", False, False), ("tiny", None, False)])
def test_the_tower_is_trained_by_setting_or_wish(live: LiveServer, raw: Raw, base: str, wish: bool | None, trains: bool) -> None:
    lora = {"rank": 2, "seed": 1} | ({} if wish is None else {"train_vision": wish})
    run = raw.create(10 + 2 * (base == "tiny") + trains, base_model=base, lora_config=lora)
    saved(raw, run)
    manifests = [(path.parent, json.loads(path.read_text())) for path in live.home.rglob("manifest.json")]
    folder, manifest = next((folder, found) for folder, found in manifests if found.get("model_id") == run)
    assert manifest["train_vision"] is trains
    assert (b"visual.blocks.0" in (folder / "adapter.safetensors").read_bytes()[:65536]) is trains


def test_an_answer_ends_where_the_cache_of_its_model_does(tiny_model: Path, tmp_path: Path) -> None:
    """Also of a model that isn't loaded before it is asked. What was asked for and doesn't fit is refused."""
    live = start_server(tmp_path, tiny_model, {"engine.kv_tokens": 256}, others={"second": tiny_model})
    try:
        raw, second = Raw(live.url, "tiny"), Raw(live.url, "second")
        long = {"model": "second", "prompt": [1] * 300}
        asked = {"params": {"max_tokens": None, "stop": []}}
        result = raw.result(raw.ok("/asample", **sample(raw.sampler(), 0, **asked))["request_id"])
        assert len(result["sequences"][0]["tokens"]) == 254
        body = {"model": "second", "prompt": [1] * 200, "max_tokens": 700, "ignore_eos": True}
        assert raw.http.post(f"{live.url}/v1/completions", json=body).json()["usage"]["completion_tokens"] == 57
        told = raw.http.post(f"{live.url}/v1/completions", json=long).json()
        assert told["error"]["code"] == "context_length_exceeded" and "room for 256" in told["error"]["message"]
        told = raw.http.post(f"{live.url}/v1/tokenize", json={"model": "second", "prompt": "x"}).json()
        assert (told["max_model_len"], told["room"]) == (1024, 256)
        failed = second.ok("/asample", **sample(second.sampler(), 0, params={"max_tokens": 900}))["request_id"]
        assert "lower max_tokens" in str(second.result(failed))
        models = raw.http.get(f"{live.url}/v1/capabilities").json()["models"]
        assert {one["id"]: one["kv_tokens"] for one in models if one["kv_tokens"]} == {"tiny": 256, "second": 256}
    finally:
        live.stop()


def test_a_model_without_a_tower_is_asked_for_none(raw: Raw) -> None:
    body = {"session_id": raw.session, "model_seq_id": 30, "base_model": "tiny", "lora_config": {"rank": 2, "train_vision": True}}
    refused(raw.post("/create_model", **body), 400, "reads text alone")
