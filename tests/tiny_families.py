"""One model of each family, random and small enough for every test, with what makes the family different: sinks and windows, latents,
shared experts, first dense layers, routers with a bias, layers with a state, a vision tower."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCAB, CONTEXT = 128, 256
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
TOWER = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 8,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1, "mlp_only_layers": []}
LATENTS = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "routed_scaling_factor": 2.5,
    "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
}
STATES = {
    "num_hidden_layers": 3,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {**MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5, "mrope_interleaved": True},
}


def llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**SIZES)


def qwen3() -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**SIZES, head_dim=16)


def qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(**SIZES, **MOE, head_dim=16, norm_topk_prob=True)


def deepseek_v3() -> Any:
    from transformers import DeepseekV3Config

    return DeepseekV3Config(**{**SIZES, **LATENTS})


def gpt_oss() -> Any:
    from transformers import GptOssConfig

    kinds = ["sliding_attention", "full_attention"] * 2
    more = {"num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 8, "head_dim": 16, "num_local_experts": 4}
    return GptOssConfig(**{**SIZES, **more}, num_experts_per_tok=2, rope_parameters=YARN | {"truncate": False})


def mistral() -> Any:
    from transformers import MistralConfig

    return MistralConfig(**SIZES, sliding_window=8, head_dim=8)


def qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig

    text = {**SIZES, "head_dim": 16, "rope_parameters": MROPE}
    return Qwen3VLConfig(text_config=text, vision_config={**TOWER, "deepstack_visual_indexes": [0]}, tie_word_embeddings=False, **TOKENS)


def qwen3_vl_moe() -> Any:
    from transformers import Qwen3VLMoeConfig

    text = {**SIZES, **MOE, "head_dim": 16, "rope_parameters": MROPE}
    return Qwen3VLMoeConfig(text_config=text, vision_config={**TOWER, "deepstack_visual_indexes": [0]}, tie_word_embeddings=False, **TOKENS)


def qwen3_5() -> Any:
    from transformers import Qwen3_5Config

    return Qwen3_5Config(text_config={**SIZES, **STATES}, vision_config=TOWER, tie_word_embeddings=False, **TOKENS)


def qwen3_5_moe() -> Any:
    from transformers import Qwen3_5MoeConfig

    text = {**SIZES, **STATES, **MOE, "shared_expert_intermediate_size": 16}
    return Qwen3_5MoeConfig(text_config=text, vision_config=TOWER, tie_word_embeddings=False, **TOKENS)


def kimi_k25() -> Any:
    from transformers import Kimi_K25Config

    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
    places = {"pos_emb_height": 4, "pos_emb_width": 4}
    text = {**SIZES, **LATENTS, "model_type": "kimi_k2"}
    ids = {**TOKENS, "vision_end_token_id": 6}
    return Kimi_K25Config(text_config=text, vision_config=tower | places, projection_hidden_size=32, tie_word_embeddings=False, **ids)


def lite_vlm() -> Any:
    from everlearn.models.lite_vlm import LiteVlmConfig, register

    register()
    tower = {"stages": [[1, 3, 2, 2, 8]], "stem": 4, "hidden_size": 16, "image_size": 16}
    ids = {name: number for name, number in TOKENS.items() if name != "video_token_id"}
    return LiteVlmConfig(text_config={**SIZES, "model_type": "llama"}, vision_config=tower, **ids)


TOKENS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
    "kimi_k25": kimi_k25,
    "lite_vlm": lite_vlm,
}


def make_tiny_family(folder: Path, family: str) -> Path:
    """Writes configuration and weights; the seed is fixed."""
    import torch

    from everlearn.models.architecture import auto_class

    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CONFIGS[family]()
        model = auto_class(config).from_config(config)
        randomise(model)
        model.save_pretrained(folder)
    if family == "kimi_k25":
        as_its_makers_name_them(folder / "model.safetensors")
    return folder


def randomise(model: Any) -> None:
    """What transformers initialises to a constant is random here: biases, sinks, norms, routers."""
    import torch

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("bias", "norm.weight", "layernorm.weight", "sinks", "gate.weight", "router.weight", "dt_bias")):
                tensor.add_(0.2 * torch.randn_like(tensor))
            elif name.endswith("A_log"):  # as slow to forget as a trained model: what is all but forgotten is noise that norms blow up
                tensor.uniform_(-4, -1)


def as_its_makers_name_them(file: Path) -> None:
    """transformers reads Kimi K2.5's own names, and writes others for the language model's layers."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    save_file(
        {name.replace("language_model.model.blocks.", "language_model.model.layers."): t for name, t in tensors.items()},
        file,
        {"format": "pt"},
    )
