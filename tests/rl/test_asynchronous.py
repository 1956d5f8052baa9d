"""The asynchronous loop on a real server. What would depend on timing waits for what it depends on: environments wait for steps."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tinker

from everlearn.errors import InvalidRequest, Unavailable
from everlearn.rl.asynchronous import train_asynchronously
from everlearn.rl.env import SameTask, StepResult
from everlearn.rl.measures import merged, of_staleness
from everlearn.rl.players import Players
from everlearn.rl.rollouts import Limits
from everlearn.rl.settings import Pace, Settings
from everlearn.rl.train import train
from tests.rl.run_first import First, Starts

BASE = Settings("tiny", steps=4, rank=4, learning_rate=1e-2, max_tokens=1, seed=5)  # one token an action, so tokens can be counted


def paced(staleness: int, minibatches: int = 1, **options: Any) -> Settings:
    return msgspec.structs.replace(BASE, pace=Pace(staleness, minibatches), **options)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def nobody_plays_on() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name == "everlearn-players" and thread.is_alive()]


class Waits(First):
    """Shows its prompt when `ready()`, and takes its action when `over()`."""

    def __init__(self, start: int, ready: Callable[[], bool] = lambda: True, over: Callable[[], bool] = lambda: True):
        super().__init__(start)
        self.ready, self.over = ready, over

    async def initial_observation(self) -> tuple[tinker.ModelInput, None]:
        while not self.ready():
            await asyncio.sleep(0.005)
        return await super().initial_observation()

    async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
        while not self.over():
            await asyncio.sleep(0.005)
        return await super().step(action, extra=extra)


class Numbered:
    """Batches of two groups of three; `make(number)` makes the environments of a group."""

    def __init__(self, make: Callable[[int], Any]):
        self.make = make

    def __len__(self) -> int:
        return 1000

    def get_batch(self, index: int) -> list[SameTask]:
        return [SameTask(lambda number=number: self.make(number), 3) for number in (2 * index, 2 * index + 1)]


def test_without_staleness_it_is_the_synchronous_loop_in_one_piece_or_in_parts(service: tinker.ServiceClient, tmp_path: Path):
    options = {"learning_rate": 1e-3, "evaluate_every": 2}
    held_out = Starts(60, 2, 1)
    expected = train(service, msgspec.structs.replace(BASE, **options), Starts(30, 4, 6), tmp_path / "synchronous", held_out)
    for minibatches in (1, 4):
        rows = train_asynchronously(service, paced(0, minibatches, **options), Starts(30, 4, 6), tmp_path / str(minibatches), held_out)
        assert [row["step"] for row in rows] == [row["step"] for row in expected]
        assert rows == lines(tmp_path / str(minibatches) / "metrics.jsonl")
        for one, other in zip(rows[:-1], expected, strict=False):
            assert one["staleness/max"] == 0 == one["groups/dropped"] and one["staleness/0"] == one["tokens/sampled"] == 24
            assert one["kl/k3"] < 1e-8 and one["episodes"] == 24 and set(other) <= set(one)
        one, other = rows[0], expected[0]  # later weights differ in last bits, of which an optimizer makes whole steps
        assert one["reward/total"] == pytest.approx(other["reward/total"], abs=0.02)
        assert one["tokens/trained"] == one["loss/trained_tokens:sum"] == other["tokens/trained"]
        assert one["loss/loss:sum"] == pytest.approx(other["loss/loss:sum"], abs=0.1)
        assert [row["step"] for row in rows if "held_out/reward/total" in row] == [0, 2, 4]


@pytest.mark.parametrize(("bound", "dropped"), [(2, True), (6, False)])
def test_a_group_older_than_the_bound_is_dropped_and_counted(service: tinker.ServiceClient, tmp_path: Path, bound: int, dropped: bool):
    """Group 0 begins with version 0 and ends after four steps; what comes after step four waits for it."""
    made, ended = threading.Event(), threading.Event()

    def over() -> bool:
        if made.is_set():
            ended.set()
        return made.is_set()

    def make(number: int) -> Waits:
        return Waits(30, over=over) if number == 0 else Waits(30, ready=lambda: number <= 8 or ended.is_set())

    def on_step(row: dict[str, float]) -> None:
        if row["step"] == 3:
            made.set()

    rows = train_asynchronously(service, paced(bound, steps=6), Numbered(make), tmp_path, on_step=on_step)
    assert sum(row["groups/dropped"] for row in rows) == dropped and sum(row["tokens/dropped"] for row in rows) == 3 * dropped
    assert max(row["staleness/max"] for row in rows) <= bound
    old = [row for row in rows if row.get("staleness/4")]
    assert len(old) == (not dropped) and all(row["staleness/4"] == 3 and row["step"] == 4 for row in old)
    for row in rows:
        assert row["episodes"] == 6, "a batch is whole whatever was dropped"
        ages = {int(name.removeprefix("staleness/")): n for name, n in row.items() if name.removeprefix("staleness/").isdigit()}
        assert sum(ages.values()) == row["tokens/sampled"] == 6
        assert row["staleness/mean"] == pytest.approx(sum(age * tokens for age, tokens in ages.items()) / 6)


def test_a_group_is_played_by_one_version(service: tinker.ServiceClient):
    """One member samples before a new version is published, two members after: the log-probabilities of all are those of the first."""
    client = service.create_lora_training_client("tiny", rank=4, seed=1).result()
    old = client.save_weights_and_get_sampling_client().result()
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([20, 30]), loss_fn_inputs={"target_tokens": [40, 41], "weights": [1.0, 1.0]}
    )
    client.forward_backward([datum], "cross_entropy").result()
    client.optim_step(tinker.AdamParams(learning_rate=3e-2)).result()
    new = client.save_weights_and_get_sampling_client().result()
    sampled, published = threading.Event(), threading.Event()

    class Member(Waits):
        async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
            sampled.set()
            return await super().step(action, extra=extra)

    class Data:
        def __len__(self) -> int:
            return 1

        def get_batch(self, index: int) -> list[SameTask]:
            members = iter([Member(30), Member(30, ready=published.is_set), Member(30, ready=published.is_set)])
            return [SameTask(lambda: next(members), 3)]

    with Players(Data(), Limits(seconds=60), room=1, seed=1) as players:
        players.publish(old, 4, 7)
        assert sampled.wait(60)
        players.publish(new, 4, 8)
        published.set()
        played = players.take()
        players.give_back(1)
        assert played.version == 7 and players.take().version == 8
    for trajectory in played.group.trajectories_G:
        action = trajectory.transitions[0].action
        prompt = tinker.ModelInput.from_ints([20, 30, *action.tokens])
        assert old.compute_logprobs(prompt).result()[2:] == pytest.approx(action.logprobs, abs=1e-4)
        assert new.compute_logprobs(prompt).result()[2:] != pytest.approx(action.logprobs, abs=1e-3)


def test_a_part_of_a_batch_is_sent_before_the_rest_is_there(service: tinker.ServiceClient, tmp_path: Path):
    """Every second group waits until the first one's record is written, which is when its part is sent: in one piece nothing would end."""
    shown = tmp_path / "rollouts.jsonl"

    def make(number: int) -> Waits:
        return Waits(
            30 + number % 2, ready=lambda: number % 2 == 0 or (shown.exists() and len(shown.read_text().splitlines()) > number // 2)
        )

    rows = train_asynchronously(service, paced(0, 2, steps=2, limits=Limits(seconds=60)), Numbered(make), tmp_path)
    assert [row["episodes"] for row in rows] == [6, 6] and [row["failed"] for row in rows] == [0, 0]
    assert [(row["step"], row["version"]) for row in lines(shown)] == [(0, 0), (1, 1)]


def test_it_can_be_continued(service: tinker.ServiceClient, tmp_path: Path):
    train_asynchronously(service, paced(1, steps=2), Starts(30, 2, 4), tmp_path)
    rows = train_asynchronously(service, paced(1, steps=4), Starts(30, 2, 4), tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and rows == lines(tmp_path / "metrics.jsonl")
    assert {row["version"] for row in lines(tmp_path / "rollouts.jsonl") if row["step"] == 2} == {2}, "what is continued begins afresh"


def test_failures_are_those_of_the_synchronous_loop(service: tinker.ServiceClient, tmp_path: Path):
    class Broken(First):
        async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
            raise OSError("the simulator is down")

    limits = Limits(seconds=0.5)
    with pytest.raises(Unavailable, match="6 of 6 episodes failed.*the simulator is down"):
        train_asynchronously(service, paced(2, steps=1), Numbered(lambda number: Broken(30)), tmp_path / "broken")
    with pytest.raises(Unavailable, match="6 of 6 episodes failed.*timeout"):
        hanging = Numbered(lambda number: Waits(30, ready=lambda: False))
        train_asynchronously(service, paced(2, steps=1, limits=limits), hanging, tmp_path / "hanging")
    seen: list[int] = []

    def some(number: int) -> First:
        seen.append(number)
        return Broken(30) if len(seen) % 3 == 0 else First(30)

    rows = train_asynchronously(service, paced(2, steps=2), Numbered(some), tmp_path / "some")
    assert [row["failed"] for row in rows] == [2, 2] and [row["failed/environment"] for row in rows] == [2, 2]


def test_what_ends_the_playing_ends_the_run(service: tinker.ServiceClient, tmp_path: Path):
    class Ends(Numbered):
        def get_batch(self, index: int) -> list[SameTask]:
            if index == 2:
                raise OSError("the tasks can't be read")
            return super().get_batch(index)

    with pytest.raises(OSError, match="the tasks can't be read"):
        train_asynchronously(service, paced(1), Ends(lambda number: First(30)), tmp_path / "dataset")
    with pytest.raises(InvalidRequest, match="first batch is empty"):
        train_asynchronously(service, paced(1), Starts(30, 0, 2), tmp_path / "empty")

    def interrupt(row: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_asynchronously(service, paced(1), Numbered(lambda number: First(30)), tmp_path / "interrupted", on_step=interrupt)


def test_an_environment_that_never_awaits_is_found_out(service: tinker.ServiceClient, tmp_path: Path):
    """No time limit reaches it, and the synchronous loop would wait with it. Nothing else can be done than to say so."""
    let_go = threading.Event()

    class Computes(First):
        async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
            let_go.wait(120)
            return await super().step(action, extra=extra)

    try:
        with pytest.raises(Unavailable, match="stood still.*without awaiting"):
            train_asynchronously(service, paced(0, limits=Limits(seconds=1)), Numbered(lambda number: Computes(30)), tmp_path)
    finally:
        let_go.set()
        for thread in threading.enumerate():
            if thread.name == "everlearn-players":
                thread.join(30)


def test_paces_that_cannot_be_kept(service: tinker.ServiceClient, tmp_path: Path):
    for wrong in ({"pace": Pace(-1)}, {"pace": Pace(1, 0)}, {"pace": Pace(1), "substeps": 2}):
        with pytest.raises(InvalidRequest):
            msgspec.structs.replace(BASE, **wrong).check()
    with pytest.raises(InvalidRequest, match="train_asynchronously"):
        train(service, paced(1), Starts(30, 2, 2), tmp_path)


def test_the_histogram_counts_tokens():
    assert of_staleness([]) == {} == of_staleness([(3, 0)])
    assert of_staleness([(0, 30), (2, 10)]) == {"staleness/mean": 0.5, "staleness/max": 2.0, "staleness/0": 30.0, "staleness/2": 10.0}


def test_metrics_of_several_requests_are_one():
    rows = [
        {"loss:sum": 1.0, "ratio:max": 2.0, "ratio:min": 0.5, "kl:mean": 1.0, "trained_tokens:sum": 30.0},
        {"loss:sum": 2.0, "ratio:max": 3.0, "ratio:min": 0.7, "kl:mean": 5.0, "trained_tokens:sum": 10.0},
        {"loss:sum": 0.5, "trained_tokens:sum": 0.0},
    ]
    assert merged(rows) == {"loss:sum": 3.5, "ratio:max": 3.0, "ratio:min": 0.5, "kl:mean": 2.0, "trained_tokens:sum": 40.0}
    assert merged(rows[:1]) == rows[0]
