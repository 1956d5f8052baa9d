"""The wire without an SDK: what a client could send, right or wrong."""

from __future__ import annotations

import time
from typing import Any

import httpx
import numpy as np

from everlearn.api.tinker.schema import pb
from tests.live import KEY

PROTO = "application/x-protobuf"


class Raw:
    """A session on a server, and one training run with rank 2 in it."""

    def __init__(self, url: str, model: str, key: str = KEY):
        self.model = model
        self.http = httpx.Client(base_url=url + "/api/v1", headers={"x-api-key": key}, timeout=60)
        self.session = self.ok("/create_session", sdk_version="0.38.0", tags=[], user_metadata={})["session_id"]

    def post(self, route: str, /, **body: Any) -> httpx.Response:
        return self.http.post(route, json=body)

    def ok(self, route: str, /, **body: Any) -> dict[str, Any]:
        reply = self.post(route, **body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def create(self, number: int = 0, **fields: Any) -> str:
        body = {
            "session_id": self.session,
            "model_seq_id": number,
            "base_model": self.model,
            "lora_config": {"rank": 2, "seed": 1},
        } | fields
        return self.result(self.ok("/create_model", **body)["request_id"])["model_id"]

    def poll(self, request_id: str, proto: bool = False, **fields: Any) -> httpx.Response:
        headers = {"accept": PROTO} if proto else {}
        return self.http.post("/retrieve_future", json={"request_id": request_id} | fields, headers=headers)

    def result(self, request_id: str) -> dict[str, Any]:
        """The JSON result, however long it takes."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            reply = self.poll(request_id)
            assert reply.status_code == 200, reply.text
            if reply.json().get("type") != "try_again":
                return reply.json()
        raise AssertionError(f"{request_id} has no result after 60 s")

    def forward_backward(self, body: bytes, **headers: str) -> httpx.Response:
        return self.http.post("/forward_backward", content=body, headers={"content-type": PROTO} | headers)

    def sampler(self, number: int = 0) -> str:
        body = {"session_id": self.session, "sampling_session_seq_id": number, "base_model": self.model}
        return self.ok("/create_sampling_session", **body)["sampling_session_id"]


def batch(model_id: str, seq: int, tokens: list[int] | None = None, **changes: Any) -> Any:
    """A good cross_entropy request as a message; `changes` are loss_fn, inputs (name -> array), forward_only."""
    tokens = [1, 40, 41, 42] if tokens is None else tokens
    message = pb.ForwardBackwardRequest(model_id=model_id, seq_id=seq, loss_fn=changes.get("loss_fn", "cross_entropy"))
    message.forward_only = changes.get("forward_only", False)
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.asarray(tokens, np.int32).tobytes()
    inputs = {"target_tokens": np.full(len(tokens), 43), "weights": np.ones(len(tokens), np.float32)} | changes.get("inputs", {})
    for name, values in inputs.items():
        if values is None:
            continue
        tensor = datum.loss_fn_inputs[name]
        tensor.dtype = pb.DTYPE_INT64 if values.dtype.kind == "i" else pb.DTYPE_FLOAT32
        tensor.dense = values.astype(np.int64 if values.dtype.kind == "i" else np.float32).tobytes()
        tensor.shape.extend(values.shape)
    return message


def sample(sampler: str, seq: int, **changes: Any) -> dict[str, Any]:
    params = {"max_tokens": 3, "temperature": 1.0, "top_k": -1, "top_p": 1.0} | changes.pop("params", {})
    prompt = {"chunks": [{"tokens": changes.pop("tokens", [1, 40, 41]), "type": "encoded_text"}]}
    return {"sampling_session_id": sampler, "seq_id": seq, "num_samples": 1, "prompt": prompt, "sampling_params": params} | changes
