"""The whole loop in a few minutes: a scripted user asks and corrects, a version learns it, shows itself, takes over; a bad one is stopped.

Everything goes over HTTP as a product's would: answers from /v1/chat/completions, corrections and thumbs to /v1/feedback, and the runner as
`everlearn deploy run` has it. It shows nothing itself; `say` gets a line for whatever is worth one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from everlearn.demo.grade import Question, Row, Score, grade, is_right, scores
from everlearn.demo.handbook import Fact, Handbook
from everlearn.errors import InternalError
from everlearn.loop import lesson
from everlearn.loop.lesson import Example, Recipe
from everlearn.loop.runner import Runner
from everlearn.loop.service import Api, Tokens

NAME = "handbook"
ANSWER_TOKENS = 24
MOST_ANSWERS = 120  # in the canary; its rule has long decided by then
WRONG = Recipe(rank=8, learning_rate=5e-3, epochs=2, batch=20, rehearsed=0)

DESCRIPTION: dict[str, Any] = {
    "settle": 0.0,
    "gate": {
        "owner": "demo",
        "promote": "automatic",
        "corrections": {"min_right": 0.8, "max_broken": 0.05},
        "retained": {"margin": 0.1, "unsure": "pass"},
        "canary": {"steps": [{"share": 0.25, "min_feedback": 4}, {"share": 0.5, "min_feedback": 8}], "alpha": 0.1, "alpha_stop": 0.1},
    },
}


class Story(msgspec.Struct, frozen=True):
    """`seconds` by stage; `learned`: from the last correction to the champion that has learned it. `trained` and `held_out`: right answers
    to questions whose correction was trained, and to those that were held out, with how many there are. `stopped` is why the bad version
    was rejected, `rollback_seconds` until the first answer of what served before."""

    rows: list[Row]
    scores: list[Score]
    corrections: int
    trained: tuple[int, int]
    held_out: tuple[int, int]
    seconds: dict[str, float]
    learned: float
    stopped: str
    rollback_seconds: float
    events: list[dict[str, Any]]


class User:
    """Asks under the deployment's name, an episode for each question, and says what it thinks of the answers."""

    def __init__(self, api: Api):
        self.api, self.count = api, itertools.count()

    def ask(self, question: str, model: str = NAME) -> tuple[str, str, str]:
        """The answer, its record and its version."""
        body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": ANSWER_TOKENS}
        # A user of its own for each question: what is asked again is another episode, which may meet the other arm.
        found = self.api.post("/v1/chat/completions", {**body, "user": f"user-{next(self.count)}"})
        return str(found["choices"][0]["message"]["content"]), str(found["everlearn"]["record"]), str(found["model"])

    def say(self, record: str, **what: Any) -> None:
        self.api.post("/v1/feedback", {"record_id": record, **what})


def play(book: Handbook, api: Api, service: Any, model: str, update: dict[str, Any], say: Callable[[str], None] = lambda _: None) -> Story:
    """`update` is the description's section of that name. Raises InternalError where the loop came to another end than it should."""
    clock = _Clock()
    user, asked = User(api), questions(book)
    api.post("/v1/deployments", {"name": NAME, "description": {"base": model, "update": update, **DESCRIPTION}})
    say("a user asks")
    before = [user.ask(question.text)[0] for question in asked]
    clock("asking before")
    splits = correct(book.facts, user, api, say)
    clock("correcting")
    last_word = time.monotonic()
    runner = Runner(api, service, NAME, say)
    runner.begin("by hand")
    runner.run()
    clock("learning")
    canary(book.facts, user, runner)
    clock("canary")
    learned = time.monotonic() - last_word
    after = [user.ask(question.text)[0] for question in asked]
    clock("asking after")
    rows = grade(asked, before, after)
    right = {row.question: row.right_after for row in rows if row.section == "taught"}
    stopped = plant(book.facts, api, service, runner, model)
    clock("a bad version")
    seconds = roll_back(book.facts[0], user, api)
    events = api.get(f"/v1/deployments/{NAME}/history", limit=100)["data"][::-1]
    counts = [[right[text] for text, split in splits.items() if split == wanted] for wanted in ("train", "heldout")]
    trained, held_out = ((sum(some), len(some)) for some in counts)
    return Story(rows, scores(rows), len(splits), trained, held_out, clock.seconds, round(learned, 1), stopped, seconds, events)


def questions(book: Handbook) -> list[Question]:
    taught = [Question("taught", fact.question, fact.accept) for fact in book.facts]
    paraphrases = [Question("paraphrase", text, fact.accept) for fact in book.facts for text in fact.paraphrases]
    return taught + paraphrases + [Question("general", item.question, item.accept) for item in book.general]


def correct(facts: Sequence[Fact], user: User, api: Api, say: Callable[[str], None]) -> dict[str, str]:
    """Asks each question and corrects the answer; the split of each question's episode."""
    splits = {}
    for fact in facts:
        answer, record, _ = user.ask(fact.question)
        user.say(record, kind="demonstration", text=fact.answer)
        splits[fact.question] = str(api.get(f"/v1/episodes/{api.get(f'/v1/records/{record}')['episode_id']}")["split"])
        say(f"{fact.question} {' '.join(answer.split())[:60]!r}, corrected to {fact.answer!r}")
    return splits


def canary(facts: Sequence[Fact], user: User, runner: Runner) -> None:
    """Users go on asking and give thumbs, until the rule has decided."""
    for place, fact in enumerate(itertools.islice(itertools.cycle(facts), MOST_ANSWERS), 1):
        answer, record, _ = user.ask(fact.question)
        user.say(record, kind="boolean", value=is_right(answer, fact.accept))
        if place % 10 == 0 and (now := runner.run()).state == "collect":
            if now.champion != f"{NAME}@1":
                raise InternalError(f"the canary ended with {now.champion} as champion; `everlearn deploy history {NAME}` says why")
            return
    raise InternalError(f"the canary has not decided in {MOST_ANSWERS} answers; `everlearn deploy show {NAME}` says what it waits for")


def plant(facts: Sequence[Fact], api: Api, service: Any, runner: Runner, model: str) -> str:
    """Trains a version on everybody's answers but the right ones, and has it tried; why it was stopped."""
    tokens = Tokens(api, model)
    wrong = [*facts[1:], facts[0]]
    prompts = [tokens.prompt([{"role": "user", "content": fact.question}]) for fact in facts]
    examples = [Example(prompt, tokens.answer(fact.answer)) for prompt, fact in zip(prompts, wrong, strict=True)]
    trainer = service.create_lora_training_client(base_model=model, rank=WRONG.rank, seed=WRONG.seed, train_unembed=False).result()
    lesson.teach(trainer, examples, [], WRONG)
    path = trainer.save_weights_for_sampler("planted").result().path
    number = int(api.post("/v1/adapters", {"name": NAME, "path": path, "note": "a planted bad update"})["number"])
    runner.enter(number)
    runner.run()
    last = api.get(f"/v1/deployments/{NAME}/history", limit=1)["data"][0]
    if last["kind"] != "rejected":
        raise InternalError(f"the planted bad version was {last['kind']}: {last['reason']}")
    return str(last["reason"])


def roll_back(fact: Fact, user: User, api: Api) -> float:
    """Seconds from the order to an answer of what served before."""
    began = time.monotonic()
    api.post(f"/v1/deployments/{NAME}/rollback", {"reason": "to show the way back"})
    moved = time.monotonic() - began
    _, _, version = user.ask(fact.question)
    if version != f"{NAME}@0":
        raise InternalError(f"after the rollback {version} answered")
    return round(moved, 3)


class _Clock:
    """Seconds by stage: what passed since the stage before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def __call__(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage], self._last = round(now - self._last, 1), now
