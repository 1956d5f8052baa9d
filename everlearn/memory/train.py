"""Training a memory: the policy that decides what stays and writes it shorter, by what its windows can still answer.

A run is one of reinforcement learning (everlearn/rl/train.py): its folder, its metrics, and where it can be continued are the same. It has
two parts. In the first `warm_steps` steps the best member of each group is imitated, best by how little likelier answers became without
what it let go (best of n, scored by the counterfactual); where chunks are weighed one by one (`MemoryTasks.weighed`), what is due of each
is taught outright. Each warm step learns again from what those before it imitated. Then groups are compared (GRPO), each from one window.
Memory tokens and answer tokens are credited apart (everlearn/memory/credit.py), sent apart, and measured apart: `memory/...` and
`answer/...`.

What comes out is an adapter: `Certain`, `Decided` and `Generate` take a sampler of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import tinker
from tinker import types

from everlearn.errors import Conflict, InvalidRequest
from everlearn.memory.credit import Advantages, best_of, due, levelled, separated
from everlearn.memory.demonstrations import Demonstrations
from everlearn.memory.environment import DECISION, REFILL, MemoryTasks
from everlearn.rl import measures
from everlearn.rl.advantages import ESTIMATORS
from everlearn.rl.datums import datums_of, supervised
from everlearn.rl.policy import seed_of
from everlearn.rl.prompts import END, ChatMl
from everlearn.rl.records import Decode, write_records
from everlearn.rl.runfolder import note, noted
from everlearn.rl.settings import Settings
from everlearn.rl.train import SHOWN_GROUPS, Learner, Metrics, Sent
from everlearn.rl.trajectory import TrajectoryGroup

KINDS = ("memory", "answer")
SAVED = "memory"  # what the finished adapter's sampler weights are called
NOTES = "training.json"  # what a run is besides its settings: written beside its state, and compared when it goes on
LOSSES = ("importance_sampling", "ppo", "cispo")  # that ask for nothing but a turn's tokens, their log-probabilities and advantages
UNUSED = ("value_function", "mask_over_long", "substeps", "epochs", "temperature", "ptx_weight", "ptx_batch", "pace")


class Training(msgspec.Struct, frozen=True):
    """`run`: steps, rank, learning rate, loss and so on, the warm steps counted in; these have the learning rate `warm_rate`, if that is
    above 0, and take `warm_epochs` optimizer steps: one from what is new to imitate, the others from as many drawn from all that the run
    imitated so far (demonstrations.py). What no step here reads (`UNUSED`) must be left as it is.
    `by_word` takes off what the word of a decision earns on average (`levelled`); without, costs such as `rewrites` can teach how often a
    word is said. `memory_weight` and `answer_weight` multiply the advantages of each kind; 0 leaves its tokens out."""

    run: Settings
    warm_steps: int = 0
    warm_rate: float = 0.0
    warm_epochs: int = 1
    by_word: bool = True
    memory_weight: float = 1.0
    answer_weight: float = 0.0

    def check(self) -> Training:
        """Itself. Raises InvalidRequest for what can't be meant, and for settings of `run` that would have no effect."""
        run = self.run.check()
        plain = Settings(run.base_model, run.steps)
        for name in UNUSED:
            if getattr(run, name) != getattr(plain, name):
                raise InvalidRequest(f"{name} is {getattr(run, name)!r}; it has no effect on training a memory, leave it out", param=name)
        for name, known in (("estimator", tuple(ESTIMATORS)), ("loss", LOSSES)):
            if getattr(run, name) not in known:
                raise InvalidRequest(f"{name} is {getattr(run, name)!r}; memories are trained by {', '.join(known)}", param=name)
        if self.warm_steps < 0 or not 0.0 <= self.warm_rate < float("inf") or self.warm_epochs < 1:
            told = f"warm_steps is {self.warm_steps}, warm_rate {self.warm_rate} and warm_epochs {self.warm_epochs}"
            raise InvalidRequest(f"{told}; the first two must be finite and at least 0, the last at least 1", param="warm_steps")
        weights = (self.memory_weight, self.answer_weight)
        if not all(0.0 <= weight < float("inf") for weight in weights) or not any(weights):
            raise InvalidRequest(
                f"memory_weight is {weights[0]} and answer_weight {weights[1]}; both are finite and at least 0, and one is above",
                param="memory_weight",
            )
        return self


def recipe(base_model: str, steps: int, warm_steps: int, rate: float, **settings: Any) -> Training:
    """What `everlearn memory train` and the figures in docs/design/memory.md are trained by. `rate`: the learning rate of the later steps;
    the warm ones have ten times that. `settings`: others of the run."""
    run = Settings(
        base_model,
        steps,
        learning_rate=rate,
        loss="ppo",
        loss_config={"kl_coeff": 0.05},
        estimator="group_mean",
        **{"max_tokens": 32, **settings},
    )
    return Training(run, warm_steps, 10.0 * rate, warm_epochs=6)


class Trained(NamedTuple):
    """`rows`: the metrics of all steps. `path`: the finished adapter, for a sampling client and for `everlearn adapter name`."""

    rows: list[Metrics]
    path: str


def train(
    service: tinker.ServiceClient,
    training: Training,
    tasks: MemoryTasks,
    folder: Path,
    held_out: MemoryTasks | None = None,
    decode: Decode | None = None,
    on_step: Callable[[Metrics], None] = lambda _: None,
    history: Mapping[str, Any] = {},
) -> Trained:
    """Runs, or continues what `folder` holds. `history` says in JSON where the histories of `tasks` come from; a run goes on only with the
    same, and with tasks that deal the same moments. Raises what everlearn/rl/train.py's `train` raises."""
    training.check()
    if training.answer_weight and not tasks.pay.correct:
        raise InvalidRequest("answer_weight is above 0 and `correct` pays nothing, so nobody answers; set both or neither", param="pay")
    learner = MemoryLearner(service, training, folder, held_out, decode, {**tasks.told(), **history})
    rows = learner.run(lambda step: _step(learner, tasks, step), on_step)
    return Trained(rows, learner.client.save_weights_for_sampler(SAVED).result().path)


def _step(learner: MemoryLearner, tasks: MemoryTasks, step: int) -> Metrics:
    started = time.monotonic()
    row: Metrics = {"step": step}
    sampler = learner.sampler()
    if learner.evaluates(step):
        row |= learner.evaluate(sampler)
    begun = time.monotonic()
    groups = learner.play(sampler, tasks, step, 1.0, seed_of(learner.settings.seed, "train", step))
    played = time.monotonic()
    write_records(learner.folder / "rollouts.jsonl", groups[:SHOWN_GROUPS], learner.decode, step=step)
    row |= measures.of_rollouts(groups)
    learner.check_failures(groups)
    warm = step < learner.training.warm_steps
    row |= learner.imitate(groups, tasks.chat, step) if warm else learner.reinforce(groups, step)
    ended = time.monotonic()
    return row | {"seconds/playing": played - begun, "seconds/training": ended - played, "seconds/step": ended - started}


class MemoryLearner(Learner):
    def __init__(
        self,
        service: tinker.ServiceClient,
        training: Training,
        folder: Path,
        held_out: MemoryTasks | None = None,
        decode: Decode | None = None,
        told: Mapping[str, Any] = {},
    ):
        """Raises Conflict if the folder holds a run whose training, or what was `told` of its tasks, is other."""
        self.training = training.check()
        parts = {name: getattr(training, name) for name in training.__struct_fields__ if name != "run"}
        self.notes: dict[str, Any] = msgspec.json.decode(msgspec.json.encode({**parts, **told}))
        pairs = [(name, old, self.notes.get(name)) for name, old in noted(folder, NOTES).items()]
        if changed := [f"{name} {old!r} -> {new!r}" for name, old, new in pairs if old != new]:
            raise Conflict(
                f"{folder} holds a run with other settings ({', '.join(changed)}); use another folder, or the settings of that run",
                param="folder",
            )
        super().__init__(service, training.run, folder, held_out, decode)
        self.demonstrations = Demonstrations.open(folder, self.first) if training.warm_steps else None

    def _save(self, step: int, stopped: str) -> None:
        note(self.folder, NOTES, self.notes)  # before the state: without one, notes bind nobody
        super()._save(step, stopped)

    def reinforce(self, groups: Sequence[TrajectoryGroup], step: int) -> Metrics:
        """One optimizer step from both kinds of tokens, each sent by itself."""
        row = self.distance(groups)
        pairs = [separated(group, self.settings.estimator) for group in groups]
        memory = [own for own, _ in pairs]
        if self.training.by_word:
            memory = levelled(groups, memory)
        sent: dict[str, Sent] = {}
        weights = (self.training.memory_weight, self.training.answer_weight)
        for kind, weight, own in zip(KINDS, weights, (memory, [own for _, own in pairs]), strict=True):
            data = [datum for group, advantages in zip(groups, own, strict=True) for datum in credited(group, advantages, weight)]
            if data:
                self._complete([data])
                sent[kind] = self.send(data)
        if not sent:
            return row
        row |= self.update(list(sent.values()), step)
        for kind, one in sent.items():
            output = one.output.result()
            found = measures.of_training(one.data, output.loss_fn_outputs)
            row |= {f"{kind}/{name}": value for name, value in found.items()}
            row |= {f"{kind}/loss/{name}": value for name, value in measures.merged([output.metrics]).items()}
        return row

    def imitate(self, groups: Sequence[TrajectoryGroup], chat: ChatMl, step: int) -> Metrics:
        """Cross-entropy on what is to be said; `warm/nll` is that of what is new, before the first of the optimizer steps."""
        new = imitated(groups, chat)
        row: Metrics = {"warm/datums": float(len(new)), **self.distance(groups)}
        if not new or self.demonstrations is None:
            return row
        self.demonstrations.add(step, new)
        rate = self.training.warm_rate or self.settings.learning_rate
        for epoch in range(self.training.warm_epochs):
            data = self.demonstrations.drawn(len(new), self.settings.seed, step, epoch) if epoch else new
            gradient = self.client.forward_backward(data, "cross_entropy")
            stepped = self.client.optim_step(tinker.AdamParams(learning_rate=rate))
            loss = float(gradient.result().metrics.get("loss:sum", 0.0))
            if not epoch:
                row["warm/nll"] = loss / sum(float(datum.loss_fn_inputs["weights"].to_numpy().sum()) for datum in new)
            stepped.result()
        return row


def credited(group: TrajectoryGroup, advantages: Advantages, weight: float) -> list[types.Datum]:
    """Datums of the turns that have an advantage other than 0, and of no others; each turn's prompt is its own."""
    return [
        datum
        for trajectory, own in zip(group.trajectories_G, advantages, strict=True)
        if weight and any(own)
        for datum in datums_of(trajectory, [weight * value for value in own], sequence_mask=True)
        if np.any(datum.loss_fn_inputs["advantages"].to_numpy())
    ]


def imitated(groups: Sequence[TrajectoryGroup], chat: ChatMl) -> list[types.Datum]:
    """What is to be said, as datums for `cross_entropy`: what the best member of each group wrote, and what it decided; of chunks that were
    weighed, what is due instead, whoever decided so."""
    found = []
    for group in groups:
        best, decisions = best_of(group), due(group)
        for number, (word, weight) in decisions.items():
            prompt = group.trajectories_G[group.scored[0]].transitions[number].observation.to_ints()
            found.append(supervised(prompt, chat.encode(f"{word}{END}"), weight))
        if best is None:
            continue
        trajectory, kinds = group.trajectories_G[best], (REFILL,) if decisions else (DECISION, REFILL)
        for datum in datums_of(trajectory, [float(turn.logs["kind"] in kinds) for turn in trajectory.transitions]):
            inputs = datum.loss_fn_inputs
            if np.any(inputs["advantages"].to_numpy()):
                kept = {"target_tokens": inputs["target_tokens"], "weights": inputs["advantages"]}
                found.append(types.Datum(model_input=datum.model_input, loss_fn_inputs=kept))
    return found
