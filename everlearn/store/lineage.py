"""The way forward from what was said: which datasets froze it, and which versions learned from these."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.store import tables

sources, items, datasets = tables.dataset_sources, tables.dataset_items, tables.datasets
learned, named = tables.version_datasets, tables.named_versions
PIECE = 500  # ids in one statement


class Use(msgspec.Struct, frozen=True):
    """One item of a dataset, and what of the things that were asked about it was made of: (kind, id). `deleted`: emptied since."""

    dataset_id: str
    name: str
    form: str
    number: int
    split: str
    weight: float
    deleted: bool
    created_at: float
    made_of: list[tuple[str, str]]


class Learner(msgspec.Struct, frozen=True):
    """A version that learned from a dataset, itself or (`inherited`) through the one that it began with. `names`: support@3, ..."""

    dataset_id: str
    version: str
    inherited: bool
    created_at: float
    names: list[str]


def uses(conn: Connection, tenant: str, ids: Sequence[str]) -> list[Use]:
    """The items that were made of these records, feedback and episodes, oldest dataset first."""
    found: dict[tuple[str, int], Use] = {}
    for start in range(0, len(ids), PIECE):
        same = (items.c.dataset_id == sources.c.dataset_id) & (items.c.number == sources.c.number)
        columns = [sources.c.dataset_id, sources.c.number, sources.c.kind, sources.c.source_id, items.c.split, items.c.weight]
        columns += [items.c.deleted_at, datasets.c.name, datasets.c.form, datasets.c.created_at]
        whole = sources.join(items, same).join(datasets, datasets.c.dataset_id == sources.c.dataset_id)
        where = (sources.c.tenant == tenant) & sources.c.source_id.in_(list(ids[start : start + PIECE]))
        for row in conn.execute(sa.select(*columns).select_from(whole).where(where)):
            place = (row.dataset_id, row.number)
            gone = row.deleted_at is not None
            use = Use(row.dataset_id, row.name, row.form, row.number, row.split, row.weight, gone, row.created_at, [])
            found.setdefault(place, use).made_of.append((row.kind, row.source_id))
    return [found[place] for place in sorted(found)]


def learners(conn: Connection, tenant: str, dataset_ids: Sequence[str]) -> list[Learner]:
    """The versions that learned from these datasets, in the order in which they did."""
    found: dict[tuple[str, str], Learner] = {}
    for start in range(0, len(dataset_ids), PIECE):
        same = (named.c.tenant == learned.c.tenant) & (named.c.version == learned.c.version)
        columns = [learned.c.dataset_id, learned.c.version, learned.c.inherited, learned.c.created_at, named.c.name, named.c.number]
        where = (learned.c.tenant == tenant) & learned.c.dataset_id.in_(list(dataset_ids[start : start + PIECE]))
        query = sa.select(*columns).select_from(learned.outerjoin(named, same)).where(where)
        for row in conn.execute(query.order_by(learned.c.created_at, named.c.name, named.c.number)):
            one = Learner(row.dataset_id, row.version, row.inherited, row.created_at, [])
            one = found.setdefault((row.dataset_id, row.version), one)
            if row.name is not None:
                one.names.append(f"{row.name}@{row.number}")
    return list(found.values())
