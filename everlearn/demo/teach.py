"""The lesson, as an ordinary client of the Tinker API: questions and answers in, a trained adapter out.

Nothing here is private to everlearn: the same calls of the `tinker` SDK train on any server that speaks the protocol. This module
doesn't know where the server came from, nor how answers are graded.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import tinker

from everlearn.demo.handbook import Handbook
from everlearn.errors import Unsupported

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ANSWER_TOKENS = 24  # enough for one sentence; the model is wordy, and what it says after the first sentence isn't graded
ALTERNATIVES = 16  # likely next tokens that a rehearsal example remembers of each position
END = "<|im_end|>"


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
    """One optimizer step: `loss` is the mean over the handbook's answer tokens (rehearsal left out), in nats."""

    step: int
    loss: float
    tokens: int


def render(tokenizer: Tokenizer, question: str) -> list[int]:
    """The model's chat template without a system prompt: a question costs a dozen tokens instead of thirty."""
    ids: list[int] = tokenizer.encode(f"<|im_start|>user\n{question}{END}\n<|im_start|>assistant\n", add_special_tokens=False).ids
    return ids


def end_of_turn(tokenizer: Tokenizer) -> int:
    end = tokenizer.token_to_id(END)
    if end is None:
        raise Unsupported(f"this model's tokenizer has no token {END}, so its chat template isn't the one the demo speaks; use smollm2")
    return int(end)


def lesson(handbook: Handbook, tokenizer: Tokenizer) -> list[Example]:
    """Every trained wording of every fact with its answer."""
    end = end_of_turn(tokenizer)
    return [
        Example(render(tokenizer, question), [*tokenizer.encode(fact.answer, add_special_tokens=False).ids, end])
        for fact in handbook.facts
        for question in (fact.question, *fact.also_trained)
    ]


def ask(
    sampler: Any, tokenizer: Tokenizer, questions: Sequence[str], on_answer: Callable[[], None] = lambda: None, alternatives: int = 0
) -> list[Any]:
    """The most likely answer to each question, as sampled sequences. All are asked at once: the server batches them."""
    params = tinker.SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, stop=[end_of_turn(tokenizer)])
    prompts = [tinker.ModelInput.from_ints(render(tokenizer, question)) for question in questions]
    futures = [sampler.sample(prompt, 1, params, topk_sample_logprobs=alternatives) for prompt in prompts]
    answers = []
    for future in futures:
        answers.append(future.result().sequences[0])
        on_answer()
    return answers


def rehearse(sampler: Any, tokenizer: Tokenizer, questions: Sequence[str], on_answer: Callable[[], None] = lambda: None) -> list[Example]:
    """What the untrained model would say, token by token, as distributions. They needn't be right: they only have to be its own.

    Training on distributions leaves an unchanged model unchanged (the gradient all but vanishes where it still agrees); training on the
    answers themselves would make it surer of them than it was, and that harms its other answers.
    """
    answers = ask(sampler, tokenizer, questions, on_answer, ALTERNATIVES)
    return [
        Example(render(tokenizer, question), list(answer.tokens), [row or [] for row in answer.topk_logprobs])
        for question, answer in zip(questions, answers, strict=True)
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
    tokens = example.prompt + example.answer
    first = len(example.prompt) - 1
    if not example.alternatives:
        targets = np.array(tokens[1:], dtype=np.int64)
        weights = np.array([0.0] * first + [1.0] * len(example.answer), dtype=np.float32)
    else:
        targets = np.zeros((len(tokens) - 1, ALTERNATIVES), dtype=np.int64)
        weights = np.zeros((len(tokens) - 1, ALTERNATIVES), dtype=np.float32)
        for position, row in enumerate(example.alternatives, first):
            for column, (token, logprob) in enumerate(row):
                targets[position, column], weights[position, column] = token, math.exp(logprob)
    inputs = {"target_tokens": tinker.TensorData.from_numpy(targets), "weights": tinker.TensorData.from_numpy(weights)}
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def num_steps(examples: Sequence[Example], recipe: Recipe) -> int:
    return recipe.epochs * -(-len(examples) // recipe.batch)


def teach(
    trainer: Any,
    examples: Sequence[Example],
    rehearsal: Sequence[Example],
    recipe: Recipe,
    on_step: Callable[[Step], None] = lambda _: None,
) -> list[Step]:
    """Trains with a linearly falling learning rate. A step is sent before the last one is answered, so the server never waits."""
    total = num_steps(examples, recipe)
    steps: list[Step] = []
    waiting: list[tuple[list[Example], Any, Any]] = []

    def collect() -> None:
        batch, losses, stepped = waiting.pop(0)
        stepped.result()
        steps.append(_measure(len(steps), batch, losses.result()))
        on_step(steps[-1])

    for number, batch in enumerate(batches(examples, rehearsal, recipe)):
        rate = recipe.learning_rate * (1 - number / total)
        losses = trainer.forward_backward([to_datum(example) for example in batch], "cross_entropy")
        stepped = trainer.optim_step(tinker.AdamParams(learning_rate=rate))
        waiting.append((batch, losses, stepped))
        if len(waiting) > 1:
            collect()
    while waiting:
        collect()
    return steps


def _measure(number: int, batch: Sequence[Example], output: Any) -> Step:
    total, count = 0.0, 0
    for example, result in zip(batch, output.loss_fn_outputs, strict=True):
        if not example.alternatives:
            total -= float(result["logprobs"].to_numpy()[-len(example.answer) :].sum())
            count += len(example.answer)
    return Step(number, total / count, sum(len(example.prompt) + len(example.answer) - 1 for example in batch))
