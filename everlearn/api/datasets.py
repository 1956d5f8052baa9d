"""/v1/datasets: episodes and feedback, chosen by filters and frozen; exported as JSON lines; marked when something of it is deleted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import Connection

from everlearn.api import auth, bodies
from everlearn.api.auth import scope, tenant
from everlearn.api.openai import types
from everlearn.api.paging import After, Limit, listing, page, refuse_unknown
from everlearn.api.services import Services, services
from everlearn.api.target import resolve
from everlearn.api.tinker.forms import CHECK_ADDRESS
from everlearn.errors import InvalidRequest
from everlearn.loop.gather import Filters, gather
from everlearn.loop.weights import factors
from everlearn.store import datasets, feedback_checks
from everlearn.store.datasets import Dataset, Item, Learned, Trace

router = APIRouter(prefix="/v1/datasets", tags=["datasets"], dependencies=[CHECK_ADDRESS])

# They hold what others said: a key that may only sample doesn't see them.
READS, MAKES = [scope("train", "read")], [scope("train")]
MAX_FILTERS = 64 * 1024
PIECE = 200  # items of an export that are in memory at once
TOKENS = ("token_ids", "logprobs")  # how the fields end that an export leaves out unless they are wanted
Purpose = Literal["train", "evaluate"]
Split = Literal["train", "heldout"]


class DatasetForm(types.Form):
    name: str
    form: str
    filters: Filters = Filters()
    reward_version: str | None = None


class LearnedForm(types.Form):
    """`version` and `parent`: what a model is asked for by (support@8, tinker://...)."""

    version: str
    parent: str | None = None


def dataset_json(dataset: Dataset) -> dict[str, Any]:
    return {
        "id": dataset.dataset_id,
        "object": "dataset",
        "created_at": int(dataset.created_at),
        "name": dataset.name,
        "form": dataset.form,
        "filters": dataset.filters,
        "content_hash": dataset.content_hash,
        "items": {"train": dataset.train_items, "heldout": dataset.heldout_items},
        "left_out": dataset.left_out,
        "reward_version": dataset.reward_version,
        "rebuilt_from": dataset.rebuilt_from,
        "bytes": dataset.bytes,
        "marks": dataset.marks,
    }


def learned_json(one: Learned) -> dict[str, Any]:
    return {"version": one.version, "inherited": one.inherited, "created_at": int(one.created_at)}


def trace_json(trace: Trace) -> dict[str, Any]:
    told = {"id": str(trace.number), "object": "dataset.item", "split": trace.split, "episode_id": trace.episode_id, "weight": trace.weight}
    told |= {"sha256": trace.sha256, "deleted": trace.deleted}
    return told | {"sources": [{"kind": kind, "id": source_id} for kind, source_id in trace.sources]}


@router.post("", dependencies=MAKES)
async def create_dataset(request: Request) -> dict[str, Any]:
    """Freezes what the filters choose now."""
    svc, owner = services(request), tenant(request)
    form = await bodies.read(request, DatasetForm)
    check(form.filters)
    settings = svc.settings.feedback
    found = await svc.read(lambda conn: gather(conn, owner, form.form, form.filters, settings.source_cap, factors(settings)))
    filters = msgspec.to_builtins(form.filters)

    def freeze(conn: Connection) -> Dataset:
        return datasets.create(conn, owner, form.name, form.form, filters, found.drafts, found.left_out, form.reward_version)

    return dataset_json(await svc.write(freeze))


def check(filters: Filters) -> None:
    if len(msgspec.json.encode(filters)) > MAX_FILTERS:
        raise InvalidRequest(f"filters have more than {MAX_FILTERS} bytes; choose by fewer names", param="filters")
    for source in filters.sources or ():
        if source not in feedback_checks.SOURCES:
            known = ", ".join(feedback_checks.SOURCES)
            raise InvalidRequest(f"filters.sources names {source[:60]!r}; a source is one of {known}", param="filters.sources")


@router.get("", dependencies=READS)
async def list_datasets(request: Request, limit: int = Limit, after: str | None = After) -> dict[str, Any]:
    """The tenant's datasets, newest first."""
    return await listing(request, limit, after, datasets.list_datasets, dataset_json)


@router.get("/{dataset_id}", dependencies=READS)
async def get_dataset(request: Request, dataset_id: str) -> dict[str, Any]:
    """One dataset, with the versions that learned from it and what was deleted of its sources."""
    owner = tenant(request)

    def read(conn: Connection) -> dict[str, Any]:
        told = dataset_json(datasets.get(conn, owner, dataset_id))
        versions = [learned_json(one) for one in datasets.versions_of(conn, owner, dataset_id)]
        deleted = [
            {"kind": mark.kind, "id": mark.source_id, "deleted_at": int(mark.created_at)}
            for mark in datasets.marks(conn, owner, dataset_id)
        ]
        return told | {"versions": versions, "deleted": deleted}

    return await services(request).read(read)


@router.get("/{dataset_id}/items", dependencies=READS)
async def list_items(request: Request, dataset_id: str, limit: int = Limit, after: str | None = After) -> dict[str, Any]:
    """Where each item comes from, in order; not what it says."""
    refuse_unknown(request, "limit", "after")
    owner = tenant(request)
    if after is not None and not (after.isascii() and after.isdigit() and len(after) < 12):
        raise InvalidRequest("after must be the id of an item, a whole number", param="after")
    behind = -1 if after is None else int(after)
    found = await services(request).read(lambda conn: datasets.traces(conn, owner, dataset_id, behind, limit + 1))
    return page(found, limit, trace_json)


@router.get("/{dataset_id}/export", dependencies=READS)
async def export_dataset(
    request: Request, dataset_id: str, split: Split = "train", purpose: Purpose = "train", tokens: bool = False
) -> StreamingResponse:
    """The items of a split as JSON lines. The held-out split is given for evaluation only."""
    refuse_unknown(request, "split", "purpose", "tokens")
    svc, owner = services(request), tenant(request)
    first = await svc.read(lambda conn: datasets.items(conn, owner, dataset_id, split, purpose, limit=PIECE))
    lines = _lines(svc, owner, dataset_id, split, purpose, tokens, first)
    headers = {"content-disposition": f'attachment; filename="{dataset_id}-{split}.jsonl"'}
    return StreamingResponse(lines, media_type="application/x-ndjson", headers=headers)


async def _lines(
    svc: Services, owner: str, dataset_id: str, split: Split, purpose: Purpose, tokens: bool, found: list[Item]
) -> AsyncIterator[bytes]:
    while found:
        yield await asyncio.to_thread(jsonl, found, tokens)
        last = found[-1].number
        found = await svc.read(lambda conn, last=last: datasets.items(conn, owner, dataset_id, split, purpose, last, PIECE))  # type: ignore[misc]


def jsonl(items: list[Item], tokens: bool) -> bytes:
    out = []
    for item in items:
        body = item.body if tokens else {name: value for name, value in item.body.items() if not name.endswith(TOKENS)}
        out.append(json.dumps(body).encode() + b"\n")
    return b"".join(out)


@router.post("/{dataset_id}/rebuild", dependencies=MAKES)
async def rebuild_dataset(request: Request, dataset_id: str) -> dict[str, Any]:
    """A new dataset of what is left of this one."""
    owner = tenant(request)
    return dataset_json(await services(request).write(lambda conn: datasets.rebuild(conn, owner, dataset_id)))


@router.post("/{dataset_id}/versions", dependencies=MAKES)
async def tell_version(request: Request, dataset_id: str) -> dict[str, Any]:
    """Keeps that a version learned from this dataset (one that was trained elsewhere tells so itself)."""
    svc, caller = services(request), auth.caller(request)
    form = await bodies.read(request, LearnedForm)
    version = (await resolve(svc, caller, form.version)).version
    parent = (await resolve(svc, caller, form.parent)).version if form.parent else None
    if not version:
        raise InvalidRequest(f"{form.version[:100]!r} is a base model, which learns nothing here", param="version")
    await svc.write(lambda conn: datasets.learned(conn, caller.tenant, version, [dataset_id], parent))
    found = await svc.read(lambda conn: datasets.versions_of(conn, caller.tenant, dataset_id))
    return {"object": "list", "data": [learned_json(one) for one in found]}


@router.delete("/{dataset_id}", status_code=204, dependencies=MAKES)
async def delete_dataset(request: Request, dataset_id: str) -> Response:
    """Forgets a dataset. Of one that versions learned from the lineage stays, without what it said."""
    owner = tenant(request)
    await services(request).write(lambda conn: datasets.delete(conn, owner, dataset_id))
    return Response(status_code=204)
