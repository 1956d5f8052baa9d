"""From an image to what a vision tower reads: how large it is resized, how many tokens stand for it, its patches.

There are two ways, and FAMILIES says which a family has. The arithmetic of the first is that of transformers' image processor for
Qwen2-VL and Qwen3-VL, in Pillow and NumPy: an image keeps its shape, is resized so that both sides are whole numbers of tokens and its
pixels lie within the model's bounds, and is cut into patches in the order in which the tower merges them. In the second an image becomes
one square of a fixed size. How many tokens an image takes follows from its size alone, so it is known before a pixel is.

Axes: R, C rows and columns of tokens; h, w their pixels; m patches of a token's side; p pixels of a patch's side; F frames.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from everlearn.errors import InvalidRequest
from everlearn.render.images import FORMATS, upright
from everlearn.types import ImageSpan, VisionInfo

MAX_ASPECT = 200
SETTINGS_FILES = ("preprocessor_config.json", "processor_config.json")


def read_vision(folder: Path, config: dict[str, Any]) -> VisionInfo | None:
    """How the model in `folder` takes images; None where it takes none, or is of a family whose images this version can't prepare."""
    tower, read = config.get("vision_config"), FAMILIES.get(str(config.get("model_type")))
    if not isinstance(tower, dict) or read is None:
        return None
    found: dict[str, Any] = next((_read(folder / name) for name in SETTINGS_FILES if (folder / name).is_file()), {})
    found = found.get("image_processor", found)
    try:
        return VisionInfo(
            **read(found, tower, config),
            mean=[float(value) for value in found.get("image_mean") or [0.5] * 3],
            std=[float(value) for value in found.get("image_std") or [0.5] * 3],
            image=int(config["image_token_id"]),
            start=int(config["vision_start_token_id"]),
            end=int(config["vision_end_token_id"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"{folder}: its settings of images can't be read ({error!r}); fetch the folder again"
        raise InvalidRequest(message, param="base_model") from None


def _in_patches(found: dict[str, Any], tower: dict[str, Any], config: dict[str, Any]) -> dict[str, int]:
    """Qwen3-VL: an image keeps its shape. Its bounds of pixels where a folder has no preprocessor_config.json are the makers';
    `min_pixels` and `max_pixels` go before `size`, as in transformers."""
    size = found.get("size") or {}
    return {
        "patch": int(found.get("patch_size") or tower["patch_size"]),
        "merge": int(found.get("merge_size") or tower["spatial_merge_size"]),
        "frames": int(found.get("temporal_patch_size") or tower["temporal_patch_size"]),
        "min_pixels": int(found.get("min_pixels") or size.get("shortest_edge") or 65536),
        "max_pixels": int(found.get("max_pixels") or size.get("longest_edge") or 16777216),
    }


def _in_one_square(found: dict[str, Any], tower: dict[str, Any], config: dict[str, Any]) -> dict[str, int]:
    """Lite-VLM: an image becomes the square that its tower was trained on; its tokens have positions as text has."""
    side, grid = int(tower["image_size"]), int(config["grid"])
    pixels = {"min_pixels": side * side, "max_pixels": side * side}
    return {"patch": side, "merge": 1, "frames": 1, **pixels, "grid": grid, "position_axes": 1}


FAMILIES = {"qwen3_vl": _in_patches, "qwen3_vl_moe": _in_patches, "lite_vlm": _in_one_square}  # by model_type


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} can't be read: {error}", param="base_model") from None
    return value if isinstance(value, dict) else {}


def grid_of(width: int, height: int, vision: VisionInfo, param: str, max_pixels: int | None = None) -> tuple[int, int]:
    """Rows and columns of tokens that an image of this size takes. `max_pixels` bounds it closer than the model does.

    With s the side of a token: each side is rounded to a multiple of s; if the area is above its bound, the sides are divided by
    sqrt(area / bound) and rounded down, if below, multiplied and rounded up.
    """
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise InvalidRequest(
            f"{param} has {width} x {height} pixels; no side may be more than {MAX_ASPECT} times the other: cut it", param=param
        )
    if vision.grid:
        return vision.grid, vision.grid
    side, most = vision.patch * vision.merge, min(max_pixels or vision.max_pixels, vision.max_pixels)
    rows, columns = round(height / side), round(width / side)
    if rows * columns * side * side > most:
        beta = math.sqrt(height * width / most)
        rows, columns = max(1, math.floor(height / beta / side)), max(1, math.floor(width / beta / side))
    elif rows * columns * side * side < vision.min_pixels:
        beta = math.sqrt(vision.min_pixels / (height * width))
        rows, columns = math.ceil(height * beta / side), math.ceil(width * beta / side)
    return rows, columns


def seen_pixels(rows: int, columns: int, vision: VisionInfo) -> int:
    """How many pixels the model sees of an image that takes so many rows and columns of tokens."""
    return vision.max_pixels if vision.grid else rows * columns * (vision.patch * vision.merge) ** 2


def patches_of(span: ImageSpan, vision: VisionInfo) -> np.ndarray:
    """float32 [R * C * m * m, 3 * F * p * p], a token's patches side by side; [1, 3 * p * p] where an image is one patch. Raises
    InvalidRequest where the file is no image."""
    side, patch, merge = vision.patch * vision.merge, vision.patch, vision.merge
    rows, columns = (1, 1) if vision.grid else (span.rows, span.columns)
    pixels_hwc = _resized(span.data, columns * side, rows * side)
    values_hwc = np.empty(pixels_hwc.shape, np.float32)
    for channel, table in enumerate(_tables(tuple(vision.mean), tuple(vision.std))):
        values_hwc[..., channel] = table[pixels_hwc[..., channel]]
    parts = values_hwc.reshape(rows, merge, patch, columns, merge, patch, 3)
    parts_RCmmcpp = parts.transpose(0, 3, 1, 4, 6, 2, 5)
    framed = np.broadcast_to(parts_RCmmcpp[:, :, :, :, :, None], (*parts_RCmmcpp.shape[:5], vision.frames, patch, patch))
    return framed.reshape(rows * columns * merge * merge, -1)


@lru_cache(maxsize=16)
def _tables(mean: tuple[float, ...], std: tuple[float, ...]) -> list[np.ndarray]:
    """For each channel, what becomes of the 256 values that a pixel can have."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return [(scaled - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)]


def _resized(data: bytes, width: int, height: int) -> np.ndarray:
    """uint8 [h, w, 3]: turned as its EXIF says, transparency laid on white, resized (bicubic)."""
    from PIL import Image as Pillow

    try:
        with Pillow.open(BytesIO(data), formats=FORMATS) as opened:
            image = upright(opened)
            if "A" in image.getbands() or image.info.get("transparency") is not None:
                image = image.convert("RGBA")
                image = Pillow.alpha_composite(Pillow.new("RGBA", image.size, (255, 255, 255, 255)), image)
            image = image.convert("RGB").resize((width, height), Pillow.Resampling.BICUBIC)
    except (OSError, ValueError, SyntaxError, EOFError, Pillow.DecompressionBombError) as error:
        raise InvalidRequest(f"an image can't be decoded: {error}", param="images") from None
    return np.asarray(image)
