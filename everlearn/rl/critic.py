"""A critic inside reinforcement learning: a group whose members are compared by a judge, and the refresh that keeps the judge honest.

A critic that only ever saw what it was first taught is soon behind the policy that it judges. So it is trained on pairs of the policy's own
answers whose winner a verifier knows (Kimi K2, arXiv 2507.20534, section 3.2.2: the critic is "continuously updated with on-policy rollouts
from verifiable prompts"): as a judge is asked, in both orders, with the letter of the better answer as the target.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import msgspec
import numpy as np
import tinker

from everlearn.errors import InvalidRequest
from everlearn.rewards.critic import criticise
from everlearn.rewards.hackcheck import VETO, earned_of
from everlearn.rewards.judge import CORE, PRESCRIPTIVE, A, B, Judge, Message, Rubric, comparison
from everlearn.rewards.reward import Part, Reward, total_of
from everlearn.rl.datums import supervised
from everlearn.rl.env import Env, EnvGroup, Metrics
from everlearn.rl.trajectory import Trajectory

Render = Callable[[Sequence[Message]], list[int]]  # messages to the tokens of a prompt, as the server's chat route renders them


class CriticisedGroup(EnvGroup):
    """A group of one task whose members' last answers are compared by a critic. What `inner` itself rewards is added. `decode` turns an
    action's tokens into the text that is judged; special tokens should be dropped. The other arguments are those of `criticise`."""

    def __init__(
        self,
        inner: EnvGroup,
        task: str,
        decode: Callable[[list[int]], str],
        judge: Judge,
        rubrics: Sequence[Rubric] = CORE + PRESCRIPTIVE,
        hack_check: bool = True,
        hack_judge: Judge | None = None,
    ):
        self.inner, self.task, self.decode, self.judge, self.rubrics = inner, task, decode, judge, rubrics
        self.hack_check, self.hack_judge = hack_check, hack_judge

    async def make_envs(self) -> Sequence[Env]:
        return await self.inner.make_envs()

    async def compute_group_rewards(
        self, trajectory_group: list[Trajectory], env_group: Sequence[Env]
    ) -> Sequence[tuple[Reward | float, Metrics]]:
        """Raises VerifierFailed, and the group has no score, where the critic can't judge enough of it."""
        answers = [self.decode(one.transitions[-1].action.tokens) for one in trajectory_group]
        own = await self.inner.compute_group_rewards(trajectory_group, env_group)
        found = await criticise(self.judge, self.task, answers, self.rubrics, hack_check=self.hack_check, hack_judge=self.hack_judge)
        return [
            (_all(trajectory, Reward.of(reward), critic), {**metrics, **found.metrics})
            for trajectory, (reward, metrics), critic in zip(trajectory_group, own, found.rewards_G, strict=True)
        ]

    async def cleanup(self) -> None:
        await self.inner.cleanup()

    def logging_tags(self) -> list[str]:
        return self.inner.logging_tags()


def _all(trajectory: Trajectory, own: Reward, critic: Reward) -> Reward:
    """What the group adds to an episode. A veto takes away what the environment paid, too."""
    if not any(part.name == VETO for part in critic.parts):
        return total_of([own, critic])
    return total_of([own, critic, Reward((Part(VETO, -earned_of(own) - earned_of(trajectory.reward)),))])


class Pair(msgspec.Struct, frozen=True):
    """Two answers to a task of which the first is known to be the better by the rubric."""

    task: str
    better: str
    worse: str
    rubric: Rubric


class RefreshSettings(msgspec.Struct, frozen=True):
    """`batch` pairs make an optimizer step, each in both orders."""

    batch: int = 8
    epochs: int = 1
    learning_rate: float = 5e-4
    seed: int = 0


def known_pairs(
    task: str,
    answers_G: Sequence[str],
    scores_G: Sequence[float],
    rubric: Rubric,
    margin: float = 0.0,
    most: int | None = None,
    seed: int = 0,
) -> list[Pair]:
    """Pairs of different answers whose verified scores differ by more than `margin`; at most `most` of them, chosen by the seed.
    `scores_G` are what a verifier says, never what a judge says."""
    if len(answers_G) != len(scores_G):
        raise InvalidRequest(f"{len(scores_G)} scores for {len(answers_G)} answers; give one for each", param="scores_G")
    found = []
    for pair in combinations(range(len(answers_G)), 2):
        one, other = pair if scores_G[pair[0]] > scores_G[pair[1]] else pair[::-1]
        if scores_G[one] - scores_G[other] > margin and answers_G[one].strip() != answers_G[other].strip():
            found.append(Pair(task, answers_G[one], answers_G[other], rubric))
    return found if most is None or len(found) <= most else random.Random(f"pairs:{seed}:{task}").sample(found, most)


def refresh(
    client: tinker.TrainingClient,
    pairs: Sequence[Pair],
    render: Render,
    settings: RefreshSettings | None = None,
    on_step: Callable[[dict[str, float]], None] = lambda _: None,
) -> list[float]:
    """Trains the critic on the pairs, and returns each step's mean loss in nats for one verdict. Save its weights afterwards, and let its
    name mean them (`everlearn adapter name critic PATH --move`): the judge asks by name and needs no other change."""
    settings = settings or RefreshSettings()
    if not pairs or settings.batch < 1 or settings.epochs < 1 or settings.learning_rate <= 0:
        raise InvalidRequest(f"{len(pairs)} pairs with {settings} teach a critic nothing; give some of each", param="pairs")
    letters = letters_of(client.get_tokenizer())
    losses: list[float] = []
    for epoch in range(settings.epochs):
        shuffled = random.Random(f"refresh:{settings.seed}:{epoch}").sample(list(pairs), len(pairs))
        for begin in range(0, len(shuffled), settings.batch):
            data = [datum for pair in shuffled[begin : begin + settings.batch] for datum in datums_of(pair, render, letters)]
            gradient = client.forward_backward(data, "cross_entropy")
            stepped = client.optim_step(tinker.AdamParams(learning_rate=settings.learning_rate))
            outputs = gradient.result().loss_fn_outputs
            stepped.result()
            losses.append(-float(np.mean([output["logprobs"].to_numpy()[-1] for output in outputs])))
            on_step({"step": float(len(losses)), "loss": losses[-1]})
    return losses


def datums_of(pair: Pair, render: Render, letters: tuple[int, int]) -> list[tinker.Datum]:
    """Both orders; the only target that counts is the letter of the better answer."""
    orders = ((pair.better, pair.worse, letters[0]), (pair.worse, pair.better, letters[1]))
    return [supervised(render(comparison(pair.task, first, second, pair.rubric)), [letter]) for first, second, letter in orders]


def letters_of(tokenizer: Any) -> tuple[int, int]:
    """The tokens of A and B. Raises InvalidRequest where one takes more than one token, which a verdict of one token can't hold."""
    found = [list(tokenizer.encode(letter, add_special_tokens=False)) for letter in (A, B)]
    if [len(ids) for ids in found] != [1, 1]:
        raise InvalidRequest(f"this tokenizer writes A and B as {found}; a critic's verdict must be one token", param="tokenizer")
    return found[0][0], found[1][0]
