from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean

import pytest

from tests.recipes.conftest import RunRecipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

TOPICS = ["a lemon", "the moon", "a bicycle", "rain", "a violin", "the sea", "a clock", "bread", "a spider", "snow", "a bridge", "salt"]
ASKS = ["Tell me about {}.", "What is {}?", "Describe {} to a child.", "Why do people like {}?"]


def write_preferences(folder: Path) -> None:
    """Forty-eight pairs in the format of the data set that the recipe asks for: a friendly answer is preferred to a rude one."""
    folder.mkdir(parents=True)
    pairs = []
    for ask in ASKS:
        for topic in TOPICS:
            question = ask.format(topic)
            kind, rude = f"Happy to help! Here is something nice about {topic}.", f"No. I won't talk about {topic}, go away."
            pairs.append(
                {"chosen": f"\n\nHuman: {question}\n\nAssistant: {kind}", "rejected": f"\n\nHuman: {question}\n\nAssistant: {rude}"}
            )
    for name, rows in (("train", pairs), ("test", pairs[:8])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_dpo_learns_a_local_preference_file(run_recipe: RunRecipe, tmp_path: Path) -> None:
    # `datasets` takes a folder of this name before it asks the hub.
    write_preferences(tmp_path / "Anthropic" / "hh-rlhf")
    rows = run_recipe(
        "tinker_cookbook.recipes.preference.dpo.train",
        dataset="hhh",
        batch_size=8,
        max_length=256,
        learning_rate=2e-4,
    )
    losses = [row["dpo_loss"] for row in rows if "dpo_loss" in row]
    assert len(losses) == 6
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4), "before the first step policy and reference are the same"
    assert mean(losses[-2:]) < 0.5, losses
    assert [row["accuracy"] for row in rows if "accuracy" in row][-1] == 1.0
