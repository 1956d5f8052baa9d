"""Tiny mixtures of experts with random weights: real architectures, every test's own size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import make_tokenizer

COMMON: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
    "max_position_embeddings": 512, "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "intermediate_size": 48},
    "deepseek_v3": {
        "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "intermediate_size": 48, "n_group": 2, "topk_group": 1,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4, "head_dim": 8, "routed_scaling_factor": 1.5,
    },
    "gpt_oss": {
        "num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 24, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip


def make_moe(folder: Path, kind: str, **changes: Any) -> Path:
    """Writes config, weights and tokenizer of a tiny model of this kind; the seed is fixed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**COMMON, **KINDS[kind], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, weight in model.named_parameters():
            if "bias" in name or "router" in name or ".gate." in name or "sinks" in name:
                torch.nn.init.normal_(weight, std=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(buffer, std=0.1)
        model.save_pretrained(folder)
    make_tokenizer(folder, 512)
    return folder
