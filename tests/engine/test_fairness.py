"""Turns between tenants: the queue alone, and in front of the sampler."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everlearn.engine.fairness import MANY_ACCOUNTS, FairQueue
from everlearn.engine.protocol import Completed
from everlearn.types import SampleResult
from tests.engine.harness import load_tiny
from tests.engine.sampling import make_sampler, one, prompts, request


def test_the_least_served_is_next_and_each_lane_keeps_its_order() -> None:
    queue: FairQueue[int] = FairQueue()
    for i in range(4):
        queue.append("a", i)
    queue.append("b", 10)
    order = []
    while queue:
        tenant, item = queue.pop()
        queue.charge(tenant, 3.0 if tenant == "a" else 1.0)
        order.append(item)
    assert order == [0, 10, 1, 2, 3]


def test_idleness_saves_up_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.append("busy", "x")
    for _ in range(100):
        queue.append("busy", "x")
        queue.charge(queue.pop()[0], 1.0)
    queue.append("late", "y")
    got = []
    for _ in range(4):
        queue.append("busy", "x")
        queue.append("late", "y")
        tenant, _item = queue.pop()
        queue.charge(tenant, 1.0)
        got.append(tenant)
    assert sorted(got) == ["busy", "busy", "late", "late"]


def test_many_tenants_that_left_are_forgotten() -> None:
    queue: FairQueue[int] = FairQueue()
    for i in range(3 * MANY_ACCOUNTS):
        queue.append(str(i), i)
        queue.charge(queue.pop()[0], 1.0)
    assert len(queue.served) <= MANY_ACCOUNTS + 1


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["append", "pop", "back", "remove"]), st.integers(1, 5)), max_size=60))
def test_nothing_is_lost_or_doubled(acts: list[tuple[str, str, int]]) -> None:
    queue: FairQueue[int] = FairQueue()
    inside: dict[int, str] = {}
    for number, (tenant, act, cost) in enumerate(acts):
        if act == "append" or not inside:
            queue.append(tenant, number)
            inside[number] = tenant
        elif act == "remove":
            victim = next(iter(inside))
            assert queue.remove(inside.pop(victim), victim)
            assert not queue.remove(tenant, victim)
        else:
            owner, item = queue.pop()
            assert inside.pop(item) == owner
            queue.charge(owner, cost)
            if act == "back":
                queue.put_back(owner, item)
                inside[item] = owner
        assert len(queue) == len(inside)


def test_one_request_of_a_tenant_overtakes_a_thousand_of_another(tiny_model: Path) -> None:
    sampler = make_sampler(load_tiny(tiny_model), max_batch=4)
    flood = prompts(0, [6] * 60)
    for i, prompt in enumerate(flood):
        sampler.add(request(f"flood {i}", prompt, max_tokens=6, cache_salt="flood"))
    sampler.step()
    for i, prompt in enumerate(prompts(1, [6, 6, 6])):
        sampler.add(request(f"calm {i}", prompt, max_tokens=6, cache_salt="calm"))
    done: list[str] = []
    while sampler.has_work():
        done += [event.request_id for event in sampler.step() if isinstance(event, Completed)]
    assert max(done.index(f"calm {i}") for i in range(3)) < 4 + 2 * 4  # those that ran already, then turn by turn
    assert [name for name in done if name.startswith("flood")] == [f"flood {i}" for i in range(60)]


@pytest.mark.parametrize("kv_tokens", [4096, 60])  # 60: whoever comes in needs the blocks that waiting samples hold
def test_a_request_of_hundreds_of_samples_takes_turns_with_others(tiny_model: Path, kv_tokens: int) -> None:
    base = load_tiny(tiny_model)
    sampler = make_sampler(base, max_batch=4, kv_tokens=kv_tokens)
    flood = request("flood", prompts(4, [30])[0], max_tokens=6, num_samples=300, cache_salt="flood")
    calm = [request(f"calm {i}", prompt, max_tokens=6, cache_salt="calm") for i, prompt in enumerate(prompts(5, [30, 9, 17]))]
    sampler.add(flood)
    for _ in range(3):
        sampler.step()
    for wanted in calm:
        sampler.add(wanted)
    steps = 0
    ended: dict[str, int] = {}
    answers: dict[str, SampleResult] = {}
    while sampler.has_work():
        steps += 1
        for event in sampler.step():
            assert isinstance(event, Completed) and isinstance(event.result, SampleResult)
            ended[event.request_id], answers[event.request_id] = steps, event.result
    assert max(ended[wanted.request_id] for wanted in calm) <= 6 * 6 and ended["flood"] > 300
    assert (sampler.stats()["preemptions"] > 0) == (kv_tokens == 60) and sampler.pool.num_used == 0 and not sampler.blocks.forks
    for wanted in (flood, *calm):
        alone = one(make_sampler(base), wanted)
        assert [s.tokens for s in alone.sequences] == [s.tokens for s in answers[wanted.request_id].sequences]


def test_samples_that_wait_are_in_nobodys_way_and_end_when_they_are_told(tiny_model: Path) -> None:
    """Cancelled, late or in want of blocks while they wait for their turn: nothing is lost and nobody is stuck."""
    base = load_tiny(tiny_model)
    sampler = make_sampler(base, max_batch=3, kv_tokens=48, prefill_tokens=16)
    asked = [
        request(f"{tenant} {i}", prompt, max_tokens=4 + i, num_samples=40, seed=i, cache_salt=tenant)
        for tenant in ("a", "b", "c")
        for i, prompt in enumerate(prompts(6, [13, 26]))
    ]
    asked.append(request("late", prompts(7, [20])[0], max_tokens=5, num_samples=40, cache_salt="d", deadline=0.2))
    for wanted in asked:
        sampler.add(wanted)
    answers: dict[str, SampleResult] = {}
    while sampler.has_work():
        for event in sampler.step():
            assert event.request_id not in answers
            if isinstance(event, Completed):
                assert isinstance(event.result, SampleResult)
                answers[event.request_id] = event.result
        if any(fork.request.command.request_id == "b 1" for fork in sampler.blocks.forks):
            assert sampler.cancel("b 1")
    assert sampler.stats()["preemptions"] > 0 and sampler.pool.num_used == 0 and not sampler.blocks.forks
    assert set(answers) == {wanted.request_id for wanted in asked} - {"b 1"}
    assert len(answers["late"].sequences) == 40
    for wanted in asked[:2]:
        alone = one(make_sampler(base), wanted)
        assert [s.tokens for s in alone.sequences] == [s.tokens for s in answers[wanted.request_id].sequences]


def test_a_long_prompt_leaves_room_for_short_ones(tiny_model: Path) -> None:
    sampler = make_sampler(load_tiny(tiny_model), prefill_tokens=32)
    sampler.add(request("long", prompts(2, [900])[0], max_tokens=4))
    sampler.step()
    sampler.add(request("short", prompts(3, [10])[0], max_tokens=4))
    done: list[str] = []
    steps = 0
    while not done:
        steps += 1
        done += [event.request_id for event in sampler.step() if isinstance(event, Completed)]
    assert done == ["short"] and steps <= 6
    while sampler.has_work():
        done += [event.request_id for event in sampler.step() if isinstance(event, Completed)]
    assert done == ["short", "long"]
