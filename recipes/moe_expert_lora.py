"""LoRA on experts against LoRA on attention: two ways to teach a small mixture of experts a task that it half knows.

    python recipes/moe_expert_lora.py                        # starts a server on the model of moe_from_scratch.py
    python recipes/moe_expert_lora.py --method grpo --on attention

Everything here is an ordinary client of the Tinker API: the official SDK, its losses, nothing of everlearn. `sft` shows the answers;
`grpo` shows none: it samples a group of answers to each problem, rewards those that are right to the last character (1, else 0),
and takes the reward minus the group's mean as the advantage of every token. Groups without a difference teach nothing and are left out.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("TINKER_API_KEY", "tml-recipe")
os.environ.setdefault("TINKER_TELEMETRY", "0")

import numpy as np
import tinker

from recipes import chains
from recipes.moe_from_scratch import CACHE, Recipe, ensure

MAX_TOKENS = max(chains.LENGTHS) + 2  # room for one letter too many and the end
PARTS = {
    "experts": {"train_attn": False, "train_mlp": True},
    "attention": {"train_attn": True, "train_mlp": False},
    "both": {"train_attn": True, "train_mlp": True},
}
Row = dict[str, float]
Measure = Callable[[Any], Row]  # a sampling client's accuracies


@dataclass(frozen=True)
class Lesson:
    """`batch` is problems a step; of GRPO, each is answered `group` times. `every` is steps between two measurements."""

    steps: int
    batch: int
    learning_rate: float
    rank: int = 8
    group: int = 8
    every: int = 9
    seed: int = 0
    chains: tuple[str, ...] = chains.SHIFTED


SFT = Lesson(steps=45, batch=32, learning_rate=2e-3)
GRPO = Lesson(steps=45, batch=16, learning_rate=2e-3)


def open_training(service: Any, model: str, on: str, lesson: Lesson) -> Any:
    """A new adapter on one part of the model; the output head stays as it is."""
    return service.create_lora_training_client(model, rank=lesson.rank, seed=lesson.seed, train_unembed=False, **PARTS[on]).result()


def draw(sampler: Any, problems: Sequence[chains.Problem], num: int, temperature: float, seed: int) -> list[list[Any]]:
    """`num` answers to each problem, as sampled sequences. All are asked for at once: the server batches them."""
    futures = []
    for number, problem in enumerate(problems):
        params = tinker.SamplingParams(max_tokens=MAX_TOKENS, temperature=temperature, stop=[chains.END_ID], seed=seed * 100_003 + number)
        futures.append(sampler.sample(tinker.ModelInput.from_ints(problem.prompt_ids), num, params))
    return [future.result().sequences for future in futures]


def is_right(sequence: Any, problem: chains.Problem) -> bool:
    return list(sequence.tokens) == problem.answer_ids


def accuracy(sampler: Any, problems: Sequence[chains.Problem]) -> float:
    drawn = draw(sampler, problems, 1, 0.0, 0)
    return sum(is_right(group[0], problem) for group, problem in zip(drawn, problems, strict=True)) / len(problems)


def measure_tasks(num: int) -> Measure:
    """Accuracy of each task on held-out strings, by the likeliest answers."""
    held = {name: chains.problems(of, num, random.Random(7), held_out=True) for name, of in chains.TASKS.items()}
    return lambda sampler: {name: accuracy(sampler, problems) for name, problems in held.items()}


def as_datum(prompt: list[int], answer: list[int], **inputs: list[float]) -> tinker.Datum:
    """Position i predicts token i + 1. `inputs` have a value for each answer token, and are 0 over the prompt."""
    tokens = prompt + answer
    padded = {name: [0.0] * (len(prompt) - 1) + values for name, values in inputs.items()}
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": tokens[1:], **padded})


def step(training: Any, datums: list[tinker.Datum], loss: str, learning_rate: float) -> Any:
    """Gradient and update, sent together; the answer to the first."""
    gradient = training.forward_backward(datums, loss)
    update = training.optim_step(tinker.AdamParams(learning_rate=learning_rate))
    update.result()
    return gradient.result()


def sft(training: Any, lesson: Lesson, measure: Measure, say: Callable[[Row], None] = lambda _: None) -> list[Row]:
    """Shows right answers to the lesson's chains. A row for each step; `loss` is nats a token."""
    rng = random.Random(lesson.seed)
    rows: list[Row] = [{"step": 0, **measure(training.save_weights_and_get_sampling_client().result())}]
    for number in range(1, lesson.steps + 1):
        shown = [(problem.prompt_ids, problem.answer_ids) for problem in chains.problems(lesson.chains, lesson.batch, rng)]
        datums = [as_datum(prompt, answer, weights=[1.0] * len(answer)) for prompt, answer in shown]
        output = step(training, datums, "cross_entropy", lesson.learning_rate)
        rows.append({"step": number, "loss": output.metrics["loss:sum"] / sum(len(answer) for _, answer in shown)})
        if number % lesson.every == 0:
            rows[-1] |= measure(training.save_weights_and_get_sampling_client().result())
        say(rows[-1])
    return rows


def grpo(training: Any, lesson: Lesson, measure: Measure, say: Callable[[Row], None] = lambda _: None) -> list[Row]:
    """Rewards right answers among those that the adapter itself draws. Every step draws from the newest weights.

    A row for each step: `reward` is the mean over all answers, `taught` the share of groups with a difference, `gap` the greatest
    difference of a token's log-probability between sampler and trainer, over `tokens` tokens, `gap_99` that of 99 of 100.
    """
    rng = random.Random(lesson.seed)
    rows: list[Row] = []
    for number in range(lesson.steps + 1):
        sampler = training.save_weights_and_get_sampling_client().result()
        row: Row = {"step": number}
        if number % lesson.every == 0:
            row |= measure(sampler)
        rows.append(row)
        if number < lesson.steps:
            row |= _grpo_step(training, sampler, chains.problems(lesson.chains, lesson.batch, rng), lesson, number)
        say(row)
    return rows


def _grpo_step(training: Any, sampler: Any, problems: Sequence[chains.Problem], lesson: Lesson, number: int) -> Row:
    groups = draw(sampler, problems, lesson.group, 1.0, lesson.seed * 1009 + number + 1)
    datums, drawn_logprobs, rewards = [], [], []
    for problem, group in zip(problems, groups, strict=True):
        rewards_G = [float(is_right(sequence, problem)) for sequence in group]
        rewards += rewards_G
        mean = sum(rewards_G) / len(group)
        if mean in (0.0, 1.0):
            continue
        for sequence, reward in zip(group, rewards_G, strict=True):
            logprobs, tokens = list(sequence.logprobs), list(sequence.tokens)
            datums.append(as_datum(problem.prompt_ids, tokens, logprobs=logprobs, advantages=[reward - mean] * len(tokens)))
            drawn_logprobs.append(logprobs)
    row: Row = {"reward": sum(rewards) / len(rewards), "taught": len(datums) / len(rewards)}
    if datums:
        output = step(training, datums, "importance_sampling", lesson.learning_rate)
        row |= {"loss": output.metrics["loss:sum"], **compare(output, drawn_logprobs)}
    return row


def compare(output: Any, drawn_logprobs: Sequence[list[float]]) -> Row:
    """How far the trainer's log-probabilities are from those that the sampler drew with: at most, and for 99 of 100 tokens (where two
    experts are all but equally likely, rounding may send a token to the other one)."""
    pairs = zip(output.loss_fn_outputs, drawn_logprobs, strict=True)
    trained_T = np.concatenate([result["logprobs"].data[-len(drawn) :] for result, drawn in pairs])
    drawn_T = np.concatenate(drawn_logprobs)
    gap_T = np.abs(trained_T - drawn_T)
    return {"gap": float(gap_T.max()), "gap_99": float(np.quantile(gap_T, 0.99)), "tokens": len(drawn_T)}


def agreement(training: Any, num: int = 64, group: int = 4) -> Row:
    """Answers to problems of all tasks, drawn and then scored by the trainer with the same weights."""
    sampler = training.save_weights_and_get_sampling_client().result()
    problems = chains.problems([*chains.COMMON, *chains.SHIFTED, *chains.UNSEEN], num, random.Random(11), held_out=True)
    groups = draw(sampler, problems, group, 1.0, 17)
    drawn = [(problem, sequence) for problem, group in zip(problems, groups, strict=True) for sequence in group]
    datums = [as_datum(problem.prompt_ids, list(seq.tokens), weights=[1.0] * len(seq.tokens)) for problem, seq in drawn]
    return compare(training.forward(datums, "cross_entropy").result(), [list(sequence.logprobs) for _, sequence in drawn])


METHODS = {"sft": (sft, SFT), "grpo": (grpo, GRPO)}


def main() -> None:
    from everlearn.demo.server import serving

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="sft")
    parser.add_argument("--on", choices=PARTS, default="experts")
    args = parser.parse_args()
    method, lesson = METHODS[args.method]
    folder = ensure(Recipe(), CACHE, lambda line: print(line, flush=True))
    with tempfile.TemporaryDirectory() as name:
        home, config = Path(name), Path(name) / "everlearn.toml"
        config.write_text(f'models.default = "chains"\nengine.threads = 1\n[[models.base]]\nname = "chains"\npath = "{folder}"\n')
        with serving(home, home / "server.log", config, lambda waited, state: None) as url:
            training = open_training(tinker.ServiceClient(base_url=url), "chains", args.on, lesson)
            method(training, lesson, measure_tasks(100), lambda row: print({k: round(v, 5) for k, v in row.items()}, flush=True))
            print(f"greatest difference of sampler and trainer: {agreement(training)}")


if __name__ == "__main__":
    main()
