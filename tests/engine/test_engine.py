"""The engine in one process: commands in, events out; snapshots and folders on a real disk."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from everlearn import faultpoints
from everlearn.config import BaseModelSettings, EngineSettings, ModelsSettings, Settings, faults
from everlearn.engine.engine import Engine
from everlearn.engine.faults import BrokenOff
from everlearn.engine.protocol import (
    AnyEvent,
    Completed,
    Create,
    Failed,
    ForwardBackward,
    Load,
    OptimStep,
    Publish,
    Replay,
    Restore,
    RestoreFailed,
    Sample,
    Save,
    Snapshotted,
    TakeSnapshot,
    Unload,
)
from everlearn.types import AdamParams, Array, ForwardBackwardResult, Grammar, LoraSpec, SampleResult, SamplingParams
from tests.engine.harness import random_datums

LORA = LoraSpec(rank=4, seed=3)


class Bench:
    """An engine and what it said."""

    def __init__(self, model: Path, home: Path, **snapshots: float):
        given = {"snapshot_min_steps": 10_000, **snapshots}
        settings = Settings(
            home=home,
            engine=EngineSettings(device="cpu", kv_tokens=2048, micro_batch_tokens=64, **given),
            models=ModelsSettings(default="tiny", base=[BaseModelSettings(name="tiny", path=str(model))]),
        )
        self.events: queue.SimpleQueue[AnyEvent] = queue.SimpleQueue()
        self.engine = Engine(settings, self.events.put)
        self.home = home

    def ask(self, command, wait_for: type = Completed) -> AnyEvent:
        """Gives a command and works until its answer is there."""
        self.engine.accept(command)
        for _ in range(1000):
            self.engine.step()
            try:
                event = self.events.get(timeout=0.02)
            except queue.Empty:
                continue
            if isinstance(event, Failed) and wait_for is not Failed:
                raise AssertionError(event)
            if isinstance(event, wait_for):
                return event
        raise AssertionError(f"no answer to {command}")

    def train(self, model_id: str, seq: int, steps: int, seed: int = 0) -> list[float]:
        losses = []
        for step in range(steps):
            data = random_datums(seed + step, [10, 17, 10])
            event = self.ask(ForwardBackward(f"{model_id}:{seq}", model_id, seq, data, "cross_entropy", {}))
            assert isinstance(event, Completed) and isinstance(event.result, ForwardBackwardResult)
            losses.append(event.result.metrics["loss:sum"])
            self.ask(OptimStep(f"{model_id}:{seq + 1}", model_id, seq + 1, AdamParams(learning_rate=1e-2)))
            seq += 2
        return losses

    def params(self, model_id: str) -> torch.Tensor:
        return self.engine.runs[model_id].adapter.params


@pytest.fixture
def bench(tiny_model: Path, tmp_path: Path) -> Bench:
    made = Bench(tiny_model, tmp_path)
    made.ask(Create("c", "ses:train:0", "t", "tiny", LORA))
    return made


def test_a_snapshot_with_a_pending_gradient_continues_bit_for_bit(bench: Bench, tiny_model: Path, tmp_path: Path) -> None:
    run = "ses:train:0"
    bench.train(run, 1, 3)
    bench.ask(ForwardBackward("half", run, 7, random_datums(50, [9, 9]), "cross_entropy", {}))
    snapshot = bench.ask(TakeSnapshot(run), Snapshotted)
    assert isinstance(snapshot, Snapshotted) and snapshot.seq == 7
    other = Bench(tiny_model, tmp_path / "other")
    other.engine.accept(Restore(run, "t", "tiny", LORA, snapshot.folder))
    assert other.engine.runs[run].adapter.has_grad
    for one in (bench, other):
        one.ask(OptimStep("s", run, 8, AdamParams(learning_rate=1e-2)))
    assert bench.train(run, 9, 3, seed=9) == other.train(run, 9, 3, seed=9)
    assert torch.equal(bench.params(run), other.params(run))


def test_save_and_load_with_and_without_the_optimizer(bench: Bench) -> None:
    run = "ses:train:0"
    bench.train(run, 1, 3)
    folder = str(bench.home / "ck")
    bench.ask(Save("save", run, 7, folder, optimizer=True))
    expected = bench.params(run).clone()
    trace = bench.train(run, 8, 2, seed=5)
    bench.ask(Load("l", "ses:train:1", 0, "t", "tiny", LORA, folder, optimizer=True, create=True))
    assert torch.equal(bench.params("ses:train:1"), expected)
    assert bench.train("ses:train:1", 1, 2, seed=5) == trace
    bench.ask(Load("m", "ses:train:2", 0, "t", "tiny", LORA, folder, optimizer=False, create=True))
    assert bench.engine.runs["ses:train:2"].adapter.moments() is None
    fresh = bench.train("ses:train:2", 1, 2, seed=5)
    assert fresh[0] == trace[0] and fresh[1] != trace[1]


def test_a_checkpoint_of_another_rank_is_refused_and_changes_nothing(bench: Bench) -> None:
    run = "ses:train:0"
    bench.train(run, 1, 1)
    folder = str(bench.home / "ck")
    bench.ask(Save("save", run, 3, folder, optimizer=True))
    bench.ask(Create("c2", "ses:train:1", "t", "tiny", LoraSpec(rank=2, seed=1)))
    before = bench.params("ses:train:1").clone()
    refusal = bench.ask(Load("l", "ses:train:1", 1, "t", "tiny", LoraSpec(rank=2, seed=1), folder, optimizer=True), Failed)
    assert isinstance(refusal, Failed) and refusal.code == "invalid_request" and "rank" in refusal.message
    assert torch.equal(before, bench.params("ses:train:1"))


def test_a_published_version_never_changes(bench: Bench) -> None:
    run = "ses:train:0"
    bench.train(run, 1, 2)
    folder = str(bench.home / "v1")
    bench.ask(Publish("p", run, 5, "v1", folder))
    prompt = Array.of(random_datums(0, [8])[0].tokens.numpy())
    request = Sample("s1", "tiny", "v1", folder, "t", prompt, 1, SamplingParams(max_tokens=8, seed=1, temperature=0.0))

    def sampled(name: str) -> bytes:
        event = bench.ask(Sample(name, *[getattr(request, f) for f in request.__struct_fields__[1:]]))
        assert isinstance(event, Completed) and isinstance(event.result, SampleResult)
        return event.result.sequences[0].logprobs.data

    first = sampled("s1")
    bench.train(run, 6, 3, seed=4)
    assert sampled("s2") == first
    bank = bench.engine.served["tiny"].bank
    bank.versions.clear()
    bank.on_disk.clear()
    assert sampled("s3") == first, "read again from its folder"


def test_errors_name_the_run_and_leave_the_engine_alive(bench: Bench) -> None:
    unknown = bench.ask(OptimStep("o", "nobody", 1, AdamParams()), Failed)
    assert isinstance(unknown, Failed) and unknown.code == "not_found" and "nobody" in unknown.message
    base = bench.ask(Create("c", "ses:train:9", "t", "nonesuch", LORA), Failed)
    assert isinstance(base, Failed) and "nonesuch" in base.message
    assert bench.train("ses:train:0", 1, 1)


def test_a_run_that_can_not_be_restored_is_not_in_the_engine(bench: Bench, tmp_path: Path) -> None:
    """What follows a failed Restore must fail too, never train an adapter that began anew."""
    run = "ses:train:0"
    bench.train(run, 1, 1)
    snapshot = bench.ask(TakeSnapshot(run), Snapshotted)
    assert isinstance(snapshot, Snapshotted)
    other = LoraSpec(rank=2, seed=3)
    failed = bench.ask(Restore("ses:train:5", "t", "tiny", other, snapshot.folder), RestoreFailed)
    assert isinstance(failed, RestoreFailed) and failed.model_id == "ses:train:5" and "rank" in failed.message
    assert "ses:train:5" not in bench.engine.runs
    after = bench.ask(OptimStep("o", "ses:train:5", 4, AdamParams()), Failed)
    assert isinstance(after, Failed) and after.code == "not_found"


class Log:
    """A run of a load, two gradients and two updates as its log holds it, and its state after them."""

    def __init__(self, model: Path, home: Path):
        self.model, self.home, self.name = model, home, "ses:train:0"
        self.created = Create("c", self.name, "t", "tiny", LORA)
        bench = Bench(model, home)
        bench.ask(self.created)
        self.start = home / "start"
        bench.ask(Save("save", self.name, 1, str(self.start), optimizer=True))
        self.commands = [
            ForwardBackward("r2", self.name, 2, random_datums(1, [9, 12]), "cross_entropy", {}),
            Load("r3", self.name, 3, "t", "tiny", LORA, str(self.start), optimizer=True),
            ForwardBackward("r4", self.name, 4, random_datums(2, [10, 17, 10]), "cross_entropy", {}),
            OptimStep("r5", self.name, 5, AdamParams(learning_rate=1e-2)),
            ForwardBackward("r6", self.name, 6, random_datums(3, [10, 17]), "cross_entropy", {}),
            OptimStep("r7", self.name, 7, AdamParams(learning_rate=1e-2)),
        ]
        for command in self.commands:
            bench.ask(command)
        self.params = bench.params(self.name).clone()

    def again(self, left_out: int = 0, arm: Callable[[Bench], None] = lambda bench: None) -> Bench:
        """A new engine that snapshots after every update gets all of it at once, as a feed sends it; and a version to publish."""
        bench = Bench(self.model, self.home, snapshot_min_steps=1, snapshot_overhead=1e9)
        bench.engine.accept(Replay(self.name, [command.seq for command in self.commands]))
        bench.engine.accept(self.created)
        arm(bench)
        for command in self.commands:
            if command.seq != left_out:
                bench.engine.accept(command)
        bench.engine.accept(Publish("p", self.name, 8, "v8", str(self.home / "v8")))
        while bench.engine.step() == 0.0:
            pass
        bench.engine.accept(TakeSnapshot(self.name))
        bench.engine.writer.close()
        return bench


@pytest.fixture
def logged(tiny_model: Path, tmp_path: Path) -> Log:
    return Log(tiny_model, tmp_path)


def test_a_replay_that_succeeds_is_the_run(logged: Log) -> None:
    bench = logged.again()
    said = list(drain(bench))
    assert [e.request_id for e in said if isinstance(e, Completed)] == ["c", "r2", "r3", "r4", "r5", "r6", "r7", "p"]
    assert [e.seq for e in said if isinstance(e, Snapshotted)][-1] >= 5 and not any(isinstance(e, RestoreFailed) for e in said)
    assert torch.equal(bench.params(logged.name), logged.params)


@pytest.mark.parametrize("fault", ["gradient", "load"])
def test_nothing_is_run_or_kept_after_a_replay_that_fails(logged: Log, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """What succeeded before the crash fails now, and what follows is in the engine already: none of it may change the adapter, become a
    version, or a snapshot of a state that the log doesn't know."""

    def arm(bench: Bench) -> None:
        """The device runs out of memory in the second gradient, or the checkpoint is gone."""
        head, calls = bench.engine.served["tiny"].base.head, iter(range(100))
        backward = head.backward

        def short_of_memory(*args: object) -> object:
            if next(calls) == 1:
                raise torch.OutOfMemoryError("injected")
            return backward(*args)  # type: ignore[arg-type]

        if fault == "gradient":
            monkeypatch.setattr(head, "backward", short_of_memory)
        else:
            logged.start.rename(logged.home / "elsewhere")

    before, failed, number = (["c", "r2", "r3"], "r4", 4) if fault == "gradient" else (["c", "r2"], "r3", 3)
    bench = logged.again(arm=arm)
    said = list(drain(bench))
    assert [e.request_id for e in said if isinstance(e, Completed)] == before
    assert [e.request_id for e in said if isinstance(e, Failed)] == [failed]
    (lost,) = [e for e in said if isinstance(e, RestoreFailed)]
    assert lost.model_id == logged.name and f"request {number} " in lost.message
    assert not any(isinstance(e, Snapshotted) for e in said) and not (logged.home / "snapshots").exists()
    assert not (logged.home / "v8").exists() and "v8" not in bench.engine.served["tiny"].bank.versions


def test_a_replayed_request_that_never_comes_is_missed(logged: Log) -> None:
    """The socket's thread answers what can't be read (logged by another version of everlearn); the engine must not go on without it."""
    said = list(drain(logged.again(left_out=4)))
    assert [e.request_id for e in said if isinstance(e, Completed)] == ["c", "r2", "r3"]
    assert [e.message for e in said if isinstance(e, RestoreFailed)] == ["request 4, which succeeded before, has not come again"]
    assert [e.seq for e in said if isinstance(e, Snapshotted)] == [] and not (logged.home / "v8").exists()


def test_a_lost_run_can_be_made_again(logged: Log) -> None:
    """And of what has no answer yet, a request that fails is only that."""
    bench = Bench(logged.model, logged.home)

    def make_again() -> None:
        bench.engine.accept(Unload(logged.name))
        bench.engine.accept(Replay(logged.name, [2, 3, 4, 5, 6]))
        bench.ask(logged.created)
        bench.ask(logged.commands[0])

    make_again()
    aside = logged.start.rename(logged.home / "elsewhere")
    bench.ask(logged.commands[1], Failed)
    aside.rename(logged.start)
    make_again()
    for command in logged.commands[1:-1]:
        bench.ask(command)
    bench.ask(ForwardBackward("long", logged.name, 7, random_datums(3, [5000]), "cross_entropy", {}), Failed)
    bench.ask(OptimStep("r8", logged.name, 8, AdamParams(learning_rate=1e-2)))
    assert torch.equal(bench.params(logged.name), logged.params)


def test_a_damaged_checkpoint_changes_nothing(bench: Bench) -> None:
    run = "ses:train:0"
    bench.train(run, 1, 2)
    folder = bench.home / "ck"
    bench.ask(Save("save", run, 5, str(folder), optimizer=True))
    bench.train(run, 6, 1, seed=3)
    before, moments = bench.params(run).clone(), bench.engine.runs[run].adapter.moments()
    (folder / "optimizer.safetensors").write_bytes(b"not tensors")
    bench.ask(Load("l", run, 8, "t", "tiny", LORA, str(folder), optimizer=True), Failed)
    assert torch.equal(bench.params(run), before) and bench.engine.runs[run].adapter.moments() == moments
    bench.ask(Load("m", "ses:train:7", 0, "t", "tiny", LORA, str(folder), optimizer=True, create=True), Failed)
    assert "ses:train:7" not in bench.engine.runs


def test_an_unloaded_run_whose_request_is_running_leaves_the_engine_alive(bench: Bench) -> None:
    """Also while two others trained a moment ago, when the engine looks whether to wait for company."""
    for i in (1, 2):
        bench.ask(Create(f"c{i}", f"ses:train:{i}", "t", "tiny", LORA))
        bench.train(f"ses:train:{i}", 1, 1)
    bench.engine.accept(ForwardBackward("f", "ses:train:0", 1, random_datums(1, [9]), "cross_entropy", {}))
    bench.engine.accept(Unload("ses:train:0"))
    done = bench.ask(OptimStep("o", "ses:train:1", 3, AdamParams()))
    assert isinstance(done, Completed)
    trainer = bench.engine.served["tiny"].trainer
    until = time.monotonic() + 20
    while trainer.has_work() and time.monotonic() < until:
        bench.engine.step()
    assert not trainer.has_work()


@pytest.fixture
def armed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Arms one fault for this test alone."""

    def arm(text: str) -> None:
        monkeypatch.setattr(faultpoints, "_armed", None)
        faultpoints.arm(faults({"EVERLEARN_FAULT": text}), tmp_path)

    return arm


@pytest.mark.parametrize("point", ["gradient.join.before", "gradient.join.after", "optimizer.apply.before", "optimizer.apply.after"])
def test_no_request_fails_whose_effect_may_have_begun(bench: Bench, armed, point: str) -> None:
    """The engine ends instead: a rebuild leaves out what failed, so the adapter would not be what the log says."""
    armed(f"{point}:2:error")
    with pytest.raises(BrokenOff):
        bench.train("ses:train:0", 1, 3)


@pytest.mark.parametrize("point", ["weights.load.before", "weights.load.after"])
def test_a_load_that_breaks_off_ends_the_engine(bench: Bench, armed, point: str) -> None:
    run, folder = "ses:train:0", bench.home / "saved"
    bench.ask(Save("s", run, 1, str(folder), optimizer=True))
    armed(f"{point}:1:error")
    with pytest.raises(BrokenOff):
        bench.ask(Load("l", run, 2, "t", "tiny", LORA, str(folder), optimizer=True))


@pytest.mark.parametrize("point", ["snapshot.copy.before", "folder.file.after", "folder.rename.before"])
def test_a_snapshot_that_fails_is_only_that(tiny_model: Path, tmp_path: Path, armed, point: str) -> None:
    bench, run = Bench(tiny_model, tmp_path, snapshot_min_steps=1, snapshot_overhead=1e9), "ses:train:0"
    bench.ask(Create("c", run, "t", "tiny", LORA))
    armed(f"{point}:1:full-disk")
    bench.train(run, 1, 1)
    until = time.monotonic() + 20
    while not list((tmp_path / faultpoints.FIRED).iterdir()):
        assert time.monotonic() < until
        time.sleep(0.01)
    bench.train(run, 3, 1)
    bench.engine.writer.close()
    said = list(drain(bench))
    assert not any(isinstance(event, Failed) for event in said)
    assert [event.seq for event in said if isinstance(event, Snapshotted)] in ([], [4]), "the first one failed"


def drain(bench: Bench) -> Iterator[AnyEvent]:
    while not bench.events.empty():
        yield bench.events.get()


def test_an_idle_engine_notices_that_a_grammar_is_compiled(bench: Bench) -> None:
    def sample(name: str, grammar: Grammar, **more: float) -> Sample:
        prompt = Array.of(np.array([5, 6, 7], np.int32))
        return Sample(name, "tiny", "", "", "default", prompt, 1, SamplingParams(8, seed=1, grammar=grammar), **more)  # type: ignore[arg-type]

    started = time.monotonic()
    event = bench.ask(sample("fine", Grammar("regex", "[ab]{4}")))
    assert isinstance(event, Completed) and isinstance(event.result, SampleResult) and event.result.sequences[0].stop_reason == "stop"
    event = bench.ask(sample("wrong", Grammar("regex", "((")), wait_for=Failed)
    assert isinstance(event, Failed) and event.param == "response_format"
    with bench.engine.served["tiny"].sampler.grammars.compiler_lock:  # what a compilation needs
        event = bench.ask(sample("late", Grammar("regex", "[cd]{4}"), deadline=0.01))
    assert isinstance(event, Completed) and isinstance(event.result, SampleResult) and event.result.sequences[0].stop_reason == "deadline"
    assert time.monotonic() - started < 20
    assert bench.engine.step() <= 0.5
