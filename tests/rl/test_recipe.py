"""recipes/rl_loop.py: the program as its reader runs it, and its step on rewards that differ."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tinker

from tests.live import LiveServer, came_to_its_end


@pytest.fixture(scope="module")
def recipe(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("rl_loop", root / "recipes" / "rl_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_one_page_without_a_framework(root: Path):
    text = (root / "recipes" / "rl_loop.py").read_text(encoding="utf-8")
    assert text.count("\n") <= 200 and "import everlearn" not in text and "from everlearn" not in text


def test_the_splits_share_no_pair(recipe: ModuleType):
    train, held_out = (set(recipe.pairs(20, 0, split)) for split in (False, True))
    assert not train & held_out and len(train | held_out) == 400 and 40 < len(held_out) < 120
    assert [recipe.reward_of(text, 2, 3) for text in ("5", " 5\n", "6", "five", "5!")] == [1.0, 1.0, 0.0, -0.1, -0.1]


def test_what_cannot_be_written_leaves_the_last_state(recipe: ModuleType, tmp_path: Path):
    file = tmp_path / "state.json"
    recipe.keep(file, {"step": 1, "path": "tinker://a"})
    (tmp_path / "state.new").mkdir()  # so the next can't be written
    with pytest.raises(OSError):
        recipe.keep(file, {"step": 2, "path": "tinker://b"})
    assert json.loads(file.read_text()) == {"step": 1, "path": "tinker://a"}


def test_it_runs_and_goes_on(root: Path, server: LiveServer, tmp_path: Path):
    environment = {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-test", "TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}
    out = tmp_path / "run"
    command = [sys.executable, str(root / "recipes" / "rl_loop.py"), "--model", server.model, "--out", str(out), "--rank", "4"]
    command += ["--groups", "2", "--group-size", "2", "--evaluated", "2", "--evaluate-every", "2", "--save-every", "1"]
    for steps, wanted in ((2, [0, 1, 2]), (3, [0, 1, 2, 2, 3])):
        ran = subprocess.run(
            [*command, "--steps", str(steps)],
            env={"PATH": "/usr/bin:/bin", **environment},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert came_to_its_end(ran), ran.stderr[-2000:]
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == wanted
    assert "held_out" in rows[0] and rows[0]["tokens"] > 0


def test_its_step_is_on_policy_and_raises_what_was_rewarded(recipe: ModuleType, service: tinker.ServiceClient, server: LiveServer):
    client = service.create_lora_training_client(server.model, rank=8, seed=1).result()
    args = argparse.Namespace(max_tokens=3, group_size=8, seed=0, loss="importance_sampling", learning_rate=2e-2)

    def play(step: int) -> list[tuple[object, list, np.ndarray]]:
        sampler = client.save_weights_and_get_sampling_client().result()
        groups = recipe.play(sampler, client.get_tokenizer(), [(1, 2), (3, 4)], args, step)
        return [(prompt, found, np.array([-one.tokens[0] / 512 for one in found])) for prompt, found, _ in groups]

    means = []
    for step in range(10):
        groups = play(step)
        means.append(np.mean([rewards for *_, rewards in groups]))
        data = [recipe.datum_of(p, one, a) for p, found, r in groups for one, a in zip(found, r - r.mean(), strict=True)]
        found = recipe.train(client, data, args)
        assert found["kl_k3"] < 1e-8 and found["ratio_max"] == pytest.approx(1.0, abs=1e-4) and found["ess"] == pytest.approx(1.0)
    assert np.mean(means[-3:]) > np.mean(means[:2]) + 0.1, "it rises by 0.2 to 0.4, whatever the seed"
