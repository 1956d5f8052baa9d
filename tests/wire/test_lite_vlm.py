"""Lite-VLM through unmodified clients: the SDK's images and a chat's are the same to it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import tinker
from tinker import types

from everlearn.evals.fewshot_vision import PROMPT
from everlearn.evals.prompts import VisionPrompt
from everlearn.models.catalog import read_info
from tests.live import KEY, LiveServer, start_server
from tests.tiny_lite import make_tiny_lite_model
from tests.tiny_vision import picture

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_lite_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def seeing(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    live = start_server(tmp_path_factory.mktemp("home"), folder)
    yield live
    live.stop()


def test_a_chat_sees_what_the_tinker_api_sees(seeing: LiveServer, folder: Path):
    prompt, image = VisionPrompt.load(read_info("tiny", folder, [])), picture(1, 200, 60)
    chunks = [
        types.EncodedTextChunk(tokens=prompt.before),
        types.ImageChunk(data=image, format="png", expected_tokens=4),
        types.EncodedTextChunk(tokens=prompt.after),
    ]
    whole, params = types.ModelInput(chunks=chunks), types.SamplingParams(max_tokens=6, temperature=0.0)
    with tinker.ServiceClient(base_url=seeing.url, api_key=KEY) as service:
        sequence = service.create_sampling_client(base_model="tiny").result().sample(whole, 1, params).result().sequences[0]
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": PROMPT}]
    client = openai.OpenAI(base_url=seeing.url + "/v1", api_key=KEY, max_retries=0)
    reply = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": content}], temperature=0.0, max_tokens=6, logprobs=True
    )
    assert reply.usage.prompt_tokens == whole.length
    told = [token.logprob for token in reply.choices[0].logprobs.content]
    assert told == pytest.approx(sequence.logprobs[: len(told)], abs=1e-4) and told


def test_a_wrong_count_of_tokens_is_refused(seeing: LiveServer):
    chunk = types.ImageChunk(data=picture(1), format="png", expected_tokens=9)
    with tinker.ServiceClient(base_url=seeing.url, api_key=KEY) as service:
        sampler = service.create_sampling_client(base_model="tiny").result()
        with pytest.raises(tinker.BadRequestError, match=r"takes 4 tokens \(2 x 2\)"):
            sampler.sample(types.ModelInput(chunks=[chunk]), 1, types.SamplingParams(max_tokens=1)).result()


def test_the_server_lists_it_among_the_models(seeing: LiveServer):
    answer = httpx.get(seeing.url + "/v1/models", headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    assert "tiny" in [model["id"] for model in answer.json()["data"]]
