"""The loop: play a batch, compare, train, measure, save. Synchronous: what is trained on was sampled by the weights that are trained.
`asynchronous.py` is the other loop; both are made of the same `Learner`.

A run lives in a folder: `metrics.jsonl` has a line for each step, `rollouts.jsonl` shows some of what was played, `state.json` says where
it can be continued. The same command continues it. With one episode at a time (`Limits(episodes_at_once=1)`) on a CPU, a run that was
killed and continued gives bit for bit what it would have given; with more, batches form by chance and the last bits with them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import tinker
from tinker import types

from everlearn.errors import Conflict, InvalidRequest, Unavailable
from everlearn.rl import measures
from everlearn.rl.advantages import advantages_of
from everlearn.rl.agent_runs import AgentHost
from everlearn.rl.agents import AgentServer, agent_metrics
from everlearn.rl.datums import by_length, datums_of_group, without_mask
from everlearn.rl.env import Dataset
from everlearn.rl.policy import TinkerPolicy, seed_of
from everlearn.rl.ptx import Ptx
from everlearn.rl.records import Decode, write_records
from everlearn.rl.reference import Reference
from everlearn.rl.rollouts import count, play_now
from everlearn.rl.runfolder import append, cut_back, note_run, read_state, write_state
from everlearn.rl.settings import Settings, State
from everlearn.rl.temperature import at, at_temperature, temperature_at
from everlearn.rl.trajectory import TrajectoryGroup
from everlearn.rl.values import GAE, valued

SHOWN_GROUPS = 2  # of each batch in rollouts.jsonl
MASKED = ("gspo", "mirror_descent")  # losses that have to know which tokens were sampled
FREE = ("steps", "kl_budget")  # settings in which a run that goes on may differ from what it was
Metrics = dict[str, float]
Sampler: TypeAlias = tinker.SamplingClient | AgentServer
SamplerOf = Callable[[tinker.TrainingClient, int], Sampler]
log = logging.getLogger("everlearn.rl")


def train(
    service: tinker.ServiceClient,
    settings: Settings,
    dataset: Dataset,
    folder: Path,
    held_out: Dataset | None = None,
    decode: Decode | None = None,
    on_step: Callable[[Metrics], None] = lambda _: None,
    ptx: Sequence[types.Datum] = (),
    sampler_of: SamplerOf | None = None,
    agents: AgentHost | None = None,
) -> list[Metrics]:
    """Runs, or continues what `folder` holds, and returns the metrics of all steps, the last being those after the last step.

    `on_step` gets each step's metrics as they are written. `ptx`: datums to imitate, for `ptx_weight`. `sampler_of(client, step)`: who
    plays the batch of a step, in place of the weights as they are: another engine's copy of them, or older ones in a study. `agents`:
    where the agents that the datasets deal out are played (agent_runs.py).

    Raises Conflict if the folder holds a run with other settings (`steps` may be raised, `kl_budget` changed) or one of more steps, and
    Unavailable when too many episodes fail, held-out ones included.
    """
    if settings.pace is not None:
        raise InvalidRequest("pace is for train_asynchronously (everlearn/rl/asynchronous.py); call that, or leave it out", param="pace")
    if sampler_of is not None and settings.temperature != 1.0:
        raise InvalidRequest(
            "sampler_of lets others sample, whose log-probabilities at another temperature than 1 this trainer's weights can't give; "
            "leave temperature out, or sampler_of",
            param="temperature",
        )
    learner = Learner(service, settings, folder, held_out, decode, ptx, agents)
    return learner.run(lambda step: _step(learner, dataset, step, sampler_of), on_step)


def _step(learner: Learner, dataset: Dataset, step: int, sampler_of: SamplerOf | None) -> Metrics:
    settings, started = learner.settings, time.monotonic()
    temperature = temperature_at(settings.temperature, step)
    row: Metrics = {"step": step, **({} if settings.temperature == 1.0 else {"temperature": temperature})}
    if sampler_of is None or learner.evaluates(step):
        sampler = learner.sampler()
    if learner.evaluates(step):
        row |= learner.evaluate(sampler)
    begun = time.monotonic()
    if sampler_of is not None:
        sampler = sampler_of(learner.client, step)
    groups = learner.play(sampler, dataset, step, temperature, seed_of(settings.seed, "train", step))
    groups = at_temperature(learner.client, groups, temperature)
    played = time.monotonic()
    write_records(learner.folder / "rollouts.jsonl", groups[:SHOWN_GROUPS], learner.decode, step=step)
    advantages = None if settings.estimator == GAE else learner.compare(groups)
    row |= measures.of_rollouts(groups)
    if isinstance(sampler, AgentServer):
        row |= agent_metrics([group.trajectories_G[index] for group in groups for index in group.scored])
    learner.check_failures(groups)
    row |= learner.train(groups, advantages, step)
    ended = time.monotonic()
    row |= {"seconds/playing": played - begun, "seconds/training": ended - played, "seconds/step": ended - started}
    row["tokens/second"] = row.get("tokens/sampled", 0.0) / (ended - begun)
    return row


class Sent(msgspec.Struct, frozen=True):
    """Datums whose gradient was asked for, each with its `sequence_ratio_mask`, and the answer to come."""

    data: list[types.Datum]
    output: tinker.APIFuture[types.ForwardBackwardOutput]


class Learner:
    """A run's training client, its folder, and what the steps of both loops are made of."""

    def __init__(
        self,
        service: tinker.ServiceClient,
        settings: Settings,
        folder: Path,
        held_out: Dataset | None = None,
        decode: Decode | None = None,
        ptx: Sequence[types.Datum] = (),
        agents: AgentHost | None = None,
    ):
        """Opens the run that the folder holds where it can be continued, or a new one."""
        self.settings, self.folder, self.held_out, self.decode, self.agents = settings.check(), folder, held_out, decode, agents
        if agents is not None:
            agents.check(settings.loss, settings.temperature)
        if bool(ptx) != bool(settings.ptx_weight):
            raise InvalidRequest("ptx are datums to imitate and ptx_weight is what they weigh; give both or neither", param="ptx")
        self.ptx = Ptx(ptx, settings.ptx_weight, settings.ptx_batch, settings.seed) if ptx else None
        self.reference = Reference(service, settings.base_model)
        self.loss_config = settings.loss_config | (settings.value_function.weights() if settings.estimator == GAE else {})
        folder.mkdir(parents=True, exist_ok=True)
        self.state = _checked(read_state(folder, State), folder, settings)
        if self.state is None:
            self.client = service.create_lora_training_client(settings.base_model, rank=settings.rank, seed=settings.seed).result()
        else:
            self.client = service.create_training_client_from_state_with_optimizer(self.state.path).result()
        note_run(folder, self.client.model_id, settings)

    @property
    def first(self) -> int:
        """The step that is to be made next when the run is opened."""
        return 0 if self.state is None else self.state.step

    def run(self, make: Callable[[int], Metrics], on_step: Callable[[Metrics], None]) -> list[Metrics]:
        """All steps that are left, as `make(step)` makes them, and the last evaluation."""
        settings, made = self.settings, self.first
        rows = cut_back(self.folder, made)

        def write(row: Metrics) -> None:
            append(self.folder / "metrics.jsonl", row)
            rows.append(row)
            on_step(row)

        raised = self.state is None or not settings.kl_budget or settings.kl_budget > self.state.settings.kl_budget
        stopped = "" if raised or self.state is None else self.state.stopped
        while made < settings.steps and not stopped:
            row = make(made)
            stopped = self._over_budget(row)
            write(row)
            made += 1
            if made % settings.save_every == 0 or made == settings.steps or stopped:
                self._save(made, stopped)
        if stopped:
            log.warning("the run in %s stopped after %d of %d steps: %s", self.folder, made, settings.steps, stopped)
        if self.held_out is not None and not (rows and rows[-1]["step"] == made):
            write({"step": made, **self.evaluate(self.sampler())})
        return rows

    def sampler(self) -> Sampler:
        """Of the weights as they are now."""
        if self.agents is not None:
            return self.agents.server(self.client)
        recording = self.settings.loss == "stable_reinforce"
        return self.client.save_weights_and_get_sampling_client(record_stability_info=recording).result()

    def evaluates(self, step: int) -> bool:
        return bool(self.settings.evaluate_every) and step % self.settings.evaluate_every == 0 and self.held_out is not None

    def evaluate(self, sampler: Sampler) -> Metrics:
        """Means over one pass through the held-out dataset, by the likeliest answers."""
        if self.held_out is None:
            return {}
        groups: list[TrajectoryGroup] = []
        for index in range(len(self.held_out)):
            groups += self.play(sampler, self.held_out, index, 0.0, seed_of(self.settings.seed, "held out", index))
        self.check_failures(groups, "held-out ")
        return {f"held_out/{name}": value for name, value in measures.of_rollouts(groups).items()}

    def play(self, sampler: Sampler, dataset: Dataset, index: int, temperature: float, seed: int) -> list[TrajectoryGroup]:
        tokens = self.settings.max_tokens
        policy = sampler.at(temperature) if isinstance(sampler, AgentServer) else TinkerPolicy(sampler, tokens, temperature)
        return play_now(dataset.get_batch(index % len(dataset)), policy, self.settings.limits, seed)

    def compare(self, groups: Sequence[TrajectoryGroup]) -> list[list[list[float]]]:
        return [advantages_of(group, self.settings.estimator, mask_over_long=self.settings.mask_over_long) for group in groups]

    def train(self, groups: list[TrajectoryGroup], advantages: list[list[list[float]]] | None, step: int) -> Metrics:
        """A batch. Each substep takes every so-manieth group, so that all have about as many; one without anything to train on is left out.
        Without advantages the value head is asked for them, once for all substeps."""
        substeps, temperature = self.settings.substeps, temperature_at(self.settings.temperature, step)
        row = self.distance(groups, temperature)
        if advantages is None:
            data_G, found = valued(self.client, groups, self.settings.value_function, self.settings.mask_over_long)
            self._complete(data_G, temperature)
            row |= found
        else:
            data_G = self.data_of(groups, advantages, temperature)
            row |= measures.of_batch(data_G)
        made = step * substeps * self.settings.epochs
        for number, substep in enumerate(list(range(substeps)) * self.settings.epochs):
            if data := [datum for members in data_G[substep::substeps] for datum in members]:
                row |= self.update([self.send(data, temperature)], made + number)
        return row

    def data_of(
        self, groups: Sequence[TrajectoryGroup], advantages: Sequence[list[list[float]]], temperature: float = 1.0
    ) -> list[list[types.Datum]]:
        """For each group its datums, with all that the loss wants to know of the weights as they are now, and what was sampled. Answers
        without advantage are among them where the loss pulls."""
        settings = self.settings
        provenance = settings.loss == "stable_reinforce"
        data_G = [
            datums_of_group(
                group, own, provenance, sequence_mask=True, always=group.taught(settings.mask_over_long) if settings.pulls else ()
            )
            for group, own in zip(groups, advantages, strict=True)
        ]
        self._complete(data_G, temperature)
        return data_G

    def _complete(self, data_G: list[list[types.Datum]], temperature: float = 1.0) -> None:
        """Adds what the loss wants to know of the weights as they are now. For `gspo`, whose objective has one term for each sequence, the
        advantages of a datum are divided by its length."""
        loss = self.settings.loss
        data = [datum for members in data_G for datum in members]
        if loss == "gspo":
            for datum in data:
                datum.loss_fn_inputs["advantages"] = by_length(datum)
        if data and self.settings.decoupled:
            outputs = self.client.forward(self._asked(data), loss, at(temperature)).result().loss_fn_outputs
            for datum, output in zip(data, outputs, strict=True):
                datum.loss_fn_inputs["old_logprobs"] = output["logprobs"]
        if data and loss != "stable_reinforce" and self.loss_config.get("kl_coeff"):
            for datum, logprobs in zip(data, self.reference.logprobs(data, temperature), strict=True):
                datum.loss_fn_inputs["reference_logprobs"] = logprobs

    def send(self, data: list[types.Datum], temperature: float = 1.0) -> Sent:
        """Asks for the gradient of these datums, which joins those that were asked for since the last optimizer step."""
        config = self.loss_config | (at(temperature) or {})
        return Sent(data, self.client.forward_backward(self._asked(data), self.settings.loss, config or None))

    def _asked(self, data: Sequence[types.Datum]) -> list[types.Datum]:
        """As the loss takes them. A mask that it can do without may be unknown to it, or change what it corrects and measures; without
        one, terms act on tokens with an advantage alone."""
        settings = self.settings
        masked = settings.loss in MASKED or settings.estimator == GAE or (settings.pulls and settings.loss != "stable_reinforce")
        return list(data) if masked else [without_mask(datum) for datum in data]

    def update(self, sent: Sequence[Sent], number: int) -> Metrics:
        """Optimizer step `number` of the run, with the gradients of all that was sent."""
        text = self.ptx.send(self.client, number) if self.ptx is not None else None
        stepped = self.client.optim_step(tinker.AdamParams(learning_rate=self.settings.learning_rate))
        outputs = [one.output.result() for one in sent]
        stepped.result()
        data = [datum for one in sent for datum in one.data]
        row = measures.of_training(data, [found for output in outputs for found in output.loss_fn_outputs])
        row |= {f"loss/{name}": value for name, value in measures.merged([output.metrics for output in outputs]).items()}
        if self.ptx is not None and text is not None:
            row |= self.ptx.measured(text.result(), number)
        return row

    def distance(self, groups: Sequence[TrajectoryGroup], temperature: float = 1.0) -> Metrics:
        """`kl/base`, if a budget asks for it."""
        return self.reference.distance(groups, temperature) if self.settings.kl_budget and self.settings.kl_budget_of == "base" else {}

    def check_failures(self, groups: Sequence[TrajectoryGroup], which: str = "") -> None:
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

    def _over_budget(self, row: Metrics) -> str:
        """Why the run must stop after this step; empty where it needn't."""
        name = "kl/base" if self.settings.kl_budget_of == "base" else "kl/k3"
        if not self.settings.kl_budget or row.get(name, 0.0) <= self.settings.kl_budget:
            return ""
        row["stopped"] = 1.0
        return f"{name} is {row[name]:.4g}, above kl_budget ({self.settings.kl_budget:g}); raise it to go on"

    def _save(self, step: int, stopped: str) -> None:
        path = self.client.save_state(f"step-{step:06}").result().path
        write_state(self.folder, State(step, path, self.settings, stopped))


def _checked(state: State | None, folder: Path, settings: Settings) -> State | None:
    """The state, if these settings may go on from it."""
    if state is None:
        return None
    if settings.steps < state.step:
        raise Conflict(
            f"{folder} holds a run of which {state.step} steps were made, and steps is {settings.steps}; a model can't go back: "
            "ask for at least as many, or use another folder",
            param="steps",
        )
    free: dict[str, Any] = {name: getattr(settings, name) for name in FREE}
    if msgspec.structs.replace(state.settings, **free) != settings:
        old, new = msgspec.to_builtins(state.settings), msgspec.to_builtins(settings)
        changed = ", ".join(f"{name} {old[name]!r} -> {new[name]!r}" for name in new if old[name] != new[name] and name not in free)
        raise Conflict(
            f"{folder} holds a run with other settings ({changed}); use another folder, or the settings of that run", param="folder"
        )
    return state
