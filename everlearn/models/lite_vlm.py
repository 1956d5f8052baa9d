"""Lite-VLM: the smallest model of ours that sees. A frozen EfficientNet-Lite, a projector, and a language model of transformers.

The map of the tower's features is pooled to `grid` x `grid` cells; the projector makes of each what takes the place of a token's
embedding (Liu et al. 2023, arXiv:2304.08485): norm, linear, GELU, linear. Positions count as in text. Importing this module lets
transformers load such folders; the plain forward here is what the engine is compared with.

Names of tensors: model.visual.tower.* (efficientnet_lite.py), model.visual.projector.{norm,linear_1,linear_2}.*, model.language_model.*
and lm_head.weight (absent where it is tied). Axes: N images, V features of them in a row, C channels, D hidden size, T tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from everlearn.models import efficientnet_lite
from everlearn.models.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel


class LiteVlmConfig(PreTrainedConfig):
    """`text_config` is that of the language model, `vision_config` that of the tower."""

    model_type = "lite_vlm"
    sub_configs = {"text_config": AutoConfig, "vision_config": EfficientNetLiteConfig}

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        grid: int = 2,
        image_token_id: int = 3,
        vision_start_token_id: int = 4,
        vision_end_token_id: int = 5,
        **others: Any,
    ):
        text = text_config or {}
        if isinstance(text, dict):
            text = {**text}
            text = AutoConfig.for_model(text.pop("model_type", "llama"), **text)
        vision = vision_config or {}
        self.text_config = text
        self.vision_config = EfficientNetLiteConfig(**vision) if isinstance(vision, dict) else vision
        self.grid, self.image_token_id = grid, image_token_id
        self.vision_start_token_id, self.vision_end_token_id = vision_start_token_id, vision_end_token_id
        others.setdefault("tie_word_embeddings", bool(getattr(text, "tie_word_embeddings", False)))
        super().__init__(**others)


class Features(NamedTuple):
    """As towers of transformers answer: `pooler_output` [V, D]."""

    pooler_output: torch.Tensor


class Projector(nn.Module):
    def __init__(self, num_in: int, num_out: int):
        super().__init__()
        self.norm = nn.LayerNorm(num_in)
        self.linear_1 = nn.Linear(num_in, num_out)
        self.linear_2 = nn.Linear(num_out, num_out)

    def forward(self, cells_VC: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear_2(F.gelu(self.linear_1(self.norm(cells_VC))))
        return out


class Visual(nn.Module):
    """Pixels to features that stand for tokens."""

    def __init__(self, config: LiteVlmConfig):
        super().__init__()
        self.config, self.grid = config.vision_config, config.grid
        self.tower = EfficientNetLiteModel(config.vision_config)
        self.projector = Projector(config.vision_config.hidden_size, config.text_config.hidden_size)

    def cells(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the projector gets: [N, 3 * side * side] or [N, 3, side, side] -> [N * grid * grid, C], row by row."""
        side = self.config.image_size
        features_NChw = self.tower(pixels.reshape(-1, 3, side, side)).last_hidden_state
        cells_NCgg = F.adaptive_avg_pool2d(features_NChw, self.grid)
        return cells_NCgg.flatten(2).transpose(1, 2).flatten(0, 1)

    def forward(self, pixels: torch.Tensor, **_: Any) -> Features:
        return Features(self.projector(self.cells(pixels)))


class LiteVlmModel(nn.Module):
    def __init__(self, config: LiteVlmConfig):
        super().__init__()
        self.visual = Visual(config)
        self.language_model = AutoModel.from_config(config.text_config)


class LiteVlmForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """`pixel_values` [N, 3, side, side] of the images whose tokens stand in `input_ids` [1, T], in their order."""

    config_class = LiteVlmConfig
    _supports_sdpa = _supports_attention_backend = _supports_flash_attn = True
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _no_split_modules: list[str] = []

    def __init__(self, config: LiteVlmConfig):
        super().__init__(config)
        self.model = LiteVlmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_decoder(self) -> nn.Module:
        decoder: nn.Module = self.model.language_model
        return decoder

    def get_input_embeddings(self) -> nn.Module:
        table: nn.Module = self.model.language_model.get_input_embeddings()
        return table

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, **_: Any) -> CausalLMOutputWithPast:
        embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features_VD = self.model.visual(pixel_values).pooler_output
            embeds = embeds.masked_scatter((input_ids == self.config.image_token_id).unsqueeze(-1), features_VD)
        hidden = self.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))


def register() -> None:
    """Lets transformers know the architecture by its name; twice does no harm."""
    efficientnet_lite.register()
    AutoConfig.register(LiteVlmConfig.model_type, LiteVlmConfig, exist_ok=True)
    AutoModelForImageTextToText.register(LiteVlmConfig, LiteVlmForConditionalGeneration, exist_ok=True)
