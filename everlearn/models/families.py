"""The families of models that are known by name: one row each, and nothing else in the code asks for a family.

What a layer does is found in the layer (hooks.py, experts.py, vision.py); a row says what that comes to for a family, how its models write
tool calls, and what the tests hold against transformers' own model (tests/models/test_families.py runs every check of every row on a
small random model). A model of another family loads as well, with a warning: nobody has compared its numbers. No torch here.
"""

from __future__ import annotations

from typing import NamedTuple

# What may be verified of a family, and what that means.
CHECKS = {
    "load": "a folder with its makers' names of tensors loads; packed or alone, logits are those of transformers' eager attention to 1e-5",
    "train": "gradients of LoRA on every linear layer of attention equal autograd on a plain model",
    "sample": "the sampler's log-probabilities are the trainer's to 1e-5: several adapters in a batch, prompts in chunks, prefixes found "
    "again, samples of one prompt, too few blocks, decoding steps of fixed shapes",
    "save": "a checkpoint is written and read back, bit by bit",
    "export": "PEFT loads the exported adapter and computes the same; importing it gives the same adapter back",
    "merge": "transformers loads the merged weights and computes the same",
    "tools": "the marks in a template choose the format, its grammar and its parser; replies are read whole and in pieces. Templates and "
    "replies are written for the tests: of makers' own, SmolLM2's alone was at hand",
}
ALL = tuple(CHECKS)
SEES = "images are trained on, sampled from and asked about, their logits those of transformers; not video"
NO_PREFIXES = "a prefix is not found again: the state of a whole sequence is not kept in blocks"


class Family(NamedTuple):
    """`architectures` as config.json names them; `tools` are rows of render/tools.py; `verified` are keys of CHECKS."""

    name: str
    architectures: tuple[str, ...]
    attention: str
    cache: str
    experts: str
    tools: tuple[str, ...]
    verified: tuple[str, ...] = ()
    note: str = ""


KEYS = "keys and values"
FAMILIES = (
    Family(
        "Llama, SmolLM", ("LlamaForCausalLM",), "grouped queries", KEYS, "", ("llama3", "prompted"), ALL,
        "SmolLM2's template knows no tools: it is prompted",
    ),
    Family("Mistral", ("MistralForCausalLM",), "grouped queries, a window where the model has one", KEYS, "", ("prompted",), ALL,
           "calls are prompted: Mistral's own syntax isn't read"),
    Family("Qwen3", ("Qwen3ForCausalLM",), "grouped queries with norms", KEYS, "", ("hermes",), ALL),
    Family(
        "Qwen3-MoE", ("Qwen3MoeForCausalLM",), "grouped queries with norms", KEYS, "softmax router", ("hermes", "qwen3_coder"), ALL,
    ),
    Family(
        "DeepSeek-V3, Kimi K2", ("DeepseekV3ForCausalLM",), "latents, interleaved rotation, YaRN", "one latent",
        "sigmoid router with a correction bias and groups; shared experts; first layers dense",
        ("deepseek_v3", "deepseek_v31", "kimi_k2"), ALL, "decoding absorbs the expansion of the latents, adapters' part of it too",
    ),
    Family(
        "gpt-oss", ("GptOssForCausalLM",), "grouped queries with biases and sinks, a window in every other layer, YaRN", KEYS,
        "softmax over the chosen ones; biases; matrices the other way round", ("harmony",), ALL,
        "unquantised: its makers' MXFP4 isn't read. Windows read no more than they see; the blocks behind them are kept all the same",
    ),
    Family(
        "Qwen3-VL", ("Qwen3VLForConditionalGeneration",), "grouped queries with norms, rotation in three dimensions", KEYS, "",
        ("hermes",), ALL, SEES,
    ),
    Family(
        "Qwen3-VL-MoE", ("Qwen3VLMoeForConditionalGeneration",), "grouped queries with norms, rotation in three dimensions", KEYS,
        "softmax router", ("hermes",), ALL, SEES,
    ),
    Family(
        "Lite-VLM", ("LiteVlmForConditionalGeneration",), "as its language model's", "as its language model's", "", ("prompted",),
        ALL, "everlearn's own: EfficientNet-Lite, a projector and a language model of transformers "
        "(SmolLM2 was tried); compared with its own plain forward, images included (tests/models/test_lite_vlm.py)",
    ),
    Family(
        "Qwen3.5", ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"),
        "gated delta-net with a state, gated grouped queries in every fourth layer", "a state for the sequence; keys and values", "",
        ("qwen3_coder",), ALL, NO_PREFIXES,
    ),
    Family(
        "Qwen3.5-MoE", ("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
        "gated delta-net with a state, gated grouped queries in every fourth layer", "a state for the sequence; keys and values",
        "softmax router; a shared expert behind a gate", ("qwen3_coder",), ALL, NO_PREFIXES,
    ),
    Family(
        "Kimi K2.5", ("Kimi_K25ForConditionalGeneration",), "latents, interleaved rotation, YaRN", "one latent",
        "as Kimi K2's", ("kimi_k2",), ALL, "text alone: its vision tower is loaded and not used",
    ),
)  # fmt: skip
BY_ARCHITECTURE = {architecture: family for family in FAMILIES for architecture in family.architectures}


def warning_of(name: str, architecture: str) -> str:
    """What to say when a model is loaded: nothing where its family was compared with transformers."""
    family = BY_ARCHITECTURE.get(architecture)
    if family is not None and family.verified:
        return ""
    return (
        f"base model {name!r} is a {architecture}, which is untested here: it loads, and nobody has compared its numbers with those of "
        "transformers (docs/reference/families.md); `everlearn export` compares them for an adapter: let it do so before you rely on it"
    )
