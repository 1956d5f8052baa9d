"""What vLLM takes of a LoRA adapter, as rules: why it would refuse a PEFT folder, and the command that serves one.

Read from the source of vLLM 0.33 (vllm/lora, vllm/config/lora.py, vllm/model_executor/models); a later release may take more. An
adapter that passes loads as far as these rules go: the names of layers are vLLM's to match. No vLLM and no torch here.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from everlearn.errors import Unsupported
from everlearn.models import export_experts
from everlearn.models.export import HEAD, PEFT_CONFIG, PEFT_WEIGHTS, Adapter
from everlearn.models.tensorfile import TensorFile
from everlearn.types import BaseModelInfo

VERSION = "0.33"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
HEAD_VOCAB = 258_048  # the largest vocabulary whose head it can adapt


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Architectures whose head it adapts too: `embedding_modules` of their classes names lm_head.
WITH_HEAD = _set("""
    ApertusForCausalLM Ernie4_5ForCausalLM Exaone4ForCausalLM ExaoneMoeForCausalLM FalconH1ForCausalLM GraniteForCausalLM
    GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM GraniteSWAForCausalLM
    HyperCLOVAXForCausalLM JambaForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM Llama4ForCausalLM LlamaForCausalLM MiniCPM3ForCausalLM
    MixtralForCausalLM NemotronForCausalLM NemotronHForCausalLM Phi3ForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3_5ForCausalLM
    Qwen3_5MoeForCausalLM
""")
# Architectures of which it adapts the linear layers of attention and MLPs.
WITHOUT_HEAD = _set("""
    AXK1ForCausalLM AfmoeForCausalLM ArceeForCausalLM Cohere2ForCausalLM CohereForCausalLM CwmForCausalLM DeepseekV2ForCausalLM
    DeepseekV3ForCausalLM Ernie4_5_MoeForCausalLM FlexOlmoForCausalLM GPTBigCodeForCausalLM GPTNeoXForCausalLM Gemma2ForCausalLM
    Gemma3ForCausalLM Gemma3ForConditionalGeneration Gemma4ForCausalLM Gemma4ForConditionalGeneration GemmaForCausalLM Glm4ForCausalLM
    Glm4MoeForCausalLM Glm4MoeLiteForCausalLM Glm4vForConditionalGeneration GlmForCausalLM GptOssForCausalLM HunYuanDenseV1ForCausalLM
    HunYuanMoEV1ForCausalLM Idefics3ForConditionalGeneration InternVLForConditionalGeneration Jais2ForCausalLM
    Lfm2VlForConditionalGeneration Llama4ForConditionalGeneration LlavaForConditionalGeneration LongcatFlashForCausalLM
    MiniMaxM2ForCausalLM Ministral3ForCausalLM Mistral3ForConditionalGeneration MistralForCausalLM OPTForCausalLM Olmo2ForCausalLM
    Olmo3ForCausalLM OlmoForCausalLM OlmoHybridForCausalLM OlmoeForCausalLM PaliGemmaForConditionalGeneration PhiForCausalLM
    Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration Qwen3NextForCausalLM
    Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration Qwen3_5ForConditionalGeneration
    Qwen3_5MoeForConditionalGeneration SeedOssForCausalLM SmolLM3ForCausalLM SmolVLMForConditionalGeneration Starcoder2ForCausalLM
    VaultGemmaForCausalLM
""")
# Architectures that it serves, but with no adapter at all.
NEVER = _set("""
    BloomForCausalLM Cohere2MoeForCausalLM DbrxForCausalLM FalconForCausalLM FalconMambaForCausalLM GPT2LMHeadModel GPTJForCausalLM
    Gemma3nForCausalLM Gemma3nForConditionalGeneration LlavaOnevisionForConditionalGeneration Mamba2ForCausalLM MambaForCausalLM
    MiMoV2FlashForCausalLM StableLmForCausalLM Zamba2ForCausalLM
""")
# PEFT's settings that change what an adapter computes and that vLLM refuses, with the values that it takes.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None), "use_dora": (False, None), "lora_bias": (False, None), "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []), "use_bdlora": (None, {}), "use_qalora": (False, None),
}  # fmt: skip
# And those that it doesn't read: such an adapter would load, and compute something else.
UNREAD: dict[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (False, None), "trainable_token_indices": (None, [], {}), "arrow_config": (None,),
}  # fmt: skip
# Initialisations that leave the base model's weights alone; the others (PiSSA, OLoRA, ...) need another base.
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
CLASSIFIERS = ("classifier", "score")


def refusals(
    config: Mapping[str, Any], names: Iterable[str], architecture: str, vocab_size: int = 0, max_rank: int = RANKS[-1]
) -> list[str]:
    """Why vLLM would refuse, or misread, an adapter: one sentence each, with the way out. `config` is its adapter_config.json,
    `names` are its tensors', `architecture` and `vocab_size` the base model's; `max_rank` is the server's --max-lora-rank."""
    found = [f"it serves no adapters of {architecture}; use --format merged"] if architecture in NEVER else []
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    if bad := [rank for rank in ranks if not isinstance(rank, int) or rank <= 0]:
        found.append(f"rank {bad[0]!r} is no positive whole number")
    elif max(ranks) > RANKS[-1]:
        found.append(f"rank {max(ranks)} is more than {RANKS[-1]}, the largest --max-lora-rank; use --format merged")
    elif max(ranks) > max_rank:
        found.append(f"rank {max(ranks)} is more than --max-lora-rank {max_rank}; serve with --max-lora-rank {rank_flag(max(ranks))}")
    for name, taken in SETTINGS.items():
        if config.get(name) not in taken:
            found.append(f"{name} is {config[name]!r}, which it doesn't do; merge with PEFT")
    for name, taken in UNREAD.items():
        if config.get(name) not in taken:
            found.append(f"{name} is {config[name]!r}, which it doesn't read: it would answer as another model; merge with PEFT")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
        found.append(f"init_lora_weights is {start!r}, which has changed the base model's weights; convert it to a plain adapter with PEFT")
    if whole := sorted(set(config.get("modules_to_save") or []) - set(CLASSIFIERS)):
        found.append(f"modules_to_save holds {whole[0]}; it takes whole modules of classifiers alone; merge with PEFT")
    return found + _of_names(names, architecture, vocab_size)


def _of_names(names: Iterable[str], architecture: str, vocab_size: int) -> list[str]:
    found, head = [], False
    for name in names:
        module, _, matrix = name.removesuffix(".weight").rpartition(".")
        if matrix in ("lora_embedding_A", "lora_embedding_B"):
            found.append(f"{name} adapts the embeddings, which few of its models allow; merge with PEFT")
        elif matrix not in ("lora_A", "lora_B") or not name.endswith(".weight"):
            found.append(f"{name} is no matrix of a LoRA (MODULE.lora_A.weight); it loads nothing else")
        head = head or module.rpartition(".")[-1] == HEAD
    if head and architecture not in WITH_HEAD:
        found.append(
            f"it adapts lm_head, which vLLM {VERSION} doesn't do for {architecture}; train with train_unembed=False, or use --format merged"
        )
    if vocab_size > HEAD_VOCAB and architecture in WITH_HEAD:
        found.append(
            f"{architecture} has a vocabulary of {vocab_size}, and vLLM adapts heads of up to {HEAD_VOCAB}: it won't start; "
            "use --format merged"
        )
    return found


def check_folder(folder: Path, architecture: str, vocab_size: int = 0, max_rank: int = RANKS[-1]) -> list[str]:
    """`refusals` of any PEFT folder."""
    return refusals(
        json.loads((folder / PEFT_CONFIG).read_text()), TensorFile(folder / PEFT_WEIGHTS).names(), architecture, vocab_size, max_rank
    )


def check_adapter(adapter: Adapter, base: BaseModelInfo, max_rank: int = RANKS[-1]) -> list[str]:
    """What the reader should know of serving it there. Raises Unsupported, before anything is written, where vLLM can't load it."""
    names = [f"{path}.lora_{side}.weight" for path in adapter.paths for side in "AB"]
    if reasons := refusals({"r": adapter.rank}, names, base.architecture, base.vocab_size, max_rank):
        raise Unsupported(f"vLLM can't serve this adapter: {'; '.join(reasons)}", param="format")
    notes = []
    if any(export_experts.is_expert(path) for path in adapter.paths):
        notes.append(
            f"the adapter changes experts, in PEFT as parameters of up to rank {2 * adapter.rank} (target_parameters); whether vLLM "
            "reads them is not known here: compare its answers, or use --format merged"
        )
    if base.architecture not in WITH_HEAD | WITHOUT_HEAD:
        notes.append(
            f"whether vLLM takes adapters of {base.architecture} is not known here (rules of vLLM {VERSION}); try it before you rely on it"
        )
    return notes


def rank_flag(rank: int) -> int:
    """The smallest --max-lora-rank that holds `rank`. More costs memory and time for every adapter."""
    return next(size for size in RANKS if size >= rank)


def serve_command(base: str, name: str, folder: Path) -> str:
    """The line that serves the exported folder under `name`, beside the base model."""
    config = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])  # experts are written with another rank than the adapter's
    modules = shlex.quote(f"{name}={folder.absolute()}")
    return f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {rank_flag(rank)} --lora-modules {modules}"
