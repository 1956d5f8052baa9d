"""The JSON forms of the Tinker protocol <-> our types: what SDKs before 0.25 send and read, and sampling requests of all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from everlearn.api.images import ImageReader, from_base64
from everlearn.api.tinker import tensors
from everlearn.api.tinker.codec import OTHER_INPUTS, SPARSE_INPUTS, ForwardBackwardCall, Row, answered_targets
from everlearn.errors import InvalidRequest, Unsupported
from everlearn.types import Array, Datum, ForwardBackwardResult, ProvenanceSpan, SampleResult, TopK

MISSING_LOGPROB = -99999.0


class Chunk(msgspec.Struct):
    """Text as `tokens`, an image as base64 `data`, or an image's `location`; `expected_tokens` of an image."""

    type: str = "encoded_text"
    tokens: list[int] = []
    data: str = ""
    format: str = ""
    location: str = ""
    expected_tokens: int | None = None


class ModelInput(msgspec.Struct):
    chunks: list[Chunk]


class TensorData(msgspec.Struct):
    data: list[Any]
    dtype: str
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class Span(msgspec.Struct):
    sequence_id: str
    length: int
    offset: int = 0
    type: str = ""


class DatumForm(msgspec.Struct):
    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData] = {}
    model_input_spans: list[Span] | None = None
    loss_fn_input_spans: list[Span] | None = None


class ForwardBackwardInput(msgspec.Struct):
    data: list[DatumForm]
    loss_fn: str
    loss_fn_config: dict[str, float | str] | None = None


class ForwardBackwardForm(msgspec.Struct):
    """`forward_backward_input` at /forward_backward, `forward_input` at /forward."""

    model_id: str
    forward_backward_input: ForwardBackwardInput | None = None
    forward_input: ForwardBackwardInput | None = None
    seq_id: int | None = None


def row_of(model_input: ModelInput, name: str, reader: ImageReader, fetched: Mapping[int, bytes] = {}) -> Row:
    """All chunks. `fetched` holds the images of chunks that give an address."""
    row = Row(reader)
    for i, chunk in enumerate(model_input.chunks):
        place = f"{name}.chunks[{i}]"
        if chunk.type == "image" or i in fetched:
            reader.vision(place)
            data = fetched[i] if i in fetched else from_base64(chunk.data, reader.settings, place)
            row.add_image(data, chunk.format, chunk.expected_tokens, place)
        elif chunk.type != "encoded_text":
            what = OTHER_INPUTS.get(chunk.type, f"a chunk of the unknown type {chunk.type!r}")
            raise Unsupported(f"{place} holds {what}; send encoded_text and image chunks", param=name)
        else:
            try:
                row.add(np.asarray(chunk.tokens, dtype=np.int32))
            except OverflowError:
                raise InvalidRequest(f"{place} holds a token id beyond 32 bits; ids lie in 0..vocabulary", param=name) from None
    return row


def shows_images(model_input: ModelInput) -> bool:
    """Whether reading it means decoding images."""
    return any(chunk.type != "encoded_text" for chunk in model_input.chunks)


def tensor_of(form: TensorData, name: str, *, pad: int, sparse: bool, max_bytes: int) -> Array:
    flat = tensors.from_list(form.data, form.dtype, name)
    if form.sparse_crow_indices is None and form.sparse_col_indices is None:
        return tensors.dense(flat, form.shape, name)
    if not sparse:
        raise InvalidRequest(f"{name} is sparse; only {sorted(SPARSE_INPUTS)} may be", param=name)
    crow, col = csr_of(form, name)
    return tensors.from_csr(flat, crow, col, form.shape, pad=pad, max_bytes=max_bytes, name=name)


def csr_of(form: TensorData, name: str) -> tuple[np.ndarray, np.ndarray]:
    if form.sparse_crow_indices is None or form.sparse_col_indices is None:
        raise InvalidRequest(f"{name} has sparse_crow_indices or sparse_col_indices alone; a sparse tensor needs both", param=name)
    return tensors.from_list(form.sparse_crow_indices, "int64", name), tensors.from_list(form.sparse_col_indices, "int64", name)


def forward_backward_call(form: ForwardBackwardForm, *, forward_only: bool, max_bytes: int, reader: ImageReader) -> ForwardBackwardCall:
    body = form.forward_backward_input or form.forward_input
    if body is None:
        field = "forward_input" if forward_only else "forward_backward_input"
        raise InvalidRequest(f"the request has no {field}; it holds data and loss_fn", param=field)
    return ForwardBackwardCall(
        model_id=form.model_id,
        seq=0 if form.seq_id is None else form.seq_id,
        data=[_datum(datum, f"data[{i}]", max_bytes, reader) for i, datum in enumerate(body.data)],
        loss_fn=body.loss_fn,
        config=dict(body.loss_fn_config or {}),
        forward_only=forward_only,
    )


def call_shows_images(form: ForwardBackwardForm) -> bool:
    body = form.forward_backward_input or form.forward_input
    return body is not None and any(shows_images(datum.model_input) for datum in body.data)


def _datum(form: DatumForm, name: str, max_bytes: int, reader: ImageReader) -> Datum:
    row = row_of(form.model_input, f"{name}.model_input", reader)
    tokens = row.tokens()
    return Datum(
        tokens=Array("int32", [tokens.size], tokens.tobytes()),
        inputs={
            key: tensor_of(value, f"{name}.loss_fn_inputs[{key!r}]", pad=0, sparse=key in SPARSE_INPUTS, max_bytes=max_bytes)
            for key, value in form.loss_fn_inputs.items()
        },
        model_input_spans=_spans(form.model_input_spans),
        loss_input_spans=_spans(form.loss_fn_input_spans),
        images=row.images,
    )


def _spans(forms: list[Span] | None) -> list[ProvenanceSpan] | None:
    if not forms:
        return None
    return [ProvenanceSpan("sampled" if "sampled" in form.type else "prompt", form.sequence_id, form.offset, form.length) for form in forms]


def tensor_json(array: Array) -> dict[str, Any]:
    """The public wire knows float32 and int64 only."""
    return {"data": array.numpy().ravel().tolist(), "dtype": tensors.WIDE[array.dtype], "shape": array.shape}


def forward_backward_json(result: ForwardBackwardResult) -> dict[str, Any]:
    return {
        "loss_fn_output_type": "ArrayRecord",
        "loss_fn_outputs": [{name: tensor_json(array) for name, array in output.items()} for output in result.outputs],
        "metrics": result.metrics,
    }


def sample_json(result: SampleResult, sequence_ids: list[str]) -> dict[str, Any]:
    body: dict[str, Any] = {
        "type": "sample",
        "sequences": [
            {
                "stop_reason": sequence.stop_reason,
                "sequence_id": sequence_id,
                "tokens": sequence.tokens.numpy().tolist(),
                "logprobs": sequence.logprobs.numpy().tolist(),
                "topk_logprobs": None if sequence.topk is None else _topk_lists(sequence.topk),
                **({} if sequence.routing is None else {"routing": tensor_json(sequence.routing)}),
            }
            for sequence, sequence_id in zip(result.sequences, sequence_ids, strict=True)
        ],
        "prompt_cache_hit_tokens": result.prompt_cache_hit_tokens,
    }
    if result.prompt_logprobs is not None:
        values = result.prompt_logprobs.numpy().tolist()
        body["prompt_logprobs"] = [None if math.isnan(value) else value for value in values]
    if result.topk_prompt_logprobs is not None:
        body["topk_prompt_logprobs"] = _topk_lists(result.topk_prompt_logprobs)
    if result.target_prompt_logprobs is not None:
        body["target_prompt_logprobs"] = tensor_json(answered_targets(result.target_prompt_logprobs))
    if result.prompt_alt_tokens is not None and result.prompt_alt_logprobs is not None:
        body["prompt_alt_tokens"] = {
            "tokens": tensor_json(result.prompt_alt_tokens),
            "logprobs": tensor_json(result.prompt_alt_logprobs),
        }
    return body


def _topk_lists(topk: TopK) -> list[list[tuple[int, float]] | None]:
    rows: list[list[tuple[int, float]] | None] = []
    for ids, logprobs in zip(topk.token_ids.numpy().tolist(), topk.logprobs.numpy().tolist(), strict=True):
        row = [(i, logprob) for i, logprob in zip(ids, logprobs, strict=True) if logprob != MISSING_LOGPROB]
        rows.append(row or None)
    return rows
