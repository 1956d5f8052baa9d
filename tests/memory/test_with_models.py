"""What asks a model: refills, counterfactuals and decisions, through the unmodified SDK against a real server on a tiny model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tinker

from everlearn.errors import InvalidRequest
from everlearn.memory.asking import ANSWER_TOKENS, Asking
from everlearn.memory.counterfactual import Counterfactual, surprisals
from everlearn.memory.decide import Decided
from everlearn.memory.distil import examples
from everlearn.memory.generate import Generate
from everlearn.memory.importance import FEATURES, distilled
from everlearn.memory.memory import Memory
from everlearn.memory.orders import UNDECIDED, level_of, sure_of
from everlearn.memory.plan import Plan
from everlearn.memory.synthetic import synthetic
from everlearn.memory.window import Chunk, Window, chunk_of, line
from everlearn.rl.prompts import ChatMl
from tests.live import KEY, LiveServer

SAID = ("My sister Nora lives in Lisbon.", "The bus was late.", "I never eat shellfish.", "What a nice day it is.", "Where does Nora live?")


@pytest.fixture(scope="module")
def sampler(server: LiveServer) -> Iterator[tinker.SamplingClient]:
    with tinker.ServiceClient(base_url=server.url, api_key=KEY) as service:
        yield service.create_sampling_client(base_model=server.model).result()


@pytest.fixture(scope="module")
def chunks(chat: ChatMl) -> tuple[Chunk, ...]:
    return tuple(chunk_of(chat.encode, ("user", "assistant")[i % 2], text, i) for i, text in enumerate(SAID))


def test_generated_refills_keep_to_their_caps_and_follow_from_the_seed(sampler, chat, chunks):
    chunks = tuple(chunk_of(chat.encode, chunk.role, " ".join([chunk.text] * 6), chunk.born) for chunk in chunks)
    plan = Plan(Window(5000, chunks, 4), chunks, 4, (0, 2, 3), (70, 60, 80))
    assert len(plan.holes) == 3
    found = {}
    for name, made in (
        ("greedy", Generate(sampler, chat)),
        ("again", Generate(sampler, chat)),
        ("drawn", Generate(sampler, chat, 1.0, seed=1)),
        ("drawn again", Generate(sampler, chat, 1.0, seed=1)),
        ("drawn otherwise", Generate(sampler, chat, 1.0, seed=2)),
    ):
        found[name] = made.fill(plan)
        for hole, text in zip(plan.holes, found[name], strict=True):
            assert not text or len(chat.encode(line(chunks[hole.place].role, text))) <= hole.cap
    assert found["greedy"] == found["again"] and found["drawn"] == found["drawn again"] != found["drawn otherwise"]
    with pytest.raises(InvalidRequest, match="temperature is -1"):
        Generate(sampler, chat, -1.0)


def test_the_counterfactual_is_the_difference_of_two_log_likelihoods(sampler, chunks):
    falls = Counterfactual(sampler, later=1).falls(chunks, [0, 2, 4])

    def score(shown: tuple[Chunk, ...]) -> float:
        prompt = [token for chunk in (*shown, chunks[4]) for token in chunk.tokens]
        values = sampler.compute_logprobs(tinker.ModelInput.from_ints(prompt)).result()
        return sum(value for value in values[-len(chunks[4].tokens) :])

    whole = score(chunks[:4])
    assert falls[0] == pytest.approx(whole - score(chunks[1:4]), abs=1e-4)
    assert falls[1] == pytest.approx(whole - score((chunks[0], chunks[1], chunks[3])), abs=1e-4)
    assert falls[2] == 0.0
    values = Counterfactual(sampler, later=1, scale=2.0).of(Window(1000), chunks, [0, 2, 4])
    assert values[:2] == pytest.approx([1 - math.exp(-max(0, fall) / 2) for fall in falls[:2]], abs=1e-4)
    assert values[2] == chunks[4].importance  # it is what is to be explained
    assert Counterfactual(sampler, later=5).falls(chunks, [0]) == [0.0]
    assert len(Counterfactual(sampler, later=4).falls(chunks, [0])) == 1  # nothing else stands before them
    with pytest.raises(InvalidRequest, match="later is 0"):
        Counterfactual(sampler, later=0)


def test_a_head_is_distilled_from_what_answers_needed(sampler, chat):
    case = synthetic(120, 1, 6)
    inputs, targets = examples(sampler, chat.encode, case, others=3)
    assert inputs.shape == (24, len(FEATURES)) and targets.shape == (24,) and 0 <= targets.min() <= targets.max() < 1
    again = examples(sampler, chat.encode, case, others=3)
    assert (again[0] == inputs).all() and again[1] == pytest.approx(targets, abs=1e-4)
    head = distilled(inputs, targets)
    assert np.abs(head.scores(inputs) - targets).mean() <= np.abs(targets.mean() - targets).mean() + 0.02
    with pytest.raises(InvalidRequest, match="others is 0"):
        examples(sampler, chat.encode, case, others=0)


def test_surprisal_takes_one_forward_pass(sampler, chunks):
    found = surprisals(sampler, chunks)
    prompt = [token for chunk in chunks for token in chunk.tokens]
    values = sampler.compute_logprobs(tinker.ModelInput.from_ints(prompt)).result()
    last = values[-len(chunks[-1].tokens) :]
    assert found[-1] == pytest.approx(-sum(last) / len(last), abs=1e-5) and len(found) == 5 and min(found) > 0


def test_decisions_are_read_or_counted(sampler, chat, chunks):
    told = {"keep": 1.0, " Keep.": 1.0, "drop it": 0.0, "compress 3": 0.3, "Compress: 9": 0.9, "compress": 0.5, "keeper": None, "": None}
    assert {answer: level_of(answer) for answer in told} == told
    assert sure_of({7: math.log(0.3), 8: math.log(0.1), 9: math.log(0.01)}, 7, 8) == pytest.approx(0.75)
    assert sure_of({7: math.log(0.3), 9: math.log(0.1)}, 7, 8) == pytest.approx(0.75), "what isn't listed is as likely as the last at most"
    assert sure_of({9: -1.0}, 7, 8) is None and sure_of({7: -0.1, 8: -3000.0}, 8, 7) == pytest.approx(0.0)
    decided = Decided(sampler, chat)
    values = decided.of(Window(1000), chunks, [0, 1])
    assert all(0 <= value <= 1 for value in values) and decided.undecided == sum(value == UNDECIDED for value in values)


def test_a_memory_whose_model_weighs_and_writes(sampler, chat, tmp_path: Path):
    """A late estimator is asked only under pressure, and the budget holds whatever the model writes."""
    memory = Memory.open(
        tmp_path / "m.memory", chat.encode, 120, importance=Counterfactual(sampler, later=1), refill=Generate(sampler, chat)
    )
    for number in range(14):
        memory.add("user", f"This is turn {number}, and it says this and that.")
        assert memory.window.size <= 120
    assert any(chunk.importance != 0.5 for chunk in memory.window.chunks)
    assert {past.refill for turn in memory.archive.turns() for past in memory.archive.rewrites(turn.number)} == {"generate"}
    written = next(chunk for chunk in memory.window.chunks if chunk.rewrites)
    neighbour = written.beside[-1]
    assert neighbour not in written.sources and memory.archive.turn(neighbour)
    memory.forget(neighbour)
    assert not any(neighbour in chunk.beside for chunk in memory.window.chunks), "some words of it may stand in them"
    assert memory.archive.rewrites(written.sources[0]) == [] and memory.archive.turn(written.sources[0]), "which doesn't forget their turns"
    memory.close()


def test_an_answer_that_was_just_given_is_worth_what_it_was(sampler, chat, chunks):
    """It belongs to what is to be explained, so its own loss explains nothing: it isn't the first to go. A line counts with its copies."""
    counterfactual = Counterfactual(sampler, later=1)
    window = Window(5000, chunks[:-1], 3)
    new = msgspec.structs.replace(chunks[-1], importance=0.7)
    assert counterfactual.of(window, (*chunks[:-1], new), [0, len(chunks) - 1])[1] == 0.7
    twice = (chunks[0], chunks[1], msgspec.structs.replace(chunks[0], born=2), chunks[3], chunks[4])
    falls = counterfactual.falls(twice, [0, 2])
    assert falls[0] == pytest.approx(falls[1], abs=1e-4) and falls[0] != 0.0


def test_answers_are_greedy_and_short(sampler, chat):
    asking = Asking(sampler, chat)
    asked = [(["user: My sister Nora lives in Lisbon.\n"], "Where does Nora live?"), ([], "What?")]
    first = asking.answers(asked)
    assert first == asking.answers(asked) and all(len(chat.encode(text)) <= 2 * ANSWER_TOKENS and "\n" not in text for text in first)
    assert isinstance(asking.write("Write something.", 5), str)


def test_a_refill_of_a_window_s_copy_changes_nothing(chunks):
    """Windows are values: what a refill is shown can't be changed by it."""
    with pytest.raises(AttributeError):
        chunks[0].text = "x"
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(Window(1000, chunks, 4)), type=Window).chunks == chunks
