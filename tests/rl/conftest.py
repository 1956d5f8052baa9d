"""A policy on a real server, and what environments of tests are made of."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import tinker
from tokenizers import Tokenizer

from everlearn.rl.policy import TinkerPolicy
from tests.live import KEY, LiveServer


@pytest.fixture(scope="module")
def service(server: LiveServer) -> Iterator[tinker.ServiceClient]:
    client = tinker.ServiceClient(base_url=server.url, api_key=KEY)
    yield client
    client.close("success").result()


@pytest.fixture(scope="module")
def policy(service: tinker.ServiceClient, server: LiveServer) -> TinkerPolicy:
    return TinkerPolicy(service.create_sampling_client(base_model=server.model).result(), max_tokens=6)


@pytest.fixture(scope="module")
def tokenizer(server: LiveServer) -> Tokenizer:
    settings = (server.home / "everlearn.toml").read_text()
    path = next(line for line in settings.splitlines() if line.startswith("path = "))
    return Tokenizer.from_file(json.loads(path.removeprefix("path = ")) + "/tokenizer.json")
