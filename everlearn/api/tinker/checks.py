"""What is checked at the door, so that the engine never sees a request that it can't run. Pure functions; UserErrors only."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping
from typing import Any

import msgspec

from everlearn.api import bounds
from everlearn.api.images import ImageReader
from everlearn.api.tinker import codec_json, forms, tensors
from everlearn.api.tinker.codec import ForwardBackwardCall, Row
from everlearn.config import Settings
from everlearn.errors import InvalidRequest, TooLarge, Unsupported
from everlearn.losses.checks import check_config, check_datum, check_request
from everlearn.types import AdamParams, Array, BaseModelInfo, LoraSpec, SamplingParams

MIN_TTL, MAX_TTL = 3600, 10 * 366 * 86_400
MAX_SEQ = 2**63 - 1
MAX_CELLS = 10_000_000  # positions x alternatives of one sampling request
MAX_STOPS = 64
MAX_METADATA_BYTES = 64 * 1024
MIN_EPS = 1e-30  # far above what float32 rounds to 0; the A of a new adapter has no gradient, and 0 / 0 is no number
KINDS_OF_OPTIMIZER = ("adamw",)
ROUTING = "routing"  # in loss_fn_inputs: the experts of each token, int64 [T, layers x experts of a token] (engine/routes.py)

_encode = msgspec.msgpack.Encoder(order="deterministic").encode


def fingerprint(form: msgspec.Struct | bytes) -> str:
    """What the client asked for, as one number: the same request sent twice has the same one."""
    return hashlib.sha256(form if isinstance(form, bytes) else _encode(form)).hexdigest()


def seq(value: int | None) -> int:
    """Training requests count from 1; 0 is the creation."""
    if value is None or not 1 <= value <= MAX_SEQ:
        raise InvalidRequest(f"seq_id is {value}; requests of a training run are numbered 1, 2, 3, ... without gaps", param="seq_id")
    return value


def whole(value: int, name: str) -> int:
    if not 0 <= value <= MAX_SEQ:
        raise InvalidRequest(f"{name} is {value}; it must lie in 0..2^63 - 1", param=name)
    return value


def ttl(value: float | None) -> float | None:
    if value is not None and not MIN_TTL <= value <= MAX_TTL:
        raise InvalidRequest(
            f"ttl_seconds is {value}; it must lie between 3600 (an hour) and {MAX_TTL} (ten years), or be absent", param="ttl_seconds"
        )
    return value


def text(value: str | None, name: str, most: int = bounds.MAX_SESSION_CHARS) -> str | None:
    if value is not None and len(value) > most:
        raise InvalidRequest(f"{name} has {len(value)} characters; it may have {most}: shorten it", param=name)
    return value


def tags(values: list[str]) -> list[str]:
    if len(values) > bounds.MAX_TAGS:
        raise InvalidRequest(f"tags holds {len(values)}; a session may have {bounds.MAX_TAGS}: send fewer", param="tags")
    for place, value in enumerate(values):
        text(value, f"tags[{place}]", bounds.MAX_TAG_CHARS)
    return values


def metadata(value: dict[str, Any] | None, name: str = "user_metadata") -> dict[str, str] | None:
    """The wire's answers hold text values only."""
    if value is None:
        return None
    if len(msgspec.json.encode(value)) > MAX_METADATA_BYTES:
        raise TooLarge(
            f"{name} takes more than {MAX_METADATA_BYTES} bytes; keep large things elsewhere and put their names here", param=name
        )
    return {str(key): item if isinstance(item, str) else msgspec.json.encode(item).decode() for key, item in value.items()}


def lora(form: forms.LoraConfig | None, settings: Settings, info: BaseModelInfo) -> LoraSpec:
    max_rank = settings.engine.max_rank
    if form is None:
        raise Unsupported(
            "lora_config is absent, which asks for training all weights; this server trains LoRA adapters: send lora_config",
            param="lora_config",
        )
    if not 1 <= form.rank <= max_rank:
        raise InvalidRequest(f"lora_config.rank is {form.rank}; it must lie in 1..{max_rank} (engine.max_rank)", param="lora_config.rank")
    vision = info.vision is not None and settings.images.train_tower if form.train_vision is None else form.train_vision
    if vision and info.vision is None:
        raise Unsupported(f"lora_config.train_vision: {info.name} reads text alone; leave it out", param="lora_config.train_vision")
    if not (form.train_attn or form.train_mlp or form.train_unembed or vision):
        raise InvalidRequest(
            "lora_config switches off train_attn, train_mlp and train_unembed: nothing is left to train", param="lora_config"
        )
    drawn = secrets.randbits(31) if form.seed is None else form.seed
    if not -(2**63) <= drawn < 2**63:
        raise InvalidRequest(f"lora_config.seed is {drawn}; it must fit 64 bits", param="lora_config.seed")
    return LoraSpec(
        rank=form.rank,
        seed=drawn,
        train_attn=form.train_attn,
        train_mlp=form.train_mlp,
        train_unembed=form.train_unembed,
        train_vision=vision,
        expert_lora=settings.engine.expert_lora if info.num_experts else "off",
    )


def optimizer_config(value: dict[str, Any] | None) -> None:
    kind = (value or {}).get("type", "adamw")
    if kind not in KINDS_OF_OPTIMIZER:
        raise Unsupported(f"optimizer {kind!r} is not offered by this server; it has adamw", param="optimizer_config")


def adam(form: forms.OptimStep) -> AdamParams:
    if form.optimizer_params is not None:
        kind = form.optimizer_params.get("type")
        raise Unsupported(f"optimizer {kind!r} is not offered by this server; send adam_params (AdamW)", param="optimizer_params")
    values = form.adam_params or forms.AdamForm()
    for name in values.__struct_fields__:
        value = getattr(values, name)
        top = 1.0 if name in ("beta1", "beta2") else math.inf
        if not (math.isfinite(value) and 0 <= value < top):
            rule = "in [0, 1)" if top == 1.0 else "a finite number of at least 0"
            raise InvalidRequest(f"adam_params.{name} is {value}; it must be {rule}", param=f"adam_params.{name}")
    if values.eps < MIN_EPS:
        raise InvalidRequest(
            f"adam_params.eps is {values.eps}; it must be at least {MIN_EPS}: matrices without a gradient yet are divided by it alone",
            param="adam_params.eps",
        )
    return AdamParams(**msgspec.structs.asdict(values))


def data(call: ForwardBackwardCall, info: BaseModelInfo) -> dict[str, float | str]:
    """Every datum against the loss and the model; the loss's complete configuration."""
    config = check_config(call.loss_fn, call.config)
    if not call.data:
        raise InvalidRequest("the request has no data; send at least one datum", param="data")
    for i, datum in enumerate(call.data):
        if ROUTING in datum.inputs:  # for the experts, not for the loss
            others = {name: array for name, array in datum.inputs.items() if name != ROUTING}
            call.data[i] = datum = msgspec.structs.replace(datum, inputs=others, routing=datum.inputs[ROUTING])
        length = datum.tokens.shape[0]
        if length > info.max_context:
            raise InvalidRequest(
                f"data[{i}].model_input has {length} tokens; {info.name} reads at most {info.max_context}: cut it",
                param=f"data[{i}].model_input",
            )
        check_datum(call.loss_fn, i, datum, info.vocab_size)
    check_request(call.loss_fn, config, call.data)
    return config


def prompt(form: forms.SampleForm, info: BaseModelInfo, reader: ImageReader, fetched: Mapping[int, bytes] = {}) -> Row:
    """`fetched`: the images of chunks that give an address."""
    row = codec_json.row_of(form.prompt, "prompt", reader, fetched)
    tokens = row.tokens()
    if tokens.size == 0:
        raise InvalidRequest("prompt holds no tokens; send at least one (a start token, for instance)", param="prompt")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= info.vocab_size:
        bad = low if low < 0 else high
        raise InvalidRequest(f"prompt holds token id {bad}; ids of {info.name} lie in 0..{info.vocab_size - 1}", param="prompt")
    if tokens.size > info.max_context:
        raise InvalidRequest(f"prompt has {tokens.size} tokens; {info.name} reads at most {info.max_context}", param="prompt")
    return row


def sampling_params(form: forms.SamplingParamsForm, prompt_length: int, info: BaseModelInfo) -> SamplingParams:
    """Without max_tokens the rest of the context is available, as far as the model's cache holds it."""
    room = info.room(prompt_length)
    tokens = room if form.max_tokens is None else form.max_tokens
    if not 1 <= tokens <= room:
        raise InvalidRequest(
            f"sampling_params.max_tokens is {tokens}; with a prompt of {prompt_length} tokens {info.name} has room for 1..{room}",
            param="sampling_params.max_tokens",
        )
    if not (math.isfinite(form.temperature) and form.temperature >= 0):
        raise InvalidRequest(
            f"sampling_params.temperature is {form.temperature}; it must be 0 (greedy) or above", param="sampling_params.temperature"
        )
    if not 0 < form.top_p <= 1:
        raise InvalidRequest(f"sampling_params.top_p is {form.top_p}; it must lie in (0, 1], 1 is off", param="sampling_params.top_p")
    if form.top_k != -1 and form.top_k < 1:
        raise InvalidRequest(f"sampling_params.top_k is {form.top_k}; it must be 1 or more, or -1 for off", param="sampling_params.top_k")
    if form.routing and not info.num_experts:
        raise InvalidRequest(
            f"sampling_params.routing: {info.name} has no experts, so there are no routes; leave it out", param="sampling_params.routing"
        )
    drawn = secrets.randbits(62) if form.seed is None else form.seed
    if not -(2**63) <= drawn < 2**63:
        raise InvalidRequest(f"sampling_params.seed is {drawn}; it must fit 64 bits", param="sampling_params.seed")
    stop_tokens, stop_strings = _stops(form.stop, info)
    return SamplingParams(
        max_tokens=tokens,
        seed=drawn,
        temperature=form.temperature,
        top_k=min(form.top_k, info.vocab_size),
        top_p=form.top_p,
        stop_tokens=stop_tokens,
        stop_strings=stop_strings,
        routing=form.routing,
        lowers=form.max_tokens is None,
    )


def _stops(stop: str | list[str | int] | None, info: BaseModelInfo) -> tuple[list[int], list[str]]:
    """End-of-sequence tokens stop unless an empty list switches all off."""
    if stop == []:
        return [], []
    items: list[str | int] = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
    strings = [item for item in items if isinstance(item, str)]
    tokens = [item for item in items if isinstance(item, int)]
    if len(items) > MAX_STOPS or (strings and tokens) or "" in strings:
        raise InvalidRequest(
            f"sampling_params.stop must be a text, or a list of at most {MAX_STOPS} non-empty texts or of token ids, not mixed",
            param="sampling_params.stop",
        )
    if any(not 0 <= token < info.vocab_size for token in tokens):
        raise InvalidRequest(f"sampling_params.stop holds a token id outside 0..{info.vocab_size - 1}", param="sampling_params.stop")
    return sorted({*tokens, *info.eos_token_ids}), strings


def sample_extras(form: forms.SampleForm, length: int, info: BaseModelInfo, max_samples: int) -> None:
    """Counts and bounds of everything that a sampling request asks for beside tokens."""
    if not 1 <= form.num_samples <= max_samples:
        raise InvalidRequest(f"num_samples is {form.num_samples}; it must lie in 1..{max_samples}", param="num_samples")
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
        k = getattr(form, name)
        positions = length if name != "topk_sample_logprobs" else 1
        if k < 0 or (k > info.vocab_size and name != "prompt_alt_tokens_k") or k * positions > MAX_CELLS:
            raise InvalidRequest(
                f"{name} is {k}; it must lie in 0..{info.vocab_size}, and times the prompt's {length} tokens stay below {MAX_CELLS}",
                param=name,
            )
    if form.prompt_alt_tokens_k and length < 2:
        raise InvalidRequest(
            "prompt_alt_tokens_k needs a prompt of at least two tokens: position 0 has no context", param="prompt_alt_tokens_k"
        )
    last = form.prompt_logprobs_last_n
    if last is not None and not form.prompt_logprobs:
        raise InvalidRequest("prompt_logprobs_last_n applies to prompt logprobs; set prompt_logprobs", param="prompt_logprobs_last_n")
    if last is not None and not 1 <= last <= length - 1:
        raise InvalidRequest(
            f"prompt_logprobs_last_n is {last}; with {length} prompt tokens it must lie in 1..{length - 1}", param="prompt_logprobs_last_n"
        )


def targets(form: codec_json.TensorData | None, length: int, info: BaseModelInfo, max_bytes: int) -> tuple[Array | None, str | None]:
    """target_prompt_logprobs, dense int64 [length - 1, K] with -1 where nothing is asked, and its layout if it came sparse."""
    if form is None:
        return None, None
    name = "target_prompt_logprobs"
    if form.dtype != "int64":
        raise InvalidRequest(f"{name} has dtype {form.dtype}; token ids are int64", param=name)
    array = codec_json.tensor_of(form, name, pad=-1, sparse=True, max_bytes=min(max_bytes, MAX_CELLS * 8))
    if len(array.shape) != 2 or array.shape[0] != length - 1 or array.shape[1] < 1:
        raise InvalidRequest(
            f"{name} has shape {array.shape}; it must be [{length - 1}, K]: one row for each prompt position but the first", param=name
        )
    ids = array.numpy()
    if ids.max(initial=-1) < 0 or ids.min(initial=0) < -1 or ids.max(initial=-1) >= info.vocab_size:
        raise InvalidRequest(
            f"{name} must hold token ids in 0..{info.vocab_size - 1}, or -1 where nothing is asked, and at least one id", param=name
        )
    layout = None
    if form.sparse_crow_indices is not None:
        layout = tensors.pack_layout(*codec_json.csr_of(form, name))
    return array, layout
