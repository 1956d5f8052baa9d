"""Deployments: which version of a name answers, which one is tried beside it, and the log of how each came there.

A deployment belongs to an adapter's name. Its champion answers; a candidate is tried beside it, unseen (shadow) or on a share of the
episodes (canary). Number 0 is the base model without an adapter, so that a name can be served before it has learned anything. What the name
means (everlearn/store/names.py) follows the champion in the same transaction.

Every act is one transaction: the row and a line of the log with its evidence. `revision` counts changes; who acts on what they have read
says which revision that was, and is refused if somebody else was faster. The same act sent again has no second effect. Nothing here
decides anything: everlearn/loop/runner.py and people do.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.errors import Conflict, InvalidRequest, NotFound
from everlearn.faultpoints import around
from everlearn.store import names, reward_models, tables

table, events = tables.deployments, tables.deployment_events

REST = "collect"
# state -> those that may follow. In `collect` labels gather and nothing is tried; every cycle ends there, promoted, rejected or ended.
NEXT = {
    REST: ("dataset", "gate"),  # straight to the gate: a candidate that was trained elsewhere
    "dataset": ("update", REST),
    "update": ("gate", REST),
    "gate": ("shadow", "canary", REST),
    "shadow": ("shadow", "canary", REST),
    "canary": ("canary", REST),
}
TRIED = ("gate", "shadow", "canary")  # states that have a candidate
MAX_REASON = 2000
# What an update notes of the words of users, whose records may be deleted: it is in no later state's cycle.
DRAFTS = ("wordings",)


class Deployment(msgspec.Struct, frozen=True):
    """One deployment. `previous` is what the champion was before it was promoted; `description` is the owner's, as
    everlearn/loop/description.py reads it."""

    tenant: str
    name: str
    base_model: str
    state: str
    champion: int
    candidate: int | None
    previous: int | None
    share: float
    shadow: float
    paused: bool
    salt: str
    revision: int
    description: dict[str, Any]
    cycle: dict[str, Any]
    created_at: float
    changed_at: float


class Event(msgspec.Struct, frozen=True):
    """One line of the log: what the deployment was and is, who made it so, why, and the figures that it rests on."""

    id: int
    kind: str  # created, changed, advanced, promoted, rejected, ended, rolled_back, paused, resumed, noted
    was: str
    state: str
    champion: int
    candidate: int | None
    share: float
    actor: str
    reason: str
    evidence: dict[str, Any]
    created_at: float


class Act(msgspec.Struct, frozen=True):
    """Who does something, why, and on what evidence. `expected`: the revision that they have seen, or None for whatever there is now."""

    actor: str
    reason: str = ""
    evidence: dict[str, Any] = {}
    expected: int | None = None


def bucket(salt: str, episode: str) -> float:
    """Where an episode stands in [0, 1): the same place for ever, so that a share that grows keeps the episodes that it had."""
    digest = hashlib.sha256(f"{salt}\n{episode}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def create(
    conn: Connection, tenant: str, name: str, base_model: str, description: dict[str, Any], act: Act, champion: int | None = None
) -> Deployment:
    """A deployment on `champion`, else on what the name means now, else on the base model. The same again changes nothing; another
    description under the same name is a Conflict."""
    there = conn.execute(sa.select(table).where(_here(tenant, name))).first()
    if there is not None:
        found = Deployment(**there._mapping)
        if (found.base_model, found.description) != (base_model, description):
            raise Conflict(f"there is a deployment {name!r} with another description; `everlearn deploy change` changes it", param="name")
        return found
    number = _starts_with(conn, tenant, name, base_model, champion)
    now = time.time()
    made = Deployment(
        tenant, name, base_model, REST, number, None, None, 0.0, 0.0, False, secrets.token_hex(16), 1, description, {}, now, now
    )
    with around("deployment.row"):
        conn.execute(table.insert().values(**msgspec.structs.asdict(made)))
        _log(conn, "created", "", made, act)
        _mean(conn, made, act)
    return made


def get(conn: Connection, tenant: str, name: str) -> Deployment:
    row = conn.execute(sa.select(table).where(_here(tenant, name))).first()
    if row is None:
        raise NotFound(f"no deployment {name[:100]!r}; `everlearn deploy list` shows yours", param="name")
    return Deployment(**row._mapping)


def find(conn: Connection, tenant: str, name: str) -> Deployment | None:
    """The deployment of this name, where there is one: what every request under a bare name asks first."""
    row = conn.execute(FIND, {"tenant": tenant, "name": name}).first()
    return None if row is None else Deployment(**row._mapping)


FIND = sa.select(table).where((table.c.tenant == sa.bindparam("tenant")) & (table.c.name == sa.bindparam("name")))


def list_all(conn: Connection, tenant: str, limit: int, after: str | None = None) -> list[Deployment]:
    """By name; with `after`, those behind that name."""
    where = table.c.tenant == tenant
    if after is not None:
        where &= table.c.name > after
    return [Deployment(**row._mapping) for row in conn.execute(sa.select(table).where(where).order_by(table.c.name).limit(limit))]


def on_base(conn: Connection, tenant: str) -> Sequence[Any]:
    """`name`, `base_model` and `created_at` of those that answer with the base model: whatever versions such a name has, it means none."""
    where = (table.c.tenant == tenant) & (table.c.champion == 0)
    return conn.execute(sa.select(table.c.name, table.c.base_model, table.c.created_at).where(where).order_by(table.c.name)).all()


def history(conn: Connection, tenant: str, name: str, limit: int = 100, after: int | None = None) -> list[Event]:
    """Newest first; with `after`, those older than that one. The log outlives the deployment."""
    where = (events.c.tenant == tenant) & (events.c.name == name)
    if after is not None:
        where &= events.c.id < after
    columns = [events.c[field] for field in Event.__struct_fields__]
    found = [Event(**row._mapping) for row in conn.execute(sa.select(*columns).where(where).order_by(events.c.id.desc()).limit(limit))]
    if not found and after is None:
        get(conn, tenant, name)
    return found


def change(conn: Connection, tenant: str, name: str, description: dict[str, Any], act: Act) -> Deployment:
    """Another description, for what is done from now on."""
    now = get(conn, tenant, name)
    if now.description == description:
        return now
    return _apply(conn, now, "changed", {"description": description}, act)


def pause(conn: Connection, tenant: str, name: str, paused: bool, act: Act) -> Deployment:
    """A paused deployment answers with its champion alone, and its runner does nothing; resumed, it goes on where it was."""
    now = get(conn, tenant, name)
    if now.paused == paused:
        return now
    return _apply(conn, now, "paused" if paused else "resumed", {"paused": paused}, act)


def note(conn: Connection, tenant: str, name: str, cycle: dict[str, Any], expected: int, act: Act | None = None) -> Deployment:
    """What the present cycle has so far, for whoever goes on with it. A line of the log only where `act` has a reason: nothing changed for
    anybody."""
    now = get(conn, tenant, name)
    if now.cycle == cycle and now.revision == expected + 1:
        return now
    _check(now, expected)
    if now.state == REST and cycle.get("id") != now.cycle.get("id"):
        raise Conflict(f"{name} rests; a cycle begins when it is advanced", param="cycle")
    if act is None or not act.reason:
        return _write(conn, now, {"cycle": cycle})
    with around("deployment.row"):
        after = _write(conn, now, {"cycle": cycle})
        _log(conn, "noted", now.state, after, act)
    return after


def advance(
    conn: Connection, tenant: str, name: str, to: str, act: Act, *, candidate: int | None = None, share: float = 0.0, shadow: float = 0.0,
    cycle: dict[str, Any] | None = None, kind: str = "advanced",
) -> Deployment:  # fmt: skip
    """To the next state of the cycle; to `collect` it ends, `rejected` or `ended` (there was nothing to do). A candidate is a version of
    the name that is there, of the same base model; it is named on the way into the gate and stays until the cycle ends."""
    now = get(conn, tenant, name)
    if to == REST and kind not in ("rejected", "ended"):
        raise InvalidRequest(f"kind {kind[:40]!r}: a cycle ends 'rejected' or 'ended'; only `promote` makes a champion", param="kind")
    kind = kind if to == REST else "advanced"
    if _again(conn, now, kind, to, act):
        return now
    if to not in NEXT[now.state]:
        raise Conflict(f"{name} is in {now.state!r}, from where {to[:40]!r} can't follow; {', '.join(NEXT[now.state])} can", param="to")
    changes: dict[str, Any] = {"state": to, "share": 0.0, "shadow": 0.0}
    if to in TRIED:
        number = now.candidate if candidate is None else candidate
        if number is None:
            raise InvalidRequest(f"{to} needs a candidate: the number of a version of {name}", param="candidate")
        _candidate(conn, now, number)
        changes["candidate"] = number
    else:
        changes["candidate"] = None
    if to == "canary":
        changes["share"] = _share(share, "share")
    if to == "shadow":
        changes["shadow"] = _share(shadow, "shadow") if shadow else 0.0
    if cycle is not None:
        changes["cycle"] = cycle
    return _apply(conn, now, kind, changes, act)


def promote(conn: Connection, tenant: str, name: str, act: Act, number: int | None = None, rule: bool = False) -> Deployment:
    """The candidate, or version `number`, answers from the next request on. With `rule` it is the owner's rule that says so: it must be
    there, and it reaches no other version than the candidate, and no state but the canary where the gate has one. Where it names the
    champion, the candidate is given up."""
    now = get(conn, tenant, name)
    if _again(conn, now, "promoted", REST, act):
        return now
    wanted = now.candidate if number is None else number
    if wanted is None:
        raise Conflict(f"{name} tries no candidate now; name the version: everlearn deploy promote {name} --to NUMBER", param="number")
    if wanted == now.champion and now.candidate is None:
        return now
    gate = now.description.get("gate", {})
    if rule and not (gate.get("owner") and gate.get("promote") == "automatic"):
        raise Conflict(f"{name} is promoted by a person: its gate names no owner who says promote = 'automatic'", param="rule")
    needs = ("canary",) if "canary" in gate else TRIED
    if rule and (now.state not in needs or wanted != now.candidate or now.paused):
        said = "paused" if now.paused else f"in {now.state!r}"
        raise Conflict(f"the rule promotes the candidate that it has tried; {name} is {said}", param="rule")
    if wanted == now.champion != now.candidate:
        return _apply(conn, now, "rejected", _rest(), act)
    _candidate(conn, now, wanted)
    previous = now.previous if wanted == now.champion else now.champion
    return _apply(conn, now, "promoted", {**_rest(), "champion": wanted, "previous": previous}, act)


def rollback(conn: Connection, tenant: str, name: str, act: Act, number: int | None = None) -> Deployment:
    """While a candidate is tried: it is given up, and the champion answers everybody. Otherwise, or with the `number` of another version:
    the champion before this one (or that version) answers from the next request on."""
    now = get(conn, tenant, name)
    if _again(conn, now, "rejected", REST, act) or _again(conn, now, "rolled_back", REST, act):
        return now
    if now.candidate is not None and number in (None, now.champion):
        return _apply(conn, now, "rejected", _rest(), act)
    wanted = now.previous if number is None else number
    if wanted is None:
        raise Conflict(f"{name} has had one champion only; name the version: everlearn deploy rollback {name} --to NUMBER", param="number")
    if wanted == now.champion:
        return now
    _candidate(conn, now, wanted)
    return _apply(conn, now, "rolled_back", {**_rest(), "champion": wanted, "previous": None}, act)


def delete(conn: Connection, tenant: str, name: str) -> None:
    """Gives up the deployment; the name goes on meaning its champion (where that was the base model, its first version), and the log
    stays."""
    now = get(conn, tenant, name)
    with around("deployment.row"):
        if now.champion == 0 and _meant(conn, tenant, name) is not None:
            names.move(conn, tenant, name, names.versions(conn, tenant, name)[-1].number, "its deployment was given up")
        reward_models.drop(conn, tenant, name)
        conn.execute(table.delete().where(_here(tenant, name)))


def guard_move(conn: Connection, tenant: str, name: str) -> None:
    """Raises Conflict where a deployment says what the name means: two hands on one pointer would undo each other."""
    if find(conn, tenant, name) is not None:
        way_out = f"`everlearn deploy promote {name} --to NUMBER` or `everlearn deploy rollback {name}`"
        raise Conflict(f"{name} is deployed, so its name follows the deployment's champion; {way_out} moves it", param="name")


def guard_delete(conn: Connection, tenant: str, name: str, number: int | None) -> None:
    """Raises Conflict where a deployment needs the version, or the name."""
    found = find(conn, tenant, name)
    if found is not None and (number is None or number in (found.champion, found.candidate, found.previous)):
        said = name if number is None else f"{name}@{number}"
        raise Conflict(f"{said} is what deployment {name} answers with, or may go back to; give the deployment up first", param="name")


def sweep_log(conn: Connection, before: float) -> int:
    """Forgets the log of names that mean nothing any more (neither deployed nor with a version) and to which nothing happened since that
    time; how many lines. The log of every other name is evidence of how its versions came to answer, and stays."""
    versions = tables.named_versions
    deployed = sa.select(table.c.name).where((table.c.tenant == events.c.tenant) & (table.c.name == events.c.name)).exists()
    named = sa.select(versions.c.name).where((versions.c.tenant == events.c.tenant) & (versions.c.name == events.c.name)).exists()
    place = (events.c.tenant, events.c.name)
    dead = sa.select(*place).where(~deployed & ~named).group_by(*place).having(sa.func.max(events.c.created_at) < before)
    lost = 0
    for tenant, name in conn.execute(dead).all():
        lost += conn.execute(events.delete().where((events.c.tenant == tenant) & (events.c.name == name))).rowcount
    return lost


def _starts_with(conn: Connection, tenant: str, name: str, base_model: str, champion: int | None) -> int:
    if champion is not None and champion != 0:
        version = names.get(conn, tenant, name, champion)
    elif champion is None and (current := _meant(conn, tenant, name)) is not None:
        version = current
    else:
        return 0
    _same_base(name, base_model, version)
    return version.number


def _meant(conn: Connection, tenant: str, name: str) -> names.NamedVersion | None:
    with contextlib.suppress(NotFound):
        return names.get(conn, tenant, name)
    return None


def _candidate(conn: Connection, now: Deployment, number: int) -> None:
    if number != 0:
        _same_base(now.name, now.base_model, names.get(conn, now.tenant, now.name, number))


def _same_base(name: str, base_model: str, version: names.NamedVersion) -> None:
    if version.base_model != base_model:
        raise Conflict(f"{version} is of base model {version.base_model}, and deployment {name} of {base_model}", param="candidate")


def _share(value: float, param: str) -> float:
    if not 0.0 < value <= 1.0:
        raise InvalidRequest(f"{param} {value} must be above 0 and 1 at most", param=param)
    return value


def _rest() -> dict[str, Any]:
    return {"state": REST, "candidate": None, "share": 0.0, "shadow": 0.0}


def _check(now: Deployment, expected: int | None) -> None:
    if expected is not None and now.revision != expected:
        raise Conflict(f"{now.name} is at revision {now.revision}, not {expected}: somebody changed it; look at it again", param="expected")


def _again(conn: Connection, now: Deployment, kind: str, to: str, act: Act) -> bool:
    """Whether the last thing that happened is this very act, whose answer was lost."""
    if act.expected is None or act.expected != now.revision - 1:
        return False
    last = history(conn, now.tenant, now.name, 1)[0]
    return (last.kind, last.state, last.actor, last.reason) == (kind, to, act.actor, act.reason)


def _apply(conn: Connection, now: Deployment, kind: str, changes: dict[str, Any], act: Act) -> Deployment:
    """Writes the changes, their line of the log, and where the champion changed, what the name means."""
    if _again(conn, now, kind, str(changes.get("state", now.state)), act):
        return now
    _check(now, act.expected)
    if now.state == "update" and changes.get("state", "update") != "update":
        changes["cycle"] = {name: value for name, value in changes.get("cycle", now.cycle).items() if name not in DRAFTS}
    with around("deployment.row"):
        after = _write(conn, now, changes)
        _log(conn, kind, now.state, after, act)
        if after.champion != now.champion:
            _mean(conn, after, act)
    return after


def _write(conn: Connection, now: Deployment, changes: dict[str, Any]) -> Deployment:
    values = {**changes, "revision": now.revision + 1, "changed_at": time.time()}
    conn.execute(table.update().where(_here(now.tenant, now.name)).values(**values))
    return msgspec.structs.replace(now, **values)


def _mean(conn: Connection, now: Deployment, act: Act) -> None:
    if now.champion:
        names.move(conn, now.tenant, now.name, now.champion, act.reason[: names.MAX_NOTE])


def _log(conn: Connection, kind: str, was: str, now: Deployment, act: Act) -> None:
    if len(act.reason) > MAX_REASON or not names.storable(act.reason):
        raise InvalidRequest(
            f"reason must be text of {MAX_REASON} characters at most, without NUL and half surrogate pairs", param="reason"
        )
    row = {field: getattr(now, field) for field in ("tenant", "name", "state", "champion", "candidate", "share")}
    told = {"kind": kind, "was": was, "actor": act.actor, "reason": act.reason, "evidence": act.evidence, "created_at": time.time()}
    conn.execute(events.insert().values(**row, **told))


def _here(tenant: str, name: str) -> sa.ColumnElement[bool]:
    return (table.c.tenant == tenant) & (table.c.name == name)
