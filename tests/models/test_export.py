"""Exports say what the adapter says: PEFT and merged folders against everlearn's own model, and back again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from everlearn.engine.adapter import TrainingAdapter
from everlearn.engine.persist import State, lora_of, restore
from everlearn.errors import Conflict, Damaged, InvalidRequest, NotFound, Unsupported
from everlearn.models import export, merge, parity, tensorfile
from everlearn.models.catalog import read_info
from everlearn.models.export import Adapter
from everlearn.models.load import load_base
from everlearn.types import BaseModelInfo, LoraSpec
from tests.tiny import make_tiny_model

CPU, F32 = torch.device("cpu"), torch.float32


def info_of(folder: Path) -> BaseModelInfo:
    return read_info(folder.name, folder, [])


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tied", tied=True)


def fresh(base: Path, lora: LoraSpec) -> TrainingAdapter:
    model = load_base(info_of(base), CPU, F32)
    return TrainingAdapter("run:train:0", "me", base.name, lora, model.adapter_shapes(lora), CPU, F32)


def checkpoint(base: Path, folder: Path, lora: LoraSpec | None = None) -> Adapter:
    """A checkpoint as the engine writes it, with an update large enough to be seen."""
    adapter = fresh(base, lora or LoraSpec(rank=4, alpha=8, seed=1))
    adapter.params += 0.2 * torch.randn(adapter.params.shape, generator=torch.Generator().manual_seed(2))
    State(adapter, optimizer=False, gradient=False).write(folder)
    return Adapter(folder)


@pytest.mark.parametrize("form", ["peft", "merged"])
@pytest.mark.parametrize("tied", [False, True])
def test_export_gives_the_same_log_probabilities(form: str, tied: bool, tiny_model: Path, tied_model: Path, tmp_path: Path) -> None:
    base = tied_model if tied else tiny_model
    adapter = checkpoint(base, tmp_path / "checkpoint")
    out = tmp_path / "out"
    if form == "peft":
        export.export_peft(adapter, out, base)
    else:
        assert bool(merge.export_merged(adapter, base, out)) == tied
    result = parity.check(form, out, adapter, info_of(base))
    assert result.difference < 5e-5 and result.effect > 0.5 and result.ok, result


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_the_check_finds_a_wrong_export(form: str, tiny_model: Path, tmp_path: Path) -> None:
    adapter = checkpoint(tiny_model, tmp_path / "checkpoint")
    out = tmp_path / "out"
    if form == "peft":
        export.export_peft(adapter, out, tiny_model)
        config = json.loads((out / "adapter_config.json").read_text())
        (out / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] * 1.01}))
    else:
        adapter.alpha *= 1.01
        merge.export_merged(adapter, tiny_model, out)
        adapter.alpha /= 1.01
    result = parity.check(form, out, adapter, info_of(tiny_model))
    assert not result.ok and 0 < result.difference < result.effect


def test_untied_head_leaves_the_embeddings_alone(tied_model: Path, tmp_path: Path) -> None:
    adapter = checkpoint(tied_model, tmp_path / "checkpoint", LoraSpec(rank=2, train_attn=False, train_mlp=False))
    merge.export_merged(adapter, tied_model, tmp_path / "out")
    before = tensorfile.TensorFile(tied_model / "model.safetensors")
    after = tensorfile.TensorFile(tmp_path / "out" / "model.safetensors")
    assert set(after.names()) == {*before.names(), "lm_head.weight"} and not export.is_tied(tmp_path / "out")
    assert all(np.array_equal(before.raw(name), after.raw(name)) for name in before.names())
    expected = before.float32("model.embed_tokens.weight") + adapter.delta("lm_head")
    np.testing.assert_array_equal(after.float32("lm_head.weight"), expected)


def test_tied_model_stays_tied_without_a_head_adapter(tied_model: Path, tmp_path: Path) -> None:
    adapter = checkpoint(tied_model, tmp_path / "checkpoint", LoraSpec(rank=2, alpha=4, train_unembed=False))
    assert merge.export_merged(adapter, tied_model, tmp_path / "out") == []
    assert export.is_tied(tmp_path / "out") and parity.check("merged", tmp_path / "out", adapter, info_of(tied_model)).difference < 5e-5


def test_sharded_base_and_other_dtypes(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = tmp_path / "tiny"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(base, max_shard_size="100KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    (base / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    (base / "evil.py").write_text("raise SystemExit")
    adapter = checkpoint(base, tmp_path / "checkpoint")
    seen: list[tuple[int, int]] = []
    merge.export_merged(adapter, base, tmp_path / "out", "bfloat16", progress=lambda done, of: seen.append((done, of)))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    assert (tmp_path / "out" / "tokenizer.json").exists() and not (tmp_path / "out" / "evil.py").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    exact = tensorfile.TensorFile
    weight = "model.layers.1.mlp.up_proj.weight"
    expected = exact(export.weight_files(base)[weight].path).float32(weight) + adapter.delta(weight.removesuffix(".weight"))
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, torch.from_numpy(expected).bfloat16())
    merge.export_merged(adapter, tmp_path / "out", tmp_path / "again")  # keeps the base's type
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").dtype == torch.bfloat16


def test_bfloat16_rounds_as_torch_does() -> None:
    normal = np.random.default_rng(0).normal(size=1000) * 10.0 ** np.arange(-20, 20).repeat(25)
    values = np.append(normal, [np.nan, np.inf, -np.inf, 0.0, -0.0, 3.4e38]).astype(np.float32)
    ours = tensorfile.widen(tensorfile.narrow(values, "BF16"), "BF16")
    np.testing.assert_array_equal(ours, torch.from_numpy(values).bfloat16().float().numpy())


def test_peft_round_trip_is_exact_and_trainable(tiny_model: Path, tmp_path: Path) -> None:
    adapter = checkpoint(tiny_model, tmp_path / "checkpoint")
    export.export_peft(adapter, tmp_path / "peft", tiny_model)
    assert export.import_peft(tmp_path / "peft", tmp_path / "back", "tiny", tiny_model) == []
    back = Adapter(tmp_path / "back")
    assert back.scale == adapter.scale and set(back.paths) == set(adapter.paths)
    assert all(np.array_equal(x, y) for path in adapter.paths for x, y in zip(adapter.pair(path), back.pair(path), strict=True))
    restore(fresh(tiny_model, lora_of(tmp_path / "back")), tmp_path / "back", optimizer=False)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_import_of_what_peft_itself_saves(tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    ).eval()
    model.save_pretrained(tmp_path / "peft")
    missing = export.import_peft(tmp_path / "peft", tmp_path / "back", "tiny", tiny_model)
    assert len(missing) == 4  # k and o of two layers
    adapter = Adapter(tmp_path / "back")
    lora = lora_of(tmp_path / "back")
    assert (lora.alpha, lora.train_attn, lora.train_mlp, lora.train_unembed) == (12, True, False, False)
    restore(fresh(tiny_model, lora), tmp_path / "back", optimizer=False)
    assert parity.check("peft", tmp_path / "peft", adapter, info_of(tiny_model)).difference < 5e-5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_import_refuses_by_name_what_it_cannot_express(change: dict[str, object], match: str, tiny_model: Path, tmp_path: Path) -> None:
    export.export_peft(checkpoint(tiny_model, tmp_path / "checkpoint"), tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(Unsupported, match=match):
        export.import_peft(tmp_path / "peft", tmp_path / "back", "tiny", tiny_model)
    assert not (tmp_path / "back").exists()


def test_wrong_base_is_refused_and_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    adapter = checkpoint(tiny_model, tmp_path / "checkpoint")
    other = make_tiny_model(tmp_path / "other", hidden=32)
    shallow = make_tiny_model(tmp_path / "shallow", layers=1)
    with pytest.raises(InvalidRequest, match="its own base model"):
        merge.export_merged(adapter, other, tmp_path / "out")
    with pytest.raises(Unsupported, match=r"layers\.1"):
        merge.export_merged(adapter, shallow, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_damaged_checkpoints_and_full_folders_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    adapter = checkpoint(tiny_model, tmp_path / "checkpoint")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(Conflict, match="isn't empty"):
        export.export_peft(adapter, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    export.export_peft(adapter, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "thesis.txt").exists() and (tmp_path / "out" / "adapter_config.json").exists()
    with pytest.raises(InvalidRequest, match="dtype 'int3'"):
        export.export_peft(adapter, tmp_path / "other", dtype="int3")
    with pytest.raises(NotFound, match="tinker://"):
        Adapter(tmp_path)
    weights = tmp_path / "checkpoint" / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(Damaged, match="damaged"):
        Adapter(tmp_path / "checkpoint")


def test_module_names_are_spelled_out_where_short_ones_are_ambiguous(tiny_model: Path) -> None:
    paths = [f"model.layers.{layer}.mlp.up_proj" for layer in range(2)]
    assert export.target_modules(paths, tiny_model) == ["up_proj"]
    assert export.target_modules(paths[:1], tiny_model) == paths[:1]
    assert export.target_modules(paths[:1], None) == ["up_proj"]


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, (2).to_bytes(8, "little") + b"{}", (9999).to_bytes(8, "little") + b"{}"])
def test_broken_safetensors_files_are_refused_or_empty(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    if len(data) == 10 and data[0] == 2:
        assert tensorfile.TensorFile(path).names() == []
    else:
        with pytest.raises(InvalidRequest, match="no safetensors file"):
            tensorfile.TensorFile(path)


def test_tensor_bytes_must_lie_inside_the_file(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(InvalidRequest, match="doesn't match its bytes"):
        tensorfile.TensorFile(tmp_path / "x.safetensors")
