"""A base model, loaded once and frozen.

The architecture is transformers' own; it is hooked at its linear layers (lora.py), its attention function (attention.py) and its
head (head.py). Nothing else of the model is ours, and no code from a model folder is ever run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from everlearn.errors import InvalidRequest, Unsupported
from everlearn.models import attention, families
from everlearn.models.architecture import auto_class, read_config, read_json
from everlearn.models.attention import Batch, running
from everlearn.models.experts import LoraExperts, install_experts, top_k_of
from everlearn.models.head import Head
from everlearn.models.hooks import fuse_norms, hook_attention, refuse_what_the_hooks_miss
from everlearn.models.lora import HEAD, LoraLinear, PairShape, install, kind_of
from everlearn.models.quant import PackedLinear, count_parameters, unpacked
from everlearn.models.quant_experts import PackedStack
from everlearn.models.routing import install_routing
from everlearn.models.siblings import join_siblings
from everlearn.models.vision import Visual, find_tower
from everlearn.models.weights import PACKING, load_weights, read_scheme
from everlearn.types import BaseModelInfo, LoraSpec

log = logging.getLogger(__name__)
# Tile sizes of the head: a CPU tile's logits fit its cache, a GPU wants large products.
CPU_CHUNK, CPU_TILE = 256, 4096
GPU_CHUNK, GPU_TILE = 2048, 32768
# Multiply-adds of a step's largest product. A decoding step of less is hundreds of products of a few microseconds: sharing each of them
# with other threads gains little, and every one then waits for the slowest thread, ten times as long when the machine has other work.
SERIAL_WORK = 2**22


class BaseModel:
    """The frozen weights and the hooks. `hidden` runs the decoder over one packed row of tokens."""

    def __init__(self, info: BaseModelInfo, model: nn.Module, device: torch.device, dtype: torch.dtype):
        self.info, self.device, self.dtype = info, device, dtype
        self.model = model
        config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
        self.num_layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.max_context: int = info.max_context
        self.decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
        prefix = next(name for name, module in model.named_modules() if module is self.decoder)
        self.lora_modules: dict[str, LoraLinear] = install(self.decoder, prefix)
        self.expert_modules: dict[str, LoraExperts] = install_experts(self.decoder, prefix, top_k_of(config))
        install_routing(self.decoder, self.expert_modules)
        join_siblings(self.decoder)
        self.cache_form = hook_attention(self.decoder, config, info.max_context)
        fuse_norms(self.decoder)
        chunk, tile = (CPU_CHUNK, CPU_TILE) if device.type == "cpu" else (GPU_CHUNK, GPU_TILE)
        self.head = Head(model.get_output_embeddings().weight, chunk, tile)  # type: ignore[operator]
        self.position_axes = info.vision.position_axes if info.vision is not None else 1
        self.vision = find_tower(info, model, device, dtype)
        self.num_parameters = count_parameters(model)
        self.largest_weight = max((layer.weight.numel() for layer in self.lora_modules.values()), default=0)
        # A loop over the experts that have rows asks the device which those are, and a recording can't.
        fused = dtype == torch.bfloat16 and not any(isinstance(experts.up, PackedStack) for experts in self.expert_modules.values())
        self.steps_can_be_recorded = fused or not self.expert_modules

    def hidden(self, token_ids_T: torch.Tensor, positions: torch.Tensor, batch: Batch, visual: Visual | None = None) -> torch.Tensor:
        """Final hidden states [T, D] of one packed row; `batch` says what attends to what and which adapter each token uses. `positions`
        are [T], or [3, T] in a row that shows images (all the same where the model's have one axis); `visual` is what it shows."""
        work = self.largest_weight * len(token_ids_T)
        small = self.device.type == "cpu" and work <= SERIAL_WORK and not torch.is_grad_enabled()
        if positions.ndim > 1 and self.position_axes == 1:
            positions = positions[0]
        inputs: dict[str, Any] = {"position_ids": positions.unsqueeze(-2), "use_cache": False}
        if visual is None:
            inputs["input_ids"] = token_ids_T.unsqueeze(0)
        else:
            embeds_TD = self.decoder.get_input_embeddings()(token_ids_T)  # type: ignore[operator]
            inputs |= {"inputs_embeds": visual.embed(embeds_TD).unsqueeze(0), **visual.deepstack(len(token_ids_T))}
        with running(batch), one_thread() if small else nullcontext():
            out = self.decoder(**inputs)
        return out.last_hidden_state[0]

    def enable_recompute(self) -> None:
        """From now on a backward pass computes each layer's activations again instead of keeping them: a third more work, and memory
        for one layer instead of all. Only checkpointing layers are set to training mode; dropout stays off."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        renamed = getattr(self.model, "activation_checkpointing_enable", None)  # newer transformers; 5.17 has the old name
        enable = renamed or self.model.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # type: ignore[operator]
        for module in self.decoder.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True

    def adapter_shapes(self, lora: LoraSpec) -> dict[str, PairShape]:
        """The matrices of every layer that an adapter with these switches trains, in the model's own order; experts come last."""
        wanted = {"attn": lora.train_attn, "mlp": lora.train_mlp}
        sizes = {path: (m.in_features, m.out_features) for path, m in self.lora_modules.items() if wanted[kind_of(path) or ""]}
        if lora.train_vision:
            sizes |= self._tower_sizes()
        if lora.train_unembed:
            sizes[HEAD] = (self.hidden_size, self.vocab_size)
        shapes = {path: PairShape((lora.rank, num_in), (num_out, lora.rank)) for path, (num_in, num_out) in sizes.items()}
        if lora.train_mlp and lora.expert_lora != "off":
            for experts in self.expert_modules.values():
                shapes |= experts.shapes(lora.expert_lora, lora.rank)
        if not shapes:
            raise InvalidRequest(
                "the LoRA config trains nothing: train_attn, train_mlp and train_unembed are all false; set one of them",
                param="lora_config",
            )
        return shapes

    def _tower_sizes(self) -> dict[str, tuple[int, int]]:
        if self.vision is None:
            raise InvalidRequest(f"train_vision is true, and {self.info.name} has no vision tower; leave it out", param="lora_config")
        return self.vision.sizes()

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The folder's fast tokenizer, or None where it has none (then stop strings are refused)."""
        path = Path(self.info.path) / "tokenizer.json"
        return Tokenizer.from_file(str(path)) if path.exists() else None


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensor work of the calling thread stays on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_base(info: BaseModelInfo, device: torch.device, dtype: torch.dtype, weights: str = "stored") -> BaseModel:
    """Loads a Hugging Face folder (safetensors only) and hooks it; `weights` as the setting engine.weights has it. Raises Unsupported
    where transformers has no such architecture, or the folder doesn't hold all of its weights."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the engine's log is no terminal; the heartbeat says what is loading
    folder = Path(info.path)
    if not any(folder.glob("*.safetensors")):
        raise Unsupported(f"base model {info.name!r}: {info.path} holds no .safetensors file; convert its weights to safetensors first")
    config, scheme = read_config(folder), read_scheme(read_json(folder))
    auto, settings = auto_class(config), {"dtype": dtype, "attn_implementation": attention.IMPLEMENTATION}

    def build() -> nn.Module:
        try:
            outline: nn.Module = auto.from_config(config, **settings)
        except (ValueError, ImportError) as error:
            kind = config.model_type
            raise Unsupported(
                f"base model {info.name!r}: transformers builds no language model of a {kind!r}: {str(error)[:300]}"
            ) from error
        refuse_what_the_hooks_miss(info, outline)  # before memory is taken
        return outline

    if warning := families.warning_of(info.name, info.architecture):
        log.warning("%s", warning)
    model = load_weights(info.name, folder, build, scheme, device, dtype, PACKING.get(weights))
    head = model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(head, PackedLinear):  # it is read in tiles, for every token
        model.set_output_embeddings(unpacked(head))  # type: ignore[operator]
    return wrap(info, model, device, dtype)


def wrap(info: BaseModelInfo, model: nn.Module, device: torch.device, dtype: torch.dtype) -> BaseModel:
    """Freezes and hooks a model that is in memory already (benchmarks build random weights of real shapes this way)."""
    refuse_what_the_hooks_miss(info, model)
    model.config._attn_implementation = attention.IMPLEMENTATION  # type: ignore[union-attr]
    model.eval().requires_grad_(False)
    return BaseModel(info, model, device, dtype)


def pick_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Resolves the settings `engine.device` and `engine.dtype`: float32 on CPU, bfloat16 on GPU unless told otherwise."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidRequest(
            f"engine.device is {device!r}, but torch sees no CUDA device; set it to 'cpu' or 'auto'", param="engine.device"
        )
    chosen = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype)
    return torch.device(name), chosen or (torch.float32 if name == "cpu" else torch.bfloat16)
