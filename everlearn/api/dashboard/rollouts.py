"""What was played: the members of a group side by side, each part of a reward with its reason, tokens coloured by log-probability, and the
prompts and records as they are."""

from __future__ import annotations

import asyncio
import math
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

    def read(conn: Connection) -> tuple[runs.Run, list[Group], Group | None]:
        there = runs.get_run(conn, owner, run)
        found = steps.list_groups(conn, owner, run)
        chosen = next((one for one in found if step in (None, one.step) and group in (None, one.number)), None)
        if chosen is None and found:
            raise NotFound(f"no rollouts of step {step} and group {group} in run {run[:100]!r}, or no longer", param="step")
        return there, found, None if chosen is None else steps.get_group(conn, owner, run, chosen.step, chosen.number)

    there, listed, chosen = await svc.read(read)
    all_steps = sorted({one.step for one in listed})
    told: dict[str, Any] = {"run": there.run_id, "base_model": there.base_model, "steps": all_steps, "groups": [], "group": None}
    if chosen is None:
        return told
    place = all_steps.index(chosen.step)
    told |= {
        "step": chosen.step,
        "before": all_steps[place - 1] if place else None,
        "after": all_steps[place + 1] if place + 1 < len(all_steps) else None,
        "groups": [group_json(one) for one in listed if one.step == chosen.step],
    }
    tokenizer = await tokenizer_of(svc, there.base_model)
    return told | {"group": await asyncio.to_thread(shown, chosen, tokenizer)}


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
    for member in members[:MAX_MEMBERS]:
        for turn in member["turns"]:
            ids = turn["action"]["tokens"]
            turn["drawn"] = drawn(ids[:MAX_TOKENS], turn["action"]["logprobs"], tokenizer)
            turn["left_out"] = max(0, len(ids) - MAX_TOKENS)
    return {**group_json(group), **group.body, "members": members[:MAX_MEMBERS], "members_left_out": max(0, len(members) - MAX_MEMBERS)}


def drawn(ids: list[int], logprobs: list[float | None], tokenizer: ChatTokenizer | None) -> list[dict[str, Any]]:
    texts = texts_of(ids, tokenizer)
    marks = [*logprobs[: len(ids)], *[None] * (len(ids) - len(logprobs))]
    return [{"id": id_, "text": text, "logprob": mark, "shade": shade(mark)} for id_, text, mark in zip(ids, texts, marks, strict=True)]


def texts_of(ids: list[int], tokenizer: ChatTokenizer | None) -> list[str]:
    """The text of each token; that of a character of several tokens stands with the last of them."""
    if tokenizer is None:
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
