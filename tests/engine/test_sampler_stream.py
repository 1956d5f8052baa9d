"""Tokens events, deadlines, and requests that go away. `run` holds every stream against its whole answer."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from everlearn.engine.protocol import Completed, Failed, Tokens
from everlearn.errors import InvalidRequest
from everlearn.models.load import BaseModel
from everlearn.types import SampleResult
from tests.engine.harness import load_tiny
from tests.engine.sampling import make_sampler, one, prompts, request, run, tokens_of


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_tiny(tiny_model)


def test_one_event_a_step_and_only_for_those_who_asked(base: BaseModel) -> None:
    sampler = make_sampler(base)
    sampler.add(request("streams", prompts(0, [9])[0], max_tokens=5, num_samples=3, stream=True, topk_sample_logprobs=2))
    sampler.add(request("silent", prompts(1, [7])[0], max_tokens=5))
    steps: list[list[str]] = []
    while sampler.has_work():
        steps.append([type(event).__name__ + " " + event.request_id for event in sampler.step()])
    assert steps[0] == ["Tokens streams"]
    assert all(names.count("Tokens streams") <= 1 and "Tokens silent" not in names for names in steps)
    assert [name for names in steps for name in names if name.startswith("Completed")] == ["Completed silent", "Completed streams"]


def test_a_stream_is_the_answer_in_pieces(base: BaseModel) -> None:
    """Under preemption, with prefix hits, stop tokens and top log-probabilities; `run` compares."""
    asked = [
        request(
            str(i), p, max_tokens=20, seed=i, num_samples=1 + i % 3, stream=True, stop_tokens=list(range(3, 30)), topk_sample_logprobs=i % 3
        )
        for i, p in enumerate(prompts(6, [5, 30, 12, 40, 7, 22]))
    ]
    sampler = make_sampler(base, kv_tokens=100, prefill_tokens=16)
    answers = run(sampler, *asked)
    again = run(sampler, *asked)
    assert sampler.stats()["preemptions"] > 0
    for wanted in asked:
        for index in range(wanted.num_samples):
            assert tokens_of(answers[wanted.request_id], index) == tokens_of(again[wanted.request_id], index)


def test_an_answer_says_where_its_time_went(base: BaseModel) -> None:
    """The parts follow each other, and are the whole; a step is counted by its size."""
    sampler = make_sampler(base, max_batch=1)
    began = time.monotonic()
    for name in ("first", "second"):
        sampler.add(request(name, prompts(3, [20])[0], max_tokens=6))
    sampler.add(request("scored", prompts(3, [20])[0], max_tokens=0))
    ends: dict[str, float] = {}
    answers: dict[str, Completed] = {}
    while sampler.has_work():
        for event in sampler.step():
            assert isinstance(event, Completed)
            answers[event.request_id], ends[event.request_id] = event, time.monotonic()
    for name, answer in answers.items():
        assert answer.times is not None
        spent = answer.times.queue + answer.times.prefill + answer.times.decode
        assert 0 < spent <= ends[name] - began and answer.times.prefill > 0
        assert (answer.times.decode > 0) == (name != "scored")
    first, second = answers["first"].times, answers["second"].times
    assert first is not None and second is not None and second.queue >= first.prefill + first.decode
    # A prompt of 20 and five tokens, the prompt again but for what the prefix cache held, five more tokens, and the scored prompt's rest.
    assert sampler.step_sizes[0] >= 10 and sampler.step_sizes[3] == 1 and sum(sampler.step_sizes) == 13
    assert sampler.step_tokens == sampler.stats()["step_tokens"] == 60 + 10 - sampler.prefix_hit_tokens


def test_without_tokens_only_the_end_is_told(base: BaseModel) -> None:
    sampler = make_sampler(base)
    sampler.add(request("r", prompts(2, [5])[0], max_tokens=0, num_samples=2, stream=True))
    events = sampler.step()
    assert [type(event) for event in events] == [Tokens, Completed]
    assert isinstance(events[0], Tokens)
    assert [(p.index, p.tokens, p.stop_reason) for p in events[0].parts] == [(0, [], "length"), (1, [], "length")]


def test_a_deadline_ends_a_request_with_what_it_has(base: BaseModel) -> None:
    sampler = make_sampler(base)
    prompt = prompts(3, [12])[0]
    whole = tokens_of(one(sampler, request("whole", prompt, max_tokens=200)))
    sampler.add(request("late", prompt, max_tokens=1000, num_samples=2, stream=True, deadline=1.0))
    sampler.add(request("free", prompt, max_tokens=200, deadline=1000.0))
    answers = run(sampler)
    late = answers["late"]
    assert isinstance(late, SampleResult)
    assert [s.stop_reason for s in late.sequences] == ["deadline"] * 2
    drawn = tokens_of(late)
    assert 0 < len(drawn) < 1000 and drawn[:200] == whole[: len(drawn)]
    assert tokens_of(answers["free"]) == whole
    assert sampler.stats()["deadlines_passed"] == 1


def test_a_deadline_that_passes_before_the_prompt_is_computed(base: BaseModel) -> None:
    sampler = make_sampler(base, max_batch=1)
    sampler.add(request("first", prompts(4, [5])[0], max_tokens=30))
    sampler.step()
    sampler.add(request("waits", prompts(5, [9])[0], max_tokens=5, num_samples=3, prompt_logprobs=True, stream=True, deadline=0.001))
    time.sleep(0.002)
    answers = run(sampler)
    waits = answers["waits"]
    assert isinstance(waits, SampleResult)
    assert [(s.stop_reason, s.tokens.shape) for s in waits.sequences] == [("deadline", [0])] * 3
    assert len(tokens_of(answers["first"])) == 30


@pytest.mark.parametrize("deadline", [-1.0, float("nan"), float("inf")])
def test_a_deadline_is_a_number_of_seconds(base: BaseModel, deadline: float) -> None:
    with pytest.raises(InvalidRequest):
        make_sampler(base).add(request("r", [5, 6], deadline=deadline))


def test_whatever_moment_a_client_leaves_at_nothing_stays_behind(base: BaseModel) -> None:
    rng = random.Random(0)
    sampler = make_sampler(base, kv_tokens=200, max_batch=6, prefill_tokens=16)
    for round_ in range(40):
        names = []
        for i, prompt in enumerate(prompts(round_, [rng.randint(1, 40) for _ in range(4)])):
            names.append(f"{round_}.{i}")
            sampler.add(
                request(names[-1], prompt, max_tokens=30, num_samples=rng.randint(1, 3), stream=bool(i % 2), cache_salt=f"t{i % 2}")
            )
        for _ in range(rng.randint(0, 12)):
            sampler.step()
        left = [name for name in names if sampler.cancel(name)]
        events = sampler.step()  # one step later all is free, and everyone has been answered
        assert [event.request_id for event in events if isinstance(event, Failed)] == left
        stats = sampler.stats()
        assert (stats["running"], stats["waiting"], stats["kv_blocks_used"]) == (0, 0, 0)
        assert not sampler.requests and not sampler.has_work()
