"""Adapters on experts leave for PEFT and full weights with the same log-probabilities, and come back exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from everlearn.engine.persist import lora_of, restore
from everlearn.errors import InvalidRequest, Unsupported
from everlearn.models import export, merge, parity
from everlearn.models.export import Adapter
from everlearn.types import LoraSpec
from tests.models.test_export import checkpoint, fresh, info_of
from tests.moe import KINDS, make_moe

LAYOUTS = ("per_expert", "shared_outer", "rank_split")


@pytest.fixture(scope="module", params=KINDS)
def moe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("moe") / request.param, request.param)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_peft_and_merged_say_the_same_and_come_back(moe: Path, layout: str, tmp_path: Path) -> None:
    adapter = checkpoint(moe, tmp_path / "checkpoint", LoraSpec(rank=6, alpha=9, seed=1, train_unembed=False, expert_lora=layout))  # type: ignore[arg-type]
    assert any(".experts." in path for path in adapter.paths)
    for form in ("peft", "merged"):
        if form == "peft":
            export.export_peft(adapter, tmp_path / form, moe)
        else:
            merge.export_merged(adapter, moe, tmp_path / form)
        result = parity.check(form, tmp_path / form, adapter, info_of(moe))
        assert result.difference < 1e-5 * max(1.0, result.effect) and result.effect > 0.3, (form, result)
    assert export.import_peft(tmp_path / "peft", tmp_path / "back", moe.name, moe) == []
    back = Adapter(tmp_path / "back")
    assert back.rank == adapter.rank and back.alpha == adapter.alpha and set(back.paths) == set(adapter.paths)
    assert all(np.array_equal(x, y) for path in adapter.paths for x, y in zip(adapter.pair(path), back.pair(path), strict=True))
    assert lora_of(tmp_path / "back").expert_lora == layout
    restore(fresh(moe, lora_of(tmp_path / "back")), tmp_path / "back", optimizer=False)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("targets", [["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"]])
def test_import_of_what_peft_itself_trains_on_experts(targets: list[str], moe: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["o_proj"], target_parameters=targets, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(moe), config).save_pretrained(tmp_path / "peft")
    missing = export.import_peft(tmp_path / "peft", tmp_path / "back", moe.name, moe)
    assert all(("experts" in path and not path.endswith(".experts.down_proj")) or "mlp" in path or "self_attn" in path for path in missing)
    adapter, lora = Adapter(tmp_path / "back"), lora_of(tmp_path / "back")
    assert (lora.rank, lora.alpha, lora.expert_lora) == (4, 6, "per_expert")
    restore(fresh(moe, lora), tmp_path / "back", optimizer=False)
    result = parity.check("peft", tmp_path / "peft", adapter, info_of(moe))
    assert result.difference < 1e-5 * max(1.0, result.effect) and result.effect > 0.3, result


def test_import_of_modules_named_by_expert(moe: Path, tmp_path: Path) -> None:
    """The form of older transformers and of servers: experts.3.up_proj. Experts without one keep their weights."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for expert in (0, 2, 5):
        for name, (num_in, num_out) in {"gate_proj": (32, 24), "up_proj": (32, 24), "down_proj": (24, 32)}.items():
            at = f"base_model.model.model.layers.1.mlp.experts.{expert}.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(2, num_in, generator=generator)
            tensors[f"{at}.lora_B.weight"] = torch.randn(num_out, 2, generator=generator)
    (tmp_path / "peft").mkdir()
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    export.write_json(
        tmp_path / "peft" / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["up_proj"]}
    )
    export.import_peft(tmp_path / "peft", tmp_path / "back", moe.name, moe)
    adapter = Adapter(tmp_path / "back")
    a, b = adapter.pair("model.layers.1.mlp.experts.up_proj")
    prefix = "base_model.model.model.layers.1.mlp.experts.5.up_proj"
    assert np.array_equal(a[5], tensors[f"{prefix}.lora_A.weight"]) and np.array_equal(b[5], tensors[f"{prefix}.lora_B.weight"])
    assert not b[1].any()
    restore(fresh(moe, lora_of(tmp_path / "back")), tmp_path / "back", optimizer=False)


def test_experts_that_the_base_lacks_are_named(tmp_path: Path, tiny_model: Path) -> None:
    moe, other = (make_moe(tmp_path / kind, kind) for kind in ("qwen3_moe", "deepseek_v3"))
    adapter = checkpoint(moe, tmp_path / "checkpoint", LoraSpec(rank=4, seed=1, train_unembed=False, expert_lora="per_expert"))
    export.export_peft(adapter, tmp_path / "peft", moe)
    with pytest.raises(InvalidRequest, match=r"adapts experts \(base_model.*\), and the base in .* has none"):
        export.import_peft(tmp_path / "peft", tmp_path / "dense", "dense", tiny_model)
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    moved = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in tensors.items() if "layers.1.mlp.experts" in name}
    save_file(moved, tmp_path / "peft" / "adapter_model.safetensors")
    with pytest.raises(Unsupported, match=r"layers\.7\.mlp\.experts.* belongs to none of the base's experts"):
        export.import_peft(tmp_path / "peft", tmp_path / "other", "other", other)


def test_a_router_stays_as_it_is(moe: Path, tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    router = "router" if moe.name == "gpt_oss" else "gate"
    at = f"base_model.model.model.layers.1.mlp.{router}"
    save_file(
        {f"{at}.lora_A.weight": np.ones((2, 32), np.float32), f"{at}.lora_B.weight": np.ones((8, 2), np.float32)},
        tmp_path / "peft" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_parameters": [f"mlp.{router}.weight"]}
    export.write_json(tmp_path / "peft" / "adapter_config.json", config)
    with pytest.raises(Unsupported, match=rf"mlp\.{router}' chooses experts, and routers stay frozen"):
        export.import_peft(tmp_path / "peft", tmp_path / "back", moe.name, moe)
