"""Older SDKs, unmodified and in their own environments: 0.16 speaks JSON only, 0.22 either, 0.25 protobuf only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.live import LiveServer
from tests.wire.sdk_envs import run_script, sdk_python

VERSIONS = ("0.16.1", "0.22.3", "0.25.0")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_method_of_an_older_sdk(version: str, server: LiveServer) -> None:
    script = Path(__file__).with_name("old_client.py")
    lines = run_script(sdk_python(version), script, server.url, server.model).strip().splitlines()
    out = json.loads(lines[-1])
    assert server.model in out["models"] and out["rank"] == 4 and ":train:" in out["model_id"]
    assert out["losses"][2] < out["losses"][1] < out["losses"][0] and out["lengths"] == [4, 2] and out["many"]
    assert out["step"]["grad_norm:mean"] > 0 and isinstance(out["ppo"], float)
    assert "vocabulary" in out["bad_token"] and "nonsense" in out["bad_loss"] and out["after_bad"] < out["losses"][2]
    assert out["from_state"] == pytest.approx(out["from_state_with_optimizer"], abs=1e-4) == pytest.approx(out["after_bad"], abs=1e-4)
    assert out["tokens"] == out["same_tokens"] and [len(tokens) for tokens in out["tokens"]] == [6, 6]
    assert all("length" in reason.lower() for reason in out["stop_reasons"])
    assert out["prompt_logprobs"][0] is None and out["topk"][0] is None and [len(row) for row in out["topk"][1:]] == [2, 2, 2]
    assert out["compute"][4:] == pytest.approx(out["sampled_logprobs"], abs=1e-4)
    assert out["base"][0] is None and out["base_model"] == server.model
    assert out["run"] == [server.model, 4, {"a": "b"}, True] and out["by_path"] == out["model_id"] and out["info"] == 4
    assert {"weights/kept", "sampler_weights/named"} <= set(out["checkpoints"]) and out["user_checkpoints"] >= 2
    assert out["model_id"] in out["session"] and out["listed"] and out["sampler"].endswith("sampler_weights/named")
    assert out["archive"] > 1000 and "NotFound" in out["deleted"]
