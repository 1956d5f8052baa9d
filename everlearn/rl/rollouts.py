"""Playing: environments and a policy in, trajectories out. Many episodes at once, each within its limits.

Nothing that an environment does ends a batch. What goes wrong in an episode becomes its `Failure`; the rest of its group goes on, and
`count` says how many episodes failed and why. What is cancelled from outside (Ctrl-C, say) is cancelled, not recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import tinker

from everlearn.errors import InvalidRequest
from everlearn.rewards.reward import Reward
from everlearn.rewards.verifiers import VerifierFailed
from everlearn.rl.bounded import GRACE_SECONDS, OutOfTime, bounded
from everlearn.rl.env import Env, EnvGroup, Metrics, StepResult
from everlearn.rl.policy import Player, Policy, seed_of
from everlearn.rl.trajectory import Action, Failure, FailureKind, Trajectory, TrajectoryGroup, Transition

MESSAGE_LENGTH = 2000


class Limits(msgspec.Struct, frozen=True):
    """Bounds of a batch. `seconds` bounds an episode, and each act of a group (making environments, comparing, cleaning up)."""

    turns: int = 64
    seconds: float = 600.0
    episodes_at_once: int = 64


async def play_batch(
    groups: Sequence[EnvGroup], policy: Policy | Player, limits: Limits | None = None, seed: int | None = None
) -> list[TrajectoryGroup]:
    """Plays all groups, and returns them in their order. With a `seed`, every sample has a seed that follows from its place."""
    limits = limits or Limits()
    room = asyncio.Semaphore(limits.episodes_at_once)
    seeds = [None if seed is None else seed_of(seed, number) for number in range(len(groups))]
    return await asyncio.gather(*(play_group(group, policy, limits, own, room) for group, own in zip(groups, seeds, strict=True)))


def play_now(
    groups: Sequence[EnvGroup], policy: Policy | Player, limits: Limits | None = None, seed: int | None = None
) -> list[TrajectoryGroup]:
    """play_batch for callers that aren't asynchronous. `asyncio.run` would wait for ever for an environment that can't be cancelled."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(play_batch(groups, policy, limits, seed))
    finally:
        end_loop(loop)


def end_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Cancels what is left in a loop that doesn't run any more, gives it GRACE_SECONDS, and closes the loop."""
    if left := asyncio.all_tasks(loop):
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.wait(left, timeout=GRACE_SECONDS))
    for task in asyncio.all_tasks(loop):
        with contextlib.suppress(RuntimeError):  # it doesn't even let go of its last await
            task.get_coro().close()
    loop.close()


async def play_group(
    group: EnvGroup, policy: Policy | Player, limits: Limits | None = None, seed: int | None = None, room: asyncio.Semaphore | None = None
) -> TrajectoryGroup:
    """Plays the group's environments, then asks the group for what needs sight of all. Raises nothing of the group's."""
    limits = limits or Limits()
    room = room or asyncio.Semaphore(limits.episodes_at_once)

    async def member(number: int, env: Env) -> Trajectory:
        async with room:
            return await play(env, policy, limits, None if seed is None else seed_of(seed, number))

    failures: list[Failure] = []
    trajectories: list[Trajectory] = []
    envs: list[Env] = []
    try:
        envs = list(await bounded(group.make_envs(), limits.seconds))
    except Exception as error:  # noqa: BLE001 - whatever it is, the batch goes on, and it is counted
        failures.append(_failure("environment", error))
    try:
        trajectories = list(await asyncio.gather(*(member(number, env) for number, env in enumerate(envs))))
        trajectories, rewards, metrics = await _compared(group, envs, trajectories, limits)
    finally:
        try:
            await bounded(group.cleanup(), limits.seconds)
        except Exception as error:  # noqa: BLE001
            failures.append(_failure("environment", error))
    try:
        tags = _checked_tags(group.logging_tags())
    except Exception as error:  # noqa: BLE001
        tags = []
        failures.append(_failure("environment", error))
    return TrajectoryGroup(trajectories, rewards, metrics, tags, failures)


async def play(env: Env, policy: Policy | Player, limits: Limits | None = None, seed: int | None = None) -> Trajectory:
    """One episode, from the first prompt until the environment says that it is over."""
    limits = limits or Limits()
    if isinstance(policy, Player):
        return await policy.play(env, limits, seed)
    started = time.monotonic()
    turns: list[Transition] = []
    try:
        failure = await bounded(_episode(env, policy, limits, seed, turns), limits.seconds)
    except (OutOfTime, InvalidRequest) as error:
        failure = _failure("environment", error, len(turns))
    return Trajectory(list(turns), failure, time.monotonic() - started)


async def _episode(env: Env, policy: Policy, limits: Limits, seed: int | None, turns: list[Transition]) -> Failure | None:
    """Plays into `turns`, which holds what happened if this is cancelled."""
    try:
        observation, stop = await env.initial_observation()
        _check_observation(observation)
    except Exception as error:  # noqa: BLE001
        return _failure("environment", error)
    for turn in range(limits.turns):
        try:
            action = (await policy(observation, stop, None if seed is None else seed_of(seed, turn))).check()
        except Exception as error:  # noqa: BLE001
            return _failure("sampling", error, turn)
        try:
            result = await env.step(list(action.tokens), extra={"stop_reason": action.stop_reason})
            if not result.episode_done:
                _check_observation(result.next_observation)
        except Exception as error:  # noqa: BLE001
            turns.append(Transition(observation, action))
            return _failure("environment", error, turn)
        try:
            turns.append(_transition(observation, action, result))
        except Exception as error:  # noqa: BLE001
            turns.append(Transition(observation, action))
            return _failure("not_finite", error, turn)
        if result.episode_done:
            return None
        observation, stop = result.next_observation, result.next_stop_condition
    message = f"the episode was not over after {limits.turns} turns; raise the limit, or let the environment end"
    return Failure("turns", message, limits.turns)


def _transition(observation: tinker.ModelInput, action: Action, result: StepResult) -> Transition:
    metrics, reward = _checked_metrics(result.metrics), Reward.of(result.reward).check()
    return Transition(observation, action, reward, bool(result.episode_done), metrics, dict(result.logs))


def _checked_metrics(metrics: Metrics) -> dict[str, float]:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise InvalidRequest(f"the metric {name!r} is {value}; it must be a finite number", param="metrics")
    return dict(metrics)


def _checked_tags(tags: Any) -> list[str]:
    found = list(tags)
    if isinstance(tags, str) or not all(isinstance(tag, str) for tag in found):
        raise InvalidRequest(f"logging_tags() gave {tags!r:.200}; it must give a list of strings", param="tags")
    return found


async def _compared(
    group: EnvGroup, envs: list[Env], trajectories: list[Trajectory], limits: Limits
) -> tuple[list[Trajectory], list[Reward], list[Metrics]]:
    """Trajectories, group rewards and group metrics. If the group can't compare, nobody in it has a score: the parts belong together."""
    rewards = [Reward()] * len(trajectories)
    metrics: list[Metrics] = [{}] * len(trajectories)
    scored = [index for index, trajectory in enumerate(trajectories) if trajectory.failure is None]
    if not scored:
        return trajectories, rewards, metrics
    try:
        shown = [trajectories[index] for index in scored]
        results = list(await bounded(group.compute_group_rewards(shown, [envs[index] for index in scored]), limits.seconds))
        for index, (reward, own) in zip(scored, results, strict=True):
            rewards[index], metrics[index] = Reward.of(reward).check(), _checked_metrics(own)
    except Exception as error:  # noqa: BLE001
        failure = _failure("group", error)
        marked = [msgspec.structs.replace(one, failure=one.failure or failure) for one in trajectories]
        return marked, [Reward()] * len(trajectories), [{} for _ in trajectories]
    return trajectories, rewards, metrics


def _check_observation(observation: Any) -> None:
    if not isinstance(observation, tinker.ModelInput):
        raise InvalidRequest(f"an observation must be a tinker.ModelInput; this is a {type(observation).__name__}", param="observation")
    if observation.length < 1:
        raise InvalidRequest("an observation is empty; a policy needs at least one token to go on from", param="observation")


def _failure(kind: FailureKind, error: BaseException, turn: int = 0) -> Failure:
    found: FailureKind = "timeout" if isinstance(error, OutOfTime) else "verifier" if isinstance(error, VerifierFailed) else kind
    return Failure(found, f"{type(error).__name__}: {error}"[:MESSAGE_LENGTH], turn)


def count(groups: Iterable[TrajectoryGroup]) -> dict[str, int]:
    """`episodes`, `failed`, and `failed/KIND` for each kind that occurred; `groups_failed`: could not be made, named or cleaned up."""
    counted: Counter[str] = Counter(episodes=0, failed=0, groups_failed=0)
    for group in groups:
        counted["episodes"] += len(group.trajectories_G)
        counted["groups_failed"] += bool(group.failures)
        for trajectory in group.trajectories_G:
            if trajectory.failure is not None:
                counted["failed"] += 1
                counted[f"failed/{trajectory.failure.kind}"] += 1
    return dict(counted)
