"""Folders in their makers' names and forms: read like any other, a group of tensors at a time, packed or quantised or plain."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from everlearn.errors import Unsupported
from everlearn.models.architecture import auto_class, read_config
from everlearn.models.conversion import new_names
from everlearn.models.load import BaseModel, load_base
from everlearn.models.quant import PackedWeight
from everlearn.types import BaseModelInfo
from tests.engine.harness import CPU, FLOAT32
from tests.models.quantised import quantise
from tests.models.test_families import our_logits, plain_of, rows_of
from tests.tiny_families import CONFIGS, CONTEXT, SIZES, VOCAB, as_its_makers_name_them

ROWS = rows_of(4, [20, 9])
SEES = "vision_tower.encoder.blocks.0"


def load(folder: Path, weights: str = "stored") -> BaseModel:
    return load_base(BaseModelInfo("m", str(folder), [], "", VOCAB, CONTEXT, [2]), CPU, FLOAT32, weights)


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kimi K2.5 as its makers store it, with sides that the groups of INT4 fit."""
    folder = tmp_path_factory.mktemp("kimi")
    config = CONFIGS["kimi_k25"]()
    config.text_config.update({"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96, "first_k_dense_replace": 1})
    config.projection_hidden_size = 64
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto_class(config).from_config(config).save_pretrained(folder)
    as_its_makers_name_them(folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("mixtral")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MixtralForCausalLM(MixtralConfig(**{**SIZES, "hidden_size": 64, "intermediate_size": 64}, num_local_experts=12)).save_pretrained(
            folder
        )
    return folder


def packed_in(base: BaseModel) -> Iterator[str]:
    return (name for name, module in base.model.named_modules() if isinstance(module, PackedWeight))


def test_kimi_k25_is_read_as_transformers_reads_it(kimi: Path) -> None:
    names = set(load_file(kimi / "model.safetensors"))
    assert {f"{SEES}.wqkv.weight", f"{SEES}.mlp.fc0.bias", "language_model.model.layers.1.mlp.experts.3.up_proj.weight"} <= names
    base, plain = load(kimi), plain_of(kimi)
    found, expected = dict(base.model.named_parameters()), dict(plain.named_parameters())
    tower = [name for name in expected if "vision_tower" in name or "mm_projector" in name]
    assert tower and all(torch.equal(found[name], expected[name]) for name in tower)
    with torch.inference_mode():
        logits = torch.cat([plain(input_ids=row[None]).logits[0] for row in ROWS])
    torch.testing.assert_close(our_logits(base, ROWS), logits, rtol=0, atol=1e-5)


def test_kimi_k25_in_int4_equals_its_values(kimi: Path, tmp_path: Path) -> None:
    """Routed experts alone are INT4, and their tensors have their makers' names as well."""
    quantised, reference = quantise(kimi, tmp_path, "int4", lambda path: ".mlp.experts." in path, shards=3)
    base = load(quantised)
    assert len(list(packed_in(base))) == 2 * len(base.expert_modules) > 0
    torch.testing.assert_close(our_logits(base, ROWS), our_logits(load(reference), ROWS), rtol=0, atol=1e-3)


@pytest.mark.parametrize("weights", ["int4", "nf4"])
def test_kimi_k25_is_packed_while_it_is_read(kimi: Path, weights: str) -> None:
    base = load(kimi, weights)
    assert all(isinstance(experts.up.weight, PackedWeight) for experts in base.expert_modules.values())
    assert not any("vision" in name for name in packed_in(base))
    assert torch.isfinite(our_logits(base, ROWS)).all()


def test_the_order_of_a_folders_tensors_names_nothing(kimi: Path) -> None:
    """Some renamings hold only behind others; shards may hold the later ones first."""
    names = list(load_file(kimi / "model.safetensors"))
    config = read_config(kimi)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    expected = new_names(model, sorted(names))
    assert f"{SEES}.norm0.weight" in names and len(set(expected.values())) == len(names) and set(expected) != set(expected.values())
    for order in (sorted(names, reverse=True), random.Random(0).sample(names, len(names))):
        assert new_names(model, order) == expected


def test_experts_that_transformers_stacks_are_stacked_here(mixtral: Path) -> None:
    """In the order of their numbers: the tenth comes after the ninth."""
    assert "model.layers.0.block_sparse_moe.experts.10.w1.weight" in load_file(mixtral / "model.safetensors")
    base, plain = load(mixtral), plain_of(mixtral)
    with torch.inference_mode():
        logits = torch.cat([plain(input_ids=row[None]).logits[0] for row in ROWS])
    torch.testing.assert_close(our_logits(base, ROWS), logits, rtol=0, atol=1e-5)
    packed = load(mixtral, "int4")
    assert all(isinstance(experts.down.weight, PackedWeight) for experts in packed.expert_modules.values())
    for path, experts in base.expert_modules.items():
        off = packed.expert_modules[path].down.weight.dense() - experts.down.weight  # type: ignore[union-attr]
        assert 0 < off.abs().max() < 0.1 * experts.down.weight.abs().max()  # type: ignore[operator]


def test_what_a_conversion_lacks_is_refused_by_name(mixtral: Path, kimi: Path, tmp_path: Path) -> None:
    def refused(folder: Path, lost: str, changed: dict[str, torch.Tensor], said: str) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[lost]
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        save_file(tensors | changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(Unsupported, match=said):
            load(tmp_path)

    expert = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
    refused(mixtral, expert, {}, r"layers\.1\..*experts\.down_proj.* would have the shape \[11, 64, 64\]")
    refused(mixtral, expert, {expert: torch.zeros(3, 3)}, r"can't convert .*layers\.1\..*experts\.0\.w2\.weight")
    wqkv = f"{SEES}.wqkv.weight"
    refused(kimi, wqkv, {}, r"lacks 3 of its tensors \(the first: model\.vision_tower\..*k_proj\.weight\)")
    refused(kimi, wqkv, {wqkv: torch.zeros(48, 32)}, r"q_proj\.weight, made from .*wqkv\.weight, would have the shape \[16, 32\]")
    refused(kimi, wqkv, {"vision_tower.other.weight": torch.zeros(2)}, r"lacks 3 .*and holds 1 .*vision_tower\.other\.weight")
