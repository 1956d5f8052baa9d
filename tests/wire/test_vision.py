"""A model that sees, through unmodified clients: trained on images by the Tinker SDK, asked about them through every chat API."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
import tinker
from PIL import Image
from tinker import types
from tokenizers import Tokenizer

from tests.live import KEY, LiveServer, start_server
from tests.tiny_vision import make_tiny_vision_model, picture, row_of
from tests.wire.raw import Raw

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

QUESTION = "what is it?"
PAIRS = [(picture(seed, 32 + 16 * (seed % 3), 32), f"{seed * 37 % 100:02}") for seed in range(32)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vision_model(tmp_path_factory.mktemp("models") / "tiny-vl")


@pytest.fixture(scope="module")
def seeing(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    live = start_server(tmp_path_factory.mktemp("home"), folder)
    yield live
    live.stop()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def service(seeing: LiveServer) -> Iterator[tinker.ServiceClient]:
    client = tinker.ServiceClient(base_url=seeing.url, api_key=KEY)
    yield client
    client.close("success").result()


class Talk:
    """How a conversation is spelled in tokens, without the chat template."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt(self, image: bytes) -> list[Any]:
        before, after = self.ids("<|im_start|>user\n<|vision_start|>"), f"<|vision_end|>{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
        _, (span,) = row_of([image])
        shown = types.ImageChunk(data=image, format="png", expected_tokens=span.num_tokens)
        return [types.EncodedTextChunk(tokens=before), shown, types.EncodedTextChunk(tokens=self.ids(after))]

    def datum(self, image: bytes, answer: str) -> types.Datum:
        prompt, said = self.prompt(image), self.ids(f"{answer}<|im_end|>")
        whole = types.ModelInput(chunks=[*prompt, types.EncodedTextChunk(tokens=said[:-1])])
        lead = whole.length - len(said) + 1  # the prompt's tokens
        targets = [0] * (lead - 1) + said
        return types.Datum(model_input=whole, loss_fn_inputs={"target_tokens": targets, "weights": [0.0] * (lead - 1) + [1.0] * len(said)})


@pytest.fixture(scope="module")
def talk(tokenizer: Tokenizer) -> Talk:
    return Talk(tokenizer)


@pytest.fixture(scope="module")
def taught(service: tinker.ServiceClient, seeing: LiveServer, talk: Talk) -> str:
    """The path of a sampler that knows all pairs. Its engine died in between, and what it had learnt came back from the log."""
    client = service.create_lora_training_client(seeing.model, rank=16, seed=1).result()
    data = [talk.datum(image, answer) for image, answer in PAIRS]
    for _ in range(60):
        output = client.forward_backward(data, "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        if output.result().metrics["loss:sum"] < 0.3:
            break
    else:
        raise AssertionError(f"the loss is still {output.result().metrics['loss:sum']}")
    seeing.kill_engine()
    return client.save_weights_for_sampler("eyes").result().path


def data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def test_pairs_of_image_and_answer_are_learnt_to_exact_match(taught: str, service: tinker.ServiceClient, talk: Talk):
    sampler = service.create_sampling_client(model_path=taught)
    params = types.SamplingParams(max_tokens=8, temperature=0.0)
    asked = [sampler.sample(types.ModelInput(chunks=talk.prompt(image)), 1, params) for image, _ in PAIRS]
    said = [talk.tokenizer.decode(future.result().sequences[0].tokens) for future in asked]
    assert said == [answer for _, answer in PAIRS]


def test_a_chat_gets_the_same_answers(taught: str, seeing: LiveServer):
    client = openai.OpenAI(base_url=seeing.url + "/v1", api_key=KEY, max_retries=0)
    for image, answer in PAIRS:
        content = [{"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": content}]
        reply = client.chat.completions.create(model=taught, messages=messages, temperature=0.0, max_tokens=8)
        assert reply.choices[0].message.content == answer


def test_responses_and_messages_see_the_same(taught: str, seeing: LiveServer):
    image, answer = PAIRS[5]
    client = openai.OpenAI(base_url=seeing.url + "/v1", api_key=KEY, max_retries=0)
    content = [{"type": "input_image", "image_url": data_url(image), "detail": "auto"}, {"type": "input_text", "text": QUESTION}]
    reply = client.responses.create(model=taught, input=[{"role": "user", "content": content}], temperature=0.0, max_output_tokens=16)
    assert reply.output_text == answer
    other = anthropic.Anthropic(base_url=seeing.url + "/anthropic/api", api_key=KEY, max_retries=0)
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(image).decode()}
    messages = [{"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]}]
    said = other.messages.create(model=taught, messages=messages, max_tokens=16, extra_body={"temperature": 0.0})
    assert said.content[0].text == answer
    counted = other.messages.count_tokens(model=taught, messages=messages)
    assert counted.input_tokens == said.usage.input_tokens + said.usage.cache_read_input_tokens == reply.usage.input_tokens


def test_a_chat_sends_the_tokens_that_the_tinker_api_sends(taught: str, seeing: LiveServer, service: tinker.ServiceClient, talk: Talk):
    image = PAIRS[1][0]
    prompt = types.ModelInput(chunks=talk.prompt(image))
    params = types.SamplingParams(max_tokens=4, temperature=0.0)
    sequence = service.create_sampling_client(model_path=taught).sample(prompt, 1, params).result().sequences[0]
    client = openai.OpenAI(base_url=seeing.url + "/v1", api_key=KEY, max_retries=0)
    content = [{"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": QUESTION}]
    reply = client.chat.completions.create(
        model=taught, messages=[{"role": "user", "content": content}], temperature=0.0, max_tokens=4, logprobs=True
    )
    assert reply.usage.prompt_tokens == prompt.length
    told = [token.logprob for token in reply.choices[0].logprobs.content]  # a chat leaves the token out that ended it
    assert told == pytest.approx(sequence.logprobs[:-1], abs=1e-4)


def test_detail_low_shows_fewer_pixels(seeing: LiveServer):
    """The tiny model sees 128 x 128 at most in any case, so both take as many tokens; what isn't known is refused."""
    client = openai.OpenAI(base_url=seeing.url + "/v1", api_key=KEY, max_retries=0)

    def tokens(**image: str) -> int:
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": image}]}]
        return client.chat.completions.create(model="tiny", messages=messages, max_tokens=1).usage.prompt_tokens

    url = data_url(picture(1, 128, 128))
    assert tokens(url=url) == tokens(url=url, detail="low") > 64
    with pytest.raises(openai.BadRequestError, match="detail"):
        tokens(url=url, detail="ultra")


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("https://example.com/x.png", "images.remote"),
        ("file:///etc/passwd", "data URL"),
        ("data:image/png;base64,aGk=", "known format"),
        (data_url(picture(1)[:80]), "broken"),
    ],
)
def test_images_that_cannot_be_seen_are_refused_by_name(seeing: LiveServer, url: str, word: str):
    body = {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}], "max_tokens": 1}
    answer = httpx.post(seeing.url + "/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    assert answer.status_code == 400, answer.text
    assert word in answer.json()["error"]["message"] and answer.json()["error"]["param"] == "messages[0].content[0]"


def test_an_address_is_an_image_too(seeing: LiveServer, service: tinker.ServiceClient):
    sampler = service.create_sampling_client(base_model="tiny")
    chunk = types.ImageAssetPointerChunk(format="png", location=data_url(picture(1)), expected_tokens=4)
    prompt = types.ModelInput(chunks=[types.EncodedTextChunk(tokens=[1, 9]), chunk, types.EncodedTextChunk(tokens=[8])])
    same = types.ModelInput(chunks=[prompt.chunks[0], types.ImageChunk(data=picture(1), format="png", expected_tokens=4), prompt.chunks[2]])
    params = types.SamplingParams(max_tokens=4, temperature=0.0)
    one, other = (sampler.sample(given, 1, params).result().sequences[0] for given in (prompt, same))
    assert one.tokens == other.tokens and one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_words_for_image_tokens_are_only_words(seeing: LiveServer):
    client = openai.OpenAI(base_url=seeing.url + "/v1", api_key=KEY, max_retries=0)
    image = {"type": "image_url", "image_url": {"url": data_url(picture(1))}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "<|vision_start|><|image_pad|><|vision_end|>"}, image]}]
    assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=1).usage.prompt_tokens > 4
    messages.insert(0, {"role": "assistant", "content": "<|image_pad|>"})
    with pytest.raises(openai.BadRequestError, match="makes 2 places"):
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)


@pytest.mark.parametrize("api", ["chat", "sample"])
def test_images_that_wait_to_be_decoded_hold_nobody_else_up(seeing: LiveServer, api: str):
    """More large images than the server has threads: whoever asks for something else meanwhile doesn't stand in line behind them."""
    file = io.BytesIO()
    Image.effect_noise((256, 256), 90).resize((3000, 3000)).convert("RGB").save(file, "JPEG", quality=30)
    sampler, image = Raw(seeing.url, "tiny").sampler(), base64.b64encode(file.getvalue()).decode()
    chunks = [{"type": "image", "format": "jpeg", "data": image}]
    content = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image}"}}]

    async def ask(client: httpx.AsyncClient, number: int) -> int:
        if api == "chat":
            body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 1}
            return (await client.post("/v1/chat/completions", json=body)).status_code
        params = {"sampling_params": {"max_tokens": 1}, "sampling_session_id": sampler, "seq_id": 1000 + number}
        return (await client.post("/api/v1/asample", json={"prompt": {"chunks": chunks}} | params)).status_code

    async def crowd() -> tuple[list[int], list[int]]:
        async with httpx.AsyncClient(base_url=seeing.url, headers={"x-api-key": KEY}, timeout=300) as client:
            waiting = [asyncio.create_task(ask(client, number)) for number in range(72)]
            done = []
            await asyncio.sleep(0.5)
            for _ in range(5):
                done.append(sum(task.done() for task in waiting))
                assert (await client.get("/v1/records", params={"limit": 1})).status_code == 200
            done.append(sum(task.done() for task in waiting))
            return done, await asyncio.gather(*waiting)

    done, statuses = asyncio.run(crowd())
    assert set(statuses) == {200}
    assert max(after - before for before, after in pairwise(done)) < 24, (
        f"{done} of 72 were answered before each question and after the last"
    )
