from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes.conftest import RunRecipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_chat_sl_learns_its_bundled_conversations(run_recipe: RunRecipe) -> None:
    import tinker_cookbook

    conversations = Path(tinker_cookbook.__file__).parent / "example_data" / "conversations.jsonl"
    rows = run_recipe(
        "tinker_cookbook.recipes.chat_sl.train",
        dataset=conversations,
        train_on_what="all_assistant_messages",
        batch_size=16,
        max_length=256,
        num_epochs=2,
        learning_rate=5e-4,
        lora_rank=16,
        save_every=8,
        eval_every=0,
    )
    losses = [row["train_mean_nll"] for row in rows if "train_mean_nll" in row]
    assert len(losses) == 16
    first_epoch, second_epoch = losses[:8], losses[8:]
    # The same conversations a second time: every one of them was seen before.
    assert sum(second_epoch) / 8 < 0.85 * sum(first_epoch) / 8, losses
