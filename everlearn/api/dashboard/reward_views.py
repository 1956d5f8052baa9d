"""What the page Reward model shows: how far each deployment's reward model may be trusted, version by version; plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from everlearn.api.reward_models import version_json
from everlearn.errors import NotFound
from everlearn.rewards.stream import ENOUGH_AUC, ENOUGH_LABELS, LEAST_HELD_OUT
from everlearn.store import deployments, review, reward_models
from everlearn.store.reward_models import RewardVersion

VERSIONS = 100  # of one deployment, on its page
DEPLOYMENTS = 200
# What a version is judged by: labels that it predicted before it learned them, those of them that are about versions that were new then,
# and held-out ones.
VIEWS = ("prequential", "shifted", "held_out")
NEEDS = {"labels": ENOUGH_LABELS, "auc": ENOUGH_AUC, "judged": LEAST_HELD_OUT}  # before it may be a reward


def listed(conn: Connection, tenant: str) -> dict[str, Any]:
    """Every deployment with its newest version (None: there is none yet), how many labels it has, and how many answers it is unsure of."""
    found = deployments.list_all(conn, tenant, DEPLOYMENTS)
    return {"object": "list", "data": [standing(conn, tenant, one.name) for one in found], "needs": NEEDS}


def standing(conn: Connection, tenant: str, name: str) -> dict[str, Any]:
    newest = reward_models.latest(conn, tenant, name)
    return {
        "deployment": name,
        "labels": reward_models.num_labels(conn, tenant, name),
        "unsure": len(review.unsure(conn, tenant, name)),
        "newest": None if newest is None else version_json(newest),
    }


def shown(conn: Connection, tenant: str, name: str, number: int | None = None) -> dict[str, Any]:
    """A deployment's reward model: version `number` or the newest with its calibration, and the figures of all versions, newest first."""
    deployments.get(conn, tenant, name)
    found = reward_models.list_versions(conn, tenant, VERSIONS, deployment=name)
    chosen = next((one for one in found if number in (None, one.number)), None)
    if chosen is None and number is not None:
        raise NotFound(f"the reward model of {name} has no version {number}; it has {len(found)}", param="version")
    told = standing(conn, tenant, name) | {"versions": [version_json(one) for one in found], "needs": NEEDS, "views": VIEWS}
    return told | {"chosen": None if chosen is None else version_json(chosen), "course": course(found)}


def course(found: Sequence[RewardVersion]) -> list[dict[str, Any]]:
    """How figures moved from version to version, oldest first: the prequential ones that have a scale from 0 to 1."""
    return [
        {"number": one.number, "labels": one.labels, **{name: one.report["prequential"][name] for name in ("auc", "ece", "brier")}}
        for one in reversed(found)
    ]
