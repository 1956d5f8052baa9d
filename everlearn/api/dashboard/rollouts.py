"""What was played: the members of a group side by side, each part of a reward with its reason, tokens coloured by log-probability, and the
prompts and records as they are."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from fastapi import Query, Request
from sqlalchemy import Connection

from everlearn.api.auth import tenant
from everlearn.api.dashboard import frame
from everlearn.api.dashboard.live import Look
from everlearn.api.runs import group_json
from everlearn.api.services import Services, services
from everlearn.errors import NotFound, Unavailable, Unsupported
from everlearn.render.detokenize import TextStream
from everlearn.render.tokenizer import ChatTokenizer
from everlearn.store import runs, steps
from everlearn.store.steps import MAX_STEP, Group

router = frame.page_router()
LIVE: dict[str, Look] = {}  # `rollouts` is looked at for the overview

MAX_RUNS = 100
MAX_MEMBERS = 32
MAX_TOKENS = 4000  # of an action that are drawn
MAX_DRAWN = 20_000  # of a page
MAX_LISTED = 200  # groups of a step that are listed at a time
# Shares of probability at which the colour of a token changes, from what was certain to what hardly any draw would give.
SHADES = (0.95, 0.8, 0.5, 0.2, 0.05)


@frame.twin(router, "/rollouts", "rollouts.html")
async def page(
    request: Request,
    run: str | None = Query(None, max_length=200),
    step: int | None = Query(None, ge=0, le=MAX_STEP),
    group: int | None = Query(None, ge=0, le=MAX_STEP),
) -> dict[str, Any]:
    """Without `run` the runs that have some; without `step` the newest; `group` is one of the step's, else its first."""
    svc, owner = services(request), tenant(request)
    if run is None:
        found = await svc.read(lambda conn: steps.played(conn, owner, MAX_RUNS))
        names = ("run_id", "groups", "last_step", "newest")
        return {"run": None, "runs": [dict(zip(names, row, strict=True)) for row in found]}

    there, told, chosen = await svc.read(lambda conn: choose(conn, owner, run, step, group))
    if chosen is None:
        return told
    tokenizer = await tokenizer_of(svc, there.base_model)
    return told | {"group": await asyncio.to_thread(shown, chosen, tokenizer)}


def choose(conn: Connection, owner: str, run: str, step: int | None, group: int | None) -> tuple[runs.Run, dict[str, Any], Group | None]:
    """The run, what the page says around a group, and the group; None where the run has none."""
    there = runs.get_run(conn, owner, run)
    all_steps = steps.played_steps(conn, owner, run)
    told: dict[str, Any] = {"run": there.run_id, "base_model": there.base_model, "steps": all_steps, "groups": [], "group": None}
    if not all_steps:
        return there, told, None
    step = all_steps[-1] if step is None else step
    numbers = steps.group_numbers(conn, owner, run, step)
    group = numbers[0] if group is None and numbers else group
    if group not in numbers:
        raise NotFound(f"no rollouts of step {step} and group {group} in run {run[:100]!r}, or no longer", param="step")
    first = numbers.index(group) // MAX_LISTED * MAX_LISTED
    listed = steps.list_groups(conn, owner, run, step, MAX_LISTED, (step, numbers[first] - 1))
    told |= {"step": step, **beside("", all_steps, all_steps.index(step), 1), "groups": [group_json(one) for one in listed]}
    return there, told | beside("groups_", numbers, first, MAX_LISTED), steps.get_group(conn, owner, run, step, group)


def beside(name: str, places: list[int], at: int, width: int) -> dict[str, int | None]:
    """What lies `width` before and after the place `at`; None beyond the ends."""
    before = places[at - width] if at >= width else None
    return {f"{name}before": before, f"{name}after": places[at + width] if at + width < len(places) else None}


async def tokenizer_of(svc: Services, base_model: str) -> ChatTokenizer | None:
    """None where the base model isn't there any more: tokens are then shown as numbers."""
    try:
        return (await svc.chat_models.get(svc.catalog.resolve(base_model))).tokenizer
    except (NotFound, Unavailable, Unsupported):
        return None


def shown(group: Group, tokenizer: ChatTokenizer | None) -> dict[str, Any]:
    """The group's record, with each action's tokens as text and shade beside what was recorded."""
    assert group.body is not None
    members = group.body["members"]
    turns = [turn for member in members[:MAX_MEMBERS] for turn in member["turns"]]
    most = min(MAX_TOKENS, fair([len(turn["action"]["tokens"]) for turn in turns], MAX_DRAWN))
    for turn in turns:
        ids = turn["action"]["tokens"]
        turn["drawn"] = drawn(ids[:most], turn["action"]["logprobs"], tokenizer)
        turn["left_out"] = max(0, len(ids) - most)
    left_out = {"members_left_out": max(0, len(members) - MAX_MEMBERS), "tokens_left_out": sum(turn["left_out"] for turn in turns)}
    return {**group_json(group), **group.body, "members": members[:MAX_MEMBERS], **left_out}


def fair(wanted: Sequence[int], room: int) -> int:
    """The most that each may have so that all together have `room`: who wants less leaves the rest to the others."""
    for place, one in enumerate(sorted(wanted)):
        if one * (len(wanted) - place) > room:
            return room // (len(wanted) - place)
        room -= one
    return max(wanted, default=0)


def drawn(ids: list[int], logprobs: list[float | None], tokenizer: ChatTokenizer | None) -> list[dict[str, Any]]:
    texts = texts_of(ids, tokenizer)
    marks = [*logprobs[: len(ids)], *[None] * (len(ids) - len(logprobs))]
    return [{"id": id_, "text": text, "logprob": mark, "shade": shade(mark)} for id_, text, mark in zip(ids, texts, marks, strict=True)]


def texts_of(ids: list[int], tokenizer: ChatTokenizer | None) -> list[str]:
    """The text of each token; that of a character of several tokens stands with the last of them."""
    if tokenizer is None or any(not 0 <= number < 2**32 for number in ids):  # the second: no vocabulary has them
        return [f"⟨{number}⟩" for number in ids]
    stream = TextStream(tokenizer, skip_special=False, continues=True)
    text = stream.add(ids) + stream.finish()
    ends = [*stream.offsets[1:], len(text)]
    return [text[start:end] for start, end in zip(stream.offsets, ends, strict=True)] if ids else []


def shade(logprob: float | None) -> int | None:
    """0 for a token that was nearly certain, to 5 for one that was hardly to be expected."""
    if logprob is None:
        return None
    return next((number for number, least in enumerate(SHADES) if math.exp(min(logprob, 0.0)) >= least), len(SHADES))
