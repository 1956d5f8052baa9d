"""The corrections that weights learn from which move with every finished episode: what was said last of each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from everlearn.errors import NotFound
from everlearn.loop.service import Api
from everlearn.loop.update import Correction


def corrections(api: Api, name: str, filters: dict[str, Any], said: Sequence[dict[str, Any]]) -> list[tuple[Correction, bool]]:
    """What was said of the answers of the deployment `name`, the last of each prompt, and whether it corrects: where `filters` has `good`,
    there are also answers that were called good, so that they stay as they are."""
    found: dict[tuple[int, ...], tuple[Correction, bool]] = {}
    for one in said:
        corrects = one["kind"] == "demonstration" and one["answer"] is not None
        good = bool(filters.get("good")) and one["kind"] in ("boolean", "float")
        good = good and float(one["value"] or 0.0) >= float(filters.get("threshold", 0.5))
        if (corrects or good) and (answer := _answer(api, name, one)) is not None:
            found[tuple(answer.prompt)] = (answer, corrects)
    return list(found.values())


def with_new(reservoir: Sequence[Correction], new: Sequence[tuple[Correction, bool]]) -> list[Correction]:
    """The reservoir with what is new in the place of what was known of the same prompts."""
    prompts = {tuple(one.prompt) for one, _ in new}
    return [*(one for one in reservoir if tuple(one.prompt) not in prompts), *(one for one, _ in new)]


def reworded(reservoir: Sequence[Correction], said: Sequence[dict[str, Any]]) -> tuple[list[Correction], list[Correction]]:
    """The reservoir, and the corrections in it among what was edited, or counts again; not where a newer one of the same prompt is known.
    Both have their words as they were read, for those are what the note tells of."""
    answers = {one["id"]: one["answer"] for one in said if one["kind"] == "demonstration" and one["answer"] is not None}
    now = [msgspec.structs.replace(one, answer=answers[one.newest]) if one.newest in answers else one for one in reservoir]
    return now, [one for one in now if one.newest in answers]


def _answer(api: Api, name: str, said: dict[str, Any]) -> Correction | None:
    """What a piece of feedback teaches: the corrected answer, or the one that it is about. None where its content isn't kept, where it
    has no text, and where another model gave it."""
    target = said["target"]
    if target["record_id"] is None or (target["span"] is not None and said["kind"] != "demonstration"):
        return None
    try:
        record = api.get(f"/v1/records/{target['record_id']}")
    except NotFound:
        return None
    content = record["content"]
    if content is None or not content.get("messages") or record["model"].partition("@")[0] != name:
        return None
    given = content["answer"][target["choice"]].get("content") if said["answer"] is None else said["answer"]
    if not isinstance(given, str):
        return None
    return Correction(record["id"], content["messages"], given, content["prompt_token_ids"], said["id"])
