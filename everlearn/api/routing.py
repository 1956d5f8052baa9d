"""Which version answers under a bare name: what the name means, or, where it is deployed, the champion or the candidate.

A candidate gets a share of the episodes, not of the requests: whoever talks with it goes on talking with it. An episode is named by the
client (`x-everlearn-episode`); else it is all chats in one memory; else it is the user's, else it is known by its key and how its
conversation began, which every later turn sends again.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import Request
from sqlalchemy import Connection

from everlearn.api import auth
from everlearn.store import deployments, names
from everlearn.store.deployments import Deployment
from everlearn.store.placing import UNHEARD, check_id, of_memory

EPISODE = "x-everlearn-episode"
Episode = Callable[[], str]


class Routed(msgspec.Struct, frozen=True):
    """One version of a name; number 0 is the base model, with neither version nor folder. `shadow` is to answer as well, unseen."""

    name: str
    number: int
    base_model: str
    version: str = ""
    folder: str = ""
    shadow: Routed | None = None


def episode_of(request: Request, user: str | None, said: Any, memory_id: str | None = None) -> Episode:
    """What stands for the request's episode, found when it is asked for: only a candidate's share needs it. `said`: its messages, or its
    prompt."""
    named = request.headers.get(EPISODE, "")
    if named:
        check_id(named)
        return lambda: f"episode:{named}"
    if memory_id is not None:
        return lambda: f"episode:{of_memory(memory_id)}"
    if user:
        return lambda: f"user:{user}"
    key = auth.caller(request).key_id
    return lambda: "begin:" + hashlib.sha256(json.dumps([key, _beginning(msgspec.to_builtins(said))]).encode()).hexdigest()


def route(conn: Connection, tenant: str, name: str, number: int | None, episode: Episode | None) -> Routed:
    """Version `number`, or the one that a bare name means for this episode. Raises NotFound."""
    found = deployments.find(conn, tenant, name) if names.NAME.fullmatch(name) else None
    if found is None or number:
        return _version(conn, tenant, name, number)
    if number == 0:
        return Routed(name, 0, found.base_model)
    tried = found.candidate if not found.paused else None
    if tried is None or tried == found.champion:
        return _arm(conn, found, found.champion)
    if found.share > 0 and episode is not None and deployments.bucket(found.salt, f"{tried}\n{episode()}") < found.share:
        return _arm(conn, found, tried)
    shown = _arm(conn, found, found.champion)
    if found.shadow > 0 and random.random() < found.shadow:
        return msgspec.structs.replace(shown, shadow=_arm(conn, found, tried))
    return shown


def _arm(conn: Connection, found: Deployment, number: int) -> Routed:
    return _version(conn, found.tenant, found.name, number) if number else Routed(found.name, 0, found.base_model)


def _version(conn: Connection, tenant: str, name: str, number: int | None) -> Routed:
    version = names.get(conn, tenant, name, number)
    return Routed(version.name, version.number, version.base_model, version.version, version.folder)


def _beginning(said: Any) -> Any:
    """The conversation up to the first thing that a user said, without what the system says: it may hold the time of day. All of it where
    no user speaks."""
    if not isinstance(said, list):
        return said
    heard = [message for message in said if isinstance(message, dict) and message.get("role") not in UNHEARD]
    first = next((i for i, message in enumerate(heard) if message.get("role") == "user"), None)
    return said if first is None else heard[: first + 1]
