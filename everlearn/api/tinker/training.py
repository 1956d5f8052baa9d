"""Training runs: creation, forward_backward, optim_step. Each request is checked, logged, acknowledged; the engine comes later."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from fastapi import APIRouter, Request

from everlearn.api.auth import caller, is_loopback, tenant
from everlearn.api.images import ImageReader
from everlearn.api.services import Services, services
from everlearn.api.tinker import checks, codec, codec_json, forms, places
from everlearn.api.tinker.codec import ForwardBackwardCall
from everlearn.api.tinker.recordings import attach_recordings
from everlearn.api.tinker.ticket import Prepared, Ticket
from everlearn.engine import protocol
from everlearn.errors import InvalidRequest, UserError
from everlearn.losses import spec
from everlearn.render.images import look_at
from everlearn.store import runs
from everlearn.types import BaseModelInfo

router = APIRouter(prefix="/api/v1", tags=["tinker: training"])

UNLOADED = "unload:"


@router.post("/create_model")
async def create_model(request: Request) -> dict[str, Any]:
    form = await forms.read(request, forms.CreateModel)
    svc, owner = services(request), tenant(request)
    checks.whole(form.model_seq_id, "model_seq_id")
    run_id = runs.run_id(form.session_id, form.model_seq_id)
    ticket = Ticket(svc, caller(request), run_id, 0, checks.fingerprint(form))

    async def prepare() -> Prepared:
        checks.optimizer_config(form.optimizer_config)
        info = svc.catalog.resolve(form.base_model)
        svc.limiter.check_model(ticket.caller, form.base_model)
        lora = checks.lora(form.lora_config, svc.settings, info)
        await svc.read(lambda conn: runs.get_session(conn, owner, form.session_id))
        command = protocol.Create(request_id=ticket.request_id, model_id=run_id, tenant=owner, base=info.name, lora=lora)
        meta = {
            "session_id": form.session_id,
            "model_seq_id": form.model_seq_id,
            "base_model": form.base_model,
            "lora": msgspec.to_builtins(lora),
            "user_metadata": checks.metadata(form.user_metadata),
        }
        return command, meta

    return await ticket.answer(prepare)


@router.post("/get_info")
async def get_info(request: Request) -> dict[str, Any]:
    form = await forms.read(request, forms.ModelOnly, strict=False)
    svc, owner = services(request), tenant(request)
    run = await svc.read(lambda conn: runs.get_run(conn, owner, form.model_id))
    info = svc.catalog.resolve(run.base_model)
    return {
        "type": "get_info",
        "model_id": run.run_id,
        "model_data": {"arch": info.architecture, "model_name": run.base_model, "tokenizer_id": tokenizer_id(request, info)},
        "optimizer_config": {"type": "adamw"},
        "is_lora": True,
        "lora_rank": run.lora.rank,
        "expert_lora": run.lora.expert_lora,
        "model_name": run.base_model,
    }


def tokenizer_id(request: Request, info: BaseModelInfo) -> str | None:
    """A client on this machine can read the model's folder; one elsewhere goes by the model's name. (The SDK cuts at ':'.)"""
    local = is_loopback(request.client.host if request.client else None)
    return info.path if local and ":" not in info.path and Path(info.path).is_dir() else None


@router.post("/forward_backward")
async def forward_backward(request: Request) -> dict[str, Any]:
    """Protobuf since SDK 0.25 (`forward_only` inside), JSON before."""
    body = await request.body()
    max_bytes = services(request).settings.api.max_body_bytes
    if request.headers.get("content-type", "").startswith(codec.CONTENT_TYPE):
        try:
            message, fingerprint = await aside(body, parse, body)
        except UserError as error:  # damaged, but where it belongs may still be read
            await places.keep(request, places.in_message(body), body, error)
            raise
        ticket = open_ticket(request, message.model_id, message.seq_id, fingerprint)
        return await submit_batch(
            ticket, body, codec.shows_images(message), lambda reader: codec.forward_backward_call(message, max_bytes, reader)
        )
    return await forward_backward_json(request, body, forward_only=False)


def parse(body: bytes) -> tuple[Any, str]:
    """The message, and its fingerprint: of its own deterministic form, because maps come in any order."""
    message = codec.parse_forward_backward(body)
    return message, checks.fingerprint(message.SerializeToString(deterministic=True))


@router.post("/forward")
async def forward(request: Request) -> dict[str, Any]:
    """Before SDK 0.25: the loss without a gradient."""
    return await forward_backward_json(request, await request.body(), forward_only=True)


async def forward_backward_json(request: Request, body: bytes, *, forward_only: bool) -> dict[str, Any]:
    form = await places.read(request, codec_json.ForwardBackwardForm)
    max_bytes = services(request).settings.api.max_body_bytes
    fingerprint = await aside(body, checks.fingerprint, body + (b"\0forward" if forward_only else b""))
    ticket = open_ticket(request, form.model_id, form.seq_id, fingerprint)
    return await submit_batch(
        ticket,
        body,
        codec_json.call_shows_images(form),
        lambda reader: codec_json.forward_backward_call(form, forward_only=forward_only, max_bytes=max_bytes, reader=reader),
    )


def open_ticket(request: Request, model_id: str, seq_id: int | None, fingerprint: str) -> Ticket:
    return Ticket(services(request), caller(request), forms.text_of(model_id, "model_id"), checks.seq(seq_id), fingerprint)


async def submit_batch(
    ticket: Ticket, body: bytes, shows_images: bool, decode: Callable[[ImageReader], ForwardBackwardCall]
) -> dict[str, Any]:
    async def prepare() -> Prepared:
        run = await ticket.run()
        info = ticket.svc.catalog.resolve(run.base_model)

        def checked() -> tuple[ForwardBackwardCall, dict[str, float | str]]:
            call = decode(ImageReader(info, ticket.svc.settings.images))
            return call, checks.data(call, info)

        call, config = await look_at(checked) if shows_images else await aside(body, checked)
        if spec.spec_of(call.loss_fn).spans:
            call = msgspec.structs.replace(call, data=await attach_recordings(ticket.svc, ticket.tenant, call.data))
        command = protocol.ForwardBackward(
            request_id=ticket.request_id,
            model_id=ticket.model_id,
            seq=ticket.seq,
            data=call.data,
            loss_fn=call.loss_fn,
            config=dict(config),
            forward_only=call.forward_only,
        )
        tokens = sum(datum.tokens.shape[0] for datum in call.data)
        return command, {"forward_only": call.forward_only, "tokens": tokens, "loss": call.loss_fn}

    return await ticket.answer(prepare)


async def aside(body: bytes, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, in a thread where the request is large."""
    return await asyncio.to_thread(function, *args) if len(body) > forms.BIG_BODY else function(*args)


@router.post("/optim_step")
async def optim_step(request: Request) -> dict[str, Any]:
    form = await places.read(request, forms.OptimStep)
    ticket = open_ticket(request, form.model_id, form.seq_id, checks.fingerprint(form))

    async def prepare() -> Prepared:
        adam = checks.adam(form)
        await ticket.run()
        return protocol.OptimStep(ticket.request_id, ticket.model_id, ticket.seq, adam), {"learning_rate": adam.learning_rate}

    return await ticket.answer(prepare)


@router.post("/unload_model")
async def unload_model(request: Request) -> dict[str, Any]:
    """Before SDK 0.26: ends a run at once; its checkpoints stay."""
    form = await forms.read(request, forms.ModelOnly, strict=False)
    await unload(services(request), tenant(request), form.model_id)
    return {"request_id": f"{UNLOADED}{form.model_id}", "model_id": form.model_id}


async def unload(svc: Services, owner: str, model_id: str) -> None:
    if not model_id:
        raise InvalidRequest("model_id is empty; name the training run", param="model_id")
    await svc.write(lambda conn: runs.unload_run(conn, owner, model_id))
    await svc.dispatcher.forget(model_id)
