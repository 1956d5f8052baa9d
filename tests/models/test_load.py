"""Which models are refused: those that would run, and compute something else than transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GraniteConfig, MistralConfig, Qwen3Config

from everlearn.errors import InvalidRequest, Unsupported
from everlearn.models.catalog import count_parameters
from everlearn.models.export import linear_shapes
from everlearn.models.hooks import refuse_what_the_hooks_miss
from everlearn.models.load import load_base
from everlearn.types import BaseModelInfo
from tests.tiny import make_tiny_model

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
}


def model_of(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


def check(config: Any, context: int = 1024) -> None:
    refuse_what_the_hooks_miss(BaseModelInfo("m", "", [], "", 64, context, []), model_of(config))


def test_causal_attention_is_taken() -> None:
    check(Qwen3Config(**SIZES))
    check(MistralConfig(**SIZES, sliding_window=None))
    check(MistralConfig(**SIZES, sliding_window=4096))  # never reached
    check(MistralConfig(**SIZES, sliding_window=128))
    check(Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=64, max_window_layers=1))


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (Qwen3Config(**SIZES, layer_types=["full_attention", "linear_attention"]), "linear_attention"),
        (GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=8.0), "logits_scaling"),
    ],
)
def test_what_our_hooks_would_leave_out_is_refused(config: Any, what: str) -> None:
    with pytest.raises(Unsupported, match=what):
        check(config)


def load(folder: Path) -> None:
    load_base(BaseModelInfo("m", str(folder), [], "", 512, 1024, []), torch.device("cpu"), torch.float32)


def test_a_folder_without_all_of_its_tensors_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m")
    load(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    gone = "model.layers.1.mlp.up_proj.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, file, {"format": "pt"})
    with pytest.raises(Unsupported, match=rf"lacks 1 of its tensors \(the first: {gone}\)"):
        load(folder)
    save_file(tensors | {"model.layers.1.mlp.more.weight": torch.zeros(2)}, file, {"format": "pt"})
    with pytest.raises(Unsupported, match=r"holds 1 tensors .*no place for \(the first: model\.layers\.1\.mlp\.more\.weight\)"):
        load(folder)
    renamed = {name + ("x" if name == gone else ""): tensor for name, tensor in tensors.items()}
    save_file(renamed, file, {"format": "pt"})
    with pytest.raises(Unsupported, match=rf"lacks 1 of its tensors \(the first: {gone}\), and holds 1 .*: {gone}x\)"):
        load(folder)
    save_file({name: tensor[:3].contiguous() if name == gone else tensor for name, tensor in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(Unsupported, match="can't be loaded"):
        load(folder)
    save_file(tensors, file, {"format": "pt"})
    load(folder)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Unsupported, match="can't be loaded"):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": null}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_refused_by_name(text: str, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(Unsupported, match=r"model\.safetensors\.index\.json .*download or convert the folder again$"):
        load(folder)
    with pytest.raises(InvalidRequest, match=r"model\.safetensors\.index\.json"):
        linear_shapes(folder)


@pytest.mark.parametrize("header", ["[]", "{", '{"a": 1}', '{"a": {"dtype": "F32", "shape": null, "data_offsets": [0, 4]}}'])
def test_a_broken_header_is_refused_by_name(header: str, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    for act in (load, linear_shapes, count_parameters):
        with pytest.raises((Unsupported, InvalidRequest), match=r"model\.safetensors is no safetensors file"):
            act(folder)


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m", tied=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(Unsupported, match=r"lm_head\.weight"):
        load(folder)
