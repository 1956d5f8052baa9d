"""The Grafana dashboard: Grafana's own types take it whole, and a running server exports whatever it asks for."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.live import KEY, LiveServer

SUFFIXES = ("_bucket", "_count", "_sum")


@pytest.fixture(scope="module")
def board(root: Path) -> dict[str, Any]:
    return json.loads((root / "docs" / "operations" / "grafana.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_the_file_is_up_to_date(root: Path) -> None:
    spec = importlib.util.spec_from_file_location("dashboard", root / "docs" / "dashboard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (root / "docs" / "operations" / "grafana.json").read_text(encoding="utf-8") == module.text(), "run: python docs/dashboard.py"


def lost(given: Any, kept: Any, place: str = "") -> list[str]:
    """Where `kept` lacks or changes what `given` has."""
    if isinstance(given, dict):
        return [
            item
            for key, value in given.items()
            for item in (lost(value, kept[key], f"{place}.{key}") if key in kept else [f"{place}.{key}"])
        ]
    if isinstance(given, list):
        if len(given) != len(kept):
            return [place]
        return [item for index, pair in enumerate(zip(given, kept, strict=True)) for item in lost(*pair, f"{place}[{index}]")]
    return [] if given == kept else [f"{place}: {given!r} became {kept!r}"]


def through_grafana(board: dict[str, Any]) -> Any:
    """What Grafana's types, which are generated from its schemas, make of a dashboard: a field that they don't know is gone."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    return json.loads(JSONEncoder().encode(Dashboard.from_json(board)))


def test_grafana_s_types_know_every_field(board: dict[str, Any]) -> None:
    assert lost(board, through_grafana(board)) == []
    misspelt = board | {"titel": "x"}
    assert lost(misspelt, through_grafana(misspelt)) == [".titel"], "the check sees what Grafana would ignore"


def test_the_panels_lie_side_by_side(board: dict[str, Any]) -> None:
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"]) > 20
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        spot = panel["gridPos"]
        cells = {(x, y) for x in range(spot["x"], spot["x"] + spot["w"]) for y in range(spot["y"], spot["y"] + spot["h"])}
        assert not cells & taken and spot["x"] + spot["w"] <= 24, panel["title"]
        taken |= cells


def queries(board: dict[str, Any]) -> list[str]:
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    return asked + [variable["query"] for variable in board["templating"]["list"] if variable["type"] == "query"]


@pytest.fixture(scope="module")
def exported(server: LiveServer) -> dict[str, set[str]]:
    """Every sample's name on a server that has trained, sampled and chatted, with its labels (none where there is no sample yet)."""
    import httpx
    import tinker
    from tinker import types

    inputs = {"target_tokens": [6, 7], "weights": [1.0] * 2}
    datum = types.Datum(model_input=types.ModelInput.from_ints([5, 6]), loss_fn_inputs=inputs)
    with tinker.ServiceClient(base_url=server.url, api_key=KEY) as service:
        training = service.create_lora_training_client(server.model, rank=4).result()
        training.forward_backward([datum], "cross_entropy").result()
        training.optim_step(types.AdamParams(learning_rate=0.05)).result()
    chat = {"model": server.model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": True}
    assert httpx.post(server.url + "/v1/chat/completions", json=chat, timeout=60).status_code == 200
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(server.get("/metrics")[1].decode()):
        names = {"counter": [f"{family.name}_total"], "histogram": [family.name + suffix for suffix in SUFFIXES]}.get(
            family.type, [family.name]
        )
        found |= {name: set() for name in names}
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_every_metric_of_the_dashboard_is_exported(board: dict[str, Any], exported: dict[str, set[str]]) -> None:
    for query in queries(board):
        asked = set(re.findall(r"\b(?:vllm:|everlearn_)\w+", query))
        assert asked and asked <= set(exported), (query, asked - set(exported))
        labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query))
        labels |= {name.strip() for group in re.findall(r"\bby \(([^)]*)\)", query) for name in group.split(",")} - {"le"}
        for name in asked:
            assert not exported[name] or labels <= exported[name], (query, name, exported[name])


def test_legends_name_labels_of_their_query(board: dict[str, Any]) -> None:
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            grouped = {name.strip() for group in re.findall(r"\bby \(([^)]*)\)", target["expr"]) for name in group.split(",")}
            assert wanted <= grouped or " by (" not in target["expr"], (panel["title"], wanted)


def test_what_vllm_s_own_dashboard_asks_for_is_there(exported: dict[str, set[str]]) -> None:
    """The names in the dashboard that comes with vLLM, but for those of things that don't exist here (swapping)."""
    for histogram in (
        "e2e_request_latency_seconds",
        "time_to_first_token_seconds",
        "time_per_output_token_seconds",
        "inter_token_latency_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_inference_time_seconds",
        "request_max_num_generation_tokens",
        "request_params_max_tokens",
        "request_params_n",
        "iteration_tokens_total",
    ):
        assert {f"vllm:{histogram}{suffix}" for suffix in SUFFIXES} <= set(exported), histogram
    for name in ("prompt_tokens_total", "generation_tokens_total", "request_success_total", "num_requests_running", "num_requests_waiting"):
        assert f"vllm:{name}" in exported, name
    assert "vllm:kv_cache_usage_perc" in exported and "vllm:prefix_cache_hits_total" in exported


def test_what_routers_and_autoscalers_ask_vllm_for_is_there(exported: dict[str, set[str]]) -> None:
    """The rest of the names that vLLM documents, with their labels; not those of what isn't here: swapping, drafts, media, other caches,
    and `lora_requests_info`, whose labels would be the names that tenants chose."""
    assert exported["vllm:prompt_tokens_by_source_total"] == {"model_name", "source"}
    assert exported["vllm:num_requests_waiting_by_reason"] == {"model_name", "reason"}
    assert {"block_size", "num_gpu_blocks"} <= exported["vllm:cache_config_info"]
    for name in ("prompt_tokens_cached_total", "num_preemptions_total", "prefix_cache_queries_total", "admission_rejections_total"):
        assert f"vllm:{name}" in exported, name
    for histogram in ("request_prefill_kv_computed_tokens", "request_time_per_output_token_seconds"):
        assert f"vllm:{histogram}_bucket" in exported, histogram
