"""Learning from preferences and thumbs, with nothing but log-probabilities and weights.

- DPO: Rafailov et al. (2023), arXiv 2305.18290: the preferred answer's log-ratio to the reference is to be larger than the other's.
- KTO: Ethayarajh et al. (2024), arXiv 2402.01306: an answer that was liked is to gain on the reference, one that wasn't is to lose,
  measured against z0, how far the policy has moved altogether.

The gradient of either loss is a weighted sum of gradients of log-probabilities, and the weight is a number that is known once the policy's
own log-probabilities are. So a step asks for these (`forward`) and trains with `cross_entropy` and signed weights; no loss of the server's
and no tensors on this side are needed. The reference is the version that the lesson begins with, so distance from it is distance from
what the lesson began with.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import tinker

from everlearn.errors import InvalidRequest
from everlearn.loop.lesson import Recipe, Step
from everlearn.rl.datums import supervised


class Said(msgspec.Struct, frozen=True):
    """An answer to a prompt, as token ids, and its log-probability under the reference."""

    prompt: list[int]
    answer: list[int]
    reference: float = 0.0

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.answer) - 1


class Preference(msgspec.Struct, frozen=True):
    chosen: Said
    rejected: Said

    @property
    def answers(self) -> list[Said]:
        return [self.chosen, self.rejected]


class Thumb(msgspec.Struct, frozen=True):
    said: Said
    liked: bool

    @property
    def answers(self) -> list[Said]:
        return [self.said]


Lesson = Sequence[Preference] | Sequence[Thumb]


def dpo(chosen: float, rejected: float, beta: float) -> tuple[float, float, float]:
    """The loss of one pair, and the weights of its two log-probabilities. `chosen` and `rejected` are log-ratios to the reference:
    loss = -log sigmoid(beta (chosen - rejected)), d loss / d chosen = -beta sigmoid(-beta (chosen - rejected))."""
    margin = beta * (chosen - rejected)
    weight = beta * sigmoid(-margin)
    return math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0), weight, -weight


def kto(ratio: float, liked: bool, z0: float, beta: float) -> tuple[float, float]:
    """The loss of one answer, 1 - sigmoid(beta (ratio - z0)) if it was liked and 1 - sigmoid(beta (z0 - ratio)) if not, and the weight
    of its log-probability."""
    sign = 1.0 if liked else -1.0
    value = sigmoid(sign * beta * (ratio - z0))
    return 1.0 - value, sign * beta * value * (1.0 - value)


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def referred(sampler: Any, lesson: Lesson) -> Lesson:
    """The lesson with the reference's log-probabilities, as `sampler` gives them."""
    flat = [said for item in lesson for said in item.answers]
    futures = [sampler.compute_logprobs(tinker.ModelInput.from_ints(said.prompt + said.answer)) for said in flat]
    sums = [math.fsum(value or 0.0 for value in future.result()[-len(said.answer) :]) for said, future in zip(flat, futures, strict=True)]
    known = iter(msgspec.structs.replace(said, reference=total) for said, total in zip(flat, sums, strict=True))
    return [Preference(next(known), next(known)) if isinstance(item, Preference) else Thumb(next(known), item.liked) for item in lesson]  # type: ignore[return-value]


def batches(lesson: Lesson, recipe: Recipe) -> Iterator[list[Any]]:
    """Each epoch shuffles the lesson and cuts it into batches."""
    rng = random.Random(recipe.seed)
    for _ in range(recipe.epochs):
        order = rng.sample(list(lesson), len(lesson))
        for start in range(0, len(order), recipe.batch):
            yield order[start : start + recipe.batch]


def num_steps(lesson: Lesson, recipe: Recipe) -> int:
    return recipe.epochs * -(-len(lesson) // recipe.batch)


def teach(
    trainer: Any, lesson: Lesson, recipe: Recipe, beta: float, on_step: Callable[[Step], None] = lambda _: None, begin: int = 0,
    save: Callable[[int], None] = lambda _: None, every: int = 0,
) -> list[Step]:  # fmt: skip
    """Trains on a lesson that was `referred`, with a linearly falling learning rate. `begin`, `save` and `every` as in
    everlearn/loop/lesson.py. A step's `loss` is the mean over its pairs or answers."""
    if not lesson:
        raise InvalidRequest("the lesson is empty", param="lesson")
    total = num_steps(lesson, recipe)
    steps: list[Step] = []
    for number, batch in enumerate(batches(lesson, recipe)):
        if number < begin:
            continue
        answers = [said for item in batch for said in item.answers]
        output = trainer.forward([supervised(said.prompt, said.answer) for said in answers], "cross_entropy").result()
        ratios = [
            float(found["logprobs"].to_numpy()[-len(said.answer) :].sum()) - said.reference
            for said, found in zip(answers, output.loss_fn_outputs, strict=True)
        ]
        losses, weights = _weighed(batch, ratios, beta)
        data = [supervised(said.prompt, said.answer, weight) for said, weight in zip(answers, weights, strict=True)]
        done = trainer.forward_backward(data, "cross_entropy")
        trainer.optim_step(tinker.AdamParams(learning_rate=recipe.learning_rate * (1 - number / total))).result()
        done.result()
        steps.append(Step(number, math.fsum(losses) / len(losses), 2 * sum(said.num_tokens for said in answers)))
        on_step(steps[-1])
        if every and ((number + 1) % every == 0 or number + 1 == total):
            save(number + 1)
    return steps


def _weighed(batch: Sequence[Any], ratios: Sequence[float], beta: float) -> tuple[list[float], list[float]]:
    """Losses of the batch's items, and the weights of its answers' log-probabilities, divided by the number of items."""
    losses, weights, size = [], [], len(batch)
    if isinstance(batch[0], Preference):
        for place in range(size):
            loss, chosen, rejected = dpo(ratios[2 * place], ratios[2 * place + 1], beta)
            losses.append(loss)
            weights += [chosen / size, rejected / size]
        return losses, weights
    # z0 is a KL divergence, estimated by the batch's own mean and, being one, not below 0; no gradient flows through it.
    z0 = max(0.0, math.fsum(ratios) / size)
    for item, ratio in zip(batch, ratios, strict=True):
        loss, weight = kto(ratio, item.liked, z0, beta)
        losses.append(loss)
        weights.append(weight / size)
    return losses, weights
