"""Which models are refused: those that would run, and compute something else than transformers does."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GraniteConfig, MistralConfig, Qwen3Config

from everlearn.errors import Unsupported
from everlearn.models.load import refuse_what_the_hooks_miss
from everlearn.types import BaseModelInfo

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
}


def model_of(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


def check(config: Any, context: int = 1024) -> None:
    refuse_what_the_hooks_miss(BaseModelInfo("m", "", [], "", 64, context, []), model_of(config))


def test_full_attention_is_taken() -> None:
    check(Qwen3Config(**SIZES))
    check(MistralConfig(**SIZES, sliding_window=None))
    check(MistralConfig(**SIZES, sliding_window=4096))  # never reached


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (MistralConfig(**SIZES, sliding_window=128), "sliding_attention"),
        (Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=64, max_window_layers=1), "sliding_attention"),
        (Qwen3Config(**SIZES, layer_types=["full_attention", "linear_attention"]), "linear_attention"),
        (GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=8.0), "logits_scaling"),
    ],
)
def test_what_our_hooks_would_leave_out_is_refused(config: Any, what: str) -> None:
    with pytest.raises(Unsupported, match=what):
        check(config)
