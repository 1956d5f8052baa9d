"""Images on their way into a decoder: the vision tower, what it has seen already, and where its features go in a packed row.

The tower is transformers' own and frozen. Its features depend on an image alone, so they are kept by the digest of its file, apart for
every tenant (what one has shown is not to be learnt from another's waiting time) and, where an adapter changes the tower, for every
version. While a run trains the tower nothing of it is kept: the gradient goes through it. On a CPU each image is computed alone, so
that its features are the same numbers whatever it came with.

A feature takes the place of a token's embedding; deepstack features are added after the first layers, at the same rows. Positions
count in three dimensions where a model has them (Bai et al. 2025, arXiv:2502.13923): for text all three are the same number; an image's
tokens share the first and count rows and columns in the others, and what follows it begins after the longer side.

Axes: T tokens of the packed row, V rows that hold features, F features of a row (its embedding, then one for each deepstack layer), D
hidden size, P tokens of one sequence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from everlearn.errors import InvalidRequest, Unsupported
from everlearn.models.lora import AdapterWeights, LoraLinear, Segment, active_segments
from everlearn.render.patches import patches_of, seen_pixels
from everlearn.types import BaseModelInfo, ImageSpan, VisionInfo

CPU_CACHE, GPU_CACHE = 256 * 2**20, 2 * 2**30
GPU_PIXELS = 4 * 2**20  # that a GPU computes together


class Shown(NamedTuple):
    """An image, who shows it, and the adapter it is shown to."""

    tenant: str
    image: ImageSpan
    adapter: AdapterWeights | None


@dataclass(eq=False)
class Visual:
    """What a packed row shows: `features_FVD` at rows `rows_V`, ascending."""

    rows_V: torch.Tensor
    features_FVD: torch.Tensor

    def embed(self, embeds_TD: torch.Tensor) -> torch.Tensor:
        """The row's embeddings with features in their places."""
        return embeds_TD.index_copy(0, self.rows_V, self.features_FVD[0])

    def deepstack(self, num_rows: int) -> dict[str, Any]:
        """transformers' arguments for what is added behind the first layers."""
        if len(self.features_FVD) == 1:
            return {}
        mask_T = torch.zeros(num_rows, dtype=torch.bool, device=self.rows_V.device)
        mask_T[self.rows_V] = True
        return {"visual_pos_masks": mask_T.unsqueeze(0), "deepstack_visual_embeds": list(self.features_FVD[1:])}


class TowerLinear(LoraLinear):
    """A linear layer of the tower. All rows of a pass belong to one adapter, however many patches its rows stand for."""

    def __init__(self, linear: nn.Linear, path: str, tower: VisionTower):
        super().__init__(linear, path)
        self.tower = tower

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outer = active_segments.current
        active_segments.current = [Segment(self.tower.adapter, 0, x.numel() // self.in_features)]
        try:
            return super().forward(x.contiguous())
        finally:
            active_segments.current = outer


class PatchProjection(nn.Module):
    """A convolution whose kernels lie side by side, as the one matrix product that it is: quicker, and in float32 not rounded as GPUs
    round convolutions."""

    def __init__(self, conv: nn.Conv3d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[n, C, F, p, p] -> [n, D]"""
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


class VisionTower:
    """The tower of one base model and the features of what it has seen."""

    def __init__(self, info: VisionInfo, tower: nn.Module, prefix: str, device: torch.device, dtype: torch.dtype):
        self.info, self.tower, self.prefix, self.device, self.dtype = info, tower, prefix, device, dtype
        tower.config._attn_implementation = "sdpa"  # type: ignore[union-attr]  # it attends within an image, both ways
        self.lora_modules = _install(self, tower, prefix)
        self.adapter: AdapterWeights | None = None  # of the present pass
        self.limit = CPU_CACHE if device.type == "cpu" else GPU_CACHE
        self.kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self.kept_bytes = self.computed_images = 0

    def sizes(self) -> dict[str, tuple[int, int]]:
        """(input, output) size of every layer that can be adapted."""
        return {path: (layer.in_features, layer.out_features) for path, layer in self.lora_modules.items()}

    def features(self, wanted: Sequence[Shown]) -> list[torch.Tensor]:
        """[F, V, D] for each image. A gradient is recorded where it is enabled and the adapter trains the tower."""
        found: dict[bytes, torch.Tensor] = {}
        missing: dict[bytes, Shown] = {}
        keys = [self._key(shown) for shown in wanted]
        for key, shown in zip(keys, wanted, strict=True):
            if key in self.kept:
                self.kept.move_to_end(key)
                found[key] = self.kept[key]
            else:
                missing.setdefault(key, shown)
        for group in self._groups(missing):
            adapter = self._tuned(missing[group[0]].adapter)
            for key, features_FVD in zip(group, self._compute([missing[key].image for key in group], adapter), strict=True):
                found[key] = features_FVD
                if adapter is None or adapter.frozen:
                    self._keep(key, features_FVD)
        return [found[key] for key in keys]

    def show(self, placed: Sequence[tuple[int, torch.Tensor]]) -> Visual | None:
        """`placed`: the first row of each stretch of features [F, v, D]; rows must ascend."""
        if not placed:
            return None
        rows = np.concatenate([np.arange(first, first + features.shape[1]) for first, features in placed])
        return Visual(torch.from_numpy(rows).to(self.device), torch.cat([features for _, features in placed], dim=1))

    # --- one pass ---

    def _tuned(self, adapter: AdapterWeights | None) -> AdapterWeights | None:
        """The adapter, if it changes the tower."""
        return None if adapter is None or self.lora_modules.keys().isdisjoint(adapter.pairs) else adapter

    def _key(self, shown: Shown) -> bytes:
        adapter, image = self._tuned(shown.adapter), shown.image
        version = "" if adapter is None else f"{adapter.version}{'' if adapter.frozen else f'#{id(adapter)}'}"
        head = f"{len(shown.tenant)}:{shown.tenant}{len(version)}:{version}{image.rows}x{image.columns}:"
        return blake2b(head.encode() + image.data, digest_size=16).digest()

    def _groups(self, missing: dict[bytes, Shown]) -> Iterator[list[bytes]]:
        """Images that are computed together: of one adapter, on a CPU each alone."""
        most = 0 if self.device.type == "cpu" else GPU_PIXELS
        group: list[bytes] = []
        pixels = 0
        for key, shown in missing.items():
            size = seen_pixels(shown.image.rows, shown.image.columns, self.info)
            if group and (pixels + size > most or self._tuned(shown.adapter) is not self._tuned(missing[group[0]].adapter)):
                yield group
                group, pixels = [], 0
            group.append(key)
            pixels += size
        if group:
            yield group

    def _compute(self, images: list[ImageSpan], adapter: AdapterWeights | None) -> list[torch.Tensor]:
        """Outside of inference mode: what is kept may meet a gradient later."""
        merge = self.info.merge
        patches = torch.from_numpy(np.concatenate([patches_of(image, self.info) for image in images])).to(self.device, self.dtype)
        grid = torch.tensor([[1, image.rows * merge, image.columns * merge] for image in images], device=self.device)
        trains = adapter is not None and adapter.grads is not None and torch.is_grad_enabled()
        self.computed_images += len(images)
        with self._pass(adapter), torch.inference_mode(False), torch.set_grad_enabled(trains):
            out = self.tower(patches, grid_thw=grid, return_dict=True)
            features_FVD = torch.stack([out.pooler_output, *(getattr(out, "deepstack_features", None) or [])])
            return list(features_FVD.split([image.num_tokens for image in images], dim=1))

    @contextmanager
    def _pass(self, adapter: AdapterWeights | None) -> Iterator[None]:
        self.adapter = adapter
        try:
            yield
        finally:
            self.adapter = None

    def _keep(self, key: bytes, features_FVD: torch.Tensor) -> None:
        size = features_FVD.numel() * features_FVD.element_size()
        if size > self.limit:
            return
        # A stretch of a larger tensor would hold all of it.
        self.kept[key] = features_FVD.clone() if features_FVD._base is not None else features_FVD
        self.kept_bytes += size
        while self.kept_bytes > self.limit:
            _, oldest = self.kept.popitem(last=False)
            self.kept_bytes -= oldest.numel() * oldest.element_size()


def find_tower(info: BaseModelInfo, model: nn.Module, device: torch.device, dtype: torch.dtype) -> VisionTower | None:
    """The model's vision tower; None where it has none or this version can't prepare its images."""
    tower = getattr(getattr(model, "model", None), "visual", None)
    return None if info.vision is None or tower is None else VisionTower(info.vision, tower, "model.visual", device, dtype)


def _install(owner: VisionTower, tower: nn.Module, prefix: str) -> dict[str, LoraLinear]:
    """Replaces every linear layer of the tower, its mergers' included, and returns them by full path. Its first convolution becomes a
    product."""
    found: dict[str, LoraLinear] = {}
    for name, module in list(tower.named_modules()):
        for child_name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                path = ".".join(part for part in (prefix, name, child_name) if part)
                found[path] = TowerLinear(child, path, owner)
                setattr(module, child_name, found[path])
            elif type(child) is nn.Conv3d and child.stride == child.kernel_size and not any(child.padding):
                setattr(module, child_name, PatchProjection(child))
    return found


# --- rows of tokens ---


def check_images(tower: VisionTower | None, name: str, num_tokens: int, images: Sequence[ImageSpan], param: str) -> None:
    """Raises a UserError where the model `name` can't see these images in a row of `num_tokens`."""
    if images and tower is None:
        raise Unsupported(f"{param} holds an image; {name} reads text alone", param=param)
    at = 0
    for image in images:
        if image.rows < 1 or image.columns < 1 or image.start < at or image.stop > num_tokens:
            raise InvalidRequest(f"{param}: an image's tokens {image.start} to {image.stop} don't fit into {num_tokens}", param=param)
        at = image.stop


def positions_of(num_tokens: int, images: Sequence[ImageSpan], axes: int = 3) -> np.ndarray:
    """int64 [3, P]: time, row and column of each token; [P] where the model's positions have one axis."""
    if axes == 1:
        return np.arange(num_tokens, dtype=np.int64)
    positions = np.empty((3, num_tokens), np.int64)
    at = next_position = 0
    for image in images:
        positions[:, at : image.start] = np.arange(next_position, next_position + image.start - at)
        next_position += image.start - at
        positions[:, image.start : image.stop] = next_position
        positions[1:, image.start : image.stop] += np.indices((image.rows, image.columns)).reshape(2, -1)
        next_position += max(image.rows, image.columns)
        at = image.stop
    positions[:, at:] = np.arange(next_position, next_position + num_tokens - at)
    return positions
