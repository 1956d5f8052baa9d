"""The loop: play a batch, compare, train, measure, save. Synchronous: what is trained on was sampled by the weights that are trained.

A run lives in a folder: `metrics.jsonl` has a line for each step, `rollouts.jsonl` shows some of what was played, `state.json` says where
it can be continued. The same command continues it. With one episode at a time (`Limits(episodes_at_once=1)`) on a CPU, a run that was
killed and continued gives bit for bit what it would have given; with more, batches form by chance and the last bits with them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import tinker

from everlearn.errors import Conflict, InvalidRequest, Unavailable
from everlearn.rl import measures
from everlearn.rl.advantages import NAMES, advantages_of
from everlearn.rl.critic import GAE, Critic, judged
from everlearn.rl.datums import datums_of_group
from everlearn.rl.env import Dataset
from everlearn.rl.policy import TinkerPolicy, seed_of
from everlearn.rl.records import Decode, write_records
from everlearn.rl.rollouts import Limits, count, play_now
from everlearn.rl.trajectory import TrajectoryGroup

SHOWN_GROUPS = 2  # of each batch in rollouts.jsonl
Metrics = dict[str, float]


class Settings(msgspec.Struct, frozen=True):
    """What a run is. `substeps` cuts each batch into so many optimizer steps, whose later ones are slightly off policy (see `ppo`).

    `max_failed`: the run stops when a larger share of a batch's episodes failed, since a policy that learns from the rest would learn
    something else than was meant; so does an evaluation, whose means would be those of other tasks. `temperature` is 1: at another one the
    log-probabilities that come back aren't those of what was drawn from. With the estimator `max_rl`, an environment that ever gives a
    negative reward ends the run at that step: what a reward may be is only known when it comes. `critic` is for the estimator `gae`.
    """

    base_model: str
    steps: int
    rank: int = 32
    learning_rate: float = 1e-4
    loss: str = "importance_sampling"
    loss_config: dict[str, float] = {}
    estimator: str = "group_mean"
    critic: Critic = Critic()
    mask_over_long: bool = False
    substeps: int = 1
    max_tokens: int = 64
    temperature: float = 1.0
    limits: Limits = Limits()
    seed: int = 0
    evaluate_every: int = 0  # steps; 0: only at the end, if there is something to evaluate on
    save_every: int = 10
    max_failed: float = 0.5

    def check(self) -> Settings:
        """Itself. Raises InvalidRequest for what can't be meant."""
        for name, least in (("steps", 1), ("rank", 1), ("substeps", 1), ("max_tokens", 1), ("save_every", 1), ("evaluate_every", 0)):
            if getattr(self, name) < least:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; it must be at least {least}", param=name)
        if self.estimator not in (*NAMES, GAE):
            raise InvalidRequest(f"there is no estimator {self.estimator!r}; there are {', '.join((*NAMES, GAE))}", param="estimator")
        self.critic.check(self.estimator, self.loss, self.loss_config)
        if self.loss == "dro":
            raise InvalidRequest(
                "dro needs the log-probabilities of prompts too, which rollouts don't have; choose another loss", param="loss"
            )
        if self.temperature != 1.0:
            raise InvalidRequest(
                f"temperature is {self.temperature:g}; training takes 1: the log-probabilities that come back are those of temperature 1, "
                "so the ratios of what was drawn at another would be biased; leave it out",
                param="temperature",
            )
        if self.learning_rate <= 0 or not 0 <= self.max_failed <= 1:
            raise InvalidRequest("learning_rate must be above 0, and max_failed a share from 0 to 1", param="learning_rate")
        return self


class State(msgspec.Struct, frozen=True):
    """Where a run can be continued: `step` steps were made, and `path` holds the weights and the optimizer's state after them."""

    step: int
    path: str
    settings: Settings


def train(
    service: tinker.ServiceClient,
    settings: Settings,
    dataset: Dataset,
    folder: Path,
    held_out: Dataset | None = None,
    decode: Decode | None = None,
    on_step: Callable[[Metrics], None] = lambda _: None,
) -> list[Metrics]:
    """Runs, or continues what `folder` holds, and returns the metrics of all steps, the last being those after the last step.

    `on_step` gets each step's metrics as they are written. Raises Conflict if the folder holds a run with other settings (`steps` may
    be raised) or one of more steps, and Unavailable when too many episodes fail, held-out ones included.
    """
    settings.check()
    folder.mkdir(parents=True, exist_ok=True)
    state = _read_state(folder, settings)
    if state is None:
        client = service.create_lora_training_client(settings.base_model, rank=settings.rank, seed=settings.seed).result()
    else:
        client = service.create_training_client_from_state_with_optimizer(state.path).result()
    run = _Run(client, settings, dataset, folder, held_out, decode)
    rows = _cut_back(folder, 0 if state is None else state.step)
    for step in range(0 if state is None else state.step, settings.steps):
        row = run.step(step)
        _append(folder / "metrics.jsonl", row)
        rows.append(row)
        on_step(row)
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            run.save(step + 1)
    if held_out is not None and not (rows and rows[-1]["step"] == settings.steps):
        row = {"step": settings.steps, **run.evaluate(run.sampler())}
        _append(folder / "metrics.jsonl", row)
        rows.append(row)
        on_step(row)
    return rows


class _Run:
    """One training client and what its steps need."""

    def __init__(
        self,
        client: tinker.TrainingClient,
        settings: Settings,
        dataset: Dataset,
        folder: Path,
        held_out: Dataset | None,
        decode: Decode | None,
    ):
        self.client, self.settings, self.dataset, self.folder = client, settings, dataset, folder
        self.held_out, self.decode = held_out, decode

    def step(self, step: int) -> Metrics:
        settings, started = self.settings, time.monotonic()
        row: Metrics = {"step": step}
        sampler = self.sampler()
        if settings.evaluate_every and step % settings.evaluate_every == 0:
            row |= self.evaluate(sampler)
        begun = time.monotonic()
        groups = self._play(sampler, self.dataset, step, settings.temperature, seed_of(settings.seed, "train", step))
        played = time.monotonic()
        write_records(self.folder / "rollouts.jsonl", groups[:SHOWN_GROUPS], self.decode, step=step)
        advantages = None if settings.estimator == GAE else self._compare(groups)
        row |= measures.of_rollouts(groups, advantages)
        self._check_failures(groups)
        row |= self._train(groups, advantages)
        ended = time.monotonic()
        row |= {"seconds/playing": played - begun, "seconds/training": ended - played, "seconds/step": ended - started}
        row["tokens/second"] = row.get("tokens/sampled", 0.0) / (ended - begun)
        return row

    def sampler(self) -> tinker.SamplingClient:
        """Of the weights as they are now."""
        recording = self.settings.loss == "stable_reinforce"
        return self.client.save_weights_and_get_sampling_client(record_stability_info=recording).result()

    def evaluate(self, sampler: tinker.SamplingClient) -> Metrics:
        """Means over one pass through the held-out dataset, by the likeliest answers."""
        if self.held_out is None:
            return {}
        groups: list[TrajectoryGroup] = []
        for index in range(len(self.held_out)):
            groups += self._play(sampler, self.held_out, index, 0.0, seed_of(self.settings.seed, "held out", index))
        self._check_failures(groups, "held-out ")
        return {f"held_out/{name}": value for name, value in measures.of_rollouts(groups).items()}

    def _play(self, sampler: tinker.SamplingClient, dataset: Dataset, index: int, temperature: float, seed: int) -> list[TrajectoryGroup]:
        policy = TinkerPolicy(sampler, self.settings.max_tokens, temperature)
        return play_now(dataset.get_batch(index % len(dataset)), policy, self.settings.limits, seed)

    def _compare(self, groups: list[TrajectoryGroup]) -> list[list[list[float]]]:
        return [advantages_of(group, self.settings.estimator, mask_over_long=self.settings.mask_over_long) for group in groups]

    def _train(self, groups: list[TrajectoryGroup], advantages: list[list[list[float]]] | None) -> Metrics:
        """Each substep takes every so-manieth group, so that all have about as many. A substep without anything to learn is left out.

        Without advantages the value head is asked for them, once for all substeps.
        """
        settings, config, row = self.settings, self.settings.loss_config, Metrics()
        if advantages is None:
            config = config | settings.critic.weights()
            data_G, row = judged(self.client, groups, settings.critic, settings.mask_over_long)
        else:
            provenance, sequence_mask = settings.loss == "stable_reinforce", settings.loss == "gspo"
            data_G = [datums_of_group(group, own, provenance, sequence_mask) for group, own in zip(groups, advantages, strict=True)]
        for substep in range(settings.substeps):
            data = [datum for members in data_G[substep :: settings.substeps] for datum in members]
            if not data:
                continue
            losses = self.client.forward_backward(data, settings.loss, config or None)
            stepped = self.client.optim_step(tinker.AdamParams(learning_rate=settings.learning_rate))
            output = losses.result()
            stepped.result()
            row |= measures.of_training(data, output.loss_fn_outputs) | {f"loss/{name}": float(x) for name, x in output.metrics.items()}
        return row

    def _check_failures(self, groups: list[TrajectoryGroup], which: str = "") -> None:
        counted = count(groups)
        failed = counted["failed"] + counted["groups_failed"]
        if failed <= self.settings.max_failed * max(counted["episodes"], 1):
            return
        failures = [one.failure for group in groups for one in group.trajectories_G if one.failure] + [
            f for g in groups for f in g.failures
        ]
        raise Unavailable(
            f"{failed} of {counted['episodes']} {which}episodes failed, more than max_failed ({self.settings.max_failed:g}) allows; "
            f"the first: {failures[0].kind}: {failures[0].message}"
        )

    def save(self, step: int) -> None:
        path = self.client.save_state(f"step-{step:06}").result().path
        text = msgspec.json.format(msgspec.json.encode(State(step, path, self.settings)), indent=1)
        new = self.folder / "state.json.new"
        with new.open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.folder / "state.json")


def _read_state(folder: Path, settings: Settings) -> State | None:
    path = folder / "state.json"
    if not path.exists():
        return None
    try:
        state = msgspec.json.decode(path.read_bytes(), type=State)
    except (msgspec.DecodeError, OSError) as error:
        raise InvalidRequest(f"{path} can't be read ({error}); continue from another folder, or remove it", param="folder") from None
    if settings.steps < state.step:
        raise Conflict(
            f"{folder} holds a run of which {state.step} steps were made, and steps is {settings.steps}; a model can't go back: "
            "ask for at least as many, or use another folder",
            param="steps",
        )
    free = {"steps": settings.steps}
    if msgspec.structs.replace(state.settings, **free) != settings:
        old, new = msgspec.to_builtins(state.settings), msgspec.to_builtins(settings)
        changed = ", ".join(f"{name} {old[name]!r} -> {new[name]!r}" for name in new if old[name] != new[name] and name not in free)
        raise Conflict(
            f"{folder} holds a run with other settings ({changed}); use another folder, or the settings of that run", param="folder"
        )
    return state


def _cut_back(folder: Path, step: int) -> list[Metrics]:
    """The metrics of the steps before `step`. Lines of later ones, which are about to be made again, are removed."""
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        path = folder / name
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) < step]
        new = path.with_suffix(".new")
        new.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        new.replace(path)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _step_of(line: str) -> float:
    """A line that was cut short by a kill belongs to no step that was completed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
