"""Answers of requests that were acknowledged earlier: held long polls, then a state with a reason.

The kind of a request and the client's Accept header decide the form of its result. Whatever an old client sent, its answer reads
from the log entry alone, so it survives restarts of everything.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request, Response

from everlearn.api.auth import tenant
from everlearn.api.dispatch import Done, Failed, Waiting
from everlearn.api.errors import category
from everlearn.api.services import services
from everlearn.api.tinker import checks, codec, codec_json, forms
from everlearn.api.tinker.recordings import sequence_ids
from everlearn.api.tinker.training import UNLOADED
from everlearn.errors import InternalError, InvalidRequest
from everlearn.store import runs
from everlearn.store.checkpoints import TinkerPath
from everlearn.store.log import Entry
from everlearn.types import ForwardBackwardResult, OptimStepResult, SampleResult, SavedResult

router = APIRouter(prefix="/api/v1", tags=["tinker: futures"])

INLINE_BYTES = 2**20  # larger results are announced by their size first, where the client allows it
CLONE_SIZE = 1_000_000_000  # a cloned sampling client numbers its requests from clone * CLONE_SIZE


@router.post("/retrieve_future")
async def retrieve_future(request: Request) -> Response:
    form = await forms.read(request, forms.RetrieveFuture, strict=False)
    svc = services(request)
    if form.request_id.startswith(UNLOADED):
        return answer({"type": "unload_model", "model_id": form.request_id.removeprefix(UNLOADED)})
    outcome = await svc.dispatcher.wait(tenant(request), form.request_id, svc.settings.api.long_poll_seconds)
    if isinstance(outcome, Waiting):
        return answer(
            {"type": "try_again", "request_id": form.request_id, "queue_state": outcome.queue_state, "queue_state_reason": outcome.reason}
        )
    if isinstance(outcome, Failed):
        return answer({"error": outcome.error["message"], "category": category(outcome.error["code"])})
    response = render(outcome, protobuf=codec.CONTENT_TYPE in request.headers.get("accept", ""))
    if form.allow_metadata_only and len(response.body) > INLINE_BYTES:
        return answer({"status": "complete_metadata", "response_payload_size": len(response.body)})
    return response


def answer(body: dict[str, Any]) -> Response:
    """JSON as the SDKs read it: a NaN metric is NaN, not null."""
    return Response(json.dumps(body, separators=(",", ":")), media_type="application/json")


def render(done: Done, *, protobuf: bool) -> Response:
    entry, result = done.entry, done.result
    if isinstance(result, ForwardBackwardResult):
        if protobuf:
            return Response(codec.encode_forward_backward(result), media_type=codec.CONTENT_TYPE)
        return answer(codec_json.forward_backward_json(result))
    if isinstance(result, SampleResult):
        if protobuf:
            return Response(codec.encode_sample(result, entry.meta.get("layout")), media_type=codec.CONTENT_TYPE)
        return answer(codec_json.sample_json(result, sequence_ids(entry.request_id, len(result.sequences))))
    if isinstance(result, OptimStepResult):
        return answer({"type": "optim_step", "metrics": result.metrics})
    return answer(describe(entry, result.bytes if isinstance(result, SavedResult) else 0))


def describe(entry: Entry, size: int) -> dict[str, Any]:
    """The answer of a request whose result is that it was done."""
    meta = entry.meta
    if entry.kind == "create":
        return {"type": "create_model", "model_id": entry.model_id}
    if entry.kind == "load":
        return {"type": "load_weights", "path": meta["path"], "model_id": entry.model_id}
    if entry.kind == "save":
        path = str(TinkerPath(entry.model_id, meta["checkpoint_kind"], meta["name"]))
        if meta["checkpoint_kind"] == "external_weights":
            return {"type": "save_weights_external", "path": path, "size_bytes": size}
        return {"type": "save_weights", "path": path}
    if entry.kind == "publish":
        body: dict[str, Any] = {"type": "save_weights_for_sampler"}
        if "name" in meta:
            return body | {"path": str(TinkerPath(entry.model_id, "sampler_weights", meta["name"]))}
        return body | {"sampling_session_id": meta["sampling_session_id"]}
    raise InternalError(f"request {entry.request_id} of kind {entry.kind!r} ended with a result of another kind")


@router.post("/retrieve_futures")
async def retrieve_futures(request: Request) -> dict[str, Any]:
    """What finished in one sampling session since the cursor: a place in the order in which the log got its answers, so it means the
    same to every later server of this store. A cursor that the log hasn't reached is not ours, and all is told again."""
    form = await forms.read(request, forms.RetrieveFutures, strict=False)
    if form.target.type != "sampling_session":
        raise InvalidRequest(f"target.type is {form.target.type!r}; it must be sampling_session", param="target.type")
    svc, owner = services(request), tenant(request)
    sampler_id, clone = form.target.sampling_session_id, form.target.cloned_sampler_id
    if not 0 <= clone <= checks.MAX_SEQ // CLONE_SIZE:
        raise InvalidRequest(f"target.cloned_sampler_id is {clone}; it counts from 0", param="target.cloned_sampler_id")
    await svc.read(lambda conn: runs.get_sampler(conn, owner, sampler_id))
    longest = svc.settings.api.long_poll_seconds
    timeout = longest if form.timeout is None else max(0.0, min(form.timeout, longest))
    seqs = range(clone * CLONE_SIZE, min((clone + 1) * CLONE_SIZE, checks.MAX_SEQ + 1))
    finished = await svc.dispatcher.samples.finished(owner, sampler_id, seqs, form.prev_cursor, timeout)
    told = [{"state": "failed" if entry.status == "failed" else "finished", "request_id": entry.request_id} for entry in finished]
    # Without news the cursor stays: a client takes one that moves as something to acknowledge at once.
    return {"completions": told, "cursor": finished[-1].finish_order if finished else max(0, form.prev_cursor)}


@router.post("/cancel_future", status_code=204)
async def cancel_future(request: Request) -> Response:
    """Stops an unfinished sampling request; anything else is left as it is."""
    form = await forms.read(request, forms.CancelFuture, strict=False)
    await services(request).dispatcher.samples.cancel(tenant(request), form.request_id)
    return Response(status_code=204)
