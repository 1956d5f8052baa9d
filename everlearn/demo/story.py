"""The whole loop in a few minutes: a scripted user asks and corrects, a version learns it, shows itself, takes over; a bad one is stopped.

Everything goes over HTTP as a product's would: questions through the `openai` client where it is installed (else the same requests without
it), corrections and thumbs to /v1/feedback, and the runner as `everlearn deploy run` has it. It shows nothing itself; `say` gets a line for
whatever is worth one.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from everlearn.demo.grade import Question, Row, Score, grade, is_right, scores
from everlearn.demo.handbook import Fact, Handbook
from everlearn.errors import InternalError, NotFound
from everlearn.loop import lesson
from everlearn.loop.lesson import Example, Recipe
from everlearn.loop.runner import Runner
from everlearn.loop.service import Api, Tokens

NAME = "handbook"
ANSWER_TOKENS = 24
# In the canary. Its test bets on blocks of eight outcomes and multiplies its wealth by 1.45 at most in each: where every answer of the
# candidate is right and none of the champion's, about 80 outcomes show it, and where one in four isn't, twice as many.
MOST_ANSWERS = 400
ROUND = 16  # answers between two looks of the runner
AT_ONCE = 32  # questions that are asked at the same time: the server answers them in one batch
TOLD_EVERY = 20  # answers
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
    was rejected, `rollback_seconds` until the first answer of what served before. `reward_model`: the deployment's newest version, as the
    server shows it."""

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
    reward_model: dict[str, Any] | None = None


class User:
    """Asks under the deployment's name, an episode for each question, and says what it thinks of the answers."""

    def __init__(self, api: Api, name: str):
        self.api, self.name, self.count = api, name, itertools.count()
        self.openai: Any = None
        with contextlib.suppress(ImportError):
            from openai import OpenAI

            self.openai = OpenAI(base_url=f"{api.url}/v1", api_key=api.key or "none", timeout=600.0)

    def ask(self, question: str) -> tuple[str, str, str]:
        """The answer, its record and its version."""
        said = [{"role": "user", "content": question}]
        # A user of its own for each question: what is asked again is another episode, which may meet the other arm.
        body = {"model": self.name, "messages": said, "temperature": 0, "max_tokens": ANSWER_TOKENS, "user": f"user-{next(self.count)}"}
        if self.openai is None:
            found = self.api.post("/v1/chat/completions", body)
            return str(found["choices"][0]["message"]["content"]), str(found["everlearn"]["record"]), str(found["model"])
        raw = self.openai.chat.completions.with_raw_response.create(**body)
        answer = raw.parse()
        return answer.choices[0].message.content or "", str(raw.headers["x-everlearn-record"]), str(answer.model)

    def ask_all(self, asked: Sequence[str], say: Callable[[str], None] = lambda _: None) -> list[tuple[str, str, str]]:
        """Several users at once, in the order of the questions; how many are answered is said from time to time."""
        found = []
        with ThreadPoolExecutor(AT_ONCE) as threads:
            for answer in threads.map(self.ask, asked):
                found.append(answer)
                if len(found) % TOLD_EVERY == 0:
                    say(f"{len(found)} of {len(asked)} are answered")
        return found

    def close(self) -> None:
        if self.openai is not None:
            self.openai.close()

    def say(self, record: str, **what: Any) -> None:
        self.api.post("/v1/feedback", {"record_id": record, **what})


def play(
    book: Handbook, api: Api, service: Any, model: str, update: dict[str, Any], say: Callable[[str], None] = lambda _: None,
    min_right: float = 0.8,
) -> Story:  # fmt: skip
    """`update` is the description's section of that name, `min_right` what the gate asks of the corrections. Raises InternalError where the
    loop came to another end than it should."""
    clock = _Clock()
    name = free_name(api)
    user, asked = User(api, name), questions(book)
    gate = {**DESCRIPTION["gate"], "corrections": {**DESCRIPTION["gate"]["corrections"], "min_right": min_right}}
    api.post("/v1/deployments", {"name": name, "description": {"base": model, "update": update, **DESCRIPTION, "gate": gate}})
    num = Counter(question.section for question in asked)
    say(f"users ask {len(asked)} questions: {num['taught']}, {num['paraphrase']} the same in other words, {num['general']} general ones")
    before = user.ask_all([question.text for question in asked], say)
    clock("asking before")
    splits = correct(book.facts, before, user, api, say)
    clock("correcting")
    last_word = time.monotonic()
    runner = Runner(api, service, name, say)
    runner.begin("by hand")
    runner.run()
    show_verdict(runner)
    clock("learning")
    canary(book.facts, user, runner)
    show_verdict(runner)
    clock("canary")
    learned = time.monotonic() - last_word
    say("the same questions again")
    after = user.ask_all([question.text for question in asked], say)
    clock("asking after")
    rows = grade(asked, *([text for text, _, _ in said] for said in (before, after)))
    right = {row.question: row.right_after for row in rows if row.section == "taught"}
    say("a bad version is planted: everybody's answers but the right ones")
    stopped = plant(book.facts, runner, model)
    show_verdict(runner)
    clock("a bad version")
    seconds = roll_back(book.facts[0], user)
    say(f"rolled back to {name}@0 in {seconds:.3f} s")
    user.close()
    events = api.get(f"/v1/deployments/{name}/history", limit=100)["data"][::-1]
    counts = [[right[text] for text, split in splits.items() if split == wanted] for wanted in ("train", "heldout")]
    trained, held_out = ((sum(some), len(some)) for some in counts)
    learned = round(learned, 1)
    reward = reward_model(api, name)
    return Story(rows, scores(rows), len(splits), trained, held_out, clock.seconds, learned, stopped, seconds, events, reward)


def questions(book: Handbook) -> list[Question]:
    taught = [Question("taught", fact.question, fact.accept) for fact in book.facts]
    paraphrases = [Question("paraphrase", text, fact.accept) for fact in book.facts for text in fact.paraphrases]
    return taught + paraphrases + [Question("general", item.question, item.accept) for item in book.general]


def correct(
    facts: Sequence[Fact], answered: Sequence[tuple[str, str, str]], user: User, api: Api, say: Callable[[str], None]
) -> dict[str, str]:
    """Corrects the answers to the taught questions, which are the first that were asked; the split of each question's episode."""
    splits = {}
    for fact, (answer, record, _) in zip(facts, answered, strict=False):
        user.say(record, kind="demonstration", text=fact.answer)
        splits[fact.question] = str(api.get(f"/v1/episodes/{api.get(f'/v1/records/{record}')['episode_id']}")["split"])
        say(f"{fact.question} {' '.join(answer.split())[:60]!r}, corrected to {fact.answer!r}")
    return splits


def free_name(api: Api) -> str:
    """What the deployment is to be called: nothing on the server has that name, nor a number of it."""
    return next(name for name in itertools.chain([NAME], (f"{NAME}-{number}" for number in itertools.count(2))) if _is_free(api, name))


def _is_free(api: Api, name: str) -> bool:
    for kind in ("deployments", "adapters"):  # a deployment may have no version yet, and a version outlives its deployment
        with contextlib.suppress(NotFound):
            api.get(f"/v1/{kind}/{name}")
            return False
    return True


def last_event(runner: Runner) -> dict[str, Any]:
    found: dict[str, Any] = runner.api.get(f"/v1/deployments/{runner.name}/history", limit=1)["data"][0]
    return found


def show_verdict(runner: Runner) -> None:
    """Says what the last verdict saw, part by part, as the history keeps it."""
    for part in last_event(runner)["evidence"].get("verdict", {}).get("parts", []):
        runner.say(f"  {part['name']}: {part['result']}: {part['reason']}")


def reward_model(api: Api, name: str) -> dict[str, Any] | None:
    """What the server's reward model of the deployment is by now; None where it has too few labels for a first version."""
    try:
        found: dict[str, Any] = api.get(f"/v1/reward-models/{name}")
    except NotFound:
        return None
    return found


def canary(facts: Sequence[Fact], user: User, runner: Runner) -> None:
    """Users go on asking and give thumbs, until the rule has decided."""
    turns = itertools.cycle(facts)
    for _ in range(MOST_ANSWERS // ROUND):
        asked = list(itertools.islice(turns, ROUND))
        for fact, (answer, record, _) in zip(asked, user.ask_all([fact.question for fact in asked]), strict=True):
            user.say(record, kind="boolean", value=is_right(answer, fact.accept))
        if (now := runner.run()).state == "collect":
            if (last := last_event(runner))["kind"] != "promoted":
                raise InternalError(f"{now.champion} serves, and what was learned was {last['kind']}: {last['reason']}")
            return
    raise InternalError(f"the canary has not decided in {MOST_ANSWERS} answers; `everlearn deploy show {runner.name}` says why")


def plant(facts: Sequence[Fact], runner: Runner, model: str) -> str:
    """Trains a version on everybody's answers but the right ones, and has it tried; why it was stopped."""
    api, service, tokens = runner.api, runner.service, Tokens(runner.api, model)
    wrong = [*facts[1:], facts[0]]
    prompts = [tokens.prompt([{"role": "user", "content": fact.question}]) for fact in facts]
    examples = [Example(prompt, tokens.answer(fact.answer)) for prompt, fact in zip(prompts, wrong, strict=True)]
    trainer = service.create_lora_training_client(base_model=model, rank=WRONG.rank, seed=WRONG.seed, train_unembed=False).result()
    lesson.teach(trainer, examples, [], WRONG)
    path = trainer.save_weights_for_sampler("planted").result().path
    number = int(api.post("/v1/adapters", {"name": runner.name, "path": path, "note": "a planted bad update"})["number"])
    runner.enter(number)
    runner.run()
    last = last_event(runner)
    if last["kind"] != "rejected":
        raise InternalError(f"the planted bad version was {last['kind']}: {last['reason']}")
    return str(last["reason"])


def roll_back(fact: Fact, user: User) -> float:
    """Seconds from the order to an answer of what served before."""
    began = time.monotonic()
    user.api.post(f"/v1/deployments/{user.name}/rollback", {"reason": "to show the way back"})
    moved = time.monotonic() - began
    _, _, version = user.ask(fact.question)
    if version != f"{user.name}@0":
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
