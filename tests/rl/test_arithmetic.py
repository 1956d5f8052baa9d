from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everlearn.errors import InvalidRequest
from everlearn.rl.envs.arithmetic import SumEnv, Sums, is_held_out
from everlearn.rl.prompts import ChatMl


def chat() -> ChatMl:
    return ChatMl(lambda text: [ord(letter) for letter in text], lambda ids: "".join(map(chr, ids)))


@pytest.mark.parametrize(
    ("answer", "values"),
    [("46", (0.0, 1.0)), (" 46\n", (0.0, 1.0)), ("45", (0.0, 0.0)), ("It is 46.", (-0.1, 0.0)), ("", (-0.1, 0.0)), ("46 46", (-0.1, 0.0))],
)
def test_answers(answer: str, values: tuple[float, float]):
    import asyncio

    result = asyncio.run(SumEnv(12, 34, chat()).step([ord(letter) for letter in answer]))
    assert (result.reward.values["parsed"], result.reward.values["right"]) == values
    assert result.metrics == {"right": float(values[1] == 1.0), "parsed": float(values[0] == 0.0)}


@given(st.integers(0, 1000), st.integers(10, 60))
def test_no_pair_is_in_both_splits(seed: int, below: int):
    train, test = ({Sums(chat(), seed, split, below).task(number) for number in range(20)} for split in ("train", "test"))
    assert not train & test and not {(b, a) for a, b in train} & test
    assert all(is_held_out(a, b, seed) for a, b in test) and not any(is_held_out(a, b, seed) for a, b in train)
    assert all(min(pair) >= 0 and max(pair) < below for pair in train | test)


def test_tasks_are_the_same_by_number():
    data = Sums(chat(), seed=3, batches=2, groups_per_batch=4)
    assert [data.task(number) for number in range(8)] == [Sums(chat(), seed=3).task(number) for number in range(8)]
    assert len({data.task(number) for number in range(50)}) > 40
    assert len(data) == 2 and len(data.get_batch(1)) == 4
    share = sum(is_held_out(a, b, 0) for a in range(100) for b in range(100)) / 10_000
    assert share == pytest.approx(0.2, abs=0.02)
    for wrong in ({"below": 2}, {"split": "dev"}):
        with pytest.raises(InvalidRequest):
            Sums(chat(), **wrong)
    with pytest.raises(InvalidRequest, match="from 0 to 1"):
        data.get_batch(2)
