"""A lesson, as an ordinary client of the Tinker API: prompts and answers in, an adapter's weights out.

What is to be learned is trained on as it is; beside it, in every batch, the model rehearses what it would say anyway, so that it forgets
nothing. Nothing here is private to everlearn: the same calls of the `tinker` SDK train on any server that speaks the protocol. It doesn't
know what the lesson is about, nor how answers are judged.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import tinker

from everlearn.rl.datums import supervised

ALTERNATIVES = 16  # likely next tokens that a rehearsal example remembers of each position
Nothing = Callable[[], None]
Room = Callable[[Sequence[int]], int]  # of a prompt, the tokens that may follow it


class Recipe(msgspec.Struct, frozen=True):
    """What teaches 20 facts to 135 M parameters with some twenty thousand training tokens.

    The output head stays frozen: a LoRA on 49,152 rows costs more than it gives here. `rehearsed` examples of what the untrained
    model says to general questions ride in every batch: they hold its other knowledge in place.
    """

    rank: int = 16
    learning_rate: float = 2e-3
    epochs: int = 7
    batch: int = 20
    rehearsed: int = 12
    seed: int = 0


class Example(msgspec.Struct, frozen=True):
    """Token ids of a prompt and of the answer to it, the end-of-turn token included where the answer has one.

    A rehearsal example has for every answer token the `alternatives` that the untrained model thought likely: (id, log-probability).
    """

    prompt: list[int]
    answer: list[int]
    alternatives: list[list[tuple[int, float]]] = []


class Step(msgspec.Struct, frozen=True):
    """One optimizer step: `loss` is the mean over the lesson's answer tokens (rehearsal left out), in nats."""

    step: int
    loss: float
    tokens: int


def send(
    sampler: Any, prompts: Sequence[Sequence[int]], stop: Sequence[int], max_tokens: int, alternatives: int = 0,
    temperature: float = 0.0, seed: int | None = None, samples: int = 1, room: Room | None = None,
) -> list[Any]:  # fmt: skip
    """Asks for an answer to each prompt, or several (`samples`), and waits for none: the server batches all that it was sent. With a seed,
    prompt i is answered with seed + i. With `room`, answers are no longer than a prompt leaves room for; there has to be some."""
    futures = []
    for place, prompt in enumerate(prompts):
        own = None if seed is None else (seed + place) % 2**31
        most = max_tokens if room is None else min(max_tokens, room(prompt))
        params = tinker.SamplingParams(max_tokens=most, temperature=temperature, stop=list(stop), seed=own)
        futures.append(sampler.sample(tinker.ModelInput.from_ints(list(prompt)), samples, params, topk_sample_logprobs=alternatives))
    return futures


def answers_of(futures: Sequence[Any], on_answer: Nothing = lambda: None) -> list[Any]:
    """What `send` asked for, as sampled sequences."""
    answers = []
    for future in futures:
        answers.append(future.result().sequences[0])
        on_answer()
    return answers


def ask(
    sampler: Any, prompts: Sequence[Sequence[int]], stop: Sequence[int], max_tokens: int, on_answer: Nothing = lambda: None,
    alternatives: int = 0, temperature: float = 0.0, seed: int | None = None,
) -> list[Any]:  # fmt: skip
    """An answer to each prompt, as sampled sequences: the most likely one at temperature 0."""
    return answers_of(send(sampler, prompts, stop, max_tokens, alternatives, temperature, seed), on_answer)


def ask_each(
    samplers: Sequence[Any], prompts: Sequence[Sequence[int]], stop: Sequence[int], max_tokens: int, room: Room | None = None
) -> list[list[Any]]:
    """The most likely answers of each, all of them asked at once. `room` as in `send`."""
    sent = [send(sampler, prompts, stop, max_tokens, room=room) for sampler in samplers]
    return [answers_of(futures) for futures in sent]


def rehearse(
    sampler: Any, prompts: Sequence[list[int]], stop: Sequence[int], max_tokens: int, on_answer: Nothing = lambda: None
) -> list[Example]:
    """What the untrained model would say, token by token, as distributions. They needn't be right: they only have to be its own.

    Training on distributions leaves an unchanged model unchanged (the gradient all but vanishes where it still agrees); training on the
    answers themselves would make it surer of them than it was, and that harms its other answers.
    """
    return rehearsal_of(prompts, answers_of(send(sampler, prompts, stop, max_tokens, ALTERNATIVES), on_answer))


def rehearsal_of(prompts: Sequence[list[int]], answers: Sequence[Any]) -> list[Example]:
    """Answers that were asked for with ALTERNATIVES, as `rehearse` has them."""
    return [
        Example(prompt, list(answer.tokens), [row or [] for row in answer.topk_logprobs])
        for prompt, answer in zip(prompts, answers, strict=True)
        if len(answer.tokens)
    ]


def batches(examples: Sequence[Example], rehearsal: Sequence[Example], recipe: Recipe) -> Iterator[list[Example]]:
    """Each epoch shuffles the lesson and cuts it into batches; rehearsal examples take turns."""
    rng = random.Random(recipe.seed)
    turns = itertools.cycle(rehearsal)
    for _ in range(recipe.epochs):
        order = rng.sample(examples, len(examples))
        for start in range(0, len(order), recipe.batch):
            rehearsed = list(itertools.islice(turns, recipe.rehearsed)) if rehearsal else []
            yield order[start : start + recipe.batch] + rehearsed


def to_datum(example: Example) -> tinker.Datum:
    """Position i predicts token i + 1; only the answer's tokens have weight. Rehearsal targets are [T, K], weighted by probability."""
    if not example.alternatives:
        return supervised(example.prompt, example.answer)
    tokens = example.prompt + example.answer
    targets = np.zeros((len(tokens) - 1, ALTERNATIVES), dtype=np.int64)
    weights = np.zeros((len(tokens) - 1, ALTERNATIVES), dtype=np.float32)
    for position, row in enumerate(example.alternatives, len(example.prompt) - 1):
        for column, (token, logprob) in enumerate(row):
            targets[position, column], weights[position, column] = token, math.exp(logprob)
    inputs = {"target_tokens": tinker.TensorData.from_numpy(targets), "weights": tinker.TensorData.from_numpy(weights)}
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def num_steps(examples: Sequence[Example], recipe: Recipe) -> int:
    return recipe.epochs * -(-len(examples) // recipe.batch)


def num_tokens(batch: Sequence[Example]) -> int:
    return sum(len(example.prompt) + len(example.answer) - 1 for example in batch)


def teach(
    trainer: Any,
    examples: Sequence[Example],
    rehearsal: Sequence[Example],
    recipe: Recipe,
    on_step: Callable[[Step], None] = lambda _: None,
    begin: int = 0,
    save: Callable[[int], None] = lambda _: None,
    every: int = 0,
) -> list[Step]:
    """Trains with a linearly falling learning rate. A step is sent before the last one is answered, so the server never waits.

    `begin`: so many steps were made before, and the trainer has them. Behind each `every` steps, and behind the last one, `save` is called
    with the number of steps that the trainer has then; what comes of the lesson is the same with it.
    """
    total = num_steps(examples, recipe)
    steps: list[Step] = []
    waiting: list[tuple[list[Example], Any, Any]] = []

    def collect(most: int) -> None:
        while len(waiting) > most:
            batch, losses, stepped = waiting.pop(0)
            stepped.result()
            steps.append(_measure(begin + len(steps), batch, losses.result()))
            on_step(steps[-1])

    for number, batch in itertools.islice(enumerate(batches(examples, rehearsal, recipe)), begin, None):
        rate = recipe.learning_rate * (1 - number / total)
        losses = trainer.forward_backward([to_datum(example) for example in batch], "cross_entropy")
        stepped = trainer.optim_step(tinker.AdamParams(learning_rate=rate))
        waiting.append((batch, losses, stepped))
        collect(1)
        if every and ((number + 1) % every == 0 or number + 1 == total):
            collect(0)
            save(number + 1)
    collect(0)
    return steps


def _measure(number: int, batch: Sequence[Example], output: Any) -> Step:
    total, count = 0.0, 0
    for example, result in zip(batch, output.loss_fn_outputs, strict=True):
        if not example.alternatives:
            total -= float(result["logprobs"].to_numpy()[-len(example.answer) :].sum())
            count += len(example.answer)
    return Step(number, total / count, num_tokens(batch))
