"""Model folders quantised the way their makers ship them, written here step by step from the formats' definitions.

The package's own packing is not used: what is tested against these folders would otherwise agree with itself.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from everlearn.models.quant_nf4 import CODES

Layer = tuple[dict[str, torch.Tensor], torch.Tensor]  # tensors on disk by suffix, and the values that they stand for

# Kimi K2 Thinking's own, field by field.
INT4_CONFIG = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4, "observer": "minmax",
                "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}  # fmt: skip
FP8_CONFIG = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
NF4_CONFIG = {
    "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "llm_int8_skip_modules": ["lm_head"], "load_in_4bit": True, "load_in_8bit": False, "quant_method": "bitsandbytes",
}  # fmt: skip


def int4(weight: torch.Tensor) -> Layer:
    num_out, num_in = weight.shape
    scale = (weight.view(num_out, -1, 32).abs().amax(-1) / 7).clamp_min(1e-6).bfloat16()
    spread = scale.float().repeat_interleave(32, dim=1)
    levels = torch.clamp(torch.round(weight / spread), -8, 7)
    packed = torch.zeros(num_out, num_in // 8, dtype=torch.int64)
    for place in range(8):
        packed |= (levels[:, place::8].long() + 8) << (4 * place)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).int()
    return {
        "weight_packed": packed,
        "weight_scale": scale,
        "weight_shape": torch.tensor([num_out, num_in], dtype=torch.int32),
    }, levels * spread


def fp8(weight: torch.Tensor) -> Layer:
    num_out, num_in = weight.shape
    scale = torch.empty(math.ceil(num_out / 128), math.ceil(num_in / 128))
    stored, dense = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            at = (slice(row * 128, (row + 1) * 128), slice(column * 128, (column + 1) * 128))
            scale[row, column] = weight[at].abs().max() / 448
            stored[at] = (weight[at] / scale[row, column]).to(torch.float8_e4m3fn)
            dense[at] = stored[at].float() * scale[row, column]
    return {"weight": stored, "weight_scale_inv": scale}, dense


def nf4(weight: torch.Tensor) -> Layer:
    """With double quantisation; the table of the second one is any table of 256 values, as the format has it."""
    codes, flat = torch.tensor(CODES), weight.reshape(-1, 64)
    absmax = flat.abs().amax(1)
    offset = absmax.mean().item()
    table = torch.linspace(-1, 1, 256)
    nested = torch.stack([block.abs().max() for block in (absmax - offset).split(256)]).clamp_min(1e-8)
    spread = nested.repeat_interleave(256)[: len(absmax)]
    index = ((absmax - offset)[:, None] / spread[:, None] - table).abs().argmin(1)
    used = table[index] * spread + offset
    chosen = (flat[:, :, None] / used[:, None, None] - codes).abs().argmin(-1).view(-1, 2).to(torch.uint8)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape), "nested_blocksize": 256,
             "nested_dtype": "float32", "nested_offset": offset}  # fmt: skip
    stored = {
        "weight": ((chosen[:, 0] << 4) | chosen[:, 1])[:, None],
        "weight.absmax": index.to(torch.uint8),
        "weight.nested_absmax": nested,
        "weight.nested_quant_map": table,
        "weight.quant_map": codes,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    return stored, (codes[chosen.long()].view(-1, 64) * used[:, None]).view(weight.shape)


KINDS: dict[str, tuple[Callable[[torch.Tensor], Layer], dict[str, Any]]] = {
    "int4": (int4, INT4_CONFIG),
    "fp8": (fp8, FP8_CONFIG),
    "nf4": (nf4, NF4_CONFIG),
}


def quantise(plain: Path, out: Path, kind: str, wanted: Callable[[str], bool], shards: int = 1) -> tuple[Path, Path]:
    """Two folders from a plain one: `quantised`, with the linear layers that `wanted` picks by path, and `reference`, with their values."""
    quantise_layer, config = KINDS[kind]
    quantised, reference = out / "quantised", out / "reference"
    for folder in (quantised, reference):
        shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    stored: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        path = name.removesuffix(".weight")
        if name.endswith(".weight") and tensor.dim() == 2 and wanted(path):
            layer, values[name] = quantise_layer(tensor.float())
            stored |= {f"{path}.{suffix}": part for suffix, part in layer.items()}
        else:
            stored[name] = values[name] = tensor
    write_shards(quantised, stored, shards)
    write_shards(reference, values, 1)
    settings = json.loads((plain / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    return quantised, reference


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {name: f"model-{at * shards // len(names) + 1:05}-of-{shards:05}.safetensors" for at, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        save_file({name: tensors[name].contiguous() for name in names if weight_map[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
