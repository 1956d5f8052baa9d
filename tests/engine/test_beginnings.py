"""What sequences begin with in common is computed once, and nobody can tell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from everlearn.engine.protocol import ForwardBackward
from everlearn.engine.trainer import Trainer
from everlearn.models.beginnings import places, shared
from everlearn.models.load import BaseModel
from everlearn.types import Datum
from tests.engine.harness import adapter, datum, forward_backward, load_tiny
from tests.engine.test_trainer import with_random_b


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_tiny(tiny_model)


def of_one_beginning(seed: int, own: list[int], common: int = 9) -> list[Datum]:
    """Examples that begin alike; the first two are the same up to their last token, and one is nothing but the beginning."""
    rng = np.random.default_rng(seed)
    start = rng.integers(3, 512, common)
    rows = [np.concatenate([start, rng.integers(3, 512, n)]) for n in own]
    rows[1] = rows[0].copy()
    rows[1][-1] = 3 + (rows[0][-1] + 1) % 500
    rows.append(np.append(start, 7))
    weights = [(np.arange(len(row) - 1) % 3 > 0).astype(np.float32) for row in rows]
    return [datum(row[:-1].tolist(), row[1:].tolist(), weights=own) for row, own in zip(rows, weights, strict=True)]


def test_places_are_those_of_a_plain_search():
    rng = np.random.default_rng(0)
    parts = [[rng.integers(0, 2, n) for n in rng.integers(1, 7, 6)] for _ in range(3)]
    told = [(number, tuple(row[: t + 1])) for number, part in enumerate(parts) for row in part for t in range(len(row))]
    first = {beginning: place for place, beginning in reversed(list(enumerate(told)))}
    found = places(parts)
    assert len(set(found.tolist())) == len(first) < len(told)
    for place, beginning in enumerate(told):
        assert found[place] == found[first[beginning]]
    assert found[0] == 0 and (np.diff(np.maximum.accumulate(found)) <= 1).all(), "they are numbered in the order of the row"
    alone = [rng.integers(0, 9, 5)]
    assert shared([alone, alone]) is None, "requests share nothing with each other"


@pytest.mark.parametrize("budget", [48, 512])
def test_a_lesson_s_gradient_is_that_of_its_examples_one_by_one(base: BaseModel, budget: int) -> None:
    data = of_one_beginning(1, [12, 12, 5, 20])
    together, apart = with_random_b(adapter(base)), with_random_b(adapter(base))
    trainer = Trainer(base, budget)
    whole = forward_backward(trainer, together, data)
    assert trainer.trained_tokens == sum(d.tokens.shape[0] for d in data), "all of them count"
    for one, output in zip(data, whole.outputs, strict=True):
        alone = forward_backward(trainer, apart, [one]).outputs[0]["logprobs"].numpy()
        np.testing.assert_allclose(output["logprobs"].numpy(), alone, atol=1e-5)
    torch.testing.assert_close(together.grad, apart.grad, rtol=1e-4, atol=1e-5)
    only_read = forward_backward(trainer, together, data, forward_only=True)
    for first, second in zip(whole.outputs, only_read.outputs, strict=True):
        np.testing.assert_allclose(first["logprobs"].numpy(), second["logprobs"].numpy(), atol=1e-5)


def test_adapters_that_share_a_row_keep_to_themselves(base: BaseModel) -> None:
    """The same beginning under two adapters is two beginnings."""
    data = of_one_beginning(2, [4, 4, 8])
    crowd = [with_random_b(adapter(base, f"run{i}", rank=4 + i, seed=i), i) for i in range(3)]
    alone = [with_random_b(adapter(base, f"run{i}", rank=4 + i, seed=i), i) for i in range(3)]
    trainer = Trainer(base, 512)
    for who in crowd:
        trainer.start(ForwardBackward("r", who.model_id, 1, data, "cross_entropy", {}), who)
    assert len(trainer.run_slice()) == 3, "they share a row"
    for one, other in zip(crowd, alone, strict=True):
        for single in data:
            forward_backward(trainer, other, [single])
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
