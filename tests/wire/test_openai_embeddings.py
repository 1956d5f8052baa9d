"""Embeddings through the unmodified `openai` SDK, and as a reward model asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tinker
from tinker import types

from everlearn.errors import Unavailable
from everlearn.rewards.features import fetch
from tests.live import KEY, LiveServer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

TEXTS = ["the quick brown", "hello"]


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as made:
        yield made


def vectors(client: openai.OpenAI, given: Any, **fields: Any) -> np.ndarray:
    """The SDK asks for base64 and reads it; what it shows must be what plain numbers say."""
    answer = client.embeddings.create(model="tiny", input=given, **fields)
    assert [one.index for one in answer.data] == list(range(len(answer.data))) and answer.model.startswith("tiny")
    plain = client.embeddings.create(model="tiny", input=given, encoding_format="float", **fields)
    found = np.array([one.embedding for one in answer.data])
    np.testing.assert_allclose(found, [one.embedding for one in plain.data], rtol=1e-5, atol=1e-6)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    return found


def refused(client: openai.OpenAI, **fields: Any) -> Any:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(**{"model": "tiny", "input": "hello", **fields})
    return caught.value.body


def token_ids(server: LiveServer, text: str) -> list[int]:
    service = tinker.ServiceClient(base_url=server.url, api_key=KEY)
    return service.create_lora_training_client(base_model="tiny", rank=1).result().get_tokenizer().encode(text)


def test_inputs_are_texts_or_tokens_one_or_many_and_of_length_1(client, server: LiveServer) -> None:
    many = vectors(client, TEXTS)
    assert many.shape[0] == 2 and np.linalg.norm(many, axis=1) == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(vectors(client, TEXTS[0])[0], many[0], atol=1e-5)
    ids = token_ids(server, TEXTS[0])
    np.testing.assert_allclose(vectors(client, ids)[0], many[0], atol=1e-5)
    np.testing.assert_allclose(vectors(client, [ids, ids])[1], many[0], atol=1e-5)
    assert not np.allclose(many[0], many[1], atol=1e-2)


def test_pooling_and_length_can_be_chosen(client) -> None:
    mean, last = (vectors(client, TEXTS[0], extra_body={"pooling": pooling}) for pooling in ("mean", "last"))
    assert not np.allclose(mean, last, atol=1e-3)
    raw = vectors(client, TEXTS[0], extra_body={"normalize": False})
    assert np.linalg.norm(raw) > 1.5
    np.testing.assert_allclose(raw / np.linalg.norm(raw), mean, atol=1e-5)


def test_an_adapter_s_states_are_its_own_and_the_base_s_stay(client, server: LiveServer) -> None:
    before = vectors(client, TEXTS[0])
    service = tinker.ServiceClient(base_url=server.url, api_key=KEY)
    trainer = service.create_lora_training_client(base_model="tiny", rank=8).result()
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(list(range(10, 30))),
        loss_fn_inputs={"target_tokens": list(range(11, 31)), "weights": [1.0] * 20},
    )
    for _ in range(3):
        trainer.forward_backward([datum], "cross_entropy")
        trainer.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    path = trainer.save_weights_for_sampler(name="embed").result().path
    moved = client.embeddings.create(model=path, input=TEXTS[0])
    assert not np.allclose(moved.data[0].embedding, before[0], atol=1e-4)
    np.testing.assert_allclose(vectors(client, TEXTS[0]), before, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ["hello", ""]}, "input"),
        ({"input": ["hello", 5]}, "input"),
        ({"input": ["a"] * 129}, "input"),
        ({"input": [10**9]}, "prompt"),
        ({"dimensions": 7}, "dimensions"),
        ({"extra_body": {"pooling": "max"}}, "pooling"),
        ({"extra_body": {"stream": True}}, "stream"),
        ({"extra_body": {"deadline": -1}}, "deadline"),
    ],
)
def test_what_it_can_t_do_is_refused_by_name(client, fields: dict[str, Any], param: str) -> None:
    assert refused(client, **fields)["param"] == param


def test_a_record_with_figures_alone_and_usage_stay(client, server: LiveServer) -> None:
    answer = client.embeddings.with_raw_response.create(model="tiny", input=TEXTS)
    ids = answer.headers["x-everlearn-record"].split(",")
    assert len(ids) == 2
    record = httpx.get(f"{server.url}/v1/records/{ids[0]}", headers={"authorization": f"Bearer {KEY}"}).json()
    assert record["route"] == "embeddings" and not record.get("messages")


def test_features_come_in_batches_and_in_order(server: LiveServer, client) -> None:
    ids = [[10 + place % 7, 20 + place % 11, 30] for place in range(70)]
    found = fetch(server.url, KEY, "tiny", ids)
    assert found.shape[0] == 70 and found.dtype == np.float64
    raw = client.embeddings.create(model="tiny", input=ids[69], extra_body={"normalize": False}).data[0].embedding
    np.testing.assert_allclose(found[69], raw, atol=1e-4)
    with pytest.raises(Unavailable, match="no features from .*: 404"):
        fetch(server.url, KEY, "nobody", ids[:1])
    with pytest.raises(Unavailable, match="is the server running"):
        fetch("http://127.0.0.1:9", KEY, "tiny", ids[:1])
