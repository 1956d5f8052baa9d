"""What a training run has to show for its steps: metrics, rollouts, and the settings of the loop that drives it.

The log tells of every finished forward_backward and optim_step by itself. A loop may tell more of its own steps (rewards, KL), and give
some of what was played; a step that it makes again, after it was killed, replaces what it had told. All of it is for looking at: nothing
is rebuilt from it, and it is bounded for each run.
"""

from __future__ import annotations

import json
import math
import random
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.errors import InvalidRequest, NotFound, TooLarge
from everlearn.store import runs, tables

LOG, CLIENT = "log", "client"
KEPT_STEPS = 50_000  # of a run and a source
KEPT_BYTES = 64 * 2**20  # of a run's rollouts, uncompressed; beyond it the oldest go
KEPT_GROUPS = 10_000  # of a run, however small they are
MAX_GROUP = 2 * 2**20
MAX_METRICS = 500
MAX_NAME = 200
MAX_SETTINGS = 256 * 1024
SWEEP_EVERY = 500  # finished requests between two looks at how many rows there are, on average
SHOWN = 4000  # rows of which curves are drawn
MAX_STEP = 2**53

table, rollouts, settings = tables.run_steps, tables.run_rollouts, tables.run_settings


class Step(msgspec.Struct, frozen=True):
    number: int
    kind: str
    name: str
    metrics: dict[str, float]
    created_at: float


class Curves(msgspec.Struct, frozen=True):
    """`series[name][i]` is the value at `x[i]`, or None. `left_out`: older rows that aren't shown."""

    x: list[int]
    series: dict[str, list[float | None]]
    left_out: int = 0


class Group(msgspec.Struct, frozen=True):
    """`body` as its loop recorded it (everlearn/rl/records.py), None in a list."""

    step: int
    number: int
    summary: dict[str, Any]
    bytes: int
    created_at: float
    body: dict[str, Any] | None = None


class Packed(msgspec.Struct, frozen=True):
    """A group ready to be kept: `body` compressed, `bytes` what it and its summary take uncompressed."""

    number: int
    summary: dict[str, Any]
    body: bytes
    bytes: int


def note(conn: Connection, tenant: str, run_id: str, seq: int, kind: str, name: str, metrics: Mapping[str, float]) -> None:
    """Keeps the metrics of a finished request. Once for each: an answer is stored once. Old rows go by chance: whichever numbers a client
    gives its requests, none can be chosen so that they stay."""
    row = {"run_id": run_id, "source": LOG, "number": seq, "tenant": tenant, "kind": kind, "name": name}
    conn.execute(INSERT, {**row, "metrics": _finite(metrics), "created_at": time.time()})
    if random.randrange(SWEEP_EVERY) == 0:
        _sweep_steps(conn, run_id, LOG)


INSERT = table.insert()


def tell(conn: Connection, tenant: str, run_id: str, told: Sequence[tuple[int, Mapping[str, float]]]) -> None:
    """What a loop says of its steps. Raises InvalidRequest for what isn't a step, NotFound for a run that isn't the tenant's."""
    runs.get_run(conn, tenant, run_id)
    for number, metrics in told:
        if not 0 <= number <= MAX_STEP:
            raise InvalidRequest(f"step is {number}; it must lie between 0 and {MAX_STEP}", param="step")
        if len(metrics) > MAX_METRICS or any(not 0 < len(name) <= MAX_NAME for name in metrics):
            raise InvalidRequest(f"a step has {MAX_METRICS} metrics at most, with names of 1 to {MAX_NAME} characters", param="metrics")
        here = (table.c.run_id == run_id) & (table.c.source == CLIENT) & (table.c.number == number)
        conn.execute(table.delete().where(here))
        row = {"run_id": run_id, "source": CLIENT, "number": number, "tenant": tenant, "kind": "step", "name": ""}
        conn.execute(INSERT, {**row, "metrics": _finite(metrics), "created_at": time.time()})
    if told:
        _sweep_steps(conn, run_id, CLIENT)


def describe(conn: Connection, tenant: str, run_id: str, given: dict[str, Any]) -> None:
    """What the loop was told to do; the last word counts."""
    runs.get_run(conn, tenant, run_id)
    if len(msgspec.json.encode(given)) > MAX_SETTINGS:
        raise TooLarge(f"settings may have {MAX_SETTINGS:,} bytes; leave out what nobody would compare", param="settings")
    conn.execute(settings.delete().where(settings.c.run_id == run_id))
    conn.execute(settings.insert().values(run_id=run_id, tenant=tenant, settings=given, created_at=time.time()))


def described(conn: Connection, tenant: str, run_id: str) -> dict[str, Any]:
    where = (settings.c.run_id == run_id) & (settings.c.tenant == tenant)
    return conn.execute(sa.select(settings.c.settings).where(where)).scalar() or {}


def list_steps(conn: Connection, tenant: str, run_id: str, source: str, limit: int, after: int | None = None) -> list[Step]:
    """In their order, behind number `after`."""
    runs.get_run(conn, tenant, run_id)
    where = (table.c.run_id == run_id) & (table.c.source == source) & (table.c.tenant == tenant)
    if after is not None:
        where &= table.c.number > after
    found = conn.execute(sa.select(table).where(where).order_by(table.c.number).limit(limit))
    return [Step(row.number, row.kind, row.name, row.metrics, row.created_at) for row in found]


def newest(conn: Connection, tenant: str, run_ids: Sequence[str]) -> dict[str, dict[str, float]]:
    """For each run that has told anything the metrics of the last step of each source."""
    last = sa.select(table.c.run_id, table.c.source, table.c.kind, sa.func.max(table.c.number).label("number"))
    last = last.where(table.c.run_id.in_(run_ids), table.c.tenant == tenant).group_by(table.c.run_id, table.c.source, table.c.kind)
    ends = last.subquery()
    same = (table.c.run_id == ends.c.run_id) & (table.c.source == ends.c.source) & (table.c.number == ends.c.number)
    found: dict[str, dict[str, float]] = {}
    for row in conn.execute(sa.select(table.c.run_id, table.c.metrics).join(ends, same)):
        found.setdefault(row.run_id, {}).update(row.metrics)
    return found


def curves(conn: Connection, tenant: str, run_id: str, source: str) -> Curves:
    """The newest steps as series. Of the log, a point is an optimizer step and all requests since the one before: what is a sum is added,
    of the other reductions (a metric's name is `name:reduction`) the largest, the smallest or the mean is shown."""
    where = (table.c.run_id == run_id) & (table.c.source == source) & (table.c.tenant == tenant)
    total = conn.execute(sa.select(sa.func.count()).select_from(table).where(where)).scalar_one()
    columns = table.c["number", "kind", "metrics"]
    rows = conn.execute(sa.select(*columns).where(where).order_by(table.c.number.desc()).limit(SHOWN)).all()[::-1]
    if source == CLIENT:
        return _series([(row.number, row.metrics) for row in rows], max(0, total - SHOWN))
    steps = (table.c.kind == "optim_step") & where
    made = conn.execute(sa.select(sa.func.count()).select_from(table).where(steps)).scalar_one()
    number = made - sum(row.kind == "optim_step" for row in rows)
    points: list[tuple[int, dict[str, float]]] = []
    since: list[dict[str, float]] = []
    for row in rows:
        if row.kind != "optim_step":
            since.append(row.metrics)
            continue
        number += 1
        points.append((number, {**merged(since), **row.metrics}))
        since = []
    return _series(points, max(0, total - SHOWN))


def merged(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of several requests as those of one, each by the reduction in its name."""
    values: dict[str, list[float]] = {}
    for part in parts:
        for name, value in part.items():
            values.setdefault(name, []).append(value)
    return {name: WAYS.get(name.rpartition(":")[2], _mean)(found) for name, found in values.items()}


def _mean(found: Sequence[float]) -> float:
    return sum(found) / len(found)


WAYS: dict[str, Callable[[Sequence[float]], float]] = {"sum": sum, "max": max, "min": min}


def losses(conn: Connection, tenant: str, run_id: str) -> list[str]:
    """The losses that the run was trained with, by name."""
    where = (table.c.run_id == run_id) & (table.c.source == LOG) & (table.c.tenant == tenant) & (table.c.name != "")
    return sorted(conn.execute(sa.select(table.c.name).distinct().where(where)).scalars())


def pack(step: int, number: int, body: dict[str, Any], summary: dict[str, Any]) -> Packed:
    """A group of a step for `add_groups`. Takes a while for a large one, and no connection. Raises TooLarge."""
    text = msgspec.json.encode(body)
    if len(text) > MAX_GROUP:
        raise TooLarge(f"group {number} of step {step} has {len(text):,} bytes; {MAX_GROUP:,} are kept at most", param="groups")
    return Packed(number, summary, zlib.compress(text, 6), len(text) + len(msgspec.json.encode(summary)))


def add_groups(conn: Connection, tenant: str, run_id: str, step: int, groups: Sequence[Packed]) -> None:
    """Keeps groups that were played, and forgets the run's oldest beyond its room."""
    runs.get_run(conn, tenant, run_id)
    fresh = {group.number: group for group in groups}  # of a number that comes twice, the last
    conn.execute(rollouts.delete().where((rollouts.c.run_id == run_id) & (rollouts.c.step == step) & rollouts.c.number.in_(fresh)))
    row = {"run_id": run_id, "step": step, "tenant": tenant, "created_at": time.time()}
    if fresh:
        conn.execute(rollouts.insert(), [{**row, **msgspec.structs.asdict(group)} for group in fresh.values()])
        _sweep_groups(conn, run_id)


def _sweep_groups(conn: Connection, run_id: str) -> None:
    """Looks once at all of a run's groups: KEPT_GROUPS at most, and what a request brings."""
    here = rollouts.c.run_id == run_id
    count, total = conn.execute(sa.select(sa.func.count(), sa.func.sum(rollouts.c.bytes)).where(here)).one()
    if count <= KEPT_GROUPS and total <= KEPT_BYTES:
        return
    sizes = sa.select(*rollouts.c["step", "number", "bytes"]).where(here)
    left = KEPT_BYTES
    for rank, row in enumerate(conn.execute(sizes.order_by(rollouts.c.step.desc(), rollouts.c.number.desc()))):
        left -= row.bytes
        if left < 0 or rank >= KEPT_GROUPS:
            older = (rollouts.c.step < row.step) | ((rollouts.c.step == row.step) & (rollouts.c.number <= row.number))
            conn.execute(rollouts.delete().where(here & older))
            return


def list_groups(
    conn: Connection, tenant: str, run_id: str, step: int | None = None, limit: int = 1000, after: tuple[int, int] | None = None
) -> list[Group]:
    """Of one step, or of all, newest step first; behind step and number `after`; without their bodies. Raises NotFound for a run that isn't
    the tenant's."""
    runs.get_run(conn, tenant, run_id)
    where = (rollouts.c.run_id == run_id) & (rollouts.c.tenant == tenant)
    if step is not None:
        where &= rollouts.c.step == step
    if after is not None:
        where &= (rollouts.c.step < after[0]) | ((rollouts.c.step == after[0]) & (rollouts.c.number > after[1]))
    columns = rollouts.c["step", "number", "summary", "bytes", "created_at"]
    query = sa.select(*columns).where(where).order_by(rollouts.c.step.desc(), rollouts.c.number).limit(limit)
    return [Group(**row._mapping) for row in conn.execute(query)]


def played_steps(conn: Connection, tenant: str, run_id: str) -> list[int]:
    """The steps of which groups are kept, in their order."""
    where = (rollouts.c.run_id == run_id) & (rollouts.c.tenant == tenant)
    return list(conn.execute(sa.select(rollouts.c.step).distinct().where(where).order_by(rollouts.c.step)).scalars())


def group_numbers(conn: Connection, tenant: str, run_id: str, step: int) -> list[int]:
    """Of one step, in their order."""
    where = (rollouts.c.run_id == run_id) & (rollouts.c.tenant == tenant) & (rollouts.c.step == step)
    return list(conn.execute(sa.select(rollouts.c.number).where(where).order_by(rollouts.c.number)).scalars())


def get_group(conn: Connection, tenant: str, run_id: str, step: int, number: int) -> Group:
    where = (rollouts.c.run_id == run_id) & (rollouts.c.step == step) & (rollouts.c.number == number) & (rollouts.c.tenant == tenant)
    row = conn.execute(sa.select(rollouts).where(where)).first()
    if row is None:
        raise NotFound(f"no rollouts {number} of step {step} of run {run_id[:100]!r}: never told, or no longer kept", param="group")
    return Group(row.step, row.number, row.summary, row.bytes, row.created_at, json.loads(zlib.decompress(row.body)))


def played(conn: Connection, tenant: str, limit: int) -> list[tuple[str, int, int, float]]:
    """Runs with rollouts, newest first: run, groups, last step, when."""
    when = sa.func.max(rollouts.c.created_at).label("at")
    query = sa.select(rollouts.c.run_id, sa.func.count(), sa.func.max(rollouts.c.step), when).where(rollouts.c.tenant == tenant)
    return [tuple(row) for row in conn.execute(query.group_by(rollouts.c.run_id).order_by(when.desc()).limit(limit))]


def forget_rollouts(conn: Connection, before: float) -> int:
    """What was played before that time, of all tenants; how many groups."""
    return conn.execute(rollouts.delete().where(rollouts.c.created_at < before)).rowcount


def _sweep_steps(conn: Connection, run_id: str, source: str) -> None:
    here = (table.c.run_id == run_id) & (table.c.source == source)
    oldest = sa.select(table.c.number).where(here).order_by(table.c.number.desc()).offset(KEPT_STEPS).limit(1)
    beyond = conn.execute(oldest).scalar()
    if beyond is not None:
        conn.execute(table.delete().where(here & (table.c.number <= beyond)))


def _series(points: Sequence[tuple[int, Mapping[str, float]]], left_out: int) -> Curves:
    names = sorted({name for _, metrics in points for name in metrics})
    return Curves([x for x, _ in points], {name: [metrics.get(name) for _, metrics in points] for name in names}, left_out)


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """What JSON, and a chart, can show."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
