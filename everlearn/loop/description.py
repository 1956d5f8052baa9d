"""What an owner writes about a deployment: when to learn, how, and by which rule a version goes live. TOML in, a checked Description out.

    base = "smollm2"

    [triggers]
    labels = 20            # learn when so many new labels are there
    at = "03:00"           # and every night, in the runner's local time

    [update]
    method = "sft"         # from corrections; "dpo" from preferences, "kto" from thumbs
    start = "base"         # each version learns from the base model anew; "champion": from the version that serves

    [shadow]
    answers = 20           # so many answers unseen before the candidate answers anybody

    [gate]                 # the rule: everlearn/loop/rule.py
    owner = "maria"
    promote = "ask"        # "automatic": the rule may promote what passes all of it

    [gate.shadow]          # without it no candidate comes into the shadow
    min_hours = 1.0

Pure: nothing here reads a file or a clock.
"""

from __future__ import annotations

import functools
import re
import tomllib
from datetime import datetime, timedelta
from typing import Any, Literal

import msgspec

from everlearn.errors import InvalidRequest
from everlearn.loop import rule

# What guardrails can be measured on (everlearn/loop/outcomes.py); the last two need somebody who sees the answers.
GUARDRAILS = ("length", "cut_off", "tool_calls", "seconds", "refusal", "tool_errors", "feedback_rate")
# What answers that nobody saw are compared in. Not whether they were cut off or how long they took: shadows are cut short, and wait.
IN_SHADOW = ("length", "tool_calls", "refusal")
ALARMS = ("cusum",)  # that the runner raises (everlearn/loop/watch.py)
SUITES = ("general", "questions", "instructions")  # of general ability (everlearn/loop/measure.py); the first is always measured


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class Triggers(Section, frozen=True):
    """Any of them begins a cycle. `at`: "HH:MM"; `labels`: new labels since the last cycle. Neither: only by hand. `continuous`, alone:
    weights move with every finished episode (everlearn/loop/continuous.py)."""

    at: str = ""
    labels: int = 0
    continuous: bool = False


class Pull(Section, frozen=True):
    """Of the method grpo (everlearn/loop/grpo.py). `group` answers to a state, of `answer_tokens` at most; `kl`: what a nat of distance
    from the serving version costs, in rewards; `hold`: what a token of a replayed correction, or of general text, weighs against a
    sampled token with an advantage of 1; `steps`: optimizer steps, small ones, as `learning_rate` has to be too; `batch`: states of one.
    `estimator`: what an answer is held against, the mean of its group or (`gae`) a value head that is learned beside, which needs no
    group."""

    estimator: Literal["group_mean", "gae"] = "group_mean"
    group: int = 8
    answer_tokens: int = 64
    kl: float = 0.05
    hold: float = 0.1
    steps: int = 40
    batch: int = 8


class Update(Section, frozen=True):
    """How a candidate is made. `paraphrases`: wordings of each question that are sampled from the model, filtered, and trained with it.
    `replay`: the most older corrections that ride along, newest first. `rehearsed`: general examples in every batch, as the model itself
    would answer them. `memory`: what corrections of a user's own facts do where the answer was given in a memory: change that memory
    ("personal"), or be learned like all others ("off"); everlearn/loop/remedy.py decides. `beta` is of dpo and kto
    (everlearn/loop/preference.py), where paraphrases, replay, rehearsed and memory have no part. `pull` is of grpo
    (everlearn/loop/grpo.py), which is refused until the deployment's reward model has earned to be a reward."""

    method: Literal["sft", "dpo", "kto", "grpo"] = "sft"
    start: Literal["base", "champion"] = "base"
    rank: int = 16
    learning_rate: float = 2e-3
    epochs: int = 5
    batch: int = 20
    paraphrases: int = 4
    replay: int = 500
    rehearsed: int = 12
    memory: Literal["personal", "off"] = "personal"
    beta: float = 0.1
    seed: int = 0
    pull: Pull = Pull()


class Shadow(Section, frozen=True):
    """`share` of the requests is answered by the candidate too, unseen, until there are `answers`. Whether there is a shadow, and how long
    at least, says the rule (`[gate.shadow]`)."""

    share: float = 0.2
    answers: int = 0


class Reward(Section, frozen=True):
    """The deployment's reward model: whether the server keeps one, and after how many labels it is fitted anew. An answer is a doubt where
    the standard deviation of its chance of approval is above `review_sd`; of the answers that nobody labelled a share `asked` is looked
    at."""

    learn: bool = True
    refit_every: int = 200
    review_sd: float = 0.2
    asked: float = 0.25


class Continuous(Section, frozen=True):
    """Of triggers.continuous. `steps`: optimizer steps of one move; `gate_every`: of them, until the gate is asked; `staleness`: of them,
    that the moving weights may be ahead of the version that serves. `quiet`: seconds without a word after which an episode is finished;
    what was said twenty times as long ago is learned from though it goes on. `rewards`: the reward model pulls too, once it
    has earned that."""

    steps: int = 4
    gate_every: int = 24
    staleness: int = 240
    quiet: float = 30.0
    rewards: bool = True


class Budget(Section, frozen=True):
    """Of one cycle: seconds from its begin to the gate's verdict, and training tokens. 0: no bound."""

    seconds: float = 0.0
    tokens: int = 0


class Description(Section, frozen=True):
    """`gate` is the rule's table (everlearn/loop/rule.py reads it). `filters` choose what is learned from, as in POST /v1/datasets.
    `settle`: seconds after its last answer in which an episode's feedback has to come to count in `feedback_rate`."""

    base: str
    triggers: Triggers = Triggers()
    update: Update = Update()
    shadow: Shadow = Shadow()
    reward: Reward = Reward()
    continuous: Continuous = Continuous()
    budget: Budget = Budget()
    settle: float = 3600.0
    filters: dict[str, Any] = {}
    gate: dict[str, Any] = {}


BOUNDS = {
    "triggers.labels": (0, 1_000_000),
    "update.rank": (1, 512),
    "update.learning_rate": (1e-7, 1.0),
    "update.epochs": (1, 1000),
    "update.batch": (1, 1024),
    "update.paraphrases": (0, 32),
    "update.replay": (0, 100_000),
    "update.rehearsed": (0, 256),
    "update.beta": (1e-4, 100.0),
    "update.pull.group": (1, 128),
    "update.pull.answer_tokens": (1, 4096),
    "update.pull.kl": (0.0, 100.0),
    "update.pull.hold": (0.0, 100.0),
    "update.pull.steps": (1, 100_000),
    "update.pull.batch": (1, 1024),
    "shadow.share": (0.0, 1.0),
    "shadow.answers": (0, 100_000),
    "reward.refit_every": (1, 1_000_000),
    "reward.review_sd": (0.0, 0.5),
    "reward.asked": (0.0, 1.0),
    "continuous.steps": (1, 1000),
    "continuous.gate_every": (1, 100_000),
    "continuous.staleness": (1, 1_000_000),
    "continuous.quiet": (0.0, 1e7),
    "settle": (0.0, 1e7),
    "budget.seconds": (0.0, 1e7),
    "budget.tokens": (0, 10**12),
}


def read(text: str) -> tuple[str, Description]:
    """The name (`name = "support"`, "" where the text has none) and the description of a TOML text. InvalidRequest names what is wrong."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequest(f"the description is not valid TOML: {error}; mend that line") from None
    name = table.pop("name", "")
    if not isinstance(name, str):
        raise InvalidRequest(f"name = {name!r} must be text", param="name")
    return name, of(table)


def of(table: Any) -> Description:
    """A description from its JSON or TOML table, checked."""
    try:
        found = msgspec.convert(table, Description)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"description: {error}; `everlearn deploy create --help` names the sections", param="description") from None
    if found.triggers.at and not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", found.triggers.at):
        raise InvalidRequest(f'triggers.at = {found.triggers.at!r} must be a time of the day, as in "03:00"', param="triggers.at")
    for key, (least, most) in BOUNDS.items():
        value = functools.reduce(getattr, key.split("."), found)
        if not least <= value <= most:  # type: ignore[operator]
            raise InvalidRequest(f"{key} = {value} must be from {least} to {most}", param=key)
    if found.update.pull.group < 2 and found.update.pull.estimator == "group_mean":
        told = 'update.pull.group = 1 has nobody to compare with; set at least 2, or update.pull.estimator = "gae"'
        raise InvalidRequest(told, param="update.pull.group")
    _check_continuous(found)
    asked = rule.rule_of(found.gate)
    _check_measured(asked)
    _check_shadow(found.shadow, asked)
    return found


def _check_continuous(found: Description) -> None:
    if found.triggers.continuous and (found.triggers.at or found.triggers.labels):
        raise InvalidRequest("triggers.continuous moves by itself; remove at and labels, or continuous", param="triggers.continuous")
    if found.triggers.continuous and found.update.method != "sft":
        told = 'learns from corrections, and from the reward model where it may; set update.method = "sft"'
        raise InvalidRequest(f"triggers.continuous {told}", param="update.method")
    moves = found.continuous
    if moves.staleness < moves.gate_every + moves.steps:
        told = f"continuous.staleness = {moves.staleness} must be at least gate_every + steps = {moves.gate_every + moves.steps}"
        raise InvalidRequest(f"{told}: no candidate would come to the gate", param="continuous.staleness")


def _check_measured(asked: rule.Rule) -> None:
    """Refuses what the runner doesn't measure: its part would wait for ever, and no candidate would pass."""
    raised = ALARMS if asked.watch is not None and asked.watch.labels else ()
    if unknown := [name for name in asked.alarms.ignore if name not in raised]:
        there = f"there is {', '.join(raised)}" if raised else "without [gate.watch] there are no alarms; remove [gate.alarms]"
        raise InvalidRequest(f"the runner raises no alarm {unknown[0]!r}; {there}", param="gate.alarms")
    if unknown := [name for name in (asked.retained.suites if asked.retained else ()) if name not in SUITES]:
        told = f"the runner doesn't measure the suite {unknown[0]!r}; there is {', '.join(SUITES)}, or leave suites out"
        raise InvalidRequest(told, param="gate.retained.suites")
    if unknown := [name for name in asked.guardrails if name not in GUARDRAILS]:
        raise InvalidRequest(f"nothing measures the guardrail {unknown[0]!r}; there are {', '.join(GUARDRAILS)}", param="gate.guardrails")


def _check_shadow(shadow: Shadow, asked: rule.Rule) -> None:
    """Refuses a shadow that never begins, and one that never has enough answers for its guardrails."""
    if asked.shadow is None:
        if shadow.answers:
            told = f"shadow.answers = {shadow.answers}, but the rule has no shadow; add [gate.shadow], or remove [shadow]"
            raise InvalidRequest(told, param="gate.shadow")
        return
    needs = {name: guard.min_num for name, guard in asked.guardrails.items() if name in IN_SHADOW}
    most = max([1, *needs.values()])
    if shadow.answers < most:
        why = "; ".join(f"the guardrail {name} waits for {num}" for name, num in needs.items() if num == most) or "the rule has a shadow"
        raise InvalidRequest(f"shadow.answers = {shadow.answers} must be at least {most}: {why}", param="shadow.answers")
    if not shadow.share:
        raise InvalidRequest("shadow.share = 0 answers nothing, and the rule has a shadow; give a share above 0", param="shadow.share")


def latest(at: str, now: float) -> float:
    """The last time that it was `at` ("HH:MM") here, in Unix seconds."""
    moment = datetime.fromtimestamp(now)
    hour, minute = map(int, at.split(":"))
    today = moment.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return (today if today <= moment else today - timedelta(days=1)).timestamp()


def to_json(description: Description) -> dict[str, Any]:
    """As it is stored: what was left out stays out."""
    table: dict[str, Any] = msgspec.to_builtins(description)
    return table
