"""Quantised folders in the exact formats that are shipped: what is loaded, what is computed, what is learnt over it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, LlamaConfig, Qwen3MoeConfig

from everlearn.errors import Unsupported
from everlearn.models import quant_fp8, quant_int4, quant_nf4
from everlearn.models.attention import PackedBatch
from everlearn.models.export import linear_shapes
from everlearn.models.load import BaseModel, load_base
from everlearn.models.lora import AdapterWeights, Segment
from everlearn.models.quant import PackedWeight, packed_linear
from everlearn.types import BaseModelInfo, LoraSpec, SampleResult
from tests.engine.sampling import make_sampler, request
from tests.engine.sampling import run as answered
from tests.models.quantised import KINDS, quantise

COMMON: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 160, "max_position_embeddings": 256,
    "moe_intermediate_size": 32, "initializer_range": 0.15, "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**COMMON, intermediate_size=64, num_key_value_heads=2, head_dim=16, num_experts=6),
    "deepseek_v3": lambda: DeepseekV3Config(
        **COMMON, intermediate_size=96, num_key_value_heads=4, n_routed_experts=6, n_group=1, topk_group=1, q_lora_rank=32,
        kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, first_k_dense_replace=1, num_mtp_layers=0,
    ),
    "llama": lambda: LlamaConfig(
        **{k: v for k, v in COMMON.items() if "exper" not in k and "moe" not in k}, intermediate_size=192, num_key_value_heads=2
    ),
}  # fmt: skip


def routed(path: str) -> bool:
    return ".experts." in path


def linear(path: str) -> bool:
    return path.endswith("_proj") or "_proj_" in path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each family with random weights in bfloat16."""
    from transformers import AutoModelForCausalLM

    folders = {}
    for family, config in CONFIGS.items():
        folders[family] = tmp_path_factory.mktemp(family)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            AutoModelForCausalLM.from_config(config()).bfloat16().save_pretrained(folders[family])
    return folders


def load(folder: Path) -> BaseModel:
    return load_base(BaseModelInfo("m", str(folder), [], "", 160, 256, []), torch.device("cpu"), torch.float32)


TOKENS = torch.arange(24) * 7 % 160


def run(base: BaseModel, weights: AdapterWeights | None) -> torch.Tensor:
    """Logits [T, V] of two packed sequences."""
    batch = PackedBatch([10, 14], [Segment(weights, 0, 24)])
    positions = torch.cat([torch.arange(10), torch.arange(14)])
    return base.hidden(TOKENS, positions, batch) @ base.head.weight.t()


def adapter(base: BaseModel) -> AdapterWeights:
    shapes = base.adapter_shapes(LoraSpec(rank=2, train_unembed=False, expert_lora="per_expert"))
    generator = torch.Generator().manual_seed(5)
    pairs = {path: tuple(torch.randn(side, generator=generator) * 0.1 for side in shape) for path, shape in shapes.items()}
    grads = {path: tuple(torch.zeros_like(side) for side in pair) for path, pair in pairs.items()}
    return AdapterWeights("a", 2.0, pairs, grads)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "kind", "wanted"),
    [
        ("qwen3_moe", "int4", routed),
        ("deepseek_v3", "int4", routed),
        ("deepseek_v3", "fp8", linear),
        ("qwen3_moe", "fp8", linear),
        ("llama", "nf4", linear),
        ("qwen3_moe", "nf4", linear),
    ],
)
def test_a_quantised_folder_equals_its_values(plain: dict[str, Path], tmp_path: Path, family: str, kind: str, wanted: Any) -> None:
    quantised, reference = (load(folder) for folder in quantise(plain[family], tmp_path, kind, wanted, shards=3))
    packed = [module for module in quantised.model.modules() if isinstance(module, PackedWeight)]
    assert packed and not any(isinstance(module, PackedWeight) for module in reference.model.modules())
    assert quantised.num_parameters == reference.num_parameters
    with torch.inference_mode():
        assert (run(quantised, None) - run(reference, None)).abs().max() < 1e-4
    ours, theirs = adapter(quantised), adapter(reference)
    assert ours.pairs.keys() == theirs.pairs.keys() and any(".experts." in path for path in ours.pairs) == (family != "llama")
    for base, weights in ((quantised, ours), (reference, theirs)):
        logits = run(base, weights)
        torch.nn.functional.cross_entropy(logits, TOKENS.roll(-1), reduction="sum").backward()
    assert ours.grads is not None and theirs.grads is not None
    for path, pair in ours.grads.items():
        for got, expected in zip(pair, theirs.grads[path], strict=True):
            assert expected.abs().max() > 0, path
            assert (got - expected).abs().max() <= 1e-4 * expected.abs().max().clamp_min(1), path


@pytest.mark.parametrize("kind", ["int4", "fp8", "nf4"])
def test_a_quantised_head_is_unpacked_once(plain: dict[str, Path], tmp_path: Path, kind: str) -> None:
    quantised, reference = (load(folder) for folder in quantise(plain["llama"], tmp_path, kind, lambda path: path == "lm_head"))
    assert isinstance(quantised.head.weight, torch.nn.Parameter) and quantised.num_parameters == reference.num_parameters
    assert not any(isinstance(module, PackedWeight) for module in quantised.model.modules())
    hidden, segments = torch.randn(3, quantised.hidden_size), [Segment(None, 0, 3)]
    with torch.inference_mode():
        ours, theirs = (base.head.logits(hidden, segments) for base in (quantised, reference))
    torch.testing.assert_close(ours, theirs)


def test_the_sampler_computes_what_the_trainer_does(plain: dict[str, Path], tmp_path: Path) -> None:
    """Over packed latents, experts and projections; one request by itself and three together."""
    base = load(quantise(plain["deepseek_v3"], tmp_path, "fp8", linear)[0])
    weights = adapter(base)
    sampler = make_sampler(base, prefill_tokens=8)
    sampler.bank.publish("v", weights.scale, weights.pairs, weights.expert_scale)
    asked = [request(str(i), list(range(9, 12 + 5 * i)), max_tokens=12, seed=i, version="v" if i else "") for i in range(4)]
    answers = answered(sampler, asked[0]) | answered(sampler, *asked[1:])
    for one in asked:
        answer = answers[one.request_id]
        assert isinstance(answer, SampleResult), answer
        prompt, drawn = one.prompt.numpy().tolist(), answer.sequences[0].tokens.numpy().tolist()
        row = torch.tensor([*prompt, *drawn])
        segments = [Segment(weights if one.version else None, 0, len(row))]
        with torch.inference_mode():
            hidden = base.hidden(row, torch.arange(len(row)), PackedBatch([len(row)], segments))
            logprobs = torch.log_softmax(base.head.logits(hidden, []), dim=-1)
        expected = [logprobs[len(prompt) - 1 + at, token].item() for at, token in enumerate(drawn)]
        assert answer.sequences[0].logprobs.numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("format", [quant_int4, quant_fp8, quant_nf4])
def test_parts_of_a_packed_weight(format: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    stack = format.pack(torch.randn(3, 40, 64, generator=generator))
    values = stack.dense()
    assert values.shape == (3, 40, 64) and torch.equal(stack.dense(1), values[1]) and torch.equal(stack.dense(slice(1, 3)), values[1:])
    matrix = format.pack(torch.randn(200, 96, generator=generator))
    values = matrix.dense()
    assert torch.equal(matrix.dense(150), values[150])
    for part in (slice(3, 170), slice(0, 1), slice(None, None, 2), slice(5, 5)):
        assert torch.equal(matrix.dense(part), values[part])
    x = torch.randn(7, 96, generator=generator, requires_grad=True)
    packed_linear(x, matrix).square().sum().backward()
    got, x.grad = x.grad, None
    torch.nn.functional.linear(x, values).square().sum().backward()
    assert got is not None and x.grad is not None and torch.allclose(got, x.grad)
    assert matrix.nbytes < matrix.numel() * (1.3 if format is quant_fp8 else 0.65) and not list(matrix.parameters())


@pytest.mark.parametrize("format", [quant_int4, quant_fp8, quant_nf4])
def test_values_in_bfloat16_are_rounded_once(format: Any) -> None:
    """Neither codes nor scales are rounded before they meet."""
    weight = format.pack(torch.randn(160, 192, generator=torch.Generator().manual_seed(2)))
    exact = weight.dense()
    weight.dtype = torch.bfloat16
    for part in (None, 7, slice(3, 150)):
        assert torch.equal(weight.dense(part), (exact if part is None else exact[part]).bfloat16())


@pytest.mark.parametrize("weights", ["int4", "fp8", "nf4"])
@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_a_plain_folder_is_packed_while_it_is_read(plain: dict[str, Path], tmp_path: Path, family: str, weights: str) -> None:
    """What comes out is what packing each layer gives: every layer that adapters may go on, and the experts."""
    info = BaseModelInfo("m", str(plain[family]), [], "", 160, 256, [])
    packed = load_base(info, torch.device("cpu"), torch.float32, weights)
    whole = load(plain[family])
    assert packed.num_parameters == whole.num_parameters
    assert all(isinstance(layer.weight, PackedWeight) for layer in packed.lora_modules.values())
    pack = {"int4": quant_int4.pack, "fp8": quant_fp8.pack, "nf4": quant_nf4.pack}[weights]
    for path, layer in whole.lora_modules.items():
        assert torch.equal(packed.lora_modules[path].weight.dense(), pack(layer.weight).dense())  # type: ignore[union-attr]
    for path, experts in whole.expert_modules.items():
        for ours, theirs in ((packed.expert_modules[path].up, experts.up), (packed.expert_modules[path].down, experts.down)):
            halves = theirs.weight.split(32, dim=1) if theirs is experts.up else [theirs.weight]  # gate and up are layers of their own
            assert torch.equal(ours.weight.dense(), torch.cat([pack(half).dense() for half in halves], dim=1))
    with torch.inference_mode():
        assert torch.isfinite(run(packed, None)).all() and not torch.equal(run(packed, None), run(whole, None))


def test_a_wish_to_pack_that_cannot_be_granted_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=160, tie_word_embeddings=False)).save_pretrained(tmp_path)
    info = BaseModelInfo("odd", str(tmp_path), [], "", 160, 256, [])
    with pytest.raises(Unsupported, match="no layers that INT4 fits"):
        load_base(info, torch.device("cpu"), torch.float32, "int4")


@pytest.mark.parametrize("format", [quant_int4, quant_fp8, quant_nf4])
def test_the_package_packs_as_well_as_the_definition_says(format: Any) -> None:
    """INT4 and FP8 give the very same values; NF4's scales differ, since ours are not quantised a second time."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    _, expected = KINDS[format.__name__.rsplit("_", 1)[-1]][0](weight)
    got = format.pack(weight).dense()
    if format is quant_nf4:
        assert (got - weight).square().mean() <= 1.01 * (expected - weight).square().mean()
    else:
        assert (got - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", ["int4", "fp8", "nf4"])
def test_shapes_of_layers_are_those_of_the_plain_folder(plain: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Imports of adapters are checked against them."""
    quantised, _ = quantise(plain["llama"], tmp_path, kind, linear)
    assert linear_shapes(quantised) == linear_shapes(plain["llama"])


def settings(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | changes}))


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("int4", {"quant_method": "gptq"}, "quantisation of the kind 'gptq' isn't read"),
        ("int4", {"format": "marlin-24"}, "format 'marlin-24'"),
        (
            "int4",
            {"config_groups": {"g": {"weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group"}}}},
            "num_bits 8",
        ),
        ("fp8", {"weight_block_size": None}, "weight_block_size None"),
        ("nf4", {"bnb_4bit_quant_type": "fp4"}, "type 'fp4'"),
        ("nf4", {"load_in_4bit": False, "load_in_8bit": True}, "8 bits"),
    ],
)
def test_a_quantisation_that_is_not_read_is_refused(plain: dict[str, Path], tmp_path: Path, kind: str, changes: Any, said: str) -> None:
    quantised, _ = quantise(plain["llama"], tmp_path, kind, linear)
    settings(quantised, **changes)
    with pytest.raises(Unsupported, match=said):
        load(quantised)


def test_what_is_missing_or_too_much_is_refused_by_name(plain: dict[str, Path], tmp_path: Path) -> None:
    quantised, _ = quantise(plain["qwen3_moe"], tmp_path, "int4", routed)
    file = quantised / "model.safetensors"
    tensors = load_file(file)
    expert = "model.layers.1.mlp.experts.4.up_proj"

    def refused(changed: dict[str, torch.Tensor], said: str) -> None:
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(Unsupported, match=said):
            load(quantised)

    refused({k: v for k, v in tensors.items() if k != f"{expert}.weight_scale"}, rf"tensor {expert}\.weight_scale is missing")
    refused(
        {k: v for k, v in tensors.items() if not k.startswith("model.layers.1.mlp.experts")}, r"lacks 2 .*layers\.1\.mlp\.experts\.down"
    )
    refused(tensors | {f"{expert}.weight_packed": tensors[f"{expert}.weight_packed"][:5].contiguous()}, "has the shape")
    refused(tensors | {f"{expert}.weight_scale": tensors[f"{expert}.weight_scale"].to(torch.int8)}, "is of type I8")
    refused(tensors | {"model.layers.0.mlp.experts.6.up_proj.weight_packed": torch.zeros(1)}, "1 tensors that .* no place")
    save_file(tensors, file, {"format": "pt"})
    load(quantised)
