"""A Lite-VLM small enough for every test: random weights, a real tokenizer, images as squares of 32 pixels, four tokens each."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from everlearn.types import VisionInfo
from tests import tiny_vision
from tests.tiny import make_tiny_model, make_tokenizer
from tests.tiny_vision import END, PAD, SPECIAL, START

SIDE, GRID = 32, 2
STAGES = ((1, 3, 1, 1, 8), (2, 3, 2, 3, 12), (2, 5, 2, 3, 16))
MEAN, STD = 127 / 255, 128 / 255
VISION = VisionInfo(SIDE, 1, 1, SIDE**2, SIDE**2, [MEAN] * 3, [STD] * 3, PAD, START, END, GRID, 1)


def make_tiny_tower(folder: Path) -> Path:
    """A random tower: a stem of stride 2 and two more strides, so a map of 4 x 4."""
    import torch

    from everlearn.models.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel, write

    config = EfficientNetLiteConfig(stages=STAGES, stem=8, hidden_size=24, image_size=SIDE)
    model = EfficientNetLiteModel(config)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()}
    for name, value in tensors.items():  # as large as keeps features alive behind ReLU6
        value *= 0.1 if name.endswith("bias") else 1.6 / (value[0].numel() ** 0.5)
    return write(config, tensors, folder)


def make_tiny_lite_model(folder: Path) -> Path:
    from everlearn.models import lite_folder

    text = make_tiny_model(folder / "parts" / "text")
    make_tokenizer(text, 512, SPECIAL)
    tower = make_tiny_tower(folder / "parts" / "tower")
    return lite_folder.write(lite_folder.assemble(text, tower, GRID), text, folder / "model")


span, row_of = partial(tiny_vision.span, vision=VISION), partial(tiny_vision.row_of, vision=VISION)
