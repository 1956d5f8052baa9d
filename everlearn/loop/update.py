"""From corrections to a new version: what is to be learned as a lesson, the lesson as weights, the weights under their name.

A dataset's corrections are trained with other wordings of their questions, sampled from the base model and filtered, so that a fact is
learned and not a sentence; older corrections ride along, and so do general questions with the model's own answers. All of it goes over the
public API, and each piece that took time is noted in the cycle, so that whoever is killed in the middle is continued by the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

import msgspec

from everlearn.errors import Conflict, NotFound, Overloaded
from everlearn.loop import general, grpo, lesson, paraphrase, preference
from everlearn.loop.description import Description, Pull
from everlearn.loop.lesson import Example, Recipe, Step
from everlearn.loop.preference import Preference, Said, Thumb
from everlearn.loop.service import Api, Deployed, Tokens, path_of

SAVE_EVERY = 10  # optimizer steps
SCORED_AT_ONCE = 64
UNEARNED = "reward_not_earned"  # an error's code: there is no reward model that has earned to be a reward
TOO_LONG = "too_long"  # another one: all that is to be learned is longer than the model's context
LONGER = "longer than the model's context"  # why something is left out
NO_ROOM = "with too little room for an answer"
KEPT_SECONDS = 7 * 86_400  # how long the weights between are there for whoever goes on
REHEARSED_TOKENS = 24
WORDED_EVERY = 5  # questions
Note = Callable[[dict[str, Any]], None]  # keeps what the cycle has, under the names given


class Correction(msgspec.Struct, frozen=True):
    """One thing to learn: the conversation, what should have been said, and the prompt as the model got it."""

    record_id: str
    messages: list[dict[str, Any]]
    answer: str
    prompt: list[int]
    newest: str  # of the feedback behind it: ids sort by time

    @property
    def question(self) -> str:
        """The last thing that the user said, where it is plain text; else ""."""
        said = self.messages[-1].get("content") if self.messages and self.messages[-1].get("role") == "user" else None
        return said if isinstance(said, str) else ""


class Made(msgspec.Struct, frozen=True):
    """A trained version: where its weights are, and what they cost. Losses are those of the first and the last step, in nats per token.
    `left_out`: how much couldn't be learned from, by reason."""

    path: str
    examples: int
    steps: int
    tokens: int
    first_loss: float | None
    last_loss: float | None
    left_out: dict[str, int] = {}


def corrections(items: Sequence[dict[str, Any]], new: int, replay: int) -> list[Correction]:
    """A dataset's items, newest first: all that are new, and `replay` older ones. Of several about the same prompt the newest counts."""
    found: dict[tuple[int, ...], Correction] = {}
    for item in sorted(items, key=lambda item: max(item["feedback_ids"], default=""), reverse=True):
        *said, answer = item["messages"]
        prompt = tuple(item["prompt_token_ids"])
        newest = max(item["feedback_ids"], default="")
        found.setdefault(prompt, Correction(item["record_id"], said, str(answer["content"]), list(prompt), newest))
    return list(found.values())[: new + replay]


def wordings(
    sampler: Any, tokens: Tokens, questions: Sequence[str], number: int, seed: int, on_question: Callable[[int], None] = lambda _: None
) -> list[list[str]]:
    """Up to `number` other wordings of each question, as everlearn/loop/paraphrase.py lets them through; the model isn't asked for those of
    a question that is too long to be asked about. `on_question`: is told of how many questions all are sampled."""
    if not number:
        return [[] for _ in questions]
    # Of a sampled text only what stands before its first question mark is looked at.
    stop = [tokens.end, *tokens.answer("?")[:-1][-1:]]
    asked: list[list[Any]] = []
    for question in questions:
        prompts = [tokens.prompt(ask) for ask in paraphrase.requests(question, number)]
        short = all(tokens.room(prompt) >= paraphrase.MAX_TOKENS for prompt in prompts)
        own, each = seed + sum(map(len, asked)), paraphrase.each(number)
        asked.append(lesson.send(sampler, prompts, stop, paraphrase.MAX_TOKENS, 0, 0.8, own, each) if short else [])
    found = []
    for place, (question, sent) in enumerate(zip(questions, asked, strict=True), 1):
        texts = [tokens.text(answer.tokens) for future in sent for answer in future.result().sequences]
        found.append(paraphrase.chosen(question, texts, number) if question else [])
        on_question(place)
    return found


def fitting(tokens: Tokens, learned: Sequence[Correction]) -> list[Correction]:
    """Those that the model can read whole."""
    return [one for one in learned if tokens.fits(one.prompt, tokens.answer(one.answer))]


def examples_of(tokens: Tokens, learned: Sequence[Correction], others: dict[str, list[str]]) -> list[Example]:
    """Every correction in every wording; what is longer than the context is left out. `others`: by record id."""
    examples = []
    for correction in learned:
        answer = tokens.answer(correction.answer)
        if not tokens.fits(correction.prompt, answer):
            continue
        *before, question = correction.messages
        worded = [tokens.prompt([*before, {**question, "content": wording}]) for wording in others.get(correction.record_id, [])]
        examples += [Example(prompt, answer) for prompt in (correction.prompt, *worded) if tokens.fits(prompt, answer)]
    return examples


class Plan(msgspec.Struct, frozen=True):
    """What is to be trained, and how: `teach(trainer, on_step, begin, save, every)` does it in `steps` optimizer steps. `left_out`: by
    reason."""

    teach: Callable[..., Any]
    examples: int
    steps: int
    left_out: dict[str, int] = {}


def make(
    api: Api, service: Any, now: Deployed, described: Description, items: Sequence[dict[str, Any]], note: Note,
    say: Callable[[str], None] = lambda _: None, clock: Callable[[], float] = time.time,
) -> Made:  # fmt: skip
    """Trains what the cycle is to learn, from where it stands. Raises Overloaded (code "budget") where the cycle's budget is used up, and
    Conflict (code TOO_LONG) where all of it is longer than the context."""
    tokens, update = Tokens(api, now.base_model), described.update
    recipe = Recipe(update.rank, update.learning_rate, update.epochs, update.batch, update.rehearsed, update.seed)
    if update.method == "sft":
        plan = _of_corrections(service, now, described, tokens, items, recipe, note, say)
    elif update.method == "grpo":
        plan = _of_rewards(api, service, now, described, tokens, items, recipe)
    else:
        plan = _of_preferences(api, service, now, described, tokens, items, recipe)
    saved = now.cycle.get("saved", {"step": 0, "path": "", "tokens": 0})
    if saved["step"] < plan.steps:
        saved = _train(open_trainer(api, service, now, described, recipe, saved["path"]), now, described, plan, saved, note, say, clock)
    first, last = saved.get("losses", [None, None])
    return Made(saved["path"], plan.examples, plan.steps, saved["tokens"], first, last, plan.left_out)


def _left_out(reason: str, before: int, after: int) -> dict[str, int]:
    """Raises Conflict (code TOO_LONG) where nothing is left."""
    if not after:
        raise Conflict(f"nothing is left to learn from: {before} of {before} left out, {reason}", code=TOO_LONG)
    return {reason: before - after} if before > after else {}


def _of_corrections(
    service: Any, now: Deployed, described: Description, tokens: Tokens, items: Sequence[dict[str, Any]], recipe: Recipe, note: Note,
    say: Callable[[str], None],
) -> Plan:  # fmt: skip
    update, cycle = described.update, now.cycle
    untaught = service.create_sampling_client(base_model=now.base_model).result()
    every = corrections(items, int(cycle.get("labels", 0)), update.replay)
    learned = fitting(tokens, every)
    left_out = _left_out(LONGER, len(every), len(learned))
    # Sent first and fetched last: the server answers general questions beside other wordings.
    general_prompts = _general(tokens) if update.rehearsed else []
    sent = lesson.send(untaught, general_prompts, [tokens.end], REHEARSED_TOKENS, lesson.ALTERNATIVES)
    others = cycle.get("wordings")
    if others is None:
        say(f"asking the model for other wordings of {len(learned)} questions")

        def on_question(done: int) -> None:
            if done % WORDED_EVERY == 0:
                say(f"{done} of {len(learned)} have other wordings")

        found = wordings(untaught, tokens, [one.question for one in learned], update.paraphrases, update.seed, on_question)
        others = {one.record_id: texts for one, texts in zip(learned, found, strict=True)}
        note({"wordings": others})
    examples = examples_of(tokens, learned, others)
    rehearsal = lesson.rehearsal_of(general_prompts, lesson.answers_of(sent))
    return Plan(
        lambda trainer, *progress: lesson.teach(trainer, examples, rehearsal, recipe, *progress),
        len(examples),
        lesson.num_steps(examples, recipe),
        left_out,
    )


def _of_preferences(
    api: Api, service: Any, now: Deployed, described: Description, tokens: Tokens, items: Sequence[dict[str, Any]], recipe: Recipe
) -> Plan:
    """The reference is what the lesson begins with."""

    def said(item: dict[str, Any], side: str) -> Said:
        ids = item.get(f"{side}_token_ids") or tokens.answer(str(item[side][0]["content"]))
        return Said(item["prompt_token_ids"], ids)

    every: Sequence[Any] = (
        [Preference(said(item, "chosen"), said(item, "rejected")) for item in items]
        if described.update.method == "dpo"
        else [Thumb(said(item, "completion"), bool(item["label"])) for item in items]
    )
    # One token less than to train on: to score the answer's last one the model reads it.
    learned = [one for one in every if all(len(answer.answer) < tokens.room(answer.prompt) for answer in one.answers)]
    left_out = _left_out(LONGER, len(every), len(learned))
    begins = _begins(api, now, described)
    made = service.create_sampling_client(model_path=begins) if begins else service.create_sampling_client(base_model=now.base_model)
    known, beta = preference.referred(made.result(), learned), described.update.beta
    return Plan(
        lambda trainer, *progress: preference.teach(trainer, known, recipe, beta, *progress),
        len(learned),
        preference.num_steps(learned, recipe),
        left_out,
    )


def _of_rewards(
    api: Api, service: Any, now: Deployed, described: Description, tokens: Tokens, items: Sequence[dict[str, Any]], recipe: Recipe
) -> Plan:
    """The reference is the version that serves. Older corrections ride along, as many as a batch has and `replay` lets."""
    score = reward_of(api, now.name)
    pull = described.update.pull
    newest = sorted(items, key=lambda item: max(item["feedback_ids"], default=""), reverse=True)
    corrected = [one for one in newest if one["corrected"] is not None][: described.update.replay]
    replay = [Example(one["prompt_token_ids"], tokens.answer(str(one["corrected"]))) for one in corrected]
    replay = [one for one in replay if tokens.fits(one.prompt, one.answer)]
    rehearsal = rehearsed(service, now, tokens) if recipe.rehearsed else []
    states = [one["prompt_token_ids"] for one in items if has_room(tokens, pull, one["prompt_token_ids"])]
    left_out = _left_out(NO_ROOM, len(items), len(states))
    path = path_of(api, now.champion)
    made = service.create_sampling_client(model_path=path) if path else service.create_sampling_client(base_model=now.base_model)
    reference = made.result()
    return Plan(
        lambda trainer, *progress: grpo.teach(trainer, reference, score, states, replay, rehearsal, recipe, pull, [tokens.end], *progress),
        len(states),
        pull.steps,
        left_out,
    )


def has_room(tokens: Tokens, pull: Pull, state: Sequence[int]) -> bool:
    """Whether an answer may be sampled there and scored whole."""
    return pull.answer_tokens < tokens.room(state)


def reward_version(api: Api, name: str) -> str | None:
    """The newest version of the deployment's reward model, if there is one: it is kept with the dataset that learns from it."""
    try:
        return str(api.get(f"/v1/reward-models/{quote(name, safe='')}")["id"])
    except NotFound:
        return None


def reward_of(api: Api, name: str) -> grpo.Score:
    """What the newest version of the deployment's reward model, as it is now, says of prompts with answers; once that one can't score any
    more, for something that it learned from was deleted or newer ones came, the newest then. Raises Conflict (code UNEARNED) where there
    is none, or where it hasn't earned to be a reward; what is returned does, too."""
    found = _earned(api, name)

    def score(inputs: list[list[int]]) -> list[float]:
        nonlocal found
        said: list[float] = []
        for first in range(0, len(inputs), SCORED_AT_ONCE):
            body = {"input": inputs[first : first + SCORED_AT_ONCE], "as_reward": True}
            try:
                scored = api.post(f"/v1/reward-models/{found}/score", body)
            except NotFound:
                newest = _earned(api, name)
                if newest == found:  # it isn't that version that isn't there
                    raise
                found = newest
                return score(inputs)  # one model says all of it
            said += [float(one["chance"]) for one in scored["data"]]
        return said

    return score


def _earned(api: Api, name: str) -> str:
    """The id of the newest version, which can score and may be a reward. Raises as `reward_of` does."""
    try:
        found = api.get(f"/v1/reward-models/{quote(name, safe='')}")
    except NotFound:
        raise Conflict(f"{name} has no reward model yet, so there is no reward to learn from; collect feedback", code=UNEARNED) from None
    if not found["has_weights"]:
        told = "something that it learned from was deleted, and the next version isn't there yet"
        raise Conflict(f"the reward model of {name} is no reward now: {told}; try again in a while", code=UNEARNED)
    if not found["earned"]:
        told = f"the reward model of {name} isn't a reward yet: {found['why']}; collect more labels"
        raise Conflict(told, code=UNEARNED)
    return str(found["id"])


def rehearsed(service: Any, now: Deployed, tokens: Tokens) -> list[Example]:
    """General questions with what the base model itself would say."""
    untaught = service.create_sampling_client(base_model=now.base_model).result()
    return lesson.rehearse(untaught, _general(tokens), [tokens.end], REHEARSED_TOKENS)


def _general(tokens: Tokens) -> list[list[int]]:
    return [tokens.prompt([{"role": "user", "content": text}]) for text in general.load().rehearsed]


def _train(
    trainer: Any, now: Deployed, described: Description, plan: Plan, saved: dict[str, Any], note: Note, say: Callable[[str], None],
    clock: Callable[[], float],
) -> dict[str, Any]:  # fmt: skip
    """The lesson from the last saved step on; what is saved last."""
    budget, began = described.budget, float(now.cycle.get("began", clock()))
    kept, spent = dict(saved), int(saved["tokens"])

    def on_step(step: Step) -> None:
        nonlocal spent
        spent += step.tokens
        kept["losses"] = [kept.get("losses", [step.loss])[0], step.loss]
        say(f"step {step.step + 1} of {plan.steps}: loss {step.loss:.3f}")
        if budget.tokens and spent > budget.tokens:
            raise Overloaded(f"the cycle has used {spent} training tokens of {budget.tokens}", code="budget")
        if budget.seconds and clock() - began > budget.seconds:
            raise Overloaded(f"the cycle has taken {clock() - began:.0f} s of {budget.seconds:g}", code="budget")

    def save(step: int) -> None:
        last = step == plan.steps
        made = trainer.save_state(f"{now.cycle['id']}-{step}", ttl_seconds=None if last else KEPT_SECONDS).result()
        kept.update(step=step, path=str(made.path), tokens=spent)
        note({"saved": dict(kept)})

    plan.teach(trainer, on_step, int(saved["step"]), save, SAVE_EVERY)
    return kept


def _begins(api: Api, now: Deployed, described: Description) -> str | None:
    """The weights that the lesson begins with; None: those of the base model."""
    champion = path_of(api, now.champion) if described.update.start == "champion" else None
    return champion if champion is not None and "/weights/" in champion else None


def open_trainer(api: Api, service: Any, now: Deployed, described: Description, recipe: Recipe, path: str) -> Any:
    """The adapter where the lesson stands: as it was saved under `path`, as the champion has it, or new."""
    if path:
        return service.create_training_client_from_state_with_optimizer(path).result()
    if (begins := _begins(api, now, described)) is not None:
        return service.create_training_client_from_state(begins).result()
    return service.create_lora_training_client(base_model=now.base_model, rank=recipe.rank, seed=recipe.seed, train_unembed=False).result()
