"""A policy in use: what it is asked about a window's lines, how sure it is of them, and which sentences stay for that."""

from __future__ import annotations

import msgspec
import pytest
import tinker

from everlearn.memory.decide import Certain, Decided, Surest, decision
from everlearn.memory.moments import moments
from everlearn.memory.plan import Plan
from everlearn.memory.synthetic import synthetic
from everlearn.memory.window import Window, chunk_of, line
from everlearn.rl.datums import supervised
from everlearn.rl.prompts import ChatMl


@pytest.fixture(scope="module")
def window(chat: ChatMl) -> Window:
    return moments(synthetic(60, 5000, 12), chat.encode, 300, 1)[0].window


def test_a_policy_is_asked_once_about_a_line(judge, chat, window):
    chunks, places = window.chunks, range(len(window.chunks))
    decided, certain = Decided(judge.sampler, chat, once=True), Certain(judge.sampler, chat, once=True)
    first, sure = decided.of(window, chunks, places), certain.of(window, chunks, places)
    asked = decided.undecided
    assert decided.of(window, chunks, places) == first and decided.undecided == asked
    cut = [msgspec.structs.replace(chunk, text=chunk.text[:9], rewrites=1, importance=0.001) for chunk in chunks[:2]]
    assert certain.of(window, [*cut, *chunks[1:]], [0, 1, 2]) == [0.001, 0.001, sure[1]], (
        "what is left of a chunk is worth no more than it was"
    )
    assert decided.of(window, chunks[1:], [0]) == first[1:2] and certain.of(window, chunks[1:], [0]) == sure[1:2]
    for once in (decided.once, certain.once):
        assert once is not None and len(once.known) == len({(chunk.role, chunk.text) for chunk in chunks[1:]}), "what left is forgotten"


@pytest.fixture(scope="module")
def taught(service, server, chat, window) -> tinker.SamplingClient:
    """A policy that was taught to keep the second line of a window and to drop the first and the third."""
    trainer = service.create_lora_training_client(server.model, rank=8, seed=5).result()
    orders = [decision(chat, window.chunks, place).to_ints() for place in range(3)]
    data = [supervised(order, chat.encode(f"{word}<|im_end|>")) for order, word in zip(orders, ("drop", "keep", "drop"), strict=True)]
    for _ in range(30):
        trainer.forward_backward(data, "cross_entropy")
        trainer.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    path = trainer.save_weights_for_sampler("sure").result().path
    return service.create_sampling_client(model_path=path).result()


def test_how_sure_a_policy_is_ranks_what_its_word_can_t(taught, chat, window):
    """It would say one word or the other of all lines that it wasn't taught; how sure it is lies between."""
    sure = Certain(taught, chat).of(window, window.chunks, range(len(window.chunks)))
    assert sure[1] > 0.9 and max(sure[0], sure[2]) < 0.1 and all(0.0 <= value <= 1.0 for value in sure), sure
    assert len(set(sure)) > len(window.chunks) / 2, sure


def test_the_sentence_stays_that_the_policy_is_surest_to_keep(taught, chat, window):
    sentences = ["My name is Ida.", "Nice weather today.", "The code of the lab is 6370."]
    chunks = list(window.chunks)
    chunks[2] = chunk_of(chat.encode, "user", " ".join(sentences), 2)
    window = msgspec.structs.replace(window, chunks=tuple(chunks))
    certain = Certain(taught, chat)
    alone = [[*chunks[:2], chunk_of(chat.encode, "user", text, 2), *chunks[3:]] for text in sentences]
    levels = [certain.of(window, own, [2])[0] for own in alone]
    best = sentences[levels.index(max(levels))]
    assert len(set(levels)) == 3
    surest = Surest(chat.encode, certain)
    least = len(chat.encode(line("user", best)))
    assert surest.least(window, chunks[2]) == least
    assert surest.known == {("user", text): pytest.approx(level, abs=1e-4) for text, level in zip(sentences, levels, strict=True)}
    assert surest.fill(Plan(window, window.chunks, 0, (2,), (least,))) == [best]
    assert surest.least(window, chunk_of(chat.encode, "user", best, 2)) == least and len(surest.known) == 3, "one sentence has no rival"
    again = chunk_of(chat.encode, "user", f"{sentences[0]} Anything new?", 9)
    surest.least(window, again)
    (alone,) = certain.of(window, [*window.chunks, chunk_of(chat.encode, "user", "Anything new?", 9)], [len(window.chunks)])
    assert surest.known["user", "Anything new?"] == pytest.approx(alone, abs=1e-4), (
        "asked where its chunk is to stand, not where one begins alike"
    )
    surest.least(msgspec.structs.replace(window, chunks=()), chunks[2])
    assert set(surest.known) == {("user", text) for text in sentences}, "what left the window is forgotten"
