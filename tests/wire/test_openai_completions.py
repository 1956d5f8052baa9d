"""Completions and the list of models through the unmodified `openai` SDK: prompts of every form, echo, scores, several at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import tinker
from tinker import types

from tests.live import KEY, LiveServer
from tests.wire import openai_schema

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

PROMPT = "the quick brown"


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as made:
        yield made


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    """Whole; a seeded request must say the same when it is streamed."""
    fields = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "seed": 1, **fields}
    whole = client.completions.create(**fields)
    if not (fields.get("echo") and fields.get("logprobs") is not None):
        openai_schema.validate("CreateCompletionResponse", whole.model_dump(mode="json", exclude_unset=True))
        texts = [""] * len(whole.choices)
        ends = [None] * len(whole.choices)
        for chunk in client.completions.create(stream=True, **fields):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                ends[choice.index] = choice.finish_reason or ends[choice.index]
        assert texts == [choice.text for choice in whole.choices]
        assert ends == [choice.finish_reason for choice in whole.choices]
    return whole


def refused(client: openai.OpenAI, **fields: Any) -> Any:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "tiny", "prompt": PROMPT, **fields})
    return caught.value.body


def test_prompts_are_text_or_tokens_one_or_many(client) -> None:
    one = complete(client).choices[0].text
    ids = [int(i) for i in token_ids(client, PROMPT)]
    assert complete(client, prompt=ids).choices[0].text == one
    many = complete(client, prompt=[PROMPT, "hello"], n=2)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3] and many.choices[0].text == one
    assert many.usage.completion_tokens == 24 and len(many.model_extra["everlearn"]["records"]) == 2
    assert complete(client, prompt=[ids, ids]).choices[1].text == one


def token_ids(client: openai.OpenAI, prompt: str) -> list[int]:
    record = client.completions.create(model="tiny", prompt=prompt, max_tokens=1).model_extra["everlearn"]["record"]
    return client.get(f"/records/{record}", cast_to=dict)["content"]["prompt_token_ids"]


def test_an_echo_comes_first_and_is_scored_as_the_trainer_scores_it(client, server) -> None:
    assert complete(client, echo=True).choices[0].text.startswith(PROMPT)
    scored = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=3)
    found = scored.choices[0].logprobs
    assert scored.choices[0].text == PROMPT == "".join(found.tokens) and scored.usage.completion_tokens == 0
    assert found.text_offset == [0, 3, 9] and found.token_logprobs[0] is None and found.top_logprobs[0] is None
    service = tinker.ServiceClient(base_url=server.url, api_key=KEY)
    sampler = service.create_sampling_client(base_model="tiny")
    expected = sampler.compute_logprobs(types.ModelInput.from_ints(token_ids(client, PROMPT))).result()
    assert found.token_logprobs[1:] == pytest.approx(expected[1:], abs=1e-5)
    assert all(3 <= len(row) <= 4 for row in found.top_logprobs[1:])


def test_scores_of_what_is_drawn(client) -> None:
    found = complete(client, logprobs=2).choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == 6 and all(value <= 0 for value in found.token_logprobs)
    assert all(found.tokens[i] in found.top_logprobs[i] for i in range(6))
    both = complete(client, logprobs=0, echo=True).choices[0].logprobs
    assert both.tokens[3:] == found.tokens and both.token_logprobs[3:] == pytest.approx(found.token_logprobs, abs=1e-5)
    assert both.text_offset[3] == len(PROMPT) and not any(math.isnan(value) for value in both.token_logprobs[1:])


def test_usage_and_the_record_come_last_in_a_stream(client) -> None:
    chunks = list(
        client.completions.create(
            model="tiny", prompt=[PROMPT, "x"], max_tokens=3, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage.completion_tokens == 6 and chunks[-1].choices == []
    assert len(chunks[-1].model_extra["everlearn"]["records"]) == 2 and not any(chunk.usage for chunk in chunks[:-1])


def test_the_default_is_sixteen_tokens_and_stops_stop(client) -> None:
    said = client.completions.create(model="tiny", prompt=PROMPT, temperature=0)
    assert said.usage.completion_tokens == 16
    stop = said.choices[0].text[4:7]
    stopped = complete(client, max_tokens=16, temperature=0, stop=stop).choices[0]
    assert stopped.text == said.choices[0].text[: said.choices[0].text.index(stop)] and stopped.finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "dog"}, "suffix"),
        ({"suffix": "dog", "echo": True}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": ["x"] * 65, "n": 2}, "prompt"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo"),
        ({"n": 1000}, "n"),
        ({"extra_body": {"messages": []}}, "messages"),
    ],
)
def test_what_can_not_be_honoured_is_refused_by_name(client, fields: dict[str, Any], param: str) -> None:
    assert refused(client, **fields)["param"] == param


# -- models --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(server: LiveServer, client: openai.OpenAI) -> str:
    """A trained adapter's path; named `support`, twice."""
    service = tinker.ServiceClient(base_url=server.url, api_key=KEY)
    training = service.create_lora_training_client("tiny", rank=4, seed=3).result()
    paths = []
    for name in ("one", "two"):
        datum = types.Datum(
            model_input=types.ModelInput.from_ints([1, 40, 41, 42]),
            loss_fn_inputs={"target_tokens": [40, 41, 42, 43], "weights": [1.0] * 4},
        )
        training.forward_backward([datum], "cross_entropy").result()
        training.optim_step(types.AdamParams(learning_rate=0.05)).result()
        paths.append(training.save_weights_for_sampler(name).result().path)
        client.post("/adapters", cast_to=dict, body={"name": "support", "path": paths[-1]})
    return paths[0]


def test_adapters_answer_under_every_name(client, adapter) -> None:
    def said(model: str) -> tuple[str, str]:
        raw = client.completions.with_raw_response.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0)
        return raw.headers["x-everlearn-version"], raw.parse().choices[0].text

    first = said("support@1")
    assert first[0] == "support@1" == said("support")[0]
    assert said(adapter) == (adapter, first[1]) and said(f"tiny;{adapter}")[1] == first[1] == said(f"Qwen/Qwen3-8B;{adapter}")[1]
    second = said("support@2")
    assert second[0] == "support@2" and second[1] != first[1] != said("tiny")[1]
    client.post("/adapters/support/move", cast_to=dict, body={"number": 2})
    assert said("support") == second and said("support@1") == first
    fingerprints = {
        client.completions.create(model=model, prompt="x", max_tokens=1).system_fingerprint for model in ("support@1", "support", "tiny")
    }
    assert len(fingerprints) == 3


def test_models_are_listed_and_found(client, adapter) -> None:
    listed = client.models.list()
    openai_schema.validate("ListModelsResponse", listed.model_dump(mode="json", exclude_unset=True))
    known = {model.id: model for model in listed}
    assert {"tiny", "Qwen/Qwen3-8B", "support"} <= set(known) and any(name.startswith("support@") for name in known)
    for name in ("tiny", "Qwen/Qwen3-8B", "support", "support@1", adapter):
        found = client.models.retrieve(name)
        assert found.id == name and found.model_extra["max_model_len"] == 1024
    assert known["support"].model_extra["parent"] == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
