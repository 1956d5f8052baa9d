"""What the pages of episodes and datasets show: from rows of the store to plain values, which the JSON twins are too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
from sqlalchemy import Connection

from everlearn.api import episodes as timeline
from everlearn.api.datasets import dataset_json, trace_json
from everlearn.api.episodes import episode_json
from everlearn.api.feedback import change_json
from everlearn.api.records import row_json
from everlearn.config import FeedbackSettings
from everlearn.loop.implicit import text_of
from everlearn.loop.weights import factors, share
from everlearn.store import datasets, episodes, feedback, lineage, records
from everlearn.store.episodes import Episode
from everlearn.store.feedback import Share

SEARCHED = 2_000  # records that a search for text reads at most: their content is compressed, no index knows it
PIECE = 200
TRACES = 500  # items of a dataset on one page
# What a reward model makes of each kind (everlearn/loop/labels.py).
LABELS = {
    "boolean": "thumb",
    "float": "stars",
    "preference": "preference",
    "demonstration": "preference",
    "outcome": "thumb",
    "implicit": "thumb",
}


class Chosen(msgspec.Struct, frozen=True):
    """What the list is narrowed to. `text`: in what was asked or answered; `judged`: with feedback, or without any."""

    user: str | None = None
    model: str | None = None
    split: str | None = None
    judged: bool | None = None
    since: float | None = None
    until: float | None = None
    text: str | None = None


def listed(conn: Connection, tenant: str, chosen: Chosen, after: str | None = None, limit: int = 50) -> dict[str, Any]:
    """A page of episodes, newest first. With `text`, `searched` says in how many answers it was looked for; where `has_more` is true, the
    next page goes on with the search."""
    equal = {name: getattr(chosen, name) for name in ("user", "model", "split", "judged", "since", "until")}
    if not chosen.text:
        found = episodes.list_episodes(conn, tenant, limit + 1, after, **equal)
        return _page(found[:limit], len(found) > limit, found[limit - 1].episode_id if len(found) > limit else None)
    wanted, hits, searched = chosen.text.casefold(), list[Episode](), 0
    while True:
        found = episodes.list_episodes(conn, tenant, PIECE, after, **equal)
        for one in found:
            after = one.episode_id
            said, read = _says(conn, tenant, one.episode_id, wanted)
            searched += read
            hits += [one] if said else []
            if len(hits) == limit or searched >= SEARCHED:
                return _page(hits, True, after) | {"searched": searched}
        if len(found) < PIECE:
            return _page(hits, False, None) | {"searched": searched}


def _page(found: list[Episode], has_more: bool, last_id: str | None) -> dict[str, Any]:
    return {"object": "list", "data": [episode_json(one) for one in found], "has_more": has_more, "last_id": last_id}


def _says(conn: Connection, tenant: str, episode_id: str, wanted: str) -> tuple[bool, int]:
    """Whether the text is in what an episode said, and in how many records it was looked for."""
    read = 0
    for row in episodes.records_of(conn, tenant, episode_id):
        read += 1
        _, body = records.get(conn, tenant, row.record_id)
        if body is None:
            continue
        texts = json.loads(body.texts)
        if any(wanted in text.casefold() for part in ("messages", "answer") for text in words(texts.get(part))):
            return True, read
    return False, read


def words(said: Any) -> list[str]:
    """The texts of messages, or of a completion's prompt and answers."""
    parts = said if isinstance(said, list) else [said]
    return [text_of(part) if isinstance(part, dict) else part for part in parts if isinstance(part, dict | str)]


def whole(
    conn: Connection, tenant: str, episode_id: str, settings: FeedbackSettings, after: str | None = None, limit: int = 100
) -> dict[str, Any]:
    """An episode's timeline; its answers with their figures (`figures`), its feedback with what became of it (`history`) and what it is
    worth as a label (`label`, `weight`), and `learned`: the datasets and versions that learned from any of it."""
    told = timeline.whole(conn, tenant, episode_id, after, limit)
    figures = {row.record_id: row_json(row) for row in episodes.records_of(conn, tenant, episode_id, after, limit)}
    counts = totals(feedback.shares(conn, tenant))
    ids = [episode_id, *figures]
    for entry in told["timeline"]:
        if entry["type"] == "answer":
            entry["figures"] = figures[entry["record_id"]]
        if entry["type"] == "feedback":
            ids.append(entry["id"])
            entry["history"] = [change_json(change) for change in feedback.history(conn, tenant, entry["id"])]
            entry["label"] = LABELS.get(entry["kind"])
            entry["weight"] = weight(entry, counts, settings) if entry["counts"] else 0.0
    return told | {"learned": learned(conn, tenant, ids)}


def totals(found: list[Share]) -> dict[tuple[str, str], int]:
    """How much each source has said that counts."""
    counts: dict[tuple[str, str], int] = {}
    for one in found:
        counts[one.source, one.source_id] = counts.get((one.source, one.source_id), 0) + one.labels
    return counts


def weight(said: Mapping[str, Any], counts: Mapping[tuple[str, str], int], settings: FeedbackSettings) -> float:
    """How many labels this one is worth, under the cap of its source."""
    own = counts.get((said["source"], said["source_id"]), 0)
    return round(factors(settings)[said["source"]] * share(own, settings.source_cap), 6)


def learned(conn: Connection, tenant: str, ids: list[str]) -> list[dict[str, Any]]:
    """For each dataset that was made of any of these: its items, and the versions that learned from it."""
    found: dict[str, dict[str, Any]] = {}
    for use in lineage.uses(conn, tenant, ids):
        about = {"id": use.dataset_id, "name": use.name, "form": use.form, "created_at": int(use.created_at), "items": [], "versions": []}
        item = {"number": use.number, "split": use.split, "weight": use.weight, "deleted": use.deleted}
        item["made_of"] = [{"kind": kind, "id": source_id} for kind, source_id in sorted(use.made_of)]
        found.setdefault(use.dataset_id, about)["items"].append(item)
    for one in lineage.learners(conn, tenant, list(found)):
        found[one.dataset_id]["versions"].append(learner_json(one))
    return list(found.values())


def learner_json(one: lineage.Learner) -> dict[str, Any]:
    return {"version": one.version, "names": one.names, "inherited": one.inherited, "created_at": int(one.created_at)}


def dataset(conn: Connection, tenant: str, dataset_id: str, after: int = -1) -> dict[str, Any]:
    """A dataset with a page of its items (where each comes from), the versions that learned from it, and what was deleted of it."""
    told = dataset_json(datasets.get(conn, tenant, dataset_id))
    found = datasets.traces(conn, tenant, dataset_id, after, TRACES + 1)
    told["traces"] = [trace_json(one) for one in found[:TRACES]]
    told["has_more"] = len(found) > TRACES
    told["versions"] = [learner_json(one) for one in lineage.learners(conn, tenant, [dataset_id])]
    told["deleted"] = [
        {"kind": mark.kind, "id": mark.source_id, "deleted_at": int(mark.created_at)} for mark in datasets.marks(conn, tenant, dataset_id)
    ]
    return told


def datasets_listed(conn: Connection, tenant: str, after: str | None = None, limit: int = 50) -> dict[str, Any]:
    found = datasets.list_datasets(conn, tenant, limit + 1, after)
    last = found[limit - 1].dataset_id if len(found) > limit else None
    return {"object": "list", "data": [dataset_json(one) for one in found[:limit]], "has_more": len(found) > limit, "last_id": last}
