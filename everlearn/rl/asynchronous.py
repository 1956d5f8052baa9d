"""The other loop: playing goes on while training does, with a bound on how old a group may be when it is trained on.

Version v is what the weights were after v steps. A group is played by one version, and trained on by step s only if s - v is at most
the bound; older ones are dropped, and counted. How many groups are out is bounded too, by (bound + 1) batches, so that on average
nothing gets too old (AReaL, arXiv 2505.24298, section 5.1); what does is slow. **So long episodes are dropped more often than short
ones**: look at `groups/dropped`, and give more `staleness` where it isn't near 0.

A batch is sent in `minibatches`, each as soon as its groups were played; their gradients add up to the one optimizer step of the batch.
Losses are sums, so it is the same step as in one piece.

Folder, metrics, records, evaluation, limits and failures are those of the synchronous loop, and so is continuing, but for this: what was
in play when a run ended is played anew, by other weights than it would have been. A continued run is as good as another; bit for bit
it continues in the synchronous loop alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import tinker
from tinker import types

from everlearn.errors import InvalidRequest
from everlearn.rl import measures
from everlearn.rl.env import Dataset
from everlearn.rl.players import Played, Players
from everlearn.rl.records import Decode, write_records
from everlearn.rl.settings import Pace, Settings
from everlearn.rl.train import SHOWN_GROUPS, Learner, Metrics, Sent
from everlearn.rl.trajectory import TrajectoryGroup

log = logging.getLogger("everlearn.rl")


def train_asynchronously(
    service: tinker.ServiceClient,
    settings: Settings,
    dataset: Dataset,
    folder: Path,
    held_out: Dataset | None = None,
    decode: Decode | None = None,
    on_step: Callable[[Metrics], None] = lambda _: None,
    ptx: Sequence[types.Datum] = (),
) -> list[Metrics]:
    """As `train`, at the pace of `settings.pace`. A batch has as many groups as the dataset's first.

    Raises what `train` raises, what the dataset raises, and Unavailable when an environment stops all playing. Nothing of the run is left
    playing afterwards, whichever way it ends.
    """
    pace = settings.pace or Pace()
    settings = msgspec.structs.replace(settings, pace=pace)  # checked, and kept with the run, which `train` then can't continue
    learner = Learner(service, settings, folder, held_out, decode, ptx)
    size = len(dataset.get_batch(0))
    if not size:
        raise InvalidRequest("the dataset's first batch is empty; a batch has as many groups as the first", param="dataset")
    room = (pace.staleness + 1) * size
    with Players(dataset, settings.limits, room, settings.seed, learner.first) as players:
        return learner.run(_Steps(learner, players, pace, size).make, on_step)


class _Steps:
    """Makes steps of what players hand over."""

    def __init__(self, learner: Learner, players: Players, pace: Pace, size: int):
        self.learner, self.players, self.pace, self.size = learner, players, pace, size
        self.done_with = 0  # groups that were trained on, and not yet given back

    def make(self, step: int) -> Metrics:
        learner, started = self.learner, time.monotonic()
        sampler = learner.sampler()
        self.players.publish(sampler, learner.settings.max_tokens, step)
        self.players.give_back(self.done_with)  # only now: what begins next begins with the new version
        row: Metrics = {"step": step}
        if learner.evaluates(step):
            row |= learner.evaluate(sampler)
        begun = time.monotonic()
        taken, sent, found = self._stream(step)
        self.done_with = len(taken)
        row |= found
        if sent:
            row |= learner.update(sent, step)
        ended = time.monotonic()
        row |= {"seconds/training": ended - begun - row["seconds/playing"], "seconds/step": ended - started}
        row["tokens/second"] = row.get("tokens/sampled", 0.0) / (ended - begun)
        return row

    def _stream(self, step: int) -> tuple[list[Played], list[Sent], Metrics]:
        """Takes a batch, sends each part of it as soon as it is there, and measures all of it. `seconds/playing` is how long it waited."""
        learner = self.learner
        taken: list[Played] = []
        sent: list[Sent] = []
        data_G: list[list[types.Datum]] = []
        row: Metrics = {"groups/dropped": 0.0, "tokens/dropped": 0.0, "seconds/playing": 0.0}
        for part in range(1, self.pace.minibatches + 1):
            begin, waiting = len(taken), time.monotonic()
            while len(taken) < self.size * part // self.pace.minibatches:
                taken += self._young(self.players.take(), step, row)
            row["seconds/playing"] += time.monotonic() - waiting
            groups = [one.group for one in taken[begin:]]
            self._record(taken[begin : begin + SHOWN_GROUPS] if part == 1 else [], step)
            part_G = learner.data_of(groups, learner.compare(groups))
            data_G += part_G
            if data := [datum for members in part_G for datum in members]:
                sent.append(learner.send(data))
        groups = [one.group for one in taken]
        row |= measures.of_rollouts(groups) | measures.of_batch(data_G) | self._staleness(taken, step)
        learner.check_failures(groups)
        if row["groups/dropped"]:
            log.info("step %d: %d groups were more than %d versions old and dropped", step, row["groups/dropped"], self.pace.staleness)
        return taken, sent, row | learner.distance(groups)

    def _young(self, played: Played, step: int, row: Metrics) -> list[Played]:
        """The group, or nothing where it is too old."""
        if played.version is None or step - played.version <= self.pace.staleness:
            return [played]
        row["groups/dropped"] += 1
        row["tokens/dropped"] += tokens_of(played.group)
        self.players.give_back(1)
        return []

    def _staleness(self, taken: Sequence[Played], step: int) -> Metrics:
        return measures.of_staleness([(step - one.version, tokens_of(one.group)) for one in taken if one.version is not None])

    def _record(self, shown: Sequence[Played], step: int) -> None:
        for one in shown:
            write_records(self.learner.folder / "rollouts.jsonl", [one.group], self.learner.decode, step=step, version=one.version)


def tokens_of(group: TrajectoryGroup) -> int:
    """How many tokens were sampled for episodes that have a score."""
    return sum(group.trajectories_G[index].num_tokens for index in group.scored)
