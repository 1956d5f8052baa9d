"""vLLM's rules for adapters: what they refuse, that an export passes them, and that they are vLLM's own where vLLM is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from everlearn.errors import Unsupported
from everlearn.models import export, vllm
from everlearn.types import LoraSpec
from tests.models.test_export import checkpoint, info_of
from tests.moe import make_moe

LLAMA, QWEN2 = "LlamaForCausalLM", "Qwen2ForCausalLM"
LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
HEAD = "base_model.model.lm_head.lora_B.weight"
PLAIN: dict[str, Any] = {"r": 16, "lora_alpha": 32, "bias": "none", "init_lora_weights": True, "target_modules": ["q_proj"]}
# What is changed in a plain adapter's settings, and what of it the refusal names.
CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"r": 1024}, "rank 1024 is more than 512"),
    ({"rank_pattern": {"q_proj": 513}}, "rank 513"),
    ({"r": 0}, "rank 0 is no positive"),
    ({"bias": "all"}, "bias is 'all'"),
    ({"use_dora": True}, "use_dora"),
    ({"lora_bias": True}, "lora_bias"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"use_qalora": True}, "use_qalora"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save holds lm_head"),
]


@pytest.mark.parametrize(("change", "says"), CHANGES)
def test_settings_that_vllm_refuses(change: dict[str, Any], says: str) -> None:
    [reason] = vllm.refusals(PLAIN | change, [LAYER], LLAMA)
    assert says in reason


def test_patterns_and_roots_are_its_own_matter() -> None:
    taken = {
        "alpha_pattern": {"q_proj": 4},
        "rank_pattern": {"q_proj": 8},
        "use_rslora": True,
        "init_lora_weights": "gaussian",
        "modules_to_save": ["score"],
    }
    assert vllm.refusals(PLAIN | taken, [LAYER], LLAMA) == []


def test_settings_that_vllm_never_reads() -> None:
    [reason] = vllm.refusals(PLAIN | {"fan_in_fan_out": True}, [LAYER], LLAMA)
    assert "fan_in_fan_out" in reason and "another model" in reason


@pytest.mark.parametrize(
    ("name", "architecture", "vocab_size", "says"),
    [
        (LAYER, LLAMA, 128_256, None),
        (HEAD, LLAMA, 128_256, None),
        (LAYER, QWEN2, 151_936, None),
        (HEAD, QWEN2, 151_936, "train_unembed=False"),
        (HEAD, "MistralForCausalLM", 32_000, "adapts lm_head"),
        (LAYER, "Phi3ForCausalLM", 300_000, "won't start"),
        (LAYER, "Gemma3ForCausalLM", 262_144, None),
        (LAYER, "GPT2LMHeadModel", 50_257, "serves no adapters"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", LLAMA, 32_000, "embeddings"),
        ("base_model.model.lm_head.weight", LLAMA, 32_000, "no matrix of a LoRA"),
    ],
)
def test_layers_and_models(name: str, architecture: str, vocab_size: int, says: str | None) -> None:
    reasons = vllm.refusals(PLAIN, [name], architecture, vocab_size)
    assert (says is None and not reasons) or (says is not None and says in reasons[0])


def test_the_rank_of_the_server() -> None:
    [reason] = vllm.refusals(PLAIN | {"r": 24}, [LAYER], LLAMA, max_rank=16)
    assert reason.endswith("serve with --max-lora-rank 32")
    assert [vllm.rank_flag(rank) for rank in (1, 2, 8, 9, 257, 512)] == [1, 8, 8, 16, 320, 512]


def test_the_line_that_serves_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my support"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "rank_pattern": {"experts": 24}}))
    line = vllm.serve_command("my model", "support", folder)
    assert line == f"vllm serve 'my model' --enable-lora --max-lora-rank 32 --lora-modules 'support={folder}'"


def test_what_is_exported_passes(tiny_model: Path, tmp_path: Path) -> None:
    adapter = checkpoint(tiny_model, tmp_path / "checkpoint")
    assert "lm_head" in adapter.paths and vllm.check_adapter(adapter, info_of(tiny_model)) == []
    export.export_peft(adapter, tmp_path / "out", tiny_model)
    assert vllm.check_folder(tmp_path / "out", LLAMA, 512) == []
    assert "adapts lm_head" in vllm.check_folder(tmp_path / "out", QWEN2, 512)[0]
    base = msgspec.structs.replace(info_of(tiny_model), architecture=QWEN2)
    with pytest.raises(Unsupported, match="vLLM can't serve this adapter: it adapts lm_head"):
        vllm.check_adapter(adapter, base)
    [note] = vllm.check_adapter(adapter_without_head(tiny_model, tmp_path), msgspec.structs.replace(base, architecture="OddForCausalLM"))
    assert "not known" in note


def test_adapters_on_experts_are_noted(tmp_path: Path) -> None:
    base = make_moe(tmp_path / "moe", "qwen3_moe")
    lora = LoraSpec(rank=4, alpha=8, seed=1, train_unembed=False, expert_lora="shared_outer")
    notes = vllm.check_adapter(checkpoint(base, tmp_path / "experts", lora), info_of(base))
    assert "of up to rank 8" in notes[0]


def adapter_without_head(base: Path, folder: Path) -> export.Adapter:
    return checkpoint(base, folder / "headless", LoraSpec(rank=4, alpha=8, seed=1, train_unembed=False))


# -- vLLM itself -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs() -> Any:
    """vLLM's own loader. It comes with a torch of its own, so it isn't among the dependencies of the tests."""
    pytest.importorskip("vllm", reason="vLLM isn't installed here: the rules are checked against what was read from its source")
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    return LoRAConfig, LoRAModel, PEFTHelper


@pytest.mark.parametrize(("change", "says"), CHANGES)
def test_vllm_refuses_the_same(theirs: Any, change: dict[str, Any], says: str) -> None:
    config, _, helper = theirs
    with pytest.raises(ValueError, match=r".+"):
        helper.from_dict(PLAIN | change).validate_legal(config(max_lora_rank=512))


def test_vllm_reads_what_is_exported(theirs: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if not torch.accelerator.is_available():  # its release for GPUs takes one for granted
        monkeypatch.setattr("vllm.lora.lora_model.PIN_MEMORY", False)
    config, model, helper = theirs
    adapter = checkpoint(tiny_model, tmp_path / "checkpoint")
    export.export_peft(adapter, tmp_path / "out", tiny_model)
    settings = helper.from_local_dir(str(tmp_path / "out"), 1024)
    settings.validate_legal(config(max_lora_rank=vllm.rank_flag(adapter.rank)))
    expected = {path.rsplit(".", 1)[-1] for path in adapter.paths}
    read = model.from_local_checkpoint(str(tmp_path / "out"), expected, settings, lora_model_id=1, device="cpu", dtype=torch.float32)
    assert set(read.loras) == set(adapter.paths)
    for path, layer in read.loras.items():
        delta = layer.scaling * layer.lora_b @ layer.lora_a
        torch.testing.assert_close(delta, torch.from_numpy(adapter.delta(path)))
