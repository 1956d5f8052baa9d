"""The JSON requests of the Tinker protocol, and how they are read.

SDKs of many ages send many fields. A field that we don't know is harmless while it is off (null, false, 0, "" or empty) and
refused by name otherwise: what we can't honour is never accepted and ignored. Texts that not every database takes are refused by
name too, on all of them.
"""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any, TypeVar

import msgspec
from fastapi import Depends, Request

from everlearn.api.tinker.codec_json import ModelInput, TensorData
from everlearn.errors import InvalidRequest, Unsupported
from everlearn.store.names import storable

NUL = b"\\u0000"  # the one way to spell it in JSON; half a surrogate pair is no JSON to our decoder
FREE_TEXTS = ("stop", "events")  # compared with what is drawn; kept as a client's report: no database looks into them
BIG_BODY = 256 * 1024  # bytes; decoding more than this would hold up the event loop

F = TypeVar("F", bound=msgspec.Struct)


class Form(msgspec.Struct):
    pass


class LoraConfig(Form):
    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True
    train_vision: bool | None = None  # the vision tower as well; not of the SDK's


class CreateModel(Form):
    session_id: str
    model_seq_id: int
    base_model: str
    user_metadata: dict[str, Any] | None = None
    lora_config: LoraConfig | None = None
    optimizer_config: dict[str, Any] | None = None


class ModelOnly(Form):
    model_id: str


class AdamForm(Form):
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStep(Form):
    model_id: str
    seq_id: int | None = None
    adam_params: AdamForm | None = None
    optimizer_params: dict[str, Any] | None = None


class SaveWeights(Form):
    model_id: str
    path: str | None = None
    seq_id: int | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None


class SaveForSampler(Form):
    model_id: str
    path: str | None = None
    sampling_session_seq_id: int | None = None
    kind: str = "snapshot"
    seq_id: int | None = None
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None


class SaveExternal(Form):
    model_id: str
    path: str
    seq_id: int | None = None
    ttl_seconds: int | None = None
    age_encryption_recipients: list[str] | None = None


class LoadWeights(Form):
    path: str
    optimizer: bool = False
    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    optimizer_config: dict[str, Any] | None = None
    weights_access_token: str | None = None


class CopyWeights(Form):
    source_path: str
    session_id: str | None = None
    model_seq_id: int | None = None
    destination_project_id: str | None = None
    ttl_seconds: int | None = None
    weights_access_token: str | None = None


class SamplingParamsForm(Form):
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str | int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    routing: bool = False  # not the SDK's: the answer (as JSON) tells which experts each token met


class SampleForm(Form):
    prompt: ModelInput
    sampling_params: SamplingParamsForm
    num_samples: int = 1
    base_model: str | None = None
    model_path: str | None = None
    sampling_session_id: str | None = None
    seq_id: int | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None


class CreateSession(Form):
    sdk_version: str
    tags: list[str] = []
    user_metadata: dict[str, Any] | None = None
    project_id: str | None = None
    display_name: str | None = None


class SessionOnly(Form):
    session_id: str


class CreateSamplingSession(Form):
    session_id: str
    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None


class SamplingSessionOnly(Form):
    sampling_session_id: str


class FinishReason(Form):
    type: str


class FinishSession(Form):
    reason: FinishReason
    detail: str | None = None


class RetrieveFuture(Form):
    request_id: str
    allow_metadata_only: bool = False
    model_id: str | None = None


class FuturesTarget(Form):
    sampling_session_id: str
    type: str = "sampling_session"
    cloned_sampler_id: int = 0


class RetrieveFutures(Form):
    target: FuturesTarget
    prev_cursor: int = 0
    timeout: float | None = None
    retrieved_request_ids: list[str] = []


class CancelFuture(Form):
    request_id: str


class WeightsInfo(Form):
    tinker_path: str


class Ttl(Form):
    ttl_seconds: int | None = None


class Project(Form):
    project_id: str


class Telemetry(Form):
    events: list[dict[str, Any]]
    session_id: str
    platform: str = ""
    sdk_version: str = ""
    process_uuid: str = ""


class SearchOwner(Form):
    type: str = "own"
    owner_urns: list[str] = []


class SearchStatus(Form):
    type: str
    reasons: list[str] | None = None


class SearchCursor(Form):
    last_created_at: str
    last_session_id: str


class SearchSessions(Form):
    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = {}
    display_name: str | None = None
    owner: SearchOwner | None = None
    statuses: list[SearchStatus] | None = None
    limit: int = 50
    cursor: SearchCursor | None = None


async def read(request: Request, form: type[F], *, strict: bool = True) -> F:
    """The request's JSON body as `form`. `strict` refuses unknown fields that are on."""
    body = await request.body()
    if len(body) > BIG_BODY:
        return await asyncio.to_thread(parse, body, form, strict=strict)
    return parse(body, form, strict=strict)


def parse(body: bytes, form: type[F], *, strict: bool = True) -> F:
    try:
        value = msgspec.json.decode(body or b"{}")
        if NUL in body:
            _refuse_unstorable(value, "")
        if strict and isinstance(value, dict):
            _refuse_unknown(value, form)
        return msgspec.convert(value, form)
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body doesn't read as {form.__name__}: {error}") from None


async def check_address(request: Request) -> None:
    """A dependency: what stands in the path and behind it can be looked up."""
    for name, text in (*request.path_params.items(), *request.query_params.multi_items()):
        text_of(text, name[:60].replace("\0", ""))


CHECK_ADDRESS = Depends(check_address)


def text_of(value: str, name: str) -> str:
    """The text, if every database takes it; InvalidRequest naming the field otherwise."""
    if not storable(value):
        raise InvalidRequest(f"{name} holds NUL or half a surrogate pair, which can't be stored; leave it out", param=name)
    return value


def _refuse_unstorable(value: Any, path: str) -> None:
    if isinstance(value, str):
        text_of(value, path)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_unstorable(item, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in FREE_TEXTS:
                text_of(key, f"a name in {path or 'the body'}")
                _refuse_unstorable(item, f"{path}.{key}" if path else key)


def _refuse_unknown(value: dict[str, Any], form: type[msgspec.Struct], prefix: str = "") -> None:
    known = _known_fields(form)
    for key, item in value.items():
        if key not in known and key != "type" and item not in (None, False, 0, "", [], {}):
            raise Unsupported(f"{prefix}{key} is not known to this server and can't be honoured; leave it out", param=f"{prefix}{key}")
        inner = known.get(key)
        if inner is not None and isinstance(item, dict):
            _refuse_unknown(item, inner, f"{prefix}{key}.")


@cache
def _known_fields(form: type[msgspec.Struct]) -> dict[str, type[msgspec.Struct] | None]:
    """Field names, and the form inside a field that has one. Cached: reading annotations costs more than the rest of a small call."""
    return {field.encode_name: _struct_of(field.type) for field in msgspec.structs.fields(form)}


def _struct_of(annotation: Any) -> type[msgspec.Struct] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, msgspec.Struct):
            return candidate
    return None
