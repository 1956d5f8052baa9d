"""Adapters for the loop's tests: versions of a name on the tiny server, trained through the official SDK."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import tinker
from tinker import types

from tests.live import KEY, LiveServer


def train(server: LiveServer, prompt: str, answer: str, steps: int = 30) -> str:
    """The tinker:// path of an adapter that answers `prompt` (as the server renders it) with `answer`."""
    with httpx.Client(base_url=server.url, headers={"X-API-Key": KEY}, timeout=60) as http:
        ask = {"model": server.model, "messages": [{"role": "user", "content": prompt}]}
        before = http.post("/v1/tokenize", json=ask).raise_for_status().json()
        said = http.post("/v1/tokenize", json={"model": server.model, "prompt": answer, "add_special_tokens": False}).json()
    tokens, ids = before["tokens"], [*said["tokens"], before["end_token"]]
    whole = tokens + ids
    inputs = {"target_tokens": whole[1:], "weights": [0.0] * (len(tokens) - 1) + [1.0] * len(ids)}
    datum = types.Datum(model_input=types.ModelInput.from_ints(whole[:-1]), loss_fn_inputs=inputs)
    with tinker.ServiceClient(base_url=server.url, api_key=KEY) as service:
        client = service.create_lora_training_client(server.model, rank=8, seed=1).result()
        for step in range(steps):
            done = client.forward_backward([datum], "cross_entropy")
            client.optim_step(types.AdamParams(learning_rate=0.02 * (1 - step / steps))).result()
            done.result()
        return client.save_state("taught").result().path


@pytest.fixture
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"X-API-Key": KEY}, timeout=60) as client:
        yield client
