"""Every family with experts, adapted everywhere at once: experts in each layout, shared experts, first dense layers, attention and head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from everlearn.engine.adapter import TrainingAdapter
from everlearn.engine.persist import State
from everlearn.engine.trainer import Trainer
from everlearn.models import quant_int4
from everlearn.models.architecture import auto_class, read_config
from everlearn.models.attention import PackedBatch
from everlearn.models.export import Adapter, export_peft, import_peft
from everlearn.models.load import load_base
from everlearn.models.lora import Segment
from everlearn.models.merge import export_merged
from everlearn.models.tensorfile import TensorFile
from everlearn.types import BaseModelInfo, Datum
from tests.engine.harness import CPU, FLOAT32, forward_backward
from tests.models.test_families import Model, attention_adapter, datums, our_logits, plain_of, rows_of
from tests.tiny_families import CONFIGS, CONTEXT, VOCAB, make_tiny_family, randomise

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_vl_moe", "qwen3_5_moe", "kimi_k25")
LAYOUTS = ("per_expert", "shared_outer", "rank_split")


def opened(name: str, folder: Path, weights: str = "stored") -> Model:
    info = BaseModelInfo(name, str(folder), [], read_config(folder).architectures[0], VOCAB, CONTEXT, [2])
    return Model(name, folder, load_base(info, CPU, FLOAT32, weights), plain_of(folder))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return opened(request.param, make_tiny_family(tmp_path_factory.mktemp("experts") / request.param, request.param))


def everywhere(model: Model, layout: str, rank: int, **switches: Any) -> TrainingAdapter:
    return attention_adapter(model.base, 4, rank, train_mlp=True, expert_lora=layout, **switches)


# ---- gradients ----


def written_out(model: Model, made: TrainingAdapter, leaves: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """W + scale · B A of every weight that the adapter changes, by the plain model's names."""
    weights = dict(model.plain.named_parameters())
    changed = {f"{p}.weight": weights[f"{p}.weight"] + made.scale * (b @ a) for p, (a, b) in leaves.items() if ".experts." not in p}
    for path, layer in model.base.expert_modules.items():

        def delta(name: str, path: str = path, num: int = layer.num_experts) -> torch.Tensor:
            a_ERI, b_EOR = (side if side.ndim == 3 else side.expand(num, *side.shape) for side in leaves[f"{path}.{name}"])
            return made.expert_scale * torch.bmm(b_EOR, a_ERI)

        up_EOI = torch.zeros(layer.num_experts, 2 * layer.size, layer.hidden)
        for name in ("gate_proj", "up_proj"):
            up_EOI[:, layer.columns[name]] = delta(name)
        for name, change in (("gate_up_proj", up_EOI), ("down_proj", delta("down_proj"))):
            turned = bool(getattr(layer.inner, "is_transposed", False))
            changed[f"{path}.{name}"] = weights[f"{path}.{name}"] + (change.transpose(1, 2) if turned else change)
    return changed


def plain_loss(plain: Any, changed: dict[str, torch.Tensor], data: list[Datum]) -> torch.Tensor:
    loss = torch.zeros(())
    for each in data:
        tokens, targets = (torch.from_numpy(array.numpy().astype(np.int64)) for array in (each.tokens, each.inputs["target_tokens"]))
        logits = functional_call(plain, changed, kwargs={"input_ids": tokens.unsqueeze(0)}).logits[0]
        picked = torch.log_softmax(logits, dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)
        loss = loss - (torch.from_numpy(each.inputs["weights"].numpy().copy()) * picked).sum()
    return loss


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_every_kind_equal_autograd_on_a_plain_model(model: Model, layout: str) -> None:
    made, data = everywhere(model, layout, 4, train_unembed=True), datums(5, [17, 17, 9, 30])
    forward_backward(Trainer(model.base, 64), made, data)
    leaves = {path: (a.clone().requires_grad_(), b.clone().requires_grad_()) for path, (a, b) in made.pairs().items()}
    plain_loss(model.plain, written_out(model, made, leaves), data).backward()
    found = made.training_weights(made.grad).grads
    assert found is not None and set(found) == set(leaves)
    kinds = {"self_attn", ".experts.", "lm_head"} | ({"shared_expert"} & {"shared_expert" for path in leaves if "shared_expert" in path})
    assert all(any(kind in path for path in leaves) for kind in kinds)
    assert ("shared_expert" in kinds) == (model.name in ("deepseek_v3", "qwen3_5_moe", "kimi_k25"))
    assert any(".layers.0.mlp.gate_proj" in path for path in leaves) == (model.name in ("deepseek_v3", "kimi_k25"))  # dense
    relative = 1e-4 if model.base.cache_form.state_layers else 2e-5
    for path, pair in leaves.items():
        for ours, theirs in zip(found[path], pair, strict=True):
            assert theirs.grad is not None
            size = float(theirs.grad.abs().max())
            assert size > 0, f"{path} takes no part in the model"
            torch.testing.assert_close(ours, theirs.grad, rtol=0, atol=relative * size, msg=lambda text, at=path: f"{at}: {text}")


# ---- out and in ----


def logits_with(model: Model, made: TrainingAdapter, row: torch.Tensor) -> torch.Tensor:
    segments = [Segment(made.weights, 0, len(row))]
    with torch.inference_mode():
        return model.base.head.logits(model.base.hidden(row, torch.arange(len(row)), PackedBatch([len(row)], segments)), segments)


def goes_round(model: Model, layout: str, out: Path) -> None:
    """PEFT and transformers compute what the adapter does here, and importing gives it back bit by bit."""
    peft = pytest.importorskip("peft")
    made, row = everywhere(model, layout, 6), rows_of(7, [24])[0]
    State(made, optimizer=False, gradient=False).write(out / "checkpoint")
    expected = logits_with(model, made, row)
    assert (our_logits(model.base, [row]) - expected).abs().max() > 0.1
    export_peft(Adapter(out / "checkpoint"), out / "peft", base=model.folder)
    export_merged(Adapter(out / "checkpoint"), model.folder, out / "merged")
    loaded = peft.PeftModel.from_pretrained(plain_of(model.folder), out / "peft").eval()
    with torch.inference_mode():
        for theirs in (loaded, plain_of(out / "merged")):
            torch.testing.assert_close(theirs(input_ids=row.unsqueeze(0)).logits[0], expected, rtol=0, atol=2e-5)
    assert import_peft(out / "peft", out / "back", model.name, model.folder) == []
    before, after = (TensorFile(out / folder / "adapter.safetensors") for folder in ("checkpoint", "back"))
    assert sorted(before.names()) == sorted(after.names()) and any(".experts." in name for name in before.names())
    for name in before.names():
        np.testing.assert_array_equal(before.float32(name), after.float32(name))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore:The following .*_pattern:RuntimeWarning")
@pytest.mark.parametrize("model", FAMILIES[3:], indirect=True)  # tests/models/test_export_experts.py has the others
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_are_exported_merged_and_imported(model: Model, layout: str, tmp_path: Path) -> None:
    goes_round(model, layout, tmp_path)


# ---- Qwen3-VL-MoE as its makers store it ----


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore:The following .*_pattern:RuntimeWarning")
@pytest.mark.parametrize(("inner", "turned"), [(24, False), (24, True), (96, True)])
def test_stacks_of_experts_are_read_either_way_round(inner: int, turned: bool, tmp_path: Path) -> None:
    """[experts, input, output] on disk, as the makers have it, or [experts, output, input], as transformers has it in memory."""
    config = CONFIGS["qwen3_vl_moe"]()
    config.text_config.moe_intermediate_size = inner
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = auto_class(config).from_config(config).eval()
        randomise(made)
        made.save_pretrained(tmp_path / "m")
    kept, file = dict(made.named_parameters()), tmp_path / "m" / "model.safetensors"
    tensors = {
        name: kept[name].detach().transpose(1, 2).contiguous() if turned and ".experts." in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    stacks = [tensor for name, tensor in tensors.items() if name.endswith("experts.gate_up_proj")]
    assert {tuple(stack.shape[1:]) for stack in stacks} == {(32, 2 * inner) if turned else (2 * inner, 32)}
    model, row = opened("vl", tmp_path / "m"), rows_of(1, [30])[0]
    with torch.inference_mode():
        expected = made(input_ids=row.unsqueeze(0)).logits[0]
    torch.testing.assert_close(our_logits(model.base, [row]), expected, rtol=0, atol=1e-5)
    goes_round(model, "shared_outer", tmp_path)
    if inner % 32 == 0:  # packed while it is read: what packing each stack gives
        packed = opened("vl", tmp_path / "m", "int4").base.expert_modules
        for path, experts in model.base.expert_modules.items():
            for ours, theirs in ((packed[path].up, experts.up), (packed[path].down, experts.down)):
                assert torch.equal(ours.weight.dense(), quant_int4.pack(theirs.weight.contiguous()).dense())  # type: ignore[union-attr, arg-type]
