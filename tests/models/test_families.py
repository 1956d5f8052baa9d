"""Every family of the table, as a tiny random model: it computes what transformers computes, and trainer and sampler agree on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.func import functional_call

from everlearn.engine import paged
from everlearn.engine.adapter import TrainingAdapter
from everlearn.engine.graphs import DecodeGraphs
from everlearn.engine.persist import State, restore
from everlearn.engine.protocol import Failed
from everlearn.engine.trainer import Trainer
from everlearn.errors import Unsupported
from everlearn.models import families
from everlearn.models.architecture import auto_class, read_config
from everlearn.models.attention import PackedBatch
from everlearn.models.export import Adapter, export_peft, import_peft
from everlearn.models.load import BaseModel, load_base
from everlearn.models.lora import Segment
from everlearn.models.merge import export_merged
from everlearn.models.tensorfile import TensorFile
from everlearn.render.tools import ARCHITECTURES, FORMATS
from everlearn.types import BaseModelInfo, Datum, LoraSpec, SampleResult
from tests.engine.harness import CPU, FLOAT32, datum, forward_backward
from tests.engine.sampling import make_sampler, request, run, tokens_of
from tests.tiny_families import CONFIGS, CONTEXT, SIZES, VOCAB, make_tiny_family

FIRST = 7  # smaller ids are special tokens


class Model(NamedTuple):
    name: str
    folder: Path
    base: BaseModel
    plain: Any  # transformers' own, eager


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = make_tiny_family(tmp_path_factory.mktemp("families") / request.param, request.param)
    config = read_config(folder)
    base = load_base(BaseModelInfo(request.param, str(folder), [], config.architectures[0], VOCAB, CONTEXT, [2]), CPU, FLOAT32)
    return Model(request.param, folder, base, plain_of(folder))


def plain_of(folder: Path) -> Any:
    """transformers' own model, attention in its plainest form."""
    model = auto_class(read_config(folder)).from_pretrained(folder, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def rows_of(seed: int, lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(FIRST, VOCAB, (length,), generator=generator) for length in lengths]


def our_logits(base: BaseModel, rows: list[torch.Tensor]) -> torch.Tensor:
    """[T, V] of the rows packed into one."""
    lengths = [len(row) for row in rows]
    segments = [Segment(None, 0, sum(lengths))]
    positions = torch.cat([torch.arange(n) for n in lengths])
    with torch.inference_mode():
        hidden = base.hidden(torch.cat(rows), positions, PackedBatch(lengths, segments))
        return base.head.logits(hidden, segments)


def attention_adapter(base: BaseModel, seed: int, rank: int, random_b: bool = True, **switches: Any) -> TrainingAdapter:
    """An adapter of attention (and of more by `switches`) whose B is far from zero, as if it had been trained."""
    spec = LoraSpec(rank, seed=seed, **{"train_mlp": False, "train_unembed": False, **switches})
    made = TrainingAdapter(f"run-{seed}", "default", base.info.name, spec, base.adapter_shapes(spec), base.device, base.dtype)
    with torch.no_grad():
        for _, b in made.pairs().values():
            b.copy_(0.03 * torch.randn(b.shape, generator=torch.Generator().manual_seed(seed)) * random_b)
    made.refresh()
    return made


def datums(seed: int, lengths: list[int]) -> list[Datum]:
    made = []
    for i, row in enumerate(rows_of(seed, [length + 1 for length in lengths])):
        weights = (np.random.default_rng([seed, i]).random(len(row) - 1) < 0.7).astype(np.float32)
        made.append(datum(row[:-1].tolist(), row[1:].tolist(), weights=weights))
    return made


def test_logits_equal_transformers_packed_or_not(model: Model) -> None:
    rows = rows_of(1, [20, 20, 13, 1, 37])
    with torch.inference_mode():
        expected = torch.cat([model.plain(input_ids=row.unsqueeze(0)).logits[0] for row in rows])
    packed = our_logits(model.base, rows)
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([our_logits(model.base, [row]) for row in rows]), packed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("part_bytes", [paged.PART_BYTES, 4000, 1])  # all rows at once, two or three, each for itself
def test_the_sampler_computes_what_the_trainer_does(model: Model, part_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some decoding steps are run as they are, some in the fixed shapes of recordings."""
    monkeypatch.setattr(paged, "PART_BYTES", part_bytes)
    worst, _ = sampler_against_trainer(model.base)
    assert worst <= 1e-5


def sampler_against_trainer(base: BaseModel) -> tuple[float, float]:
    """Several adapters in one batch, prompts in chunks, prefixes that are found again, several samples of one prompt, few blocks. The
    largest and the mean difference of log-probabilities."""
    versions: dict[str, TrainingAdapter | None] = {
        "": None,
        "v1": attention_adapter(base, 1, 2),
        "v2": attention_adapter(base, 2, 5, train_mlp=True),
    }
    sampler = make_sampler(base, prefill_tokens=8, kv_tokens=280, max_batch=5)
    sampler.graphs = DecodeGraphs(base) if base.device.type == "cpu" or base.steps_can_be_recorded else None
    for version, made in versions.items():
        if made is not None:
            sampler.bank.publish(version, made.scale, made.pairs(), made.expert_scale)
    prompts = [row.tolist() for row in rows_of(2, [1, 5, 19, 30, 9, 22])]
    prompts.append(prompts[3][:28] + prompts[1])  # shares a prefix with one that has the same adapter
    names = ["", "v1", "v2", "", "v1", "v2", ""]
    asked = [
        request(str(i), prompt, max_tokens=14, seed=i, version=version, num_samples=2 if i == 2 else 1)
        for i, (prompt, version) in enumerate(zip(prompts, names, strict=True))
    ]
    answers = run(sampler, *asked[:6]) | run(sampler, asked[6])
    keyed = not base.cache_form.state_layers
    assert not keyed or answers["6"].prompt_cache_hit_tokens > 0  # type: ignore[union-attr]
    assert sampler.graphs is None or sampler.graphs.recordings
    differences = []
    idle = attention_adapter(base, 3, 2, random_b=False)
    for i, (prompt, version) in enumerate(zip(prompts, names, strict=True)):
        answer = answers[str(i)]
        assert isinstance(answer, SampleResult), answer
        for sequence in answer.sequences:
            whole = [*prompt, *sequence.tokens.numpy().tolist()]
            data = [datum(whole[:-1], whole[1:], weights=[1.0] * (len(whole) - 1))]
            trained = forward_backward(Trainer(base, 128), versions[version] or idle, data, forward_only=True)
            expected = trained.outputs[0]["logprobs"].numpy()[len(prompt) - 1 :]
            differences.append(np.abs(sequence.logprobs.numpy() - expected))
    found = np.concatenate(differences)
    return float(found.max()), float(found.mean())


def test_preempted_sequences_begin_again(model: Model) -> None:
    if model.name not in ("llama", "deepseek_v3", "gpt_oss", "qwen3_5"):
        pytest.skip("one family of each form of cache is enough")
    prompts = [row.tolist() for row in rows_of(3, [20, 21, 22])]
    asked = [request(str(i), prompt, max_tokens=20, seed=i) for i, prompt in enumerate(prompts)]
    roomy, tight = make_sampler(model.base, prefill_tokens=16), make_sampler(model.base, prefill_tokens=16, kv_tokens=88)
    expected, answers = run(roomy, *asked), run(tight, *asked)
    assert tight.preemptions > 0
    for key, answer in answers.items():
        assert not isinstance(answer, Failed) and tokens_of(answer) == tokens_of(expected[key])


def test_samples_without_a_free_state_compute_the_prompt_again(model: Model) -> None:
    if model.name != "qwen3_5":
        pytest.skip("no states to run out of, or the same ones")
    prompt = rows_of(9, [12])[0].tolist()
    asked = [
        request("many", prompt, max_tokens=6, num_samples=5),
        request("other", prompt[:7], max_tokens=6),
        request("stranger", prompt[:9], max_tokens=6, num_samples=5, cache_salt="another tenant"),
    ]
    roomy, tight = make_sampler(model.base), make_sampler(model.base, max_batch=2)
    expected, answers = run(roomy, *asked), run(tight, *asked)
    assert tight.states.num_slots == 2 and sorted(tight.states.free) == [0, 1]
    for key, count in (("many", 5), ("other", 1), ("stranger", 5)):
        for index in range(count):
            assert tokens_of(answers[key], index) == tokens_of(expected[key], index)


def test_gradients_of_attention_equal_autograd_on_a_plain_model(model: Model) -> None:
    base, plain = model.base, model.plain
    made = attention_adapter(base, 4, 3)
    data = datums(5, [17, 17, 9, 30])
    forward_backward(Trainer(base, 64), made, data)
    leaves = {path: (a.clone().requires_grad_(), b.clone().requires_grad_()) for path, (a, b) in made.pairs().items()}
    weights = dict(plain.named_parameters())
    changed = {f"{path}.weight": weights[f"{path}.weight"] + made.scale * (b @ a) for path, (a, b) in leaves.items()}
    loss = torch.zeros(())
    for each in data:
        tokens, targets = (torch.from_numpy(array.numpy().astype(np.int64)) for array in (each.tokens, each.inputs["target_tokens"]))
        logits = functional_call(plain, changed, kwargs={"input_ids": tokens.unsqueeze(0)}).logits[0]
        picked = torch.log_softmax(logits, dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)
        loss = loss - (torch.from_numpy(each.inputs["weights"].numpy().copy()) * picked).sum()
    loss.backward()
    # The sums of a state run over many small numbers, and the norm behind it scales them up, with their rounding.
    relative = 5e-5 if base.cache_form.state_layers else 1e-5
    found = made.training_weights(made.grad).grads
    assert found is not None and set(found) == set(leaves)
    for path, pair in leaves.items():
        for ours, theirs in zip(found[path], pair, strict=True):
            assert theirs.grad is not None
            size = float(theirs.grad.abs().max())
            assert size > 0, f"{path} takes no part in the model"
            torch.testing.assert_close(ours, theirs.grad, rtol=0, atol=relative * max(1.0, size), msg=lambda text, at=path: f"{at}: {text}")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers by an old name
def test_attention_is_saved_exported_imported_and_merged(model: Model, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    made, row = attention_adapter(model.base, 6, 3), rows_of(7, [24])[0]
    checkpoint = tmp_path / "checkpoint"
    State(made, optimizer=False, gradient=False).write(checkpoint)
    again = attention_adapter(model.base, 8, 3)
    restore(again, checkpoint, optimizer=True)
    assert torch.equal(again.params, made.params)

    export_peft(Adapter(checkpoint), tmp_path / "peft", base=model.folder)
    loaded = peft.PeftModel.from_pretrained(plain_of(model.folder), tmp_path / "peft").eval()
    segments = [Segment(made.weights, 0, len(row))]
    with torch.inference_mode():
        hidden = model.base.hidden(row, torch.arange(len(row)), PackedBatch([len(row)], segments))
        expected = model.base.head.logits(hidden, segments)
        found = loaded(input_ids=row.unsqueeze(0)).logits[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert (our_logits(model.base, [row]) - expected).abs().max() > 1e-2  # the adapter does something

    assert import_peft(tmp_path / "peft", tmp_path / "back", model.name, model.folder) == []
    before, after = (TensorFile(tmp_path / folder / "adapter.safetensors") for folder in ("checkpoint", "back"))
    assert sorted(before.names()) == sorted(after.names())
    for name in before.names():
        np.testing.assert_array_equal(before.float32(name), after.float32(name))

    export_merged(Adapter(checkpoint), model.folder, tmp_path / "merged")
    with torch.inference_mode():
        merged = plain_of(tmp_path / "merged")(input_ids=row.unsqueeze(0)).logits[0]
    torch.testing.assert_close(merged, expected, rtol=0, atol=2e-5)


# ---- the table ----


def test_every_row_is_run_by_these_tests() -> None:
    tested = {name for config in CONFIGS.values() for name in (architecture_of(config()),)}
    for family in families.FAMILIES:
        assert tested & set(family.architectures), f"{family.name} has no tiny model"
        assert set(family.verified) == set(families.CHECKS), f"these tests run every check on {family.name}"
    assert len(families.BY_ARCHITECTURE) == sum(len(family.architectures) for family in families.FAMILIES)


def architecture_of(config: Any) -> str:
    with torch.device("meta"):
        return type(auto_class(config).from_config(config)).__name__


def test_tool_formats_are_those_that_are_read() -> None:
    recorded = {path.stem for path in (Path(__file__).parents[1] / "render" / "recorded").glob("*.toml")}
    for family in families.FAMILIES:
        assert family.tools and set(family.tools) <= set(FORMATS), family.name
        assert set(family.tools) - {"prompted"} <= recorded, family.name  # what is prompted is written as Hermes's
    for architecture, name in ARCHITECTURES.items():
        family_of = families.BY_ARCHITECTURE.get(architecture)
        assert family_of is None or name in family_of.tools


def test_an_untested_family_loads_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import OlmoConfig, OlmoForCausalLM

    OlmoForCausalLM(OlmoConfig(**SIZES)).save_pretrained(tmp_path)
    load_base(BaseModelInfo("m", str(tmp_path), [], "OlmoForCausalLM", VOCAB, CONTEXT, [2]), CPU, FLOAT32)
    assert [r.message for r in caplog.records if "'m' is a OlmoForCausalLM, which is untested here" in r.message]
    assert families.warning_of("m", "LlamaForCausalLM") == ""


# ---- what is refused ----


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": "no_such_architecture"}, "no_such_architecture"),
        ({"model_type": "vit", "hidden_size": 32}, "vit"),
        ({"model_type": "deepseek_v32"}, "indexer"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"model_type": "qwen3_next"}, "linear_attention"),
    ],
)
def test_what_is_not_computed_is_refused_by_name_before_memory_is_taken(config: dict[str, Any], what: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, **config, "num_hidden_layers": 4}))
    save_file({"one.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(Unsupported, match=what):
        load_base(BaseModelInfo("m", str(tmp_path), [], "", VOCAB, CONTEXT, [2]), CPU, FLOAT32)
