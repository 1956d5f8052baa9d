"""What a model takes, said from its config.json alone.

The model is built on the meta device (shapes, no memory) and hooked as the engine hooks it, so that what is counted is what would be
trained and kept: the same functions give the layers of an adapter, and what a sampler keeps of a token. Bytes of weights follow from
the formats in quant_*.py. Activations aren't planned beyond the inputs of the layers that recomputation keeps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from everlearn.errors import InvalidRequest
from everlearn.models.architecture import outline, read_config, read_json
from everlearn.models.experts import LAYOUTS
from everlearn.models.hooks import refuse_what_the_hooks_miss
from everlearn.models.load import BaseModel
from everlearn.models.quant import Scheme
from everlearn.models.quant_fp8 import Fp8Scheme
from everlearn.models.quant_int4 import Int4Scheme
from everlearn.models.quant_nf4 import Nf4Scheme
from everlearn.models.weights import read_scheme
from everlearn.types import BaseModelInfo, LoraSpec

HALF = 2  # bytes of a bfloat16
# What a training run keeps of each parameter of its adapter: the value, its gradient and two moments, in float32.
TRAINED = 16
PARTS = ("embedding", "attention", "mlp", "experts", "other", "vision", "head")


@dataclass(frozen=True)
class Storage:
    """One way to keep the weights. `fits`, `cache_tokens`: with the planned adapter in training, in the memory that was asked about."""

    name: str
    bytes: int
    fits: bool | None = None
    cache_tokens: int | None = None


@dataclass(frozen=True)
class Plan:
    """Counts are of parameters, sizes in bytes. `parts` add up to `parameters`; `active` is what one token passes through: all but the
    experts that it isn't sent to. `lora` counts an adapter of `rank` by what it is put on; `adapter_parameters` is that of `layout`."""

    model: str
    parameters: int
    active: int
    parts: dict[str, int]
    rank: int
    layout: str
    lora: dict[str, int]
    adapter_parameters: int
    adapter_training_bytes: int
    adapter_serving_bytes: int
    cache_token_bytes: int
    sequence_state_bytes: int
    checkpoint_token_bytes: int
    storage: list[Storage]
    memory: int | None


def make_plan(path: Path, rank: int = 32, layout: str = "off", memory: int | None = None) -> Plan:
    """The plan of a model folder or of a config.json. `layout` is that of the experts, as LoraSpec.expert_lora has it. Raises Unsupported
    for an architecture or a quantisation that the engine would refuse."""
    config, settings = read_config(path), read_json(path)
    model = outline(config)
    text = config.get_text_config()
    info = BaseModelInfo(settings["model_type"], str(path), [], "", text.vocab_size, getattr(text, "max_position_embeddings", 2**20), [])
    refuse_what_the_hooks_miss(info, model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    base = BaseModel(info, model, torch.device("meta"), torch.bfloat16)
    parts = count_parts(shapes)
    top_k = {experts.top_k / experts.num_experts for experts in base.expert_modules.values()}
    lora = {name: _count(base, spec) for name, spec in _lora_specs(rank, bool(base.expert_modules)).items()}
    adapter = _count(base, LoraSpec(rank=rank, expert_lora=layout))  # type: ignore[arg-type]
    cache = base.cache_form.floats * HALF
    taken = adapter * TRAINED
    ways = {name: stored_bytes(shapes, quantised) for name, quantised in _ways(shapes, linears, settings).items()}
    storage = [Storage("float32", 2 * ways["bfloat16"])] + [Storage(name, size) for name, size in ways.items()]
    if memory is not None:
        storage = [
            Storage(way.name, way.bytes, way.bytes + taken <= memory, max(0, (memory - way.bytes - taken) // max(cache, 1)))
            for way in storage
        ]
    return Plan(
        model=settings["model_type"],
        parameters=sum(parts.values()),
        active=sum(parts.values()) - round(parts["experts"] * (1 - max(top_k, default=1.0))),
        parts=parts,
        rank=rank,
        layout=layout,
        lora=lora,
        adapter_parameters=adapter,
        adapter_training_bytes=taken,
        adapter_serving_bytes=adapter * HALF,
        cache_token_bytes=cache,
        sequence_state_bytes=_state_bytes(base),
        checkpoint_token_bytes=base.num_layers * base.hidden_size * HALF,
        storage=storage,
        memory=memory,
    )


def _state_bytes(base: BaseModel) -> int:
    """Of a sequence, in layers that keep a state: the convolution's inputs in half precision, the state in float32."""
    sizes = [math.prod(shape) * item for shape, item in zip(base.cache_form.state_shapes, (HALF, 4), strict=False)]
    return sum(sizes) * len(base.cache_form.state_layers)


def count_parts(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Parameters by what they belong to; "mlp" includes shared experts, "other" are norms and routers."""
    parts = dict.fromkeys(PARTS, 0)
    for name, shape in shapes.items():
        parts[_part_of(name)] += math.prod(shape)
    return parts


def _part_of(name: str) -> str:
    words = name.split(".")
    if any(word in ("visual", "vision_tower", "mm_projector", "multi_modal_projector") for word in words):
        return "vision"
    if "experts" in words:
        return "experts"
    if words[-2] in ("embed_tokens", "wte"):
        return "embedding"
    if words[0] == "lm_head":
        return "head"
    if any("norm" in word for word in words) or words[-2] in ("gate", "router"):
        return "other"
    if any(word in ("self_attn", "attn", "attention", "linear_attn") for word in words):
        return "attention"
    return "mlp" if any(word in ("mlp", "shared_experts", "shared_expert", "feed_forward") for word in words) else "other"


def _lora_specs(rank: int, has_experts: bool) -> dict[str, LoraSpec]:
    def spec(**on: Any) -> LoraSpec:
        return LoraSpec(**({"rank": rank, "train_attn": False, "train_mlp": False, "train_unembed": False} | on))

    found = {"attention": spec(train_attn=True), "mlp": spec(train_mlp=True), "head": spec(train_unembed=True)}
    if has_experts:
        found |= {f"mlp and experts, {layout}": spec(train_mlp=True, expert_lora=layout) for layout in LAYOUTS}
    return found


def _count(base: BaseModel, spec: LoraSpec) -> int:
    """Parameters of an adapter; 0 where the model has no such layers."""
    if not (spec.train_attn or spec.train_unembed or base.lora_modules) and spec.expert_lora == "off":
        return 0
    try:
        shapes = base.adapter_shapes(spec)
    except InvalidRequest:  # it trains nothing: a model whose every layer has routed experts has no other mlp
        return 0
    return sum(math.prod(shape.a) + math.prod(shape.b) for shape in shapes.values())


Quantised = Callable[[str], Scheme | None]  # by the path of a layer


def _ways(shapes: dict[str, tuple[int, ...]], linears: set[str], settings: dict[str, Any]) -> dict[str, Quantised]:
    """Ways to keep the weights: what quantises which layer. The head and the embedding stay as they are in all of them."""
    int4, fp8, nf4 = Int4Scheme(32, ""), Fp8Scheme((128, 128), ""), Nf4Scheme(True, "")
    wide = {name for name in linears if name != "lm_head" and "visual" not in name.split(".")}
    experts = {name for name in shapes if _part_of(name) == "experts" and len(shapes[name]) == 3}

    def only(names: Iterable[str], scheme: Scheme) -> Quantised:
        held = set(names)
        return lambda path: scheme if path in held else None

    ways: dict[str, Quantised] = {"bfloat16": lambda path: None, "FP8 blocks, all layers": only(wide | experts, fp8)}
    if experts:
        ways["INT4 groups of 32, routed experts"] = only(experts, int4)
    ways["NF4, all layers"] = only(wide | experts, nf4)
    shipped = read_scheme(settings)
    if shipped is not None:
        found = settings.get("quantization_config") or settings["text_config"]["quantization_config"]
        kept = [*(found.get("ignore") or found.get("modules_to_not_convert") or found.get("llm_int8_skip_modules") or ())]
        # A fused stack is, on disk, a layer for each expert and projection.
        names = {name for name in wide | experts if not left_out(f"{name.rpartition('.')[0]}.0.up_proj" if name in experts else name, kept)}
        ways[f"as shipped: {shipped.name}"] = only(names, shipped)
    return ways


def left_out(path: str, rules: list[str]) -> bool:
    """Whether a layer is left as it is: by a regular expression ("re:..."), its full name, or the name of a module above it."""
    for rule in rules:
        if rule.startswith("re:"):
            if re.match(rule.removeprefix("re:"), path):
                return True
        elif f".{rule}." in f".{path}.":
            return True
    return False


def stored_bytes(shapes: dict[str, tuple[int, ...]], quantised: Quantised) -> int:
    """What all weights take; what isn't quantised is in bfloat16."""
    total = 0.0
    for name, shape in shapes.items():
        scheme = quantised(name.removesuffix(".weight"))
        total += scheme.nbytes(shape) if scheme is not None else HALF * math.prod(shape)
    return round(total)
