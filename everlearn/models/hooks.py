"""What of transformers' model is replaced: attention that works by latents or with a state, norms; and which models the hooks would miss.

Linear layers are lora.py's, experts are experts.py's, the head is head.py's. What a sampler has to keep follows from the hooks
(`CacheForm`).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from everlearn.errors import Unsupported
from everlearn.models import recurrent
from everlearn.models.attention import CacheForm
from everlearn.models.mla import install_latents
from everlearn.models.recurrent import install_recurrent, state_shapes
from everlearn.types import BaseModelInfo

KEYED = {"full_attention", "sliding_attention"}  # kinds of layers that keep keys and values (or latents) of each token


def hook_attention(decoder: nn.Module, config: Any, max_context: int) -> CacheForm:
    """Hooks the decoder's layers; `config` is that of the text model. LoRA must be installed. Gives what a sampler has to keep."""
    latents = install_latents(decoder)
    states = install_recurrent(decoder)
    num_layers: int = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
    layers = tuple(index for index, kind in enumerate(kinds[:num_layers]) if kind in KEYED)
    entries: tuple[tuple[int, int], ...]
    if latents:
        entries = ((1, latents[0].latent_size + latents[0].rope),)
    else:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        entries = ((heads, size), (heads, size))
    window = window_of(config)
    shapes = {state_shapes(hook) for hook in states}
    return CacheForm(
        layers=layers,
        entries=entries,
        window=window if window is not None and window < max_context else None,
        state_layers=tuple(hook.index for hook in states),
        state_shapes=shapes.pop() if shapes else (),
    )


def window_of(config: Any) -> int | None:
    """How far back the layers with a window see; None where no layer has one."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None)
    return None if kinds and "sliding_attention" not in kinds else window


# Classes that compute x / rms(x) * weight and nothing else (Gemma's, for one, multiplies by 1 + weight).
PLAIN_RMS_NORMS = {
    "LlamaRMSNorm",
    "MistralRMSNorm",
    "Qwen2RMSNorm",
    "Qwen3RMSNorm",
    "Qwen3MoeRMSNorm",
    "Qwen3VLTextRMSNorm",
    "Qwen3VLMoeTextRMSNorm",
    "DeepseekV3RMSNorm",
}


def fuse_norms(decoder: nn.Module) -> None:
    """torch's own RMSNorm over the same weights: one operation for six, a quarter of the launches of a decoding step on a GPU."""
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ in PLAIN_RMS_NORMS:
                norm: Any = child
                fused = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, device="meta")
                fused.weight = norm.weight
                setattr(module, name, fused.eval())


def refuse_what_the_hooks_miss(info: BaseModelInfo, model: nn.Module) -> None:
    """Raises Unsupported for a model that would run and compute something else: our attention is causal and has no soft caps, and our head
    is one matrix. (A layer with a state that isn't hooked would also carry it from one tenant's sequence to the next in a packed row.)
    The model may be on the meta device: nothing of its weights is read."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    known = KEYED | ({"linear_attention"} if any(type(module).__name__ in recurrent.KNOWN for module in model.modules()) else set())
    kinds = set(getattr(config, "layer_types", None) or [])
    found = [f"layers of kind {kind}" for kind in sorted(kinds - known)]
    found += [name for name in ("attn_logit_softcapping", "final_logit_softcapping") if getattr(config, name, None)]
    found += [name for name in ("logit_scale", "logits_scaling") if getattr(config, name, None) not in (None, 1.0)]
    found += ["a sparse attention's indexer"] * bool(getattr(config, "index_topk", None))
    if getattr(model.get_output_embeddings(), "bias", None) is not None:  # type: ignore[operator]
        found.append("a bias of the output layer")
    if found:
        raise Unsupported(f"base model {info.name!r} has {', '.join(found)}, which this version doesn't compute; choose another base model")
