from __future__ import annotations

from statistics import mean

import pytest

from tests.recipes.conftest import Metrics, RunRecipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

REWARD = "env/all/reward/total"
DRIFT = "optim/kl_sample_train_v2"  # half the mean squared difference of sampling and training log-probabilities


def arithmetic(run_recipe: RunRecipe, **options: object) -> Metrics:
    return run_recipe(
        "tinker_cookbook.recipes.math_rl.train",
        env="arithmetic",
        group_size=8,
        groups_per_batch=4,
        max_tokens=5,
        max_steps=20,
        learning_rate=4e-4,
        lora_rank=16,
        eval_every=0,
        save_every=0,
        **options,
    )


def check_rise(rows: Metrics) -> None:
    """The embedded model adds two numbers right about once in a hundred, so what it learns in 20 steps is the other part of the
    reward: to answer with a number and stop, instead of explaining. The first row is the untrained model."""
    rows = [row for row in rows if REWARD in row]
    rewards, formats = [row[REWARD] for row in rows], [row["env/all/format"] for row in rows]
    assert len(rewards) == 20, rewards
    assert mean(rewards[-10:]) > rewards[0] + 0.02, rewards
    assert formats[0] < 0.8 and mean(formats[-10:]) > 0.85, formats
    # On policy, sampler and trainer must give the same log-probability to every sampled token.
    assert max(row[DRIFT] for row in rows if DRIFT in row) < 1e-9


def test_arithmetic_reward_rises_with_importance_sampling(run_recipe: RunRecipe) -> None:
    check_rise(arithmetic(run_recipe, loss_fn="importance_sampling"))


def test_arithmetic_reward_rises_with_the_recipes_default_loss(run_recipe: RunRecipe) -> None:
    check_rise(arithmetic(run_recipe))


def test_guess_number_plays_whole_games(run_recipe: RunRecipe) -> None:
    """Each of a game's ten turns becomes a training sequence of its own with the whole game so far: few games are many tokens."""
    rows = run_recipe(
        "tinker_cookbook.recipes.multiplayer_rl.guess_number.train",
        group_size=2,
        batch_size=2,
        max_tokens=8,
        max_steps=2,
        learning_rate=4e-4,
        eval_every=0,
        save_every=0,
    )
    rows = [row for row in rows if REWARD in row]
    assert len(rows) == 2
    assert all(-10 <= row[REWARD] <= 1 for row in rows), rows  # -1 for each turn that is no guess
    assert all(row["env/all/turns_per_episode"] > 1 for row in rows), rows
    assert max(row[DRIFT] for row in rows) < 1e-9
