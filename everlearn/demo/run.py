"""The demo from end to end: ask, teach, ask again, grade. It shows nothing itself; the command line passes `stage`, which draws."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec
import tinker
from tokenizers import Tokenizer

from everlearn.demo import teach
from everlearn.demo.grade import Question, Row, Score, grade, scores
from everlearn.demo.handbook import Handbook


class Bar(Protocol):
    def advance(self, amount: float = 1) -> None: ...
    def update(self, done: float, note: str = "") -> None: ...


Stage = Callable[[str, float], AbstractContextManager[Bar]]  # (label, total) -> a bar for the block


class Outcome(msgspec.Struct, frozen=True):
    scores: list[Score]
    rows: list[Row]
    steps: list[teach.Step]
    path: str  # of the taught adapter's sampler weights
    seconds: dict[str, float]  # by stage


class Clock:
    """Seconds by stage."""

    def __init__(self, stage: Stage):
        self._stage = stage
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, label: str, total: float) -> Iterator[Bar]:
        started = time.monotonic()
        with self._stage(label, total) as bar:
            yield bar
        self.seconds[name] = round(time.monotonic() - started, 1)


def run(handbook: Handbook, recipe: teach.Recipe, url: str, key: str, model: str, folder: Path, stage: Stage) -> Outcome:
    """`folder` is the base model's, for its tokenizer. The adapter is kept on the server under a name of its own."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    clock = Clock(stage)
    asked = _questions(handbook)
    texts = [question.text for question in asked]
    with tinker.ServiceClient(base_url=url, api_key=key, user_metadata={"client": "everlearn demo"}) as service:
        untaught = service.create_sampling_client(base_model=model).result()
        with clock("before", "asking before", len(texts)) as bar:
            before = _ask(untaught, tokenizer, texts, bar)
        with clock("rehearsal", "rehearsing", len(handbook.rehearsal)) as bar:
            rehearsal = teach.rehearse(untaught, tokenizer, handbook.rehearsal, bar.advance)
        examples = teach.lesson(handbook, tokenizer)
        with clock("teaching", "teaching", teach.num_steps(examples, recipe)) as bar:
            trainer = service.create_lora_training_client(
                base_model=model, rank=recipe.rank, seed=recipe.seed, train_unembed=False
            ).result()
            steps = teach.teach(trainer, examples, rehearsal, recipe, lambda step: bar.update(step.step + 1, f"loss {step.loss:.3f}"))
            path = trainer.save_weights_for_sampler(name="handbook").result().path
        with clock("after", "asking after", len(texts)) as bar:
            after = _ask(service.create_sampling_client(model_path=path).result(), tokenizer, texts, bar)
    rows = grade(asked, before, after)
    return Outcome(scores(rows), rows, steps, path, clock.seconds)


def _questions(handbook: Handbook) -> list[Question]:
    taught = [Question("taught", fact.question, fact.accept) for fact in handbook.facts]
    paraphrases = [Question("paraphrase", text, fact.accept) for fact in handbook.facts for text in fact.paraphrases]
    return taught + paraphrases + [Question("general", item.question, item.accept) for item in handbook.general]


def _ask(sampler: Any, tokenizer: Tokenizer, questions: Sequence[str], bar: Bar) -> list[str]:
    return [tokenizer.decode(list(answer.tokens)).strip() for answer in teach.ask(sampler, tokenizer, questions, bar.advance)]
