"""The mixture of experts that is trained from nothing, and what adapters on its experts learn through a real server."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import tinker

from recipes import chains
from recipes import moe_expert_lora as lessons
from recipes.moe_from_scratch import Recipe, ensure
from tests.live import KEY, LiveServer, start_server

# Two layers of four narrow experts: enough to sort short strings about every third time, after ten seconds.
SMALL = Recipe(steps=270, batch=64, learning_rate=5e-3, warmup=10, hidden=64, layers=2, experts=4, expert_width=64)
ROUNDING = 5e-5  # of a log-probability, between two ways of computing it in float32; several times what was seen


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def server(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    live = start_server(tmp_path_factory.mktemp("home"), ensure(SMALL, cache))
    yield live
    live.stop()


def test_chains_are_read_from_left_to_right() -> None:
    assert chains.solve("SL", "dbaf") == "bdfa" and chains.solve("SR", "dbaf") == "fdba" and chains.solve("NR", "abj") == "acb"
    chosen = [*chains.COMMON, *chains.SHIFTED, *chains.UNSEEN]
    assert len(set(chosen)) == len(chosen) == 4 + 16 + 13


def test_held_out_strings_are_never_trained_on() -> None:
    sides = [
        {problem.prompt.partition(":")[2] for problem in chains.problems(chains.COMMON, 3000, random.Random(3), held_out=side)}
        for side in (False, True)
    ]
    assert not sides[0] & sides[1]


def test_every_character_is_a_token_of_its_own() -> None:
    tokenizer, problem = chains.make_tokenizer(), chains.Problem("SL:dbaf=", "bdfa")
    text = problem.prompt + problem.answer + chains.END
    ids = tokenizer.encode(text).ids
    assert ids == problem.prompt_ids + problem.answer_ids and len(ids) == 13
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_model_is_trained_once(cache: Path) -> None:
    folder = ensure(SMALL, cache)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    lines: list[str] = []
    assert ensure(SMALL, cache, lines.append) == folder and not lines
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert json.loads((folder / "recipe.json").read_text())["accuracy"].keys() >= {"common", "shifted", "unseen", "S", "SNS", "SR"}
    other = ensure(Recipe(steps=1, batch=2, hidden=32, layers=1, experts=2, expert_width=8), cache, lines.append)
    assert other != folder and lines
    assert {path.name for path in cache.iterdir()} == {folder.name, other.name}  # nothing unfinished stays


def test_the_default_is_nine_million_parameters_in_experts() -> None:
    from recipes.moe_from_scratch import new_model

    sizes = {name: parameter.numel() for name, parameter in new_model(Recipe()).named_parameters()}
    assert 8.5e6 < sum(sizes.values()) < 9.5e6
    assert sum(size for name, size in sizes.items() if "experts" in name) > 0.97 * sum(sizes.values())


def expected_accuracy(training: Any, problems: list[chains.Problem]) -> float:
    """The mean probability of the right answer: what drawing would give on the average, without the luck of the draw."""
    data = [lessons.as_datum(problem.prompt_ids, problem.answer_ids, weights=[1.0] * len(problem.answer_ids)) for problem in problems]
    outputs = training.forward(data, "cross_entropy").result().loss_fn_outputs
    return mean(
        math.exp(sum(output["logprobs"].data[-len(problem.answer_ids) :])) for output, problem in zip(outputs, problems, strict=True)
    )


@pytest.mark.parametrize("on", ["experts", "attention"])
def test_adapters_learn_by_sft_and_the_sampler_agrees(server: LiveServer, on: str) -> None:
    """A pair that the base model never saw: its loss falls to a third and less, whatever the base's seed."""
    lesson = lessons.Lesson(steps=30, batch=16, learning_rate=5e-3, every=30, chains=("SR",))
    training = lessons.open_training(tinker.ServiceClient(base_url=server.url, api_key=KEY), server.model, on, lesson)
    rows = lessons.sft(training, lesson, lessons.measure_tasks(8))
    assert [row["step"] for row in rows if "shifted" in row] == [0, 30]
    losses = [row["loss"] for row in rows[1:]]
    assert mean(losses[-4:]) < 0.6 * losses[0], losses
    agreed = lessons.agreement(training)
    assert agreed["tokens"] >= 500 and agreed["gap_99"] <= ROUNDING, agreed


def test_experts_learn_by_rewards_alone(server: LiveServer) -> None:
    """Sorting, which this model sometimes gets right: what is drawn is compared with the trainer at every step. What was learnt is asked
    on the same held-out strings before and after, which differ by about ten times the standard error of their difference."""
    lesson = lessons.Lesson(steps=30, batch=16, learning_rate=3e-3, every=30, chains=("S",))
    training = lessons.open_training(tinker.ServiceClient(base_url=server.url, api_key=KEY), server.model, "experts", lesson)
    held_out = chains.problems(("S",), 200, random.Random(3), held_out=True)
    before = expected_accuracy(training, held_out)
    rows = lessons.grpo(training, lesson, lessons.measure_tasks(8))
    after = expected_accuracy(training, held_out)
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert len(rewards) == 30 and rows[0]["taught"] > 0, rows
    assert after > before + 0.02, (before, after, rewards)
    compared = [row for row in rows if "gap" in row]
    assert max(row["gap_99"] for row in compared) <= ROUNDING and sum(row["tokens"] for row in compared) >= 500
