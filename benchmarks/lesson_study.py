#!/usr/bin/env python3
"""What a lesson costs: recipes that teach the handbook's facts to the embedded model, and what becomes of its general answers.

    python benchmarks/lesson_study.py --seeds 5              # on a GPU where there is one
    python benchmarks/lesson_study.py --only "default;rank 8" --seeds 1 --smoke

Each recipe learns the twenty corrections as the loop does (other wordings sampled from the model, general questions rehearsed). Then the
questions that were taught, their paraphrases and twenty general questions are asked; `drift` is how many nats per token the model's own
former answers to the general questions have become less likely: it tells recipes apart where twenty answers, right or wrong, don't.
"""

from __future__ import annotations

import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import msgspec
import numpy as np
import tinker
from common import arguments, server, short, side_by_side, write_result

from everlearn.cli.client import Client
from everlearn.demo import handbook
from everlearn.demo.grade import is_right
from everlearn.demo.story import ANSWER_TOKENS
from everlearn.loop import general, lesson, update
from everlearn.loop.lesson import Example, Recipe
from everlearn.loop.service import Tokens

PARAPHRASES = 4
MORE = [
    *(f"What is the capital of {name}?" for name in ("Portugal", "Norway", "Austria", "Turkey", "Argentina", "Cuba", "Ireland", "Finland")),
    *(f"What is the capital of {name}?" for name in ("the Netherlands", "Belgium", "South Korea", "Australia", "Peru", "Denmark")),
    *(f"Who wrote {title}?" for title in ("Romeo and Juliet", "War and Peace", "the Odyssey", "Pride and Prejudice", "Moby-Dick")),
    *(f"Who developed {what}?" for what in ("the theory of evolution", "calculus", "the periodic table", "the first vaccine")),
    *(f"Who painted {what}?" for what in ("The Last Supper", "The Scream", "Water Lilies")),
    *(f"What is the chemical symbol for {what}?" for what in ("silver", "sodium", "carbon", "helium")),
    *(f"What is the currency of {what}?" for what in ("China", "Mexico", "Switzerland")),
    *(f"On which continent is {what}?" for what in ("Egypt", "Canada", "Japan", "Peru")),
    *(f"What is the opposite of {what}?" for what in ("tall", "early", "loud", "empty")),
    *(f"What color is {what}?" for what in ("a lemon", "coal", "a fire truck", "the sea")),
    *(f"How many {what}?" for what in ("wings does a bird have", "seconds are in a minute", "weeks are in a year", "sides has a square")),
    "Which planet is the largest?",
    "Which planet do we live on?",
    "What is the largest lake in the world?",
    "What is the longest river in South America?",
    "What is the smallest country in the world?",
    "What is the largest reptile?",
    "What do pandas eat?",
    "What gas do we breathe out?",
]  # fmt: skip


class Arm(NamedTuple):
    """`more`: rehearses twice as many different questions; `sure`: only those whose answer has at least that log-probability (nats, the
    mean of its tokens); `without`: not this one; `short`: that many tokens of each answer and no more; `first`: what the first three tokens
    of an answer weigh. The others are the optimizer's and the adapter's."""

    recipe: Recipe
    more: bool = False
    sure: float | None = None
    without: tuple[str, ...] = ()
    short: int = 0
    first: float = 1.0
    beta2: float = 0.95
    attention: bool = True
    mlp: bool = True


def recipe(**changed: Any) -> Recipe:
    """As a deployment has it by itself, but for what is changed."""
    return Recipe(**{"epochs": 5, **changed})


DEFAULT = recipe()

ARMS = {
    "default": Arm(DEFAULT),
    "4 epochs": Arm(recipe(epochs=4)),
    "rate 1e-3, 7 epochs": Arm(recipe(learning_rate=1e-3, epochs=7)),
    "mlp only": Arm(DEFAULT, attention=False),
    "attention only": Arm(DEFAULT, mlp=False),
    "rank 8": Arm(recipe(rank=8)),
    "beta2 0.99": Arm(DEFAULT, beta2=0.99),
    "first x4": Arm(DEFAULT, first=4.0),
    "first x4, more": Arm(DEFAULT, more=True, first=4.0),
    "32 short": Arm(recipe(rehearsed=32), short=8),
    "32 short, more": Arm(recipe(rehearsed=32), more=True, short=8),
    "32 short, more, rate 1e-3, 7 epochs": Arm(recipe(learning_rate=1e-3, epochs=7, rehearsed=32), more=True, short=8),
    "sure": Arm(DEFAULT, sure=-0.65),
    "sure, more": Arm(DEFAULT, more=True, sure=-0.65),
    "no foreign answers": Arm(DEFAULT, without=("Say hello in French.", "What is the capital of Spain?")),
    "no foreign answers, more": Arm(DEFAULT, more=True, without=("Say hello in French.", "What is the capital of Spain?")),
    "no rehearsal": Arm(recipe(rehearsed=0)),
}


def rehearsed(known: Before, arm: Arm) -> list[Example]:
    """What the model itself would say, as the arm has it. A weight is a probability: a log-probability that is greater weighs more."""
    always, made = general.load().rehearsed, []
    pairs = list(zip([*always, *MORE], known.rehearsal, strict=True))
    for text, example in pairs if arm.more else pairs[: len(always)]:
        said = [dict(row)[token] for token, row in zip(example.answer, example.alternatives, strict=True)]
        if text in arm.without or (arm.sure is not None and np.mean(said) < arm.sure):
            continue
        rows = [
            [(token, logprob + (math.log(arm.first) if place < 3 else 0.0)) for token, logprob in row]
            for place, row in enumerate(example.alternatives)
        ]
        length = arm.short or len(rows)
        made.append(Example(example.prompt, example.answer[:length], rows[:length]))
    return made


class Before(NamedTuple):
    """The embedded model before the lesson: how it is asked, and what it says to general questions."""

    service: Any
    model: str
    tokens: Tokens
    untaught: Any
    book: handbook.Handbook
    said: list[Any]
    rehearsal: list[Example]


def begun(service: Any, model: str, tokens: Tokens) -> Before:
    untaught, book = service.create_sampling_client(base_model=model).result(), handbook.load()
    said = asked(untaught, tokens, [item.question for item in book.general])
    prompts = [prompt(tokens, text) for text in [*general.load().rehearsed, *MORE]]
    assert not {item.question for item in book.general} & set(MORE)
    rehearsal = lesson.rehearse(untaught, prompts, [tokens.end], update.REHEARSED_TOKENS)
    return Before(service, model, tokens, untaught, book, said, rehearsal)


def prompt(tokens: Tokens, text: str) -> list[int]:
    return tokens.prompt([{"role": "user", "content": text}])


def asked(sampler: Any, tokens: Tokens, texts: list[str]) -> list[Any]:
    return lesson.ask(sampler, [prompt(tokens, text) for text in texts], [tokens.end], ANSWER_TOKENS)


def one(known: Before, name: str, seed: int, smoke: bool) -> dict[str, Any]:
    """A lesson, and the examination behind it."""
    started, arm, tokens, facts = time.perf_counter(), ARMS[name], known.tokens, known.book.facts[: 3 if smoke else None]
    others = update.wordings(known.untaught, tokens, [fact.question for fact in facts], PARAPHRASES, seed * 10_000)
    wordings = [(text, fact.answer) for fact, texts in zip(facts, others, strict=True) for text in (fact.question, *texts)]
    examples = [Example(prompt(tokens, text), tokens.answer(answer)) for text, answer in wordings]
    trainer = known.service.create_lora_training_client(
        base_model=known.model, rank=arm.recipe.rank, seed=seed, train_unembed=False, train_attn=arm.attention, train_mlp=arm.mlp
    ).result()
    seeded = msgspec.structs.replace(arm.recipe, seed=seed)
    total, tokens_used = lesson.num_steps(examples, seeded), 0
    for number, batch in enumerate(lesson.batches(examples, rehearsed(known, arm), seeded)):
        tokens_used += lesson.num_tokens(batch)
        losses = trainer.forward_backward([lesson.to_datum(example) for example in batch], "cross_entropy")
        rate = seeded.learning_rate * (1 - number / total)
        trainer.optim_step(tinker.AdamParams(learning_rate=rate, beta2=arm.beta2)).result()
        losses.result()  # a batch that was refused is said
    path = trainer.save_weights_for_sampler(f"{name.replace(' ', '-').replace(',', '')}-{seed}").result().path
    sampler = known.service.create_sampling_client(model_path=path).result()
    return {"arm": name, "seed": seed, "tokens": tokens_used, **examined(known, sampler, facts), "seconds": time.perf_counter() - started}


def examined(known: Before, sampler: Any, facts: list[handbook.Fact]) -> dict[str, Any]:
    tokens, graded = known.tokens, known.book.general
    questions = [(fact.question, fact.accept) for fact in facts], [(text, fact.accept) for fact in facts for text in fact.paraphrases]
    right = {}
    for section, rows in zip(("taught", "paraphrase"), questions, strict=True):
        answers = asked(sampler, tokens, [text for text, _ in rows])
        right[section] = [is_right(tokens.text(answer.tokens), accept) for answer, (_, accept) in zip(answers, rows, strict=True)]
    after = [tokens.text(answer.tokens) for answer in asked(sampler, tokens, [item.question for item in graded])]
    right["general"] = [is_right(text, item.accept) for text, item in zip(after, graded, strict=True)]
    right["general before"] = [is_right(tokens.text(was.tokens), item.accept) for was, item in zip(known.said, graded, strict=True)]
    futures = []
    for item, was in zip(graded, known.said, strict=True):
        futures.append(sampler.compute_logprobs(tinker.ModelInput.from_ints([*prompt(tokens, item.question), *was.tokens])))
    falls = []
    for was, future in zip(known.said, futures, strict=True):
        now = future.result()[-len(was.tokens) :]
        falls.append(float(np.mean([then - value for then, value in zip(was.logprobs, now, strict=True)])))
    return {"right": right, "drift": falls, "general answers": after}


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(model="smollm2")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", help="names of recipes, with semicolons [default: all]")
    parser.add_argument("--at-once", type=int, default=4, metavar="N", help="lessons that the server gives side by side")
    parser.add_argument("--smoke", action="store_true", help="three facts")
    args = parser.parse_args()
    names = list(ARMS) if args.only is None else args.only.split(";")
    if unknown := [name for name in names if name not in ARMS]:
        parser.error(f"--only: {unknown[0]!r} is none; there are {'; '.join(ARMS)}")
    runs = []
    with server(args) as live, tinker.ServiceClient(base_url=live.url, api_key="tml-benchmark") as service:
        client = Client(live.url, timeout=600.0)
        known = begun(service, live.model, Tokens(client, live.model))
        jobs = [partial(one, known, name, seed, args.smoke) for seed in range(args.seeds) for name in names]
        for run in side_by_side(args.at_once, jobs):
            runs.append(run)
            right = {section: f"{sum(values)}/{len(values)}" for section, values in run["right"].items()}
            print(run["arm"], run["seed"], right, f"drift {np.mean(run['drift']):.3f}, {run['seconds']:.0f} s", flush=True)
        client.close()
    for name in names:
        own = [run for run in runs if run["arm"] == name]
        told = {section: float(np.mean([np.mean(run["right"][section]) for run in own])) for section in own[0]["right"]}
        print(f"{name:28}", {section: round(value, 3) for section, value in told.items()},
              f"drift {np.mean([np.mean(run['drift']) for run in own]):.3f}", flush=True)  # fmt: skip
    recipes = {name: ARMS[name]._asdict() | {"recipe": msgspec.structs.asdict(ARMS[name].recipe)} for name in names}
    write_result(args, "lesson-study" + ("-smoke" if args.smoke else ""), {"model": short(args.model), "recipes": recipes, "runs": runs})


if __name__ == "__main__":
    main()
