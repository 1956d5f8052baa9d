"""Protobuf of the Tinker protocol <-> our types. Pure functions; what is malformed ends here as a UserError."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from everlearn.api.images import ImageReader
from everlearn.api.tinker import tensors
from everlearn.api.tinker.schema import DecodeError, pb
from everlearn.errors import InvalidRequest, Unsupported
from everlearn.types import Array, Datum, ForwardBackwardResult, ImageSpan, ProvenanceSpan, SampleResult, TopK

CONTENT_TYPE = "application/x-protobuf"
DTYPES = {pb.DTYPE_FLOAT32: "float32", pb.DTYPE_INT64: "int64", pb.DTYPE_INT32: "int32", pb.DTYPE_BFLOAT16: "bfloat16"}
WIRE_DTYPES = {"float32": pb.DTYPE_FLOAT32, "int64": pb.DTYPE_INT64, "int32": pb.DTYPE_INT32}
STOP_REASONS = {"stop": pb.STOP_REASON_STOP, "length": pb.STOP_REASON_LENGTH}
SPARSE_INPUTS = frozenset({"target_tokens", "weights"})
OTHER_INPUTS = {
    "image_asset_pointer": "the address of an image, which training doesn't follow: send the image itself",
    "dmel": "audio, which this server's models don't hear",
}
IMAGE_FORMATS = {"png": "PNG", "jpeg": "JPEG"}


class ForwardBackwardCall(msgspec.Struct, frozen=True):
    """One forward_backward request, whichever form it came in."""

    model_id: str
    seq: int
    data: list[Datum]
    loss_fn: str
    config: dict[str, float | str]
    forward_only: bool


def parse_forward_backward(body: bytes) -> Any:
    """The message alone: model_id and seq_id are known before the data is looked at, so that a refusal can name its seq."""
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except (DecodeError, ValueError) as error:
        raise InvalidRequest(f"the body is not a ForwardBackwardRequest in protobuf ({error})") from None
    return message


def shows_images(message: Any) -> bool:
    """Whether reading the request means decoding images."""
    return any(chunk.HasField("image") for datum in message.data for chunk in datum.model_input)


def forward_backward_call(message: Any, max_bytes: int, reader: ImageReader) -> ForwardBackwardCall:
    """`max_bytes` bounds each sparse tensor after it was made dense."""
    return ForwardBackwardCall(
        model_id=message.model_id,
        seq=message.seq_id,
        data=[_datum(datum, f"data[{i}]", max_bytes, reader) for i, datum in enumerate(message.data)],
        loss_fn=message.loss_fn,
        config=_config(message),
        forward_only=message.forward_only,
    )


def _config(message: Any) -> dict[str, float | str]:
    """The second map holds all of the first plus texts; only clients before 0.26 send the first alone."""
    config: dict[str, float | str] = dict(message.loss_fn_config)
    for key, value in message.loss_fn_config_v2.items():
        kind = value.WhichOneof("value")
        if kind is None:
            raise InvalidRequest(f"loss_fn_config[{key!r}] holds no value; give a number or a text", param="loss_fn_config")
        config[key] = getattr(value, kind)
    return config


def _datum(message: Any, name: str, max_bytes: int, reader: ImageReader) -> Datum:
    row = Row(reader)
    for i, chunk in enumerate(message.model_input):
        _add_chunk(row, chunk, f"{name}.model_input[{i}]")
    tokens = row.tokens()
    return Datum(
        tokens=Array("int32", [tokens.size], tokens.tobytes()),
        inputs={key: _tensor(value, f"{name}.loss_fn_inputs[{key!r}]", key, max_bytes) for key, value in message.loss_fn_inputs.items()},
        model_input_spans=_spans(message.model_input_spans, f"{name}.model_input_spans"),
        loss_input_spans=_spans(message.loss_fn_input_spans, f"{name}.loss_fn_input_spans"),
        images=row.images,
    )


class Row:
    """A model input that grows chunk by chunk: tokens, and the images among them."""

    def __init__(self, reader: ImageReader):
        self.reader, self.length = reader, 0
        self.parts: list[np.ndarray] = []
        self.images: list[ImageSpan] = []

    def add(self, tokens: np.ndarray) -> None:
        self.parts.append(tokens)
        self.length += len(tokens)

    def add_image(self, data: bytes, format: str, expected: int | None, name: str) -> None:
        if format not in IMAGE_FORMATS:
            raise InvalidRequest(f"{name}.format is {format[:40]!r}; {' and '.join(IMAGE_FORMATS)} are taken", param=f"{name}.format")
        span = self.reader.read(data, self.length, name, format=IMAGE_FORMATS[format], expected=expected)
        self.images.append(span)
        self.add(self.reader.placeholder(span))

    def tokens(self) -> np.ndarray:
        """int32 of all chunks."""
        return np.concatenate(self.parts) if self.parts else np.zeros(0, dtype=np.int32)


def _add_chunk(row: Row, chunk: Any, name: str) -> None:
    kind = chunk.WhichOneof("chunk")
    if kind == "encoded_text":
        row.add(tensors.from_bytes(chunk.encoded_text.tokens, "int32", name).astype(np.int32))
    elif kind == "image":
        image = chunk.image
        row.reader.vision(name)
        if image.HasField("override_dimensions"):
            param = f"{name}.override_dimensions"
            raise Unsupported(f"{param} can't be honoured; send the image in the size that is meant", param=param)
        row.add_image(image.data, image.format, image.expected_tokens if image.HasField("expected_tokens") else None, name)
    else:
        what = OTHER_INPUTS.get(kind, "nothing")
        raise Unsupported(f"{name} holds {what}; send encoded_text and image chunks", param=name)


def _tensor(message: Any, name: str, key: str, max_bytes: int) -> Array:
    dtype = DTYPES.get(message.dtype)
    if dtype is None:
        raise InvalidRequest(f"{name} has no known dtype ({message.dtype}); it must be float32 or int64", param=name)
    if message.WhichOneof("encoding") != "sparse_csr":
        return tensors.dense(tensors.from_bytes(message.dense, dtype, name), list(message.shape), name)
    if key not in SPARSE_INPUTS:
        raise InvalidRequest(f"{name} is sparse; only {sorted(SPARSE_INPUTS)} may be", param=name)
    sparse = message.sparse_csr
    return tensors.from_csr(
        tensors.from_bytes(sparse.values, dtype, name),
        tensors.from_bytes(sparse.crow_indices, "int64", name),
        tensors.from_bytes(sparse.col_indices, "int64", name),
        list(message.shape),
        pad=0,
        max_bytes=max_bytes,
        name=name,
    )


def _spans(messages: Any, name: str) -> list[ProvenanceSpan] | None:
    spans = []
    for i, message in enumerate(messages):
        kind = message.WhichOneof("span")
        if kind is None:
            raise InvalidRequest(f"{name}[{i}] names neither prompt nor sampled tokens", param=name)
        span = getattr(message, kind)
        spans.append(ProvenanceSpan(kind.removesuffix("_tokens"), span.sequence_id, span.offset, span.length))
    return spans or None


def encode_forward_backward(result: ForwardBackwardResult) -> bytes:
    """Neighbouring datums whose outputs have the same inner shape share one record."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics=result.metrics)
    run: list[dict[str, Array]] = []
    for output in result.outputs:
        if run and _inner(run[0]) != _inner(output):
            _add_record(message, run)
            run = []
        run.append(output)
    if run:
        _add_record(message, run)
    return message.SerializeToString()


def _inner(output: dict[str, Array]) -> dict[str, tuple[str, list[int]]]:
    return {name: (array.dtype, array.shape[1:]) for name, array in output.items()}


def _add_record(message: Any, outputs: list[dict[str, Array]]) -> None:
    record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(outputs))
    for name, first in outputs[0].items():
        parts = [output[name].data for output in outputs]
        offsets = np.cumsum([0] + [len(part) for part in parts], dtype=np.int64)
        field = record.fields[name]
        field.data = b"".join(parts)
        field.offsets = offsets.tobytes()
        field.dtype = WIRE_DTYPES[first.dtype]
        field.trailing_shape.extend(first.shape[1:])


def encode_sample(result: SampleResult, layout: str | None = None) -> bytes:
    """`layout` (tensors.pack_layout) where the target ids came sparse."""
    message = pb.SampleResponse(prompt_cache_hit_tokens=result.prompt_cache_hit_tokens)
    for sequence in result.sequences:
        item = message.sequences.add(stop_reason=STOP_REASONS[sequence.stop_reason], tokens=sequence.tokens.data)
        item.logprobs = sequence.logprobs.data
        if sequence.topk is not None:
            _write_topk(item.topk_sampled_logprobs, sequence.topk)
    if result.prompt_logprobs is not None:
        message.prompt_logprobs = result.prompt_logprobs.data
    if result.topk_prompt_logprobs is not None:
        _write_topk(message.topk_prompt_logprobs, result.topk_prompt_logprobs)
    if result.target_prompt_logprobs is not None:
        _write_target(message.target_prompt_logprobs, result.target_prompt_logprobs, layout)
    if result.prompt_alt_tokens is not None and result.prompt_alt_logprobs is not None:
        _write_dense(message.prompt_alt_tokens.tokens, result.prompt_alt_tokens)
        _write_dense(message.prompt_alt_tokens.logprobs, result.prompt_alt_logprobs)
    return message.SerializeToString()


def _write_topk(message: Any, topk: TopK) -> None:
    message.length, message.k = topk.token_ids.shape
    message.token_ids = topk.token_ids.data
    message.logprobs = topk.logprobs.data


def _write_dense(message: Any, array: Array) -> None:
    message.dense = array.data
    message.dtype = WIRE_DTYPES[array.dtype]
    message.shape.extend(array.shape)


def answered_targets(array: Array) -> Array:
    """The wire has 0 where nothing was asked; the engine says NaN."""
    values = array.numpy()
    return Array.of(np.where(np.isnan(values), np.float32(0), values))


def _write_target(message: Any, array: Array, layout: str | None) -> None:
    array = answered_targets(array)
    if layout is None:
        return _write_dense(message, array)
    crow, col = tensors.unpack_layout(layout)
    message.sparse_csr.values = np.ascontiguousarray(tensors.pick(array.numpy(), crow, col)).tobytes()
    message.sparse_csr.crow_indices = crow.tobytes()
    message.sparse_csr.col_indices = col.tobytes()
    message.dtype = WIRE_DTYPES[array.dtype]
    message.shape.extend(array.shape)
