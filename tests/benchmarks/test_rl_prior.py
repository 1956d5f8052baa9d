"""The prior-limited study: what it counts, and that its arms cost the same."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import Tokenizer

from everlearn.rl.prompts import ChatMl
from everlearn.rl.rollouts import play_now
from everlearn.rl.trajectory import Action

STUDY = "rl_prior"


def test_gains_are_of_the_headroom(study: ModuleType):
    assert study.gain(0.2, 0.6) == pytest.approx(0.5) and study.gain(0.5, 0.25) == -0.5 and study.gain(1.0, 1.0) == 0.0


def test_what_follows_the_number_does_not_count(study: ModuleType):
    assert study.begins_right("17 + -5", " 12, which is") and study.begins_right("3 + 4", "7")
    assert not study.begins_right("3 + 4", " 77") and not study.begins_right("3 + 4", "It is 7")


def test_passes_make_operations_equal(study: ModuleType):
    steps = [{"episodes": 128.0, "tokens/mean": 4.0}] * 3
    large, small = 134_515_008, 17_700_000
    passes = max(1, round((8 * large / small - 2) / 6))
    one, other = study.operations(steps, large, 1, 26.0), study.operations(steps, small, passes, 26.0)
    assert one == 3 * 128 * 30 * large * 8 and other == pytest.approx(one, rel=0.06)


def test_the_model_of_a_folder_is_counted(study: ModuleType, tiny_model: Path):
    from transformers import AutoModelForCausalLM

    assert study.parameters(tiny_model) == AutoModelForCausalLM.from_pretrained(tiny_model, local_files_only=True).num_parameters()


def test_transfer_is_differences_of_held_out_pairs(study: ModuleType, tiny_model: Path):
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    chat = ChatMl(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.decode)
    asked: list[str] = []

    async def knows(observation, stop, seed):  # type: ignore[no-untyped-def]
        asked.append(tokenizer.decode(observation.to_ints()))
        high, low = asked[-1].split("What is ")[1].split("?")[0].split(" - ")
        tokens = chat.encode(f" {int(high) - int(low)}")
        return Action(tokens, [-1.0] * len(tokens))

    groups = play_now(study.differences(chat, batches=1, groups_per_batch=20, group_size=1).get_batch(0), knows)
    assert all(group.reward(0).values["right"] == 1.0 for group in groups) and len(set(asked)) > 5


def test_commands_cover_every_arm_rate_and_seed_and_runs_are_collected(
    study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    made = study.commands(3)
    assert len(made) == len(set(made)) == 3 * sum(len(arm["rates"]) for arm in study.ARMS.values())
    run = dict.fromkeys(study.MEASURED, 0.0) | {"passes": 1, "operations": 1e3}
    for arm, rate, seed, gained in [("large-lora", 1e-4, 0, 0.5), ("large-lora", 2e-4, 0, 0.7), ("small-full", 1e-4, 0, 0.1)]:
        rows = [{"step": step, "held_out/env/right": 0.2 + 0.1 * step} for step in range(3)]
        one = run | {"arm": arm, "learning_rate": rate, "seed": seed, "task_gain": gained, "rows": rows}
        origin = {"command": "c", "when": "w", "load_average": [0], "commit": "x", "hardware": {}, "versions": {}}
        (tmp_path / f"{arm}-{rate}-{seed}.json").write_text(json.dumps(origin | {"run": one}))
    study.collect(argparse.Namespace(runs=tmp_path, out=tmp_path / "out" / "result.json"))
    found = json.loads((tmp_path / "out" / "result.json").read_text())["results"]
    assert [(row["arm"], row["learning_rate"]) for row in found["table"]] == [
        ("large-lora", 2e-4),
        ("large-lora", 1e-4),
        ("small-full", 1e-4),
    ]
    assert len(found["runs"]) == 3 and (tmp_path / "out" / "result.svg").read_text().count("<path") >= 2
    assert "gain  0.700 on the task" in capsys.readouterr().out
