"""Sinks: what they show, and that none of them can stop a run."""

from __future__ import annotations

import importlib.util
import io
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import tinker

from everlearn.errors import Unsupported
from everlearn.rl.settings import Settings
from everlearn.rl.sinks import Sinks, TensorBoard, Terminal, WeightsAndBiases
from everlearn.rl.train import train
from tests.rl.run_first import Starts


class Kept:
    """A sink that keeps what it gets, and fails when a test says so."""

    def __init__(self, fails_at: int | None = None, fails_to_close: bool = False):
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.fails_at, self.fails_to_close, self.closed = fails_at, fails_to_close, 0

    def write(self, step: int, metrics: Any) -> None:
        if step == self.fails_at:
            raise OSError("no space left on device")
        self.rows.append((step, dict(metrics)))

    def close(self) -> None:
        self.closed += 1
        if self.fails_to_close:
            raise ConnectionError("the service is down")


def test_a_sink_that_raises_is_switched_off_with_one_warning():
    good, bad = Kept(), Kept(fails_at=1, fails_to_close=True)
    with Sinks([bad, good]) as sinks:
        sinks({"step": 0, "reward/total": 0.5})
        with pytest.warns(RuntimeWarning, match="Kept is switched off.*no space left") as warned:
            for step in (1, 2, 3):
                sinks({"step": step, "reward/total": 0.5})
        assert len(warned) == 1 and sinks.names == ["Kept"]
    assert [step for step, _ in good.rows] == [0, 1, 2, 3] and [step for step, _ in bad.rows] == [0]
    assert (good.closed, bad.closed) == (1, 1)


def test_a_sink_that_cannot_be_made_or_closed_is_switched_off():
    def broken() -> Kept:
        raise Unsupported("this sink needs the package x")

    with pytest.warns(RuntimeWarning, match="needs the package x"):
        sinks = Sinks([broken, lambda: Kept(fails_to_close=True)])
    with pytest.warns(RuntimeWarning, match="the service is down"):
        sinks.close()


def test_numbers_that_are_none_are_left_out():
    kept = Kept()
    Sinks([kept])({"step": 2, "a": 1, "b": math.nan, "c": math.inf})
    assert kept.rows == [(2, {"a": 1.0})]


def test_a_run_goes_on_without_its_sink(service: tinker.ServiceClient, tmp_path: Path):
    good = Kept()
    with pytest.warns(RuntimeWarning, match="switched off"), Sinks([Kept(fails_at=1), good]) as sinks:
        rows = train(service, Settings("tiny", steps=3, rank=4, max_tokens=2), Starts(30, 2, 4), tmp_path, on_step=sinks)
    assert [row["step"] for row in rows] == [0, 1, 2] == [step for step, _ in good.rows]
    assert good.rows[0][1]["reward/total"] == rows[0]["reward/total"]


def test_the_live_table_has_the_last_steps():
    console = pytest.importorskip("rich.console", reason="the live table needs the package rich")
    screen = console.Console(file=io.StringIO(), force_terminal=True, width=120)
    with Sinks([Terminal(rows=2, console=screen)]) as sinks:
        for step in range(3):
            sinks({"step": step, "reward/total": 0.25 * step, "kl/k3": 1e-5, "failed": 0.0})
    shown = screen.file.getvalue()
    last = shown[shown.rindex("reward") :]
    assert "0.25" in last and "0.5" in last and "1e-05" in last and "held out" not in shown


def test_a_pipe_gets_lines():
    console = pytest.importorskip("rich.console", reason="the live table needs the package rich")
    pipe = console.Console(file=io.StringIO(), force_terminal=False, width=200)
    with Sinks([Terminal(console=pipe)]) as sinks:
        sinks({"step": 7, "reward/total": 0.5, "held_out/reward/total": 1.0})
    assert pipe.file.getvalue() == "step 7: reward 0.5, held out 1\n"


def test_tensorboard_has_every_scalar(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the package does at import is its own affair
        pytest.importorskip("tensorboardX", reason="this sink needs the package tensorboardX")
        from tensorboardX.proto.event_pb2 import Event
    with Sinks([TensorBoard(tmp_path)]) as sinks:
        sinks({"step": 0, "reward/total": 0.5})
        sinks({"step": 1, "reward/total": 0.75, "kl/k3": 0.125})
    (file,) = tmp_path.glob("events.out.tfevents.*")
    events = [Event.FromString(record) for record in records(file.read_bytes())]
    found = {(event.step, value.tag): value.simple_value for event in events for value in event.summary.value}
    assert found == {(0, "reward/total"): 0.5, (1, "reward/total"): 0.75, (1, "kl/k3"): 0.125}


def records(data: bytes) -> list[bytes]:
    """The records of a TFRecord file: length (8 bytes), checksum (4), data, checksum (4)."""
    found, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 8], "little")
        found.append(data[at + 12 : at + 12 + length])
        at += 16 + length
    return found


def test_weights_and_biases_stops_nothing(tmp_path: Path):
    """Where the package is installed it writes offline; where it isn't, the sink is off, and the run goes on."""

    def run() -> Sinks:
        return Sinks([lambda: WeightsAndBiases(project="x", mode="offline", dir=str(tmp_path)), Kept()])

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # what the package does at import is its own affair
        if (installed := importlib.util.find_spec("wandb") is not None) is False:
            with pytest.warns(RuntimeWarning, match="needs the package wandb"):
                sinks = run()
        else:
            sinks = run()
        with sinks:
            sinks({"step": 0, "reward/total": 0.5, "not_finite": math.nan})
            sinks({"step": 1, "reward/total": 0.75})
            assert sinks.names == [*(["WeightsAndBiases"] if installed else []), "Kept"]
    written = [file.read_bytes() for file in tmp_path.rglob("*.wandb")]
    assert len(written) == installed and all(b"reward/total" in data and b"not_finite" not in data for data in written)
