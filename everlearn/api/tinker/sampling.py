"""Samplers and sampling requests."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from everlearn.api.auth import caller, tenant
from everlearn.api.images import ImageReader, load
from everlearn.api.ledger import Done, Failed, Ledger
from everlearn.api.limiter import Lease
from everlearn.api.services import Services, services
from everlearn.api.tinker import checks, codec_json, forms
from everlearn.api.tinker.paths import base_model_of, parse_source
from everlearn.api.tinker.recordings import pack_prompt, sequence_ids
from everlearn.engine import protocol
from everlearn.errors import InvalidRequest, TooLarge
from everlearn.render.images import look_at
from everlearn.store import checkpoints, runs
from everlearn.store.log import Entry
from everlearn.types import Array, BaseModelInfo, SampleResult

router = APIRouter(prefix="/api/v1", tags=["tinker: sampling"])
KEPT_SAMPLERS = 4096


@router.post("/create_sampling_session")
async def create_sampling_session(request: Request) -> dict[str, Any]:
    form = await forms.read(request, forms.CreateSamplingSession)
    svc, owner = services(request), tenant(request)
    checks.whole(form.sampling_session_seq_id, "sampling_session_seq_id")
    if form.model_path is not None:
        target = await of_checkpoint(svc, owner, form.model_path, form.base_model)
    elif form.base_model is not None:
        svc.catalog.resolve(form.base_model)
        target = {"base_model": form.base_model, "kind": "base"}
    else:
        raise InvalidRequest("neither base_model nor model_path is given; a sampler needs one of them", param="base_model")
    svc.limiter.check_model(caller(request), target.get("model_path") or target["base_model"])
    sampler = await svc.write(
        lambda conn: runs.create_sampler(conn, owner, session_id=form.session_id, seq=form.sampling_session_seq_id, **target)
    )
    return {"type": "create_sampling_session", "sampling_session_id": sampler.sampler_id}


async def of_checkpoint(svc: Services, owner: str, model_path: str, base_model: str | None) -> dict[str, Any]:
    path = parse_source(model_path)
    if path.kind == "external_weights":
        raise InvalidRequest(f"{path} is an export; sample from weights of kind sampler_weights or weights", param="model_path")
    checkpoint = await svc.read(lambda conn: checkpoints.get(conn, owner, path, public=True))
    base = await base_model_of(svc, checkpoint)
    if base_model is not None and svc.catalog.resolve(base_model).name != svc.catalog.resolve(base).name:
        raise InvalidRequest(f"{path} belongs to base model {base!r}, not to {base_model!r}; leave base_model out", param="base_model")
    return {
        "base_model": base,
        "model_path": str(path),
        "model_id": checkpoint.run_id,
        "version": checkpoint.version,
        "folder": checkpoint.folder,
        "kind": "persistent",
    }


@router.post("/join_sampling_session")
async def join_sampling_session(request: Request) -> dict[str, Any]:
    form = await forms.read(request, forms.SamplingSessionOnly, strict=False)
    owner = tenant(request)
    counter = await services(request).write(lambda conn: runs.join_sampler(conn, owner, form.sampling_session_id))
    return {"type": "join_sampling_session", "client_counter": counter}


@router.get("/samplers/{sampler_id}")
async def get_sampler(request: Request, sampler_id: str) -> dict[str, Any]:
    owner = tenant(request)
    sampler = await services(request).read(lambda conn: runs.get_sampler(conn, owner, sampler_id))
    return {"sampler_id": sampler.sampler_id, "base_model": sampler.base_model, "model_path": sampler.model_path}


@router.post("/asample")
async def asample(request: Request) -> dict[str, Any]:
    form = await forms.read(request, forms.SampleForm)
    svc, owner = services(request), tenant(request)
    if form.sampling_session_id is None or form.seq_id is None:
        raise InvalidRequest(
            "sampling_session_id and seq_id are required; create_sampling_session gives the first", param="sampling_session_id"
        )
    if form.base_model is not None or form.model_path is not None:
        raise InvalidRequest("base_model and model_path belong to create_sampling_session; leave them out here", param="base_model")
    sampler_id, seq = form.sampling_session_id, checks.whole(form.seq_id, "seq_id")
    sampler = await sampler_of(svc, owner, sampler_id)
    request_id = f"{sampler_id}:{seq}"
    command, meta = await read(svc, owner, sampler, form, request_id)
    wanted = meta["tokens"] + form.num_samples * command.params.max_tokens
    lease = None
    if not svc.dispatcher.ledger.known(request_id):  # the same request again takes no second share
        lease = svc.limiter.admit(caller(request), sampler.model_path or sampler.base_model, wanted)
    try:
        entry = await svc.dispatcher.submit(owner, command, model_id=sampler_id, seq=seq, fingerprint=checks.fingerprint(form), meta=meta)
    except BaseException:
        if lease is not None:
            lease.spent(0)
            lease.release()
        raise
    if lease is not None:
        hold(svc.dispatcher.ledger, lease, entry, meta["tokens"])
    return {
        "request_id": entry.request_id,
        "model_id": sampler_id,
        "sample_sequence_ids": sequence_ids(entry.request_id, form.num_samples),
    }


def hold(ledger: Ledger, lease: Lease, entry: Entry, prompt_tokens: int) -> None:
    """The request's share of its key's limits is held until its answer is there, and then settled by what was drawn."""

    def settle(answer: Done | Failed | None) -> None:
        drawn = answer.result.sequences if isinstance(answer, Done) and isinstance(answer.result, SampleResult) else []
        lease.spent(prompt_tokens + sum(sequence.tokens.shape[0] for sequence in drawn))
        lease.release()

    pending = ledger.get(entry.request_id)
    if pending is None:
        settle(ledger.answer(entry.tenant, entry.request_id))
    else:
        pending.future.add_done_callback(lambda done: settle(None if done.cancelled() else done.result()))


async def sampler_of(svc: Services, owner: str, sampler_id: str) -> runs.Sampler:
    """The sampler's row. It never changes but for an inflight one, and a client asks for it with every sample."""
    kept = svc.samplers.get((owner, sampler_id))
    if kept is not None:
        return kept
    sampler = await svc.read(lambda conn: runs.get_sampler(conn, owner, sampler_id))
    if sampler.kind != "inflight":
        if len(svc.samplers) >= KEPT_SAMPLERS:
            svc.samplers.clear()
        svc.samplers[owner, sampler_id] = sampler
    return sampler


async def read(
    svc: Services, owner: str, sampler: runs.Sampler, form: forms.SampleForm, request_id: str
) -> tuple[protocol.Sample, dict[str, Any]]:
    """`build`, in a thread for images if there are any. Those that the prompt gives an address of are fetched first, and logged like
    others."""
    if not codec_json.shows_images(form.prompt):
        return build(svc, owner, sampler, form, request_id, {})
    reader = ImageReader(svc.catalog.resolve(sampler.base_model), svc.settings.images)
    fetched: dict[int, bytes] = {}
    for i, chunk in enumerate(form.prompt.chunks):
        if chunk.type == "image_asset_pointer":
            place = f"prompt.chunks[{i}].location"
            reader.vision(place)
            fetched[i] = await load(chunk.location, svc.settings.images, place)
            if sum(map(len, fetched.values())) > svc.settings.api.max_body_bytes:
                raise TooLarge(f"{place}: the prompt's images have more bytes than a request may have (api.max_body_bytes)", param=place)
    return await look_at(build, svc, owner, sampler, form, request_id, fetched)


def build(
    svc: Services, owner: str, sampler: runs.Sampler, form: forms.SampleForm, request_id: str, fetched: dict[int, bytes]
) -> tuple[protocol.Sample, dict[str, Any]]:
    """The command, and what its log entry keeps beside it: the counts, the layout of its targets, the prompt if it is recorded."""
    info: BaseModelInfo = svc.catalog.resolve(sampler.base_model)
    row = checks.prompt(form, info, ImageReader(info, svc.settings.images), fetched)
    tokens = row.tokens()
    params = checks.sampling_params(form.sampling_params, tokens.size, info)
    checks.sample_extras(form, tokens.size, info, svc.settings.engine.queue_limit)
    targets, layout = checks.targets(form.target_prompt_logprobs, tokens.size, info, svc.settings.api.max_body_bytes)
    command = protocol.Sample(
        request_id=request_id,
        base=info.name,
        version=sampler.version,
        folder=sampler.folder,
        cache_salt=owner,
        prompt=Array("int32", [tokens.size], tokens.tobytes()),
        num_samples=form.num_samples,
        params=params,
        prompt_logprobs=bool(form.prompt_logprobs),
        prompt_logprobs_last_n=form.prompt_logprobs_last_n,
        topk_prompt_logprobs=form.topk_prompt_logprobs,
        topk_sample_logprobs=form.topk_sample_logprobs,
        target_prompt_logprobs=targets,
        prompt_alt_tokens_k=form.prompt_alt_tokens_k,
        images=row.images,
    )
    subject = sampler.model_path or sampler.model_id or sampler.base_model
    meta: dict[str, Any] = {"num_samples": form.num_samples, "tokens": int(tokens.size), "subject": subject}
    if layout is not None:
        meta["layout"] = layout
    if sampler.kind == "inflight":
        meta["folder"] = sampler.folder  # the sampler moves on to newer weights; these are kept until this request has its answer
    if form.record_stability_info:
        meta |= {"prompt": pack_prompt(tokens), "version": sampler.version}
    return command, meta
