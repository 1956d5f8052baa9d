"""Sampling at another temperature than 1, and training on exactly what was drawn.

Whoever samples at T draws from softmax(logits / T), and that distribution is then the policy. The sampler reports log-probabilities of
softmax(logits); the ones at T can't be made of those, it takes all logits of a position. So the trainer is asked for them: one `forward`
at T under the very weights that sampled, before anything is trained (`at_temperature`), and the loss is computed at T too
(`loss_config.temperature`, docs/reference/losses.md). That sampler and trainer agree at 1 is what makes them agree at T.

It takes the server's extension `temperature`, and weights that haven't moved since: so it is for the synchronous loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import msgspec
import numpy as np
import tinker

from everlearn.errors import InvalidRequest
from everlearn.rl.datums import datums_of, sampled_of
from everlearn.rl.trajectory import Trajectory, TrajectoryGroup

LOWEST, HIGHEST = 1e-3, 1e3  # what the loss takes
Shape: TypeAlias = Literal["linear", "exponential"]
SHAPES: tuple[str, ...] = get_args(Shape)
WITHOUT = ("stable_reinforce",)  # losses of which another part than `logprobs` says how tokens were drawn


class Temperature(msgspec.Struct, frozen=True):
    """A schedule: from `first` at step 0 to `last` at step `steps`, and `last` from there on. `linear` adds the same at each step,
    `exponential` multiplies by the same."""

    first: float
    last: float
    steps: int
    shape: Shape = "linear"

    def at(self, step: int) -> float:
        share = min(step / self.steps, 1.0)
        if self.shape == "exponential":
            return float(self.first * (self.last / self.first) ** share)
        return self.first + (self.last - self.first) * share


def temperature_at(temperature: float | Temperature, step: int) -> float:
    """That of a step; a number is constant."""
    return temperature.at(step) if isinstance(temperature, Temperature) else float(temperature)


def at(temperature: float) -> dict[str, float | str] | None:
    """What the loss has to be told; None where it needn't be told anything, as by servers without the extension."""
    return None if temperature == 1.0 else {"temperature": temperature}


def check_temperature(temperature: float | Temperature, loss: str, loss_config: Any, asynchronous: bool) -> None:
    """Raises InvalidRequest for what can't be meant in a run with such a loss, or can't be trained on rightly."""
    if "temperature" in loss_config:
        raise InvalidRequest("loss_config.temperature is the run's temperature here; set that, and samples follow it", param="loss_config")
    ends = [temperature.first, temperature.last] if isinstance(temperature, Temperature) else [temperature]
    if not all(LOWEST <= one <= HIGHEST for one in ends):
        raise InvalidRequest(
            f"temperature is {' to '.join(f'{one:g}' for one in ends)}; it must lie in [{LOWEST:g}, {HIGHEST:g}]", param="temperature"
        )
    if isinstance(temperature, Temperature) and temperature.steps < 1:
        raise InvalidRequest(f"temperature.steps is {temperature.steps}; a schedule takes at least 1 step", param="temperature")
    if isinstance(temperature, Temperature) and temperature.shape not in SHAPES:
        raise InvalidRequest(f"temperature.shape is {temperature.shape!r}; it must be {' or '.join(SHAPES)}", param="temperature")
    if all(one == 1.0 for one in ends):
        return
    if loss in WITHOUT:
        raise InvalidRequest(
            f"{loss} reads the log-probabilities that the server recorded, which are those of temperature 1, so the ratios of what was "
            "drawn at another would be biased; take another loss, or leave temperature out",
            param="temperature",
        )
    if asynchronous:
        raise InvalidRequest(
            "an asynchronous run samples at temperature 1: at another one the log-probabilities of what was drawn take a forward pass "
            "under the weights that drew it, and those have moved by then; leave temperature out, or use train",
            param="temperature",
        )


def at_temperature(client: tinker.TrainingClient, groups: Sequence[TrajectoryGroup], temperature: float) -> list[TrajectoryGroup]:
    """The groups, whose episodes with a score now carry the log-probabilities of softmax(logits / temperature) under the client's present
    weights, which must be those that sampled. Failed episodes, on which nobody trains, keep what the sampler reported.
    """
    if temperature == 1.0:
        return list(groups)
    places = [(number, index) for number, group in enumerate(groups) for index in group.scored]
    data_E = [_datums(groups[number].trajectories_G[index]) for number, index in places]
    data = [datum for own in data_E for datum in own]
    if not data:
        return list(groups)
    outputs = iter(client.forward(data, "importance_sampling", at(temperature)).result().loss_fn_outputs)
    members = [list(group.trajectories_G) for group in groups]
    for (number, index), own in zip(places, data_E, strict=True):
        sampled = [sampled_of(datum) for datum in own]
        told = np.concatenate([next(outputs)["logprobs"].to_numpy()[mask] for mask in sampled])
        members[number][index] = _retold(members[number][index], [float(value) for value in told])
    return [msgspec.structs.replace(group, trajectories_G=own) for group, own in zip(groups, members, strict=True)]


def _datums(trajectory: Trajectory) -> list[tinker.types.Datum]:
    data = datums_of(trajectory, [0.0] * len(trajectory.transitions), sequence_mask=True)
    if sum(int(sampled_of(datum).sum()) for datum in data) != trajectory.num_tokens:
        message = "an action without a prompt can't be asked for at another temperature; let the environment show at least one token"
        raise InvalidRequest(message, param="initial_observation")
    return data


def _retold(trajectory: Trajectory, logprobs: list[float]) -> Trajectory:
    """The same episode; `logprobs` are those of its sampled tokens, in order."""
    turns, at = [], 0
    for turn in trajectory.transitions:
        stop = at + len(turn.action.tokens)
        turns.append(msgspec.structs.replace(turn, action=msgspec.structs.replace(turn.action, logprobs=logprobs[at:stop])))
        at = stop
    return msgspec.structs.replace(trajectory, transitions=turns)
