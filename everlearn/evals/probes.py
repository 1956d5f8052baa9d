"""Baselines of the few-shot study: classifiers on the features of a frozen vision tower, fitted to the same photos that the adapters see.

A tower is a folder that transformers' AutoModel loads (DINOv2, ViT, CLIP's vision model, EfficientNet-Lite as everlearn converts it):
its pooled output is the feature of a photo, or the mean of its last hidden states where it pools nothing. Axes: N photos, D features,
K classes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from everlearn.errors import InvalidRequest, NotFound, Unsupported
from everlearn.evals.fewshot_study import Gallery, Run
from everlearn.evals.fewshot_vision import Photo, choose, name_of

WEIGHT_DECAY = 1e-3  # of the linear probe, on features whose mean square is 1
PROBE_STEPS = 100


class Tower:
    """`features` of photos, each computed once. Images are prepared as transformers does by the folder's preprocessor_config.json."""

    def __init__(self, folder: Path):
        from transformers import AutoModel

        from everlearn.models.architecture import read_config

        if not (folder / "config.json").is_file():
            raise NotFound(f"{folder} holds no config.json; name the folder of a vision tower", param="baseline")
        config = read_config(folder)
        try:
            self.model = AutoModel.from_pretrained(
                folder, config=config, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise Unsupported(f"{folder} can't be loaded as a vision tower: {str(error)[:200]}", param="baseline") from error
        if self.model.main_input_name != "pixel_values":
            raise Unsupported(f"{folder} is a {config.model_type}, which reads no pixels alone; name a vision tower", param="baseline")
        self.model.eval().requires_grad_(False)
        self.prepare = _processor(folder, config)
        self.kept: dict[bytes, torch.Tensor] = {}

    def features(self, files: Sequence[bytes]) -> torch.Tensor:
        """[N, D] of image files."""
        for file in files:
            if file not in self.kept:
                with torch.inference_mode():
                    out = self.model(pixel_values=self._pixels(file))
                pooled = getattr(out, "pooler_output", None)
                self.kept[file] = (out.last_hidden_state.mean(1) if pooled is None else pooled).flatten().clone()
        return torch.stack([self.kept[file] for file in files])

    def _pixels(self, file: bytes) -> torch.Tensor:
        with Image.open(BytesIO(file)) as opened:
            image = opened.convert("RGB")
        pixels: torch.Tensor = self.prepare(image, return_tensors="pt")["pixel_values"]
        return pixels


def _processor(folder: Path, config: Any) -> Any:
    """transformers' image processor, in Pillow and NumPy, that the folder or its kind of model names.

    Where neither names one, settings are read by those keys that are common to all: `size` of one number is the shorter side's, and what
    isn't said is bicubic, with means and deviations of 0.5. Without settings the shorter side becomes an eighth longer than the model's
    square, which is cut out of the middle: 256 for 224.
    """
    from transformers import IMAGE_PROCESSOR_MAPPING, AutoImageProcessor
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    path = folder / "preprocessor_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        named = found.get("image_processor_type") or found.get("feature_extractor_type") or type(config) in IMAGE_PROCESSOR_MAPPING
        if found and named:
            return AutoImageProcessor.from_pretrained(folder, config=config, backend="pil", local_files_only=True, trust_remote_code=False)
        settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": bool(found.get("crop_size")), **found}
        if not found.get("size"):
            side = int(getattr(config, "image_size", 224) or 224)
            settings |= {
                "size": {"shortest_edge": round(side * 8 / 7)},
                "crop_size": found.get("crop_size") or side,
                "do_center_crop": True,
            }
        return BitImageProcessorPil(**settings)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise Unsupported(f"{path}: images can't be prepared as it says: {str(error)[:200]}", param="baseline") from error


# --- classifiers: features of the shots [N, D], their classes [N], features of the tests -> classes of the tests ---


def nearest_centroid(shots_ND: torch.Tensor, classes_N: torch.Tensor, tests_MD: torch.Tensor) -> torch.Tensor:
    """The class whose mean feature has the largest cosine with a test's, features of length 1."""
    shots_ND, tests_MD = F.normalize(shots_ND, dim=1), F.normalize(tests_MD, dim=1)
    centroids_KD = torch.stack([shots_ND[classes_N == k].mean(0) for k in range(int(classes_N.max()) + 1)])
    return (tests_MD @ F.normalize(centroids_KD, dim=1).T).argmax(1)


def linear_probe(shots_ND: torch.Tensor, classes_N: torch.Tensor, tests_MD: torch.Tensor) -> torch.Tensor:
    """Multinomial logistic regression: the least mean cross-entropy + WEIGHT_DECAY / 2 |W|^2, found by L-BFGS. Features are taken less the
    shots' mean and scaled to a mean square of 1."""
    centre_D = shots_ND.mean(0)
    scale = (shots_ND - centre_D).pow(2).mean().sqrt().clamp_min(1e-6)
    inputs_ND, tests_MD = (shots_ND - centre_D) / scale, (tests_MD - centre_D) / scale
    num_classes = int(classes_N.max()) + 1
    weight_KD, bias_K = torch.zeros(num_classes, inputs_ND.shape[1], requires_grad=True), torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_KD, bias_K], max_iter=PROBE_STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs_ND @ weight_KD.T + bias_K, classes_N) + WEIGHT_DECAY / 2 * weight_KD.pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (tests_MD @ weight_KD.T + bias_K).argmax(1).detach()


KINDS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "nearest-centroid": nearest_centroid,
    "linear-probe": linear_probe,
}


def probes_of(baselines: Sequence[str]) -> list[Probe]:
    """The baselines, one tower for each folder. Raises InvalidRequest where two have the same name: runs are told apart by the names of
    their methods, so two of one name would count as one baseline with twice the seeds."""
    named: dict[str, str] = {}
    for given in baselines:
        name = _read(given)[0]
        if name in named:
            raise InvalidRequest(
                f"the baselines {named[name]} and {given} are both called {name!r}; "
                "name each once, and rename one of two folders of one name",
                param="baseline",
            )
        named[name] = given
    towers: dict[Path, Tower] = {}
    return [Probe(given, towers) for given in baselines]


def _read(given: str) -> tuple[str, str, Path]:
    """Name, kind and folder of KIND:FOLDER. The name is the kind's and the folder's last part: reports show no path of a machine."""
    kind, _, folder = given.partition(":")
    if kind not in KINDS or not folder:
        raise InvalidRequest(f"{given!r} is no baseline; write KIND:FOLDER with a KIND of {', '.join(KINDS)}", param="baseline")
    path = Path(folder).expanduser()
    return f"{kind} on {path.name}", kind, path


class Probe:
    """A baseline of the study: `given` is KIND:FOLDER."""

    def __init__(self, given: str, towers: dict[Path, Tower]):
        self.name, kind, path = _read(given)
        self.fit = KINDS[kind]
        self.tower = towers.setdefault(path, Tower(path)) if path not in towers else towers[path]

    def run(self, train: Mapping[str, Sequence[Photo]], tests: Sequence[Photo], gallery: Gallery, shots: int, seed: int) -> Run:
        """Fitted to the photos that adapters of this seed see, and to their mirror images."""
        started = time.monotonic()
        chosen, labels = choose(train, shots, seed), list(train)
        shown = [(photo, flip) for photos in chosen.values() for photo in photos for flip in (False, True)]
        classes_N = torch.tensor([labels.index(photo.label) for photo, _ in shown])
        shots_ND = self.tower.features([gallery.file(*each) for each in shown])
        tests_MD = self.tower.features([gallery.file(photo) for photo in tests])
        said = [labels[k] for k in self.fit(shots_ND, classes_N, tests_MD).tolist()]
        correct = sum(label == photo.label for label, photo in zip(said, tests, strict=True))
        seconds = time.monotonic() - started
        return Run(self.name, shots, seed, correct, len(tests), [name_of(label) for label in said], seconds=seconds)
