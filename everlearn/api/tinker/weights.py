"""Saving and loading weights. Saves are training requests: they see the adapter as it is at their place in the order."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request

from everlearn.api.auth import caller, tenant
from everlearn.api.services import Services, services
from everlearn.api.tinker import checks, forms, places
from everlearn.api.tinker.paths import checkpoint_of, run_of
from everlearn.api.tinker.ticket import Prepared, Ticket
from everlearn.engine import protocol
from everlearn.errors import Forbidden, InvalidRequest, Unsupported
from everlearn.store import checkpoints, runs

router = APIRouter(prefix="/api/v1", tags=["tinker: weights"])

SAMPLER_KINDS = ("snapshot", "inflight")


@router.post("/save_weights")
async def save_weights(request: Request) -> dict[str, Any]:
    form = await places.read(request, forms.SaveWeights)
    return await save(request, "weights", form, optimizer=True, overwrite=form.overwrite, metadata=form.user_metadata)


@router.post("/save_weights_external")
async def save_weights_external(request: Request) -> dict[str, Any]:
    form = await places.read(request, forms.SaveExternal)
    return await save(request, "external_weights", form, optimizer=False, overwrite=False, metadata=None)


async def save(
    request: Request,
    kind: str,
    form: forms.SaveWeights | forms.SaveExternal,
    *,
    optimizer: bool,
    overwrite: bool,
    metadata: dict[str, str] | None,
) -> dict[str, Any]:
    svc = services(request)
    ticket = Ticket(svc, caller(request), form.model_id, checks.seq(form.seq_id), checks.fingerprint(form))

    async def prepare() -> Prepared:
        if isinstance(form, forms.SaveExternal) and form.age_encryption_recipients:
            raise Unsupported("this server doesn't encrypt exports; leave age_encryption_recipients out", param="age_encryption_recipients")
        name = checkpoints.check_name(default_name(ticket) if form.path is None else form.path)
        await ticket.run()
        await check_room(svc)
        folder = str(checkpoints.checkpoint_folder(svc.settings.home, ticket.model_id, kind, name, ticket.seq))
        meta = {
            "checkpoint_kind": kind,
            "name": name,
            "folder": folder,
            "overwrite": overwrite,
            "ttl_seconds": checks.ttl(form.ttl_seconds),
            "user_metadata": checks.metadata(metadata),
            "optimizer": optimizer,
        }
        return protocol.Save(ticket.request_id, ticket.model_id, ticket.seq, folder, optimizer, metadata or {}), meta

    return await ticket.answer(prepare)


async def check_room(svc: Services, wanted: int = 1) -> None:
    """Refuses where checkpoints of `wanted` bytes more would pass the bound. (A save's own size is known when it is written.)"""
    limit = svc.settings.store.checkpoint_max_bytes
    if limit and await svc.read(checkpoints.total_bytes) + wanted > limit:
        raise Forbidden(f"checkpoints fill store.checkpoint_max_bytes ({limit}); delete some, or raise it")


def default_name(ticket: Ticket) -> str:
    return f"{ticket.seq:08d}"


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(request: Request) -> dict[str, Any]:
    """Persistent under a name (`path`), or ephemeral: a sampler (`sampling_session_seq_id`) whose weights have no name."""
    form = await places.read(request, forms.SaveForSampler)
    svc = services(request)
    ticket = Ticket(svc, caller(request), form.model_id, checks.seq(form.seq_id), checks.fingerprint(known_by(form)))

    async def prepare() -> Prepared:
        check_sampler_form(form)
        run = await ticket.run()
        version = checkpoints.new_version()
        meta: dict[str, Any] = {"version": version, "kind": form.kind, "user_metadata": checks.metadata(form.user_metadata)}
        if form.sampling_session_seq_id is None:
            name = checkpoints.check_name(default_name(ticket) if form.path is None else form.path)
            await check_room(svc)
            folder = checkpoints.checkpoint_folder(svc.settings.home, ticket.model_id, "sampler_weights", name, ticket.seq)
            meta |= {"name": name, "overwrite": False, "ttl_seconds": checks.ttl(form.ttl_seconds)}
        else:
            number = checks.whole(form.sampling_session_seq_id, "sampling_session_seq_id")
            folder = checkpoints.version_folder(svc.settings.home, version)
            meta |= {"sampling_session_seq_id": number, "sampling_session_id": runs.sampler_id(run.session_id, number), "ttl_seconds": None}
        meta["folder"] = str(folder)
        return protocol.Publish(ticket.request_id, ticket.model_id, ticket.seq, version, str(folder), form.user_metadata or {}), meta

    return await ticket.answer(prepare)


def known_by(form: forms.SaveForSampler) -> forms.SaveForSampler:
    """The part by which a save that is sent again is known: the SDK draws another sampler's number for each try, and takes the sampler
    that the answer names."""
    return form if form.sampling_session_seq_id is None else msgspec.structs.replace(form, sampling_session_seq_id=0)


def check_sampler_form(form: forms.SaveForSampler) -> None:
    if form.kind not in SAMPLER_KINDS:
        raise InvalidRequest(f"kind is {form.kind!r}; it must be one of {', '.join(SAMPLER_KINDS)}", param="kind")
    if form.sampling_session_seq_id is None:
        if form.kind == "inflight":
            raise InvalidRequest("kind 'inflight' has no name; send sampling_session_seq_id instead of path", param="kind")
        return
    if form.path is not None:
        raise InvalidRequest(
            "path (a named checkpoint) and sampling_session_seq_id (an unnamed one) exclude each other; send one", param="path"
        )
    if form.ttl_seconds is not None:
        raise InvalidRequest(
            "ttl_seconds is for named checkpoints; an unnamed one lasts as long as its sampler is in use", param="ttl_seconds"
        )


@router.post("/load_weights")
async def load_weights(request: Request) -> dict[str, Any]:
    """Into a run that exists (model_id and seq_id), or as the first request of a new one (session_id and model_seq_id)."""
    form = await places.read(request, forms.LoadWeights)
    new = form.session_id is not None or form.model_seq_id is not None
    if new == (form.model_id is not None):
        raise InvalidRequest("send either model_id and seq_id, or session_id and model_seq_id", param="model_id")
    return await load_into_new(request, form) if new else await load_into(request, form)


async def load_into(request: Request, form: forms.LoadWeights) -> dict[str, Any]:
    svc = services(request)
    ticket = Ticket(svc, caller(request), form.model_id or "", checks.seq(form.seq_id), checks.fingerprint(form))

    async def prepare() -> Prepared:
        if form.optimizer_config is not None or form.base_model is not None:
            raise InvalidRequest("optimizer_config and base_model are for a new run; this one has both already", param="optimizer_config")
        run = await ticket.run()
        checkpoint, source = await source_of(svc, ticket.tenant, form)
        check_fits(svc, run, source, checkpoint)
        command = load_command(svc, ticket.request_id, run, ticket.seq, checkpoint, form.optimizer, create=False)
        return command, {"folder": checkpoint.folder, "path": form.path, "create": False}

    return await ticket.answer(prepare)


async def load_into_new(request: Request, form: forms.LoadWeights) -> dict[str, Any]:
    svc, owner = services(request), tenant(request)
    if form.session_id is None or form.model_seq_id is None:
        raise InvalidRequest("a new run needs both session_id and model_seq_id", param="session_id")
    session_id, number = form.session_id, checks.whole(form.model_seq_id, "model_seq_id")
    ticket = Ticket(svc, caller(request), runs.run_id(session_id, number), 0, checks.fingerprint(form))

    async def prepare() -> Prepared:
        checks.optimizer_config(form.optimizer_config)
        await svc.read(lambda conn: runs.get_session(conn, owner, session_id))
        checkpoint, source = await source_of(svc, owner, form)
        base_model = form.base_model or source.base_model
        if svc.catalog.resolve(base_model).name != svc.catalog.resolve(source.base_model).name:
            raise InvalidRequest(f"{form.path} belongs to base model {source.base_model!r}, not to {base_model!r}", param="base_model")
        svc.limiter.check_model(ticket.caller, base_model)
        run = msgspec.structs.replace(source, run_id=ticket.model_id, tenant=owner, base_model=base_model)
        meta = {
            "folder": checkpoint.folder,
            "path": form.path,
            "create": True,
            "session_id": session_id,
            "model_seq_id": number,
            "base_model": base_model,
            "lora": msgspec.to_builtins(run.lora),
            "user_metadata": checks.metadata(form.user_metadata),
        }
        return load_command(svc, ticket.request_id, run, 0, checkpoint, form.optimizer, create=True), meta

    return await ticket.answer(prepare)


async def source_of(svc: Services, owner: str, form: forms.LoadWeights) -> tuple[checkpoints.Checkpoint, runs.Run]:
    checkpoint = await checkpoint_of(svc, owner, form.path, form.weights_access_token)
    if form.optimizer and not checkpoint.optimizer:
        raise InvalidRequest(
            f"{form.path} holds no optimizer state; load it with optimizer=false, or a checkpoint of save_state", param="optimizer"
        )
    return checkpoint, await run_of(svc, checkpoint)


def check_fits(svc: Services, run: runs.Run, source: runs.Run, checkpoint: checkpoints.Checkpoint) -> None:
    """A run's adapter keeps its base model and its shape; other weights need a run of their own."""
    if svc.catalog.resolve(run.base_model).name != svc.catalog.resolve(source.base_model).name:
        raise InvalidRequest(
            f"{checkpoint.path} belongs to base model {source.base_model!r}, and run {run.run_id} to {run.base_model!r}", param="path"
        )
    for name in ("rank", "alpha", "expert_lora", "train_attn", "train_mlp", "train_unembed", "train_vision"):
        mine, theirs = getattr(run.lora, name), getattr(source.lora, name)
        if mine != theirs:
            raise InvalidRequest(
                f"{checkpoint.path} has {name} {theirs}, and run {run.run_id} has {mine}; load it into a new run",
                param="path",
            )


def load_command(
    svc: Services, request_id: str, run: runs.Run, seq: int, checkpoint: checkpoints.Checkpoint, optimizer: bool, *, create: bool
) -> protocol.Load:
    return protocol.Load(
        request_id=request_id,
        model_id=run.run_id,
        seq=seq,
        tenant=run.tenant,
        base=svc.catalog.resolve(run.base_model).name,
        lora=run.lora,
        folder=checkpoint.folder,
        optimizer=optimizer,
        create=create,
    )
