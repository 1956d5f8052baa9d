"""Runs that are killed again and again, at moments that nobody chose, and end where an undisturbed run ends: bit for bit."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tinker
from tinker import types

from everlearn.rl.settings import State
from tests.live import LiveServer, came_to_its_end
from tests.rl.run_first import SETTINGS, run
from tests.rl.test_train import lines, played, whole_lines, without_time

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
KILLS = 4


def weights_say(service: tinker.ServiceClient, folder: Path) -> tuple[list[float], list[float]]:
    """Log-probabilities and values of some tokens under the weights that a run saved last."""
    state = msgspec.json.decode((folder / "state.json").read_bytes(), type=State)
    client = service.create_training_client_from_state_with_optimizer(state.path).result()
    inputs = {
        "target_tokens": list(range(41, 61)),
        "logprobs": [0.0] * 20,
        "advantages": [0.0] * 20,
        "value_targets": np.zeros(20, np.float32),
    }
    datum = types.Datum(model_input=types.ModelInput.from_ints(list(range(40, 60))), loss_fn_inputs=inputs)
    output = client.forward([datum], "ppo").result().loss_fn_outputs[0]
    return output["logprobs"].tolist(), output["values"].tolist()


@pytest.mark.parametrize("estimator", ["group_mean", "gae"])
def test_the_curve_is_the_same(service: tinker.ServiceClient, server: LiveServer, tmp_path: Path, root: Path, estimator: str):
    calm, hit = tmp_path / "calm", tmp_path / "hit"
    started = time.monotonic()
    run(service, calm, msgspec.structs.replace(SETTINGS, estimator=estimator))
    a_step = (time.monotonic() - started) / SETTINGS.steps
    seed = random.randrange(10**6)
    print(f"moments drawn with seed {seed}")
    rng = random.Random(seed)
    command = [sys.executable, "-m", "tests.rl.run_first", server.url, str(hit), estimator]
    killed = 0
    for step in sorted(rng.choices(range(SETTINGS.steps), k=KILLS)):
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 300
        try:
            while not any(row["step"] >= step for row in whole_lines(hit / rng.choice(["rollouts.jsonl", "metrics.jsonl"]))):
                assert process.poll() is None and time.monotonic() < deadline, process.stderr and process.stderr.read()
                time.sleep(0.01)
            time.sleep(rng.uniform(0, a_step))
        finally:
            killed += process.poll() is None
            process.kill()
            process.wait()
            process.stderr and process.stderr.close()
    assert killed, "all were done before they were killed"
    again = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert came_to_its_end(again), again.stderr[-3000:]
    assert without_time(lines(hit / "metrics.jsonl")) == without_time(lines(calm / "metrics.jsonl"))
    assert played(hit) == played(calm)
    said = weights_say(service, hit)
    assert said == weights_say(service, calm) and any(said[1]) == (estimator == "gae")
