"""The estimator `gae`: each sampled token's advantage over what the adapter's value head expected there.

The values come from the server (`forward` with `value_targets` answers with them, and trains nothing), the advantages are made here, and
one `forward_backward` trains policy and value head together (docs/design/objectives.md). Schulman et al., arXiv 1506.02438 and 1707.06347.

An episode's time goes from sampled token to sampled token, through all its turns and however many datums they are spread over. A turn is
paid with its last token, what the group adds with the very last, and after that nothing more is to come. So an episode needs no companion:
groups of one, and groups whose members all earned the same, are trained on like others.

Axes: N sampled tokens of one episode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import tinker
from tinker import types

from everlearn.errors import InvalidRequest
from everlearn.rl.advantages import EPSILON, gae, turn_rewards
from everlearn.rl.datums import datums_of, sampled_of
from everlearn.rl.trajectory import TrajectoryGroup

GAE = "gae"
WEIGHTS = ("value_coeff", "value_trunk")  # of the value function, and keys of the loss
WITHOUT_VALUES = ("stable_reinforce", "dro")  # losses that don't train the value head


class ValueFunction(msgspec.Struct, frozen=True):
    """`gamma` and `lam` count in tokens. `value_coeff` weighs the value head's loss beside the policy's, and of its gradient the share
    `value_trunk` reaches the adapter. `standardise` brings a batch's advantages to mean 0 and standard deviation 1.

    The head is stepped with the adapter, at its learning rate, and Adam's steps don't grow with the error: rewards of which an episode's
    sum varies by far less than 1 leave the head trembling by as much as it should tell. Its loss isn't clipped: each batch is trained on
    once.
    """

    gamma: float = 1.0
    lam: float = 0.95
    value_coeff: float = 0.5
    value_trunk: float = 1.0
    standardise: bool = False

    def check(self, estimator: str, loss: str, loss_config: Mapping[str, float | str]) -> None:
        """Raises InvalidRequest for what can't be meant in a run of such an estimator and loss."""
        if estimator != GAE:
            if self != ValueFunction():
                raise InvalidRequest(
                    f"value_function has no effect on the estimator {estimator!r}; leave it out, or take {GAE}", param="value_function"
                )
            return
        for name in ("gamma", "lam", "value_trunk"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidRequest(
                    f"value_function.{name} is {getattr(self, name):g}; it goes from 0 to 1", param=f"value_function.{name}"
                )
        if not 0 < self.value_coeff < float("inf"):
            raise InvalidRequest(
                f"value_function.value_coeff is {self.value_coeff:g}; it must be above 0", param="value_function.value_coeff"
            )
        if loss in WITHOUT_VALUES:
            raise InvalidRequest(f"{loss} trains no value head; take ppo or importance_sampling, or another estimator", param="loss")
        for name in WEIGHTS:
            if name in loss_config:
                raise InvalidRequest(f"loss_config.{name} is value_function.{name} here; set that", param="loss_config")

    def weights(self) -> dict[str, float | str]:
        """What the loss has to know."""
        return {name: float(getattr(self, name)) for name in WEIGHTS}


class _Episode(NamedTuple):
    """An episode's datums in order, and what each sampled token was paid."""

    data: list[types.Datum]
    rewards_N: np.ndarray


def valued(
    client: tinker.TrainingClient, groups: Sequence[TrajectoryGroup], function: ValueFunction, mask_over_long: bool = False
) -> tuple[list[list[types.Datum]], dict[str, float]]:
    """For each group the datums of its scored members with `advantages` and `value_targets`, and what was measured.

    The values are those of the client's weights as they are now. `mask_over_long` leaves out episodes that were cut off. Measured are
    over all sampled tokens: the mean value, the share of the variance of what was earned that values explain before they are trained on
    it (1 is all; absent where everything earned the same), and mean and standard deviation of the advantages before any standardising.
    """
    episodes_G = [[_episode(group, index) for index in group.taught(mask_over_long)] for group in groups]
    episodes = [episode for members in episodes_G for episode in members]
    if not episodes:
        return [[] for _ in groups], {"groups/trained": 0.0}
    values = _values(client, episodes)
    estimates = [gae(one.rewards_N, own, function.gamma, function.lam) for one, own in zip(episodes, values, strict=True)]
    earned = np.concatenate([gae(one.rewards_N, own, function.gamma, 1.0)[1] for one, own in zip(episodes, values, strict=True)])
    advantages = np.concatenate([found for found, _ in estimates])
    centre, width = (advantages.mean(), advantages.std() + EPSILON) if function.standardise else (0.0, 1.0)
    for episode, (found, targets) in zip(episodes, estimates, strict=True):
        _fill(episode, "advantages", (found - centre) / width)
        _fill(episode, "value_targets", targets)
    metrics = {
        "groups/trained": float(sum(bool(members) for members in episodes_G)),
        "value/mean": float(np.concatenate(values).mean()),
        "advantage/mean": float(advantages.mean()),
        "advantage/std": float(advantages.std()),
    }
    if earned.std() > EPSILON:
        metrics["value/explained"] = float(1 - np.var(earned - np.concatenate(values)) / np.var(earned))
    return [[datum for episode in members for datum in episode.data] for members in episodes_G], metrics


def _episode(group: TrajectoryGroup, index: int) -> _Episode:
    trajectory = group.trajectories_G[index]
    data = datums_of(trajectory, [0.0] * len(trajectory.transitions), sequence_mask=True)
    if sum(int(sampled_of(datum).sum()) for datum in data) != trajectory.num_tokens:
        message = "an action without a prompt has no value before it; let the environment show at least one token"
        raise InvalidRequest(message, param="initial_observation")
    rewards: list[float] = []
    for transition, reward in zip(trajectory.transitions, turn_rewards(group, index), strict=True):
        rewards += [0.0] * (len(transition.action.tokens) - 1) + [reward]
    return _Episode(data, np.array(rewards))


def _values(client: tinker.TrainingClient, episodes: Sequence[_Episode]) -> list[np.ndarray]:
    """The value at each sampled token [N], for each episode."""
    data = [datum for episode in episodes for datum in episode.data]
    for datum in data:
        datum.loss_fn_inputs["value_targets"] = _tensor(np.zeros(len(sampled_of(datum))))
    outputs = iter(client.forward(data, "importance_sampling").result().loss_fn_outputs)
    return [
        np.concatenate([next(outputs)["values"].to_numpy()[sampled_of(datum)] for datum in episode.data]).astype(np.float64)
        for episode in episodes
    ]


def _fill(episode: _Episode, name: str, numbers_N: np.ndarray) -> None:
    """Puts an episode's numbers to its sampled tokens, 0 elsewhere."""
    begin = 0
    for datum in episode.data:
        sampled = sampled_of(datum)
        row = np.zeros(len(sampled))
        row[sampled] = numbers_N[begin : begin + int(sampled.sum())]
        begin += int(sampled.sum())
        datum.loss_fn_inputs[name] = _tensor(row)


def _tensor(row: np.ndarray) -> types.TensorData:
    return types.TensorData.from_numpy(row.astype(np.float32))
