"""Datasets: what was learned from, frozen. An item is made of records and feedback, which its lineage names, and never changes.

The split of an episode is settled when it is made (everlearn/store/placing.py), so what is held out in one dataset is held out in all;
`items` refuses to read it for training. When something that an item was made of is deleted, the item is emptied and the dataset marked,
and with it every version that learned from it; `rebuild` freezes what is left anew.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec
import sqlalchemy as sa
import zstandard
from sqlalchemy.engine import Connection

from everlearn.errors import Conflict, Forbidden, InvalidRequest, NotFound
from everlearn.faultpoints import around
from everlearn.store import tables
from everlearn.store.names import storable
from everlearn.store.placing import SPLITS

table, item_rows, source_rows, mark_rows = tables.datasets, tables.dataset_items, tables.dataset_sources, tables.dataset_marks
learned_rows = tables.version_datasets
FORMS = ("sft", "preference", "kto", "prompts")
MAX_NAME = 200
LEVEL = 3
VANISHED = "deleted meanwhile"
Purpose = Literal["train", "evaluate"]


class Draft(msgspec.Struct, frozen=True):
    """An item that is to be frozen. `sources`: (kind, id) of all that it was made of, kinds record, feedback, episode."""

    split: str
    episode_id: str
    weight: float
    body: bytes  # packed by `pack`
    sha256: str
    sources: list[tuple[str, str]]


class Item(msgspec.Struct, frozen=True):
    number: int
    split: str
    episode_id: str
    weight: float
    body: dict[str, Any]


class Trace(msgspec.Struct, frozen=True):
    """An item's lineage without what it says. `deleted`: something that it was made of is gone, and so is its body."""

    number: int
    split: str
    episode_id: str
    weight: float
    sha256: str
    deleted: bool
    sources: list[tuple[str, str]]


class Dataset(msgspec.Struct, frozen=True):
    """`content_hash`: sha256 over all items in order. `left_out`: how many items there would have been besides, by reason. `marks`: how
    many things that it was made of were deleted since. `reward_version`: which reward model had a say in it."""

    dataset_id: str
    tenant: str
    name: str
    form: str
    filters: dict[str, Any]
    content_hash: str
    train_items: int
    heldout_items: int
    left_out: dict[str, int]
    reward_version: str | None
    rebuilt_from: str | None
    bytes: int
    created_at: float
    marks: int = 0


class Mark(msgspec.Struct, frozen=True):
    kind: str
    source_id: str
    created_at: float


class Learned(msgspec.Struct, frozen=True):
    """`inherited`: the version began with one that learned from the dataset. `marks`: of the dataset."""

    version: str
    dataset_id: str
    inherited: bool
    marks: int
    created_at: float


def draft(split: str, episode_id: str, weight: float, body: Mapping[str, Any], sources: Sequence[tuple[str, str]]) -> Draft:
    """A draft of an item that says `body`."""
    said = json.dumps(body, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()
    packed = zstandard.ZstdCompressor(level=LEVEL).compress(said)
    return Draft(split, episode_id, round(weight, 9), packed, hashlib.sha256(said).hexdigest(), sorted(set(sources)))


def create(
    conn: Connection,
    tenant: str,
    name: str,
    form: str,
    filters: Mapping[str, Any],
    drafts: Sequence[Draft],
    left_out: Mapping[str, int],
    reward_version: str | None = None,
    rebuilt_from: str | None = None,
) -> Dataset:
    """Freezes the drafts, but those that were made of what is gone by now. Raises InvalidRequest where nothing is left.

    Asked again, for instance by whoever got no answer, it returns what the same call froze before, unless that is marked by now.
    """
    _check(name, form, reward_version)
    alive = _alive(conn, tenant, drafts) if rebuilt_from is None else list(drafts)
    counts = Counter(left_out) + Counter({VANISHED: len(drafts) - len(alive)})
    if not alive:
        told = "; ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "nothing was said that counts"
        raise InvalidRequest(f"there is nothing in such a dataset ({told}); choose wider filters", param="filters")
    now = time.time()
    dataset_id = f"ds_{int(1000 * now):011x}{secrets.token_hex(8)}"
    numbers = Counter(one.split for one in alive)
    row: dict[str, Any] = {"dataset_id": dataset_id, "tenant": tenant, "name": name, "form": form}
    row |= {"filters": dict(filters), "left_out": dict(counts)}
    row |= {"train_items": numbers["train"], "heldout_items": numbers["heldout"], "bytes": sum(len(one.body) for one in alive)}
    row |= {"content_hash": content_hash(alive), "reward_version": reward_version, "rebuilt_from": rebuilt_from, "created_at": now}
    if (before := _same(conn, row)) is not None:
        return before
    items, sources = [], []
    for number, one in enumerate(alive):
        place = {"dataset_id": dataset_id, "number": number, "tenant": tenant}
        content = {"split": one.split, "weight": one.weight, "body": one.body, "sha256": one.sha256}
        items.append({**place, "episode_id": one.episode_id, **content})
        sources += [{**place, "kind": kind, "source_id": source_id} for kind, source_id in one.sources]
    with around("dataset.row"):
        conn.execute(table.insert().values(**row))
        for start in range(0, len(items), 1000):
            conn.execute(item_rows.insert(), items[start : start + 1000])
        for start in range(0, len(sources), 1000):
            conn.execute(source_rows.insert(), sources[start : start + 1000])
    return get(conn, tenant, dataset_id)


def _same(conn: Connection, row: Mapping[str, Any]) -> Dataset | None:
    """The newest unmarked dataset that is the one of `row` but for its id and time."""
    where = sa.and_(*(table.c[key] == row[key] for key in ("tenant", "name", "form", "content_hash", "reward_version", "rebuilt_from")))
    found = (Dataset(**one._mapping) for one in conn.execute(_counted().where(where).order_by(table.c.dataset_id.desc())))
    return next((one for one in found if not one.marks and one.filters == row["filters"]), None)


def content_hash(drafts: Sequence[Draft]) -> str:
    """The same for the same items with the same weights in the same splits and order."""
    lines = (f"{one.split} {one.weight!r} {one.sha256}\n" for one in drafts)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def get(conn: Connection, tenant: str, dataset_id: str) -> Dataset:
    row = conn.execute(_counted().where((table.c.tenant == tenant) & (table.c.dataset_id == dataset_id))).first()
    if row is None:
        raise NotFound(f"no dataset {dataset_id[:100]!r}; GET /v1/datasets lists yours", param="dataset_id")
    return Dataset(**row._mapping)


def list_datasets(conn: Connection, tenant: str, limit: int = 20, after: str | None = None) -> list[Dataset]:
    """The tenant's datasets, newest first; with `after` those older than that one."""
    where = table.c.tenant == tenant
    if after is not None:
        where &= table.c.dataset_id < after
    query = _counted().where(where).order_by(table.c.dataset_id.desc()).limit(limit)
    return [Dataset(**row._mapping) for row in conn.execute(query)]


def items(
    conn: Connection,
    tenant: str,
    dataset_id: str,
    split: str = "train",
    purpose: Purpose = "train",
    after: int = -1,
    limit: int | None = None,
) -> list[Item]:
    """The items of a split, in order, from behind number `after` on. Raises Forbidden for held-out items that are to be trained on, and
    Conflict for training on a dataset of which something was deleted."""
    found = get(conn, tenant, dataset_id)
    if split not in SPLITS:
        raise InvalidRequest(f"split {split[:60]!r} is one of {', '.join(SPLITS)}", param="split")
    if purpose == "train" and split != "train":
        raise Forbidden(
            f"the held-out split of {dataset_id} is never trained on: versions are judged with it; read it with purpose evaluate",
            param="split",
        )
    if purpose == "train" and found.marks:
        raise Conflict(
            f"{found.marks} things that dataset {dataset_id} was made of were deleted; rebuild it and train on the new one",
            param="dataset_id",
        )
    where = (item_rows.c.dataset_id == dataset_id) & (item_rows.c.split == split) & (item_rows.c.number > after)
    query = sa.select(item_rows).where(where & item_rows.c.deleted_at.is_(None)).order_by(item_rows.c.number)
    inflate = zstandard.ZstdDecompressor().decompress
    return [
        Item(row.number, row.split, row.episode_id, row.weight, json.loads(inflate(row.body)))
        for row in conn.execute(query if limit is None else query.limit(limit))
    ]


def traces(conn: Connection, tenant: str, dataset_id: str, after: int = -1, limit: int = 1000) -> list[Trace]:
    """Where each item comes from, in order."""
    get(conn, tenant, dataset_id)
    columns = [item_rows.c[name] for name in ("number", "split", "episode_id", "weight", "sha256", "deleted_at")]
    here = (item_rows.c.dataset_id == dataset_id) & (item_rows.c.number > after)
    found = conn.execute(sa.select(*columns).where(here).order_by(item_rows.c.number).limit(limit)).all()
    if not found:
        return []
    of: dict[int, list[tuple[str, str]]] = {}
    where = (source_rows.c.dataset_id == dataset_id) & source_rows.c.number.between(found[0].number, found[-1].number)
    for row in conn.execute(sa.select(source_rows).where(where).order_by(source_rows.c.kind, source_rows.c.source_id)):
        of.setdefault(row.number, []).append((row.kind, row.source_id))
    return [
        Trace(row.number, row.split, row.episode_id, row.weight, row.sha256, row.deleted_at is not None, of.get(row.number, []))
        for row in found
    ]


def rebuild(conn: Connection, tenant: str, dataset_id: str) -> Dataset:
    """A new dataset of the items that are left of this one."""
    found = get(conn, tenant, dataset_id)
    return create(
        conn,
        tenant,
        found.name,
        found.form,
        found.filters,
        list(_left(conn, tenant, dataset_id)),
        found.left_out,
        found.reward_version,
        rebuilt_from=dataset_id,
    )


def delete(conn: Connection, tenant: str, dataset_id: str) -> None:
    """Forgets a dataset. Of one that versions learned from the lineage stays, emptied and marked, and so do they."""
    get(conn, tenant, dataset_id)
    here = learned_rows.c.dataset_id == dataset_id
    if conn.execute(sa.select(learned_rows.c.version).where(here).limit(1)).first() is None:
        for rows in (source_rows, item_rows, mark_rows, table):
            conn.execute(rows.delete().where(rows.c.dataset_id == dataset_id))
        return
    now = time.time()
    conn.execute(item_rows.update().where(item_rows.c.dataset_id == dataset_id).values(body=b"", deleted_at=now))
    place = {"dataset_id": dataset_id, "kind": "dataset", "source_id": dataset_id}
    conn.execute(mark_rows.delete().where(sa.and_(*(mark_rows.c[name] == value for name, value in place.items()))))
    conn.execute(mark_rows.insert().values(tenant=tenant, created_at=now, **place))


def marks(conn: Connection, tenant: str, dataset_id: str) -> list[Mark]:
    """What was deleted of that which a dataset was made of, oldest first."""
    where = (mark_rows.c.tenant == tenant) & (mark_rows.c.dataset_id == dataset_id)
    columns = [mark_rows.c[name] for name in Mark.__struct_fields__]
    return [Mark(**row._mapping) for row in conn.execute(sa.select(*columns).where(where).order_by(mark_rows.c.created_at))]


def learned(conn: Connection, tenant: str, version: str, dataset_ids: Sequence[str], parent: str | None = None) -> None:
    """`version` (the id of its weights) learned from these datasets, and began with the weights `parent`, whose datasets it inherits."""
    wanted = dict.fromkeys(dataset_ids, False)
    for dataset_id in dataset_ids:
        get(conn, tenant, dataset_id)
    if parent:
        wanted = {one.dataset_id: True for one in datasets_of(conn, tenant, parent)} | wanted
    there = {one.dataset_id: one.inherited for one in datasets_of(conn, tenant, version)}
    for dataset_id, inherited in wanted.items():
        here = (learned_rows.c.tenant == tenant) & (learned_rows.c.version == version) & (learned_rows.c.dataset_id == dataset_id)
        if dataset_id not in there:
            row = {"tenant": tenant, "version": version, "dataset_id": dataset_id, "inherited": inherited, "created_at": time.time()}
            conn.execute(learned_rows.insert().values(**row))
        elif there[dataset_id] and not inherited:
            conn.execute(learned_rows.update().where(here).values(inherited=False))


def datasets_of(conn: Connection, tenant: str, version: str) -> list[Learned]:
    """What a version learned from, itself or through those that it began with."""
    return _learned(conn, (learned_rows.c.tenant == tenant) & (learned_rows.c.version == version))


def versions_of(conn: Connection, tenant: str, dataset_id: str) -> list[Learned]:
    """Who learned from a dataset."""
    return _learned(conn, (learned_rows.c.tenant == tenant) & (learned_rows.c.dataset_id == dataset_id))


def marked_versions(conn: Connection, tenant: str) -> list[str]:
    """The versions that learned from something that is deleted by now."""
    marked = sa.select(mark_rows.c.dataset_id).where(mark_rows.c.tenant == tenant)
    where = (learned_rows.c.tenant == tenant) & learned_rows.c.dataset_id.in_(marked)
    return list(conn.execute(sa.select(learned_rows.c.version).where(where).distinct().order_by(learned_rows.c.version)).scalars())


def _learned(conn: Connection, where: sa.ColumnElement[bool]) -> list[Learned]:
    count = sa.select(sa.func.count()).select_from(mark_rows).where(mark_rows.c.dataset_id == learned_rows.c.dataset_id)
    columns = [learned_rows.c[name] for name in ("version", "dataset_id", "inherited", "created_at")]
    query = sa.select(*columns, count.scalar_subquery().label("marks")).where(where)
    return [Learned(**row._mapping) for row in conn.execute(query.order_by(learned_rows.c.version, learned_rows.c.dataset_id))]


def _check(name: str, form: str, reward_version: str | None) -> None:
    if reward_version is not None and (len(reward_version) > MAX_NAME or not storable(reward_version)):
        raise InvalidRequest(f"reward_version must be text of {MAX_NAME} characters at most", param="reward_version")
    if form not in FORMS:
        raise InvalidRequest(f"form {form[:60]!r} is one of {', '.join(FORMS)}", param="form")
    if not 1 <= len(name) <= MAX_NAME or not storable(name):
        raise InvalidRequest(f"name must be text of 1 to {MAX_NAME} characters, without NUL and half surrogate pairs", param="name")


def _alive(conn: Connection, tenant: str, drafts: Sequence[Draft]) -> list[Draft]:
    """Those whose sources are all there still: what was gathered in a read may be deleted before it is written."""
    rows = {"record": tables.records.c.record_id, "feedback": tables.feedback.c.feedback_id, "episode": tables.episodes.c.episode_id}
    wanted = sorted({source for one in drafts for source in one.sources})
    there: set[tuple[str, str]] = set()
    for kind, column in rows.items():
        ids = [source_id for known, source_id in wanted if known == kind]
        for start in range(0, len(ids), 500):
            where = column.in_(ids[start : start + 500]) & (column.table.c.tenant == tenant)
            there |= {(kind, source_id) for source_id in conn.execute(sa.select(column).where(where)).scalars()}
    return [one for one in drafts if there.issuperset(one.sources)]


def _left(conn: Connection, tenant: str, dataset_id: str) -> Iterator[Draft]:
    of = {one.number: one for one in traces(conn, tenant, dataset_id, limit=10**9) if not one.deleted}
    where = (item_rows.c.dataset_id == dataset_id) & item_rows.c.deleted_at.is_(None)
    for row in conn.execute(sa.select(item_rows).where(where).order_by(item_rows.c.number)):
        yield Draft(row.split, row.episode_id, row.weight, row.body, row.sha256, of[row.number].sources)


def _counted() -> sa.Select[tuple[object, ...]]:
    """Rows with the fields of Dataset."""
    count = sa.select(sa.func.count()).select_from(mark_rows).where(mark_rows.c.dataset_id == table.c.dataset_id)
    return sa.select(table, count.scalar_subquery().label("marks"))
