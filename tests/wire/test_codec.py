"""The codec against the SDK's own conversion code: what one writes the other reads."""

from __future__ import annotations

import math
from io import BytesIO

import msgspec
import numpy as np
import pytest
import tinker
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tinker import types
from tinker.proto import request_conv, response_conv

from everlearn.api.images import ImageReader
from everlearn.api.tinker import checks, codec, codec_json, forms, tensors
from everlearn.api.tinker.schema import pb
from everlearn.config import ImageSettings, Settings
from everlearn.errors import InvalidRequest, TooLarge, Unsupported, UserError
from everlearn.types import Array, BaseModelInfo, ForwardBackwardResult, ImageSpan, SampledSequence, SampleResult, TopK, VisionInfo
from tests.render.test_images import png_header
from tests.tiny_vision import PAD, VISION, picture

LIMIT = 1 << 20


def request_of(data: list[types.Datum], **config: float | str) -> types.ForwardBackwardRequest:
    body = types.ForwardBackwardInput(data=data, loss_fn="ppo", loss_fn_config=config or None)
    return types.ForwardBackwardRequest(forward_backward_input=body, model_id="s:train:0", seq_id=3)


def reader(vision: VisionInfo | None = None) -> ImageReader:
    return ImageReader(BaseModelInfo("tiny", "", [], "", 512, 512, [2], vision=vision), ImageSettings())


def decode(request: types.ForwardBackwardRequest, vision: VisionInfo | None = None) -> codec.ForwardBackwardCall:
    body = request_conv.forward_backward_request_to_proto(request).SerializeToString()
    return codec.forward_backward_call(codec.parse_forward_backward(body), LIMIT, reader(vision))


def decode_json(request: types.ForwardBackwardRequest, vision: VisionInfo | None = None) -> codec.ForwardBackwardCall:
    """The same request as SDK 0.16 wrote it."""
    data = [
        {
            "model_input": datum.model_input.model_dump(mode="json"),
            "loss_fn_inputs": {
                name: {key: value for key, value in vars_of(tensor).items() if value is not None}
                for name, tensor in datum.loss_fn_inputs.items()
            },
        }
        for datum in request.forward_backward_input.data
    ]
    body = {"model_id": request.model_id, "seq_id": request.seq_id}
    body["forward_backward_input"] = {"data": data, "loss_fn": "ppo", "loss_fn_config": request.forward_backward_input.loss_fn_config}
    form = forms.parse(msgspec.json.encode(body), codec_json.ForwardBackwardForm)
    return codec_json.forward_backward_call(form, forward_only=False, max_bytes=LIMIT, reader=reader(vision))


def vars_of(tensor: types.TensorData) -> dict:
    names = ("data", "dtype", "shape", "sparse_crow_indices", "sparse_col_indices")
    return {name: getattr(tensor, name) for name in names}


def text(*tokens: int) -> types.ModelInput:
    return types.ModelInput(chunks=[types.EncodedTextChunk(tokens=list(tokens[:2])), types.EncodedTextChunk(tokens=list(tokens[2:]))])


@pytest.mark.parametrize("through", [decode, decode_json])
def test_a_dense_request_arrives_whole(through) -> None:
    inputs = {"target_tokens": [5, 6, 7], "logprobs": [-0.5, -1.5, -2.5], "advantages": np.array([1.0, 0.0, -1.0], np.float32)}
    call = through(request_of([types.Datum(model_input=text(4, 5, 6), loss_fn_inputs=inputs)], clip_low_threshold=0.7))
    assert (call.model_id, call.seq, call.loss_fn, call.config) == ("s:train:0", 3, "ppo", {"clip_low_threshold": 0.7})
    datum = call.data[0]
    assert datum.tokens.numpy().tolist() == [4, 5, 6] and datum.tokens.dtype == "int32"
    assert datum.inputs["target_tokens"].numpy().tolist() == [5, 6, 7] and datum.inputs["target_tokens"].dtype == "int64"
    assert datum.inputs["logprobs"].numpy().tolist() == [-0.5, -1.5, -2.5]
    assert datum.inputs["advantages"].dtype == "float32"


def test_text_in_the_configuration_and_forward_only_arrive() -> None:
    message = request_conv.forward_backward_request_to_proto(request_of([types.Datum(model_input=text(1, 2, 3))], mode="fast", beta=2.0))
    message.forward_only = True
    call = codec.forward_backward_call(codec.parse_forward_backward(message.SerializeToString()), LIMIT, reader())
    assert call.config == {"mode": "fast", "beta": 2.0} and call.forward_only


def test_provenance_spans_arrive_in_order() -> None:
    spans = [types.PromptProvenanceSpan(sequence_id="a", length=2), types.SampledProvenanceSpan(sequence_id="b", offset=4, length=1)]
    datum = types.Datum(model_input=text(1, 2, 3), loss_fn_inputs={"target_tokens": [2, 3, 4]}).with_provenance(spans, spans)
    decoded = decode(request_of([datum])).data[0]
    assert decoded.model_input_spans == decoded.loss_input_spans
    assert [(s.kind, s.sequence_id, s.offset, s.length) for s in decoded.model_input_spans or []] == [
        ("prompt", "a", 0, 2),
        ("sampled", "b", 4, 1),
    ]


@pytest.mark.parametrize("through", [decode, decode_json])
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 9), seed=st.integers(0, 999))
def test_sparse_tensors_become_what_torch_makes_of_them(through, rows: int, columns: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    keep = generator.random((rows, columns)) < 0.2
    targets = torch.from_numpy(generator.integers(1, 99, (rows, columns)) * keep)
    weights = torch.from_numpy((generator.random((rows, columns)) * keep).astype(np.float32))
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(list(range(rows))), loss_fn_inputs={"target_tokens": targets, "weights": weights}
    )
    inputs = through(request_of([datum])).data[0].inputs
    for name, tensor in (("target_tokens", targets), ("weights", weights)):
        assert inputs[name].shape == [rows, columns]
        assert np.array_equal(inputs[name].numpy(), tensor.numpy())


def sparse_message(values: list[float], crow: list[int], col: list[int], shape: list[int], name: str = "weights") -> bytes:
    message = pb.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="cross_entropy")
    datum = message.data.add()
    tensor = datum.loss_fn_inputs[name]
    tensor.dtype = pb.DTYPE_FLOAT32
    tensor.shape.extend(shape)
    tensor.sparse_csr.values = np.asarray(values, np.float32).tobytes()
    tensor.sparse_csr.crow_indices = np.asarray(crow, np.int64).tobytes()
    tensor.sparse_csr.col_indices = np.asarray(col, np.int64).tobytes()
    return message.SerializeToString()


@pytest.mark.parametrize(
    ("values", "crow", "col", "shape", "rule"),
    [
        ([1, 2], [0, 1], [0, 1], [2, 2], "row pointers"),
        ([1, 2], [0, 2, 1], [0, 1], [2, 2], "rise"),
        ([1, 2], [0, 1, 2], [0], [2, 2], "column indices"),
        ([1, 2], [0, 1, 2], [0, 2], [2, 2], "0..1"),
        ([1, 2], [0, 1, 2], [0, -1], [2, 2], "0..1"),
        ([1, 2], [0, 2, 2], [1, 1], [2, 2], "strictly"),
        ([1], [0, 1], [0], [1], "two dimensions"),
    ],
)
def test_broken_sparse_tensors_are_refused(values, crow, col, shape, rule) -> None:
    with pytest.raises(InvalidRequest, match=rule):
        codec.forward_backward_call(codec.parse_forward_backward(sparse_message(values, crow, col, shape)), LIMIT, reader())


def test_a_sparse_tensor_may_not_grow_beyond_the_limit() -> None:
    body = sparse_message([1], [0, 1], [0], [1, 1 << 40])
    with pytest.raises(TooLarge):
        codec.forward_backward_call(codec.parse_forward_backward(body), LIMIT, reader())


def test_only_targets_and_weights_may_be_sparse() -> None:
    with pytest.raises(InvalidRequest, match="only"):
        codec.forward_backward_call(codec.parse_forward_backward(sparse_message([1], [0, 1], [0], [1, 1], "advantages")), LIMIT, reader())


def seeing(*images: types.ImageChunk) -> types.ForwardBackwardRequest:
    """A datum with two tokens before, and two after, all of the images."""
    ends = [types.EncodedTextChunk(tokens=[7, 8]), types.EncodedTextChunk(tokens=[9, 10])]
    return request_of([types.Datum(model_input=types.ModelInput(chunks=[ends[0], *images, ends[1]]))])


@pytest.mark.parametrize("through", [decode, decode_json])
def test_audio_and_images_for_a_model_that_reads_text_are_refused_by_name(through) -> None:
    for chunk, word in ((types.ImageChunk(data=b"x", format="png"), "reads text alone"), (types.DmelChunk(dmel=b"\0\0"), "audio")):
        with pytest.raises(Unsupported, match=word):
            through(seeing(chunk))


@pytest.mark.parametrize("through", [decode, decode_json])
def test_images_arrive_as_sent_and_take_the_tokens_of_their_grid(through) -> None:
    first, second = picture(1, 64, 32), picture(2, 40, 100, "JPEG")
    chunks = [types.ImageChunk(data=first, format="png", expected_tokens=8), types.ImageChunk(data=second, format="jpeg")]
    (datum,) = through(seeing(*chunks), VISION).data
    assert datum.images == [ImageSpan(2, 2, 4, first), ImageSpan(10, 6, 2, second)]
    assert datum.tokens.numpy().tolist() == [7, 8, *[PAD] * 20, 9, 10]


def animated(format: str) -> bytes:
    out = BytesIO()
    frames = [Image.open(BytesIO(picture(seed))) for seed in range(2)]
    frames[0].save(out, format, save_all=True, append_images=frames[1:])
    return out.getvalue()


BAD_IMAGES = {
    "another number of tokens": (picture(1, 64, 32), "png", 9, "expected_tokens is 9.*takes 8 tokens"),
    "another format": (picture(1), "jpeg", None, "said to be a JPEG and is a PNG"),
    "no image": (b"hello", "png", None, "no image"),
    "half an image": (picture(1)[:100], "png", None, "broken"),
    "an animation": (animated("PNG"), "png", None, "animation"),
    "a gif": (animated("GIF"), "png", None, "GIF"),
    "a line": (picture(1, 1000, 4), "png", None, "200 times"),
    "a bomb": (png_header(30_000, 30_000), "png", None, "max_pixels"),
}


@pytest.mark.parametrize("through", [decode, decode_json])
@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused(through, case: str) -> None:
    data, format, expected, word = BAD_IMAGES[case]
    with pytest.raises(UserError, match=word) as caught:
        through(seeing(types.ImageChunk(data=data, format=format, expected_tokens=expected)), VISION)
    assert caught.value.param.startswith(("data[0].model_input[1]", "data[0].model_input.chunks[1]"))


def test_all_images_of_a_request_are_counted() -> None:
    small = ImageReader(reader(VISION).info, ImageSettings(request_pixels=6000))
    for _ in range(2):
        small.read(picture(1, 50, 50), 0, "here")
    with pytest.raises(TooLarge, match=r"images\.request_pixels"):
        small.read(picture(1, 50, 50), 0, "here")
    with pytest.raises(InvalidRequest, match="reads at most 512"):
        reader(VISION).read(picture(1, 64, 64), 500, "here")


def test_dimensions_that_override_the_image_are_refused() -> None:
    message = request_conv.forward_backward_request_to_proto(seeing(types.ImageChunk(data=picture(1), format="png")))
    message.data[0].model_input[1].image.override_dimensions.width = 5
    with pytest.raises(Unsupported, match="override_dimensions"):
        codec.forward_backward_call(message, LIMIT, reader(VISION))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_end_as_a_user_error_or_a_request(body: bytes) -> None:
    try:
        codec.forward_backward_call(codec.parse_forward_backward(body), LIMIT, reader())
    except UserError:
        pass


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_requests_end_as_a_user_error_or_a_request(data) -> None:
    datum = types.Datum(model_input=text(1, 2, 3), loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 0.0]})
    body = bytearray(request_conv.forward_backward_request_to_proto(request_of([datum], beta=1.0)).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        codec.forward_backward_call(codec.parse_forward_backward(bytes(body)), LIMIT, reader())
    except UserError:
        pass


def array(values, dtype: str = "float32") -> Array:
    return Array.of(np.asarray(values, dtype=dtype))


def test_forward_backward_results_read_back() -> None:
    outputs = [{"logprobs": array([-1.0, -2.0])}, {"logprobs": array([[-3.0, -4.0, 0.5]])}, {"logprobs": array([[-5.0, -6.0, 0.5]])}]
    result = ForwardBackwardResult(outputs, {"loss:sum": 2.5})
    read = response_conv.deserialize_forward_backward_output(codec.encode_forward_backward(result))
    assert [output["logprobs"].tolist() for output in read.loss_fn_outputs] == [[-1.0, -2.0], [[-3.0, -4.0, 0.5]], [[-5.0, -6.0, 0.5]]]
    assert read.metrics == {"loss:sum": 2.5}


def sample_result(target: Array | None = None) -> SampleResult:
    topk = TopK(array([[1, 2], [3, 0]], "int32"), array([[-0.1, -0.2], [-0.3, -99999.0]]))
    sequences = [
        SampledSequence("stop", array([7, 8], "int32"), array([-0.5, -0.25]), topk),
        SampledSequence("length", array([9], "int32"), array([-1.0])),
    ]
    prompt_topk = TopK(array([[0, 0], [4, 5]], "int32"), array([[-99999.0, -99999.0], [-0.1, -0.2]]))
    return SampleResult(
        sequences, array([math.nan, -2.0]), prompt_topk, target, array([[3, 4]], "int64"), array([[-1.0, -2.0]]), prompt_cache_hit_tokens=2
    )


def test_sample_results_read_back() -> None:
    read = response_conv.deserialize_sample_response(codec.encode_sample(sample_result(array([[-1.0, 0.0]]))))
    assert [(s.stop_reason, s.tokens, s.logprobs) for s in read.sequences] == [("stop", [7, 8], [-0.5, -0.25]), ("length", [9], [-1.0])]
    assert [[pair[0] for pair in row] for row in read.sequences[0].topk_logprobs or []] == [[1, 2], [3]]
    assert read.prompt_logprobs == [None, -2.0] and (read.topk_prompt_logprobs or [1])[0] is None
    assert read.target_prompt_logprobs is not None and read.target_prompt_logprobs.tolist() == [[-1.0, 0.0]]
    assert read.prompt_alt_tokens is not None and read.prompt_alt_tokens.tokens.tolist() == [[3, 4]]
    assert read.prompt_cache_hit_tokens == 2


def test_the_answer_to_sparse_targets_has_their_layout() -> None:
    ids = torch.full((3, 4), -1, dtype=torch.int64)
    ids[1, 2], ids[2, 0] = 5, 6
    asked = types.TensorData.from_torch_sparse(ids, pad_value=-1)
    layout = tensors.pack_layout(np.asarray(asked.sparse_crow_indices), np.asarray(asked.sparse_col_indices))
    values = np.zeros((3, 4), np.float32)
    values[1, 2], values[2, 0] = -0.5, -0.75
    read = response_conv.deserialize_sample_response(codec.encode_sample(sample_result(Array.of(values)), layout)).target_prompt_logprobs
    assert read is not None and read.sparse_crow_indices == asked.sparse_crow_indices and list(read.data) == [-0.5, -0.75]
    assert np.array_equal(read.to_torch().numpy(), values)


def test_json_results_hold_the_same_numbers() -> None:
    body = codec_json.sample_json(sample_result(), ["a", "b"])
    assert body["sequences"][0]["tokens"] == [7, 8] and body["sequences"][1]["stop_reason"] == "length"
    assert body["prompt_logprobs"] == [None, -2.0]
    assert body["topk_prompt_logprobs"][0] is None and [pair[0] for pair in body["topk_prompt_logprobs"][1]] == [4, 5]


def test_unknown_fields_are_harmless_while_they_are_off() -> None:
    assert forms.parse(b'{"model_id": "m", "type": "x", "brand_new": false}', forms.ModelOnly).model_id == "m"
    with pytest.raises(Unsupported, match="brand_new"):
        forms.parse(b'{"model_id": "m", "brand_new": true}', forms.ModelOnly)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"model_id": 3}', b"\xff\xfe", b'{"model_id": NaN}', b"[" * 5000])
def test_malformed_json_is_a_user_error(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        forms.parse(body, forms.ModelOnly)


def test_the_schema_is_the_packages_own() -> None:
    assert pb.ForwardBackwardRequest.DESCRIPTOR.full_name == tinker.proto.tinker_public_pb2.ForwardBackwardRequest.DESCRIPTOR.full_name


def test_a_request_or_a_setting_trains_the_tower() -> None:
    sees, blind = reader(VISION).info, reader().info
    plain, always = Settings(), Settings.model_validate({"images": {"train_tower": True}})

    def trains(wish: bool | None, settings: Settings, info: BaseModelInfo) -> bool:
        return checks.lora(forms.LoraConfig(rank=4, train_vision=wish), settings, info).train_vision

    assert [trains(wish, plain, sees) for wish in (None, False, True)] == [False, False, True]
    assert [trains(wish, always, sees) for wish in (None, False, True)] == [True, False, True]
    assert not trains(None, always, blind)
    with pytest.raises(Unsupported, match="reads text alone"):
        trains(True, plain, blind)
