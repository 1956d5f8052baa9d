"""A server's client, how its tiny model is asked, and who judges memories there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker

from everlearn.memory.environment import Judge
from everlearn.render.tokenizer import load
from everlearn.rl.prompts import ChatMl
from tests.live import KEY, LiveServer


@pytest.fixture(scope="module")
def service(server: LiveServer) -> Iterator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=server.url, api_key=KEY) as client:
        yield client


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatMl:
    tokenizer = load(tiny_model)
    return ChatMl(tokenizer.encode, lambda ids: tokenizer.decode(ids, skip_special=True))


@pytest.fixture(scope="module")
def judge(service, server, chat) -> Judge:
    return Judge(service.create_sampling_client(base_model=server.model).result(), chat)
