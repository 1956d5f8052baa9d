"""Learning from a reward model: answers are sampled in the very states that users reached, scored, and compared with each other.

A step takes states (conversations up to where a user waits), lets the policy as it is now answer each of them several times, and moves it
towards the answers that the reward model thinks would be liked more: GRPO without the standard deviation (Liu et al., arXiv 2503.20783).
Three things hold it in place: what is explained by length alone earns nothing (`without_length`), going far from the version that serves
costs (`kl`), and older corrections and the model's own general answers are trained on beside it. The reward model knows answers like those
that it saw, and nothing of others.

With the estimator `gae` an answer is held against what the adapter's value head expects at each of its tokens instead
(everlearn/rl/values.py). The head is learned in the same pass and saved with the adapter. Each answer is an episode of one turn, paid with
its last token.

A client of the Tinker API like everlearn/loop/lesson.py. Axes: P states, G answers to each, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import tinker

from everlearn.errors import InvalidRequest
from everlearn.loop import lesson
from everlearn.loop.description import Pull
from everlearn.loop.lesson import Example, Recipe, Step
from everlearn.rewards.reward import Reward
from everlearn.rl.advantages import group_mean
from everlearn.rl.trajectory import Action, Trajectory, TrajectoryGroup, Transition
from everlearn.rl.values import GAE, ValueFunction, valued

# Paid at the end and nowhere else, an answer needs no bootstrapping; and what is expected shouldn't change what is said.
VALUES = ValueFunction(lam=1.0, value_trunk=0.0, standardise=True)
Score = Callable[[list[list[int]]], list[float]]  # what a reward model says of prompts with their answers


class Rolled(msgspec.Struct, frozen=True):
    """A sampled answer: its tokens and their log-probabilities as they were sampled, and under the serving version."""

    prompt: list[int]
    answer: list[int]
    logprobs: list[float]
    reference: list[float] = []


def without_length(rewards_PG: Sequence[Sequence[float]], lengths_PG: Sequence[Sequence[int]]) -> list[list[float]]:
    """Rewards less what answers' lengths explain: r - b (l - mean l), with means over each group and one b for all, the least squares slope
    of rewards by lengths within groups. What is left is uncorrelated with length; the mean of each group stays."""
    rewards = [np.asarray(row, dtype=np.float64) for row in rewards_PG]
    lengths = [np.asarray(row, dtype=np.float64) for row in lengths_PG]
    apart = [row - row.mean() for row in lengths]
    square = sum(float(row @ row) for row in apart)
    if not square:
        return [row.tolist() for row in rewards]
    slope = sum(float(row @ (own - own.mean())) for row, own in zip(apart, rewards, strict=True)) / square
    return [(own - slope * row).tolist() for own, row in zip(rewards, apart, strict=True)]


def token_advantages(advantage: float, logprobs_T: Sequence[float], reference_T: Sequence[float], kl: float) -> list[float]:
    """[T] A - kl (log mu - log ref): the gradient of a reward less `kl` times the KL divergence from the reference, sampled token by
    token."""
    return [advantage - kl * (own - base) for own, base in zip(logprobs_T, reference_T, strict=True)]


def roll(sampler: Any, prompts_P: Sequence[Sequence[int]], pull: Pull, stop: Sequence[int], seed: int) -> list[list[Rolled]]:
    """[P, G] answers by the policy as it is, at temperature 1. Empty ones are left out: nothing was drawn."""
    futures = []
    for place, prompt in enumerate(prompts_P):
        own = (seed + place) % 2**31
        params = tinker.SamplingParams(max_tokens=pull.answer_tokens, temperature=1.0, stop=list(stop), seed=own)
        futures.append(sampler.sample(tinker.ModelInput.from_ints(list(prompt)), pull.group, params))
    return [
        [Rolled(list(prompt), list(one.tokens), list(one.logprobs)) for one in future.result().sequences if len(one.tokens)]
        for prompt, future in zip(prompts_P, futures, strict=True)
    ]


def referred(reference: Any, rolled_PG: Sequence[Sequence[Rolled]]) -> list[list[Rolled]]:
    """The same with their log-probabilities under the serving version. All are asked at once: the server batches them."""
    futures = [[reference.compute_logprobs(tinker.ModelInput.from_ints(one.prompt + one.answer)) for one in row] for row in rolled_PG]
    return [
        [
            msgspec.structs.replace(one, reference=[float(value) for value in future.result()[-len(one.answer) :]])
            for one, future in zip(row, own, strict=True)
        ]
        for row, own in zip(rolled_PG, futures, strict=True)
    ]


class Moved(msgspec.Struct, frozen=True):
    """What a step was: `reward` is the mean of what the reward model said, `kl` of log mu - log ref per token, `tokens` those sampled and
    trained. `explained`: the share of the variance of rewards that the value head foretold, where there is one and they differ."""

    reward: float
    kl: float
    length: float
    tokens: int
    explained: float | None = None


def step(trainer: Any, reference: Any, score: Score, states: Sequence[Sequence[int]], pull: Pull, stop: Sequence[int], seed: int) -> Moved:
    """Sends the gradient of one step; `optim_step` is the caller's. Nothing is sent where no group says what is better."""
    sampler = trainer.save_weights_and_get_sampling_client().result()
    rolled_PG = [row for row in roll(sampler, states, pull, stop, seed) if row]
    if not rolled_PG:
        return Moved(0.0, 0.0, 0.0, 0)
    rolled_PG = referred(reference, rolled_PG)
    said = iter(score([one.prompt + one.answer for row in rolled_PG for one in row]))
    rewards_PG = [[next(said) for _ in row] for row in rolled_PG]
    shaped_PG = without_length(rewards_PG, [[len(one.answer) for one in row] for row in rolled_PG])
    gaps = [a - b for row in rolled_PG for one in row for a, b in zip(one.logprobs, one.reference, strict=True)]
    tokens = sum(2 * (len(one.prompt) + len(one.answer)) for row in rolled_PG for one in row)
    explained = None
    if pull.estimator == GAE:
        data, explained = _valued(trainer, rolled_PG, shaped_PG, pull.kl)
        trainer.forward_backward(data, "importance_sampling", VALUES.weights()).result()
    elif data := _compared(rolled_PG, shaped_PG, pull.kl):
        trainer.forward_backward(data, "importance_sampling").result()
    flat = [value for row in rewards_PG for value in row]
    lengths = [len(one.answer) for row in rolled_PG for one in row]
    return Moved(float(np.mean(flat)), float(np.mean(gaps)), float(np.mean(lengths)), tokens, explained)


def _compared(rolled_PG: Sequence[Sequence[Rolled]], rewards_PG: Sequence[Sequence[float]], kl: float) -> list[tinker.Datum]:
    """Each answer against the mean of its group."""
    data = []
    for row, rewards in zip(rolled_PG, rewards_PG, strict=True):
        for one, advantage in zip(row, group_mean(rewards), strict=True):
            own = token_advantages(float(advantage), one.logprobs, one.reference, kl)
            if any(own):
                data.append(_datum(one, own))
    return data


def _valued(
    trainer: Any, rolled_PG: Sequence[Sequence[Rolled]], rewards_PG: Sequence[Sequence[float]], kl: float
) -> tuple[list[tinker.Datum], float | None]:
    """Each answer against what the value head expects. That learns rewards alone, without what distance costs. Advantages have the mean 0
    over a step (a head that knows nothing yet would have all that is sampled become more likely), and stay in rewards, as `kl` is."""
    groups = [
        TrajectoryGroup([_episode(one, reward) for one, reward in zip(row, rewards, strict=True)], [Reward()] * len(row))
        for row, rewards in zip(rolled_PG, rewards_PG, strict=True)
    ]
    data_PG, measured = valued(trainer, groups, VALUES)
    data = []
    for row, found in zip(rolled_PG, data_PG, strict=True):
        for one, datum in zip(row, found, strict=True):  # an episode of one turn is one datum
            advantages = measured["advantage/std"] * datum.loss_fn_inputs["advantages"].to_numpy()
            advantages[len(one.prompt) - 1 :] -= kl * (np.array(one.logprobs) - np.array(one.reference))
            datum.loss_fn_inputs["advantages"] = tinker.TensorData.from_numpy(advantages.astype(np.float32))
            data.append(datum)
    return data, measured.get("value/explained")


def _episode(one: Rolled, reward: float) -> Trajectory:
    action = Action(one.answer, one.logprobs)
    return Trajectory([Transition(tinker.ModelInput.from_ints(one.prompt), action, Reward.of(reward), episode_done=True)])


def hold(trainer: Any, examples: Sequence[Example], weight: float) -> int:
    """Sends the gradient of text to imitate, each token with that weight; how many tokens it was."""
    if not examples or not weight:
        return 0
    trainer.forward_backward([_lighter(lesson.to_datum(one), weight) for one in examples], "cross_entropy").result()
    return lesson.num_tokens(examples)


def teach(
    trainer: Any, reference: Any, score: Score, states: Sequence[Sequence[int]], replay: Sequence[Example], rehearsal: Sequence[Example],
    recipe: Recipe, pull: Pull, stop: Sequence[int], on_step: Callable[[Step], None] = lambda _: None, begin: int = 0,
    save: Callable[[int], None] = lambda _: None, every: int = 0,
) -> list[Moved]:  # fmt: skip
    """`pull.steps` steps. `begin`, `save` and `every` as in everlearn/loop/lesson.py; a Step's `loss` is minus the mean reward."""
    if not states:
        raise InvalidRequest("there are no states to answer in", param="states")
    made = []
    for number in range(begin, pull.steps):
        rng = random.Random(f"{recipe.seed}:{number}")
        chosen = rng.sample(list(states), min(pull.batch, len(states)))
        made.append(step(trainer, reference, score, chosen, pull, stop, rng.randrange(2**31)))
        beside = rng.sample(list(replay), min(recipe.batch, len(replay)))
        beside += rng.sample(list(rehearsal), min(recipe.rehearsed, len(rehearsal)))
        held = hold(trainer, beside, pull.hold)
        trainer.optim_step(tinker.AdamParams(learning_rate=recipe.learning_rate)).result()
        on_step(Step(number, -made[-1].reward, made[-1].tokens + held))
        if every and ((number + 1) % every == 0 or number + 1 == pull.steps):
            save(number + 1)
    return made


def _datum(one: Rolled, advantages_T: Sequence[float]) -> tinker.Datum:
    tokens, shown = one.prompt + one.answer, len(one.prompt) - 1
    inputs = {
        "target_tokens": tinker.TensorData.from_numpy(np.array(tokens[1:], dtype=np.int64)),
        "logprobs": tinker.TensorData.from_numpy(np.array([0.0] * shown + one.logprobs, dtype=np.float32)),
        "advantages": tinker.TensorData.from_numpy(np.array([0.0] * shown + list(advantages_T), dtype=np.float32)),
    }
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def _lighter(datum: tinker.Datum, weight: float) -> tinker.Datum:
    own = datum.loss_fn_inputs["weights"].to_numpy().astype(np.float32) * np.float32(weight)
    inputs = {**datum.loss_fn_inputs, "weights": tinker.TensorData.from_numpy(own)}
    return tinker.Datum(model_input=datum.model_input, loss_fn_inputs=inputs)
