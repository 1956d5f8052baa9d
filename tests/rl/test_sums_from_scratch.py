"""recipes/sums_from_scratch.py: the same text for the same seed, nothing of it held out, a folder that a server takes."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from everlearn.rl.envs.arithmetic import is_held_out
from recipes.full_tuning import load
from recipes.sums_from_scratch import HELD_OUT_SEED, Recipe, ensure, line

SMALL = Recipe(steps=2, batch=4, hidden=64, layers=1)


def test_nothing_that_is_held_out_is_read_and_answers_slip_as_often_as_said():
    rng, right, sums = random.Random(0), 0, 0
    for _ in range(2000):
        text = line(SMALL, rng)
        found = re.search(r"What is (\d+) ([+-]) (\d+)\?.*= (\d+)<", text, flags=re.S)
        if found:
            a, sign, b, said = found.groups()
            assert not is_held_out(int(a), int(b), HELD_OUT_SEED)
            sums, right = sums + 1, right + (int(said) == (int(a) + int(b) if sign == "+" else int(a) - int(b)))
    assert sums > 1000 and right / sums == pytest.approx(0.7, abs=0.05)


def test_the_model_is_made_once_and_can_be_loaded(tiny_model: Path, tmp_path: Path):
    said: list[str] = []
    folder = ensure(SMALL, tiny_model, tmp_path, say=said.append)
    assert len(said) == 1 and "sums right" in said[0]
    assert ensure(SMALL, tiny_model, tmp_path, say=said.append) == folder and len(said) == 1
    assert ensure(replace(SMALL, seed=1), tiny_model, tmp_path) != folder
    assert load(folder, "cpu").num_parameters() == json.loads((folder / "recipe.json").read_text())["parameters"]
