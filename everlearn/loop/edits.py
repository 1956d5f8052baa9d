"""Corrections that are answered in memories instead of weights: decided by everlearn/loop/remedy.py, carried out over the API.

An edit supersedes the mistaken answer by what is right, and pins that. It is told in the answer's episode, and noted in the cycle before
the next one is made. Done again (by the next runner, or in a later cycle with the same correction) it finds the turn superseded
and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from everlearn.errors import Conflict, NotFound, Unavailable, UserError
from everlearn.loop.remedy import Case, remedies, told
from everlearn.loop.service import Api, Deployed

if TYPE_CHECKING:
    from everlearn.loop.update import Correction

Note = Callable[[dict[str, Any]], None]
ACT = "memory edit"


def carried_out(api: Api, items: Sequence[dict[str, Any]], known: dict[str, Any], note: Note) -> dict[str, Any]:
    """What became of each correction of an answer in a memory, by record id: `place` (memory, weights or nowhere), `reason`, `memory`,
    `turn`, and for an edit the number of the `edit`'s turn. `known`: what an earlier try has noted."""
    done = dict(known)
    cases = [case_of(item) for item in items]
    for item, case, remedy in zip(items, cases, remedies(cases), strict=True):
        if not case.memory or case.key in done:
            continue
        found = {"place": remedy.place, "reason": remedy.reason, **item["memory"]}
        if remedy.place == "memory":
            try:
                found["edit"] = _edit(api, item, case, remedy.reason)
            except (Conflict, Unavailable):
                raise  # another try may do
            except NotFound:  # what somebody wanted forgotten must not come back as weights
                found |= {"place": "nowhere", "reason": "the memory, or the turn, was forgotten"}
            except UserError as error:  # it has no room, or this key may not: then the weights learn it
                found |= {"place": "weights", "reason": f"the memory couldn't be changed: {error.message}"}
        done[case.key] = found
        if remedy.place == "memory":
            note({"remedies": done})
    return done


def left(items: Sequence[dict[str, Any]], done: dict[str, Any]) -> list[dict[str, Any]]:
    """The items that are for the weights."""
    return [item for item in items if done.get(item["record_id"], {"place": "weights"})["place"] == "weights"]


def remedied(now: Deployed) -> dict[str, Any]:
    """What became of corrections of answers in memories, for the history; nothing where there were none."""
    return {"remedies": now.cycle["remedies"]} if now.cycle.get("remedies") else {}


def for_weights(now: Deployed, corrections: Sequence[Correction]) -> list[Correction]:
    """Without those that memories have, or that were forgotten there."""
    done = now.cycle.get("remedies", {})
    return [one for one in corrections if done.get(one.record_id, {"place": "weights"})["place"] == "weights"]


def case_of(item: dict[str, Any]) -> Case:
    *said, answer = item["messages"]
    question = said[-1].get("content") if said and said[-1].get("role") == "user" else ""
    text = answer.get("content")
    return Case(
        item["record_id"],
        question if isinstance(question, str) else "",
        text if isinstance(text, str) else "",
        (item.get("memory") or {}).get("memory", ""),
    )


def _edit(api: Api, item: dict[str, Any], case: Case, reason: str) -> int:
    """The number of the turn that supersedes the mistaken answer."""
    route, turn = f"/v1/memories/{quote(case.memory, safe='@')}", int(item["memory"]["turn"])
    record_id = item["record_id"]
    before = api.get(f"{route}/turns/{turn}", record_id=record_id)["superseded_by"]
    if before is not None:
        return int(before)
    made = api.post(f"{route}/correct", {"number": turn, "text": told(case), "pinned": True, "record_id": record_id})
    event = {"kind": "act", "name": ACT, "record_id": record_id, "text": reason}
    api.post(f"/v1/episodes/{quote(item['episode_id'], safe=':')}/events", event)
    return int(made["turns"]) - 1
