"""Images as a vision tower reads them: the same numbers as transformers' own image processor makes."""

from __future__ import annotations

import json
import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from everlearn.config import ImageSettings
from everlearn.errors import InvalidRequest
from everlearn.render.images import inspect
from everlearn.render.patches import grid_of, patches_of, read_vision
from everlearn.types import ImageSpan, VisionInfo

QWEN = VisionInfo(16, 2, 2, 65536, 16777216, [0.5] * 3, [0.5] * 3, 151655, 151652, 151653)
OTHER = VisionInfo(14, 2, 2, 3136, 200704, [0.48, 0.46, 0.41], [0.27, 0.26, 0.28], 1, 2, 3)


@pytest.fixture(scope="module")
def processors():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    def of(vision: VisionInfo):
        size = {"shortest_edge": vision.min_pixels, "longest_edge": vision.max_pixels}
        return Qwen2VLImageProcessorPil(patch_size=vision.patch, size=size, image_mean=vision.mean, image_std=vision.std)

    return {id(vision): of(vision) for vision in (QWEN, OTHER)}


def saved(seed: int, width: int, height: int, mode: str = "RGB", format: str = "PNG", **more: object) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    out = BytesIO()
    Image.fromarray(values).convert(mode).save(out, format, **more)
    return out.getvalue()


@pytest.mark.parametrize("vision", [QWEN, OTHER], ids=["qwen3", "other"])
@pytest.mark.parametrize(
    ("width", "height", "mode", "format"),
    [(300, 200, "RGB", "PNG"), (1000, 31, "RGBA", "PNG"), (17, 300, "L", "PNG"), (320, 240, "P", "PNG"), (211, 99, "RGB", "JPEG")],
)
def test_grids_and_patches_are_those_of_transformers(processors, vision: VisionInfo, width: int, height: int, mode: str, format: str):
    data = saved(1, width, height, mode, format)
    rows, columns = grid_of(width, height, vision, "image")
    with Image.open(BytesIO(data)) as image:
        wanted = processors[id(vision)](image, return_tensors="np")
    assert wanted["image_grid_thw"].tolist() == [[1, rows * vision.merge, columns * vision.merge]]
    np.testing.assert_array_equal(patches_of(ImageSpan(0, rows, columns, data), vision), wanted["pixel_values"])


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), vision=st.sampled_from([QWEN, OTHER]))
def test_a_grid_follows_from_the_size_and_keeps_the_bounds(width: int, height: int, vision: VisionInfo):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    if max(width, height) > 200 * min(width, height):
        with pytest.raises(InvalidRequest, match="200 times"):
            grid_of(width, height, vision, "image")
        return
    side = vision.patch * vision.merge
    rows, columns = grid_of(width, height, vision, "image")
    assert (rows * side, columns * side) == smart_resize(height, width, side, vision.min_pixels, vision.max_pixels)
    assert grid_of(height, width, vision, "image") == (columns, rows)  # so a turned image takes as many tokens
    assert rows >= 1 <= columns


def test_an_image_is_turned_as_its_exif_says():
    plain = Image.open(BytesIO(saved(2, 96, 64)))
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = BytesIO()
    plain.rotate(90, expand=True).save(lying, "PNG", exif=exif)
    np.testing.assert_array_equal(
        patches_of(ImageSpan(0, 4, 6, lying.getvalue()), OTHER), patches_of(ImageSpan(0, 4, 6, saved(2, 96, 64)), OTHER)
    )


def entry(kind: int, count: int, value: bytes, tag: int = 0x0112) -> bytes:
    return struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")


SIX = struct.pack("<H", 6)
EXIF = {
    **{f"{n}": (entry(3, 1, struct.pack("<H", n)), n if n <= 8 else 1) for n in range(1, 10)},
    "65535": (entry(3, 1, struct.pack("<H", 65535)), 1),
    "text": (entry(2, 2, b"6\0"), 1),
    "bytes": (entry(7, 3, b"abc"), 1),
    "two numbers": (entry(3, 2, SIX + SIX), 6),
    "no number": (entry(3, 0, b""), 1),
    "a fraction": (entry(5, 1, struct.pack("<I", 8)), 1),
    "a float": (entry(11, 1, struct.pack("<f", 6.0)), 6),
    "6 beside what Pillow can't write": (entry(3, 1, SIX) + entry(4, 1, b"\0", 0x0201) + entry(12, 1, b"\xff" * 4, 0xC000), 6),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow speaks of what it can't read
@pytest.mark.parametrize("name", EXIF)
def test_grid_and_pixels_are_turned_alike_whatever_the_exif_holds(name: str):
    entries, turn = EXIF[name]
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries) // 12) + entries + bytes(4)
    data = saved(5, 96, 64, exif=exif)
    found = inspect(data, ImageSettings())
    assert (found.width, found.height) == ((64, 96) if turn >= 5 else (96, 64))
    rows, columns = grid_of(found.width, found.height, OTHER, "image")
    clean = Image.Exif()
    clean[0x0112] = turn
    expected = BytesIO()
    ImageOps.exif_transpose(Image.open(BytesIO(saved(5, 96, 64, exif=clean)))).save(expected, "PNG")
    np.testing.assert_array_equal(
        patches_of(ImageSpan(0, rows, columns, data), OTHER), patches_of(ImageSpan(0, rows, columns, expected.getvalue()), OTHER)
    )


def test_a_broken_file_is_refused():
    with pytest.raises(InvalidRequest, match="decoded"):
        patches_of(ImageSpan(0, 2, 2, saved(3, 64, 64)[:90]), QWEN)


CONFIG = {
    "model_type": "qwen3_vl",
    "vision_config": {"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2},
    "image_token_id": 7,
    "vision_start_token_id": 8,
    "vision_end_token_id": 9,
}


@pytest.mark.parametrize("nested", [False, True])
def test_settings_come_from_the_folder(tmp_path: Path, nested: bool):
    plain = read_vision(tmp_path, CONFIG)
    assert plain == VisionInfo(16, 2, 2, 65536, 16777216, [0.5] * 3, [0.5] * 3, 7, 8, 9)
    settings = {"size": {"shortest_edge": 4096, "longest_edge": 8192}, "patch_size": 14, "image_mean": [0.1, 0.2, 0.3]}
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps({"image_processor": settings} if nested else settings))
    assert read_vision(tmp_path, CONFIG) == VisionInfo(14, 2, 2, 4096, 8192, [0.1, 0.2, 0.3], [0.5] * 3, 7, 8, 9)
    assert read_vision(tmp_path, {**CONFIG, "model_type": "llama"}) is None
    with pytest.raises(InvalidRequest, match="image_token_id"):
        read_vision(tmp_path, {name: value for name, value in CONFIG.items() if name != "image_token_id"})


@pytest.mark.parametrize("given", [{"min_pixels": 3136}, {"max_pixels": 200704}, {"min_pixels": 3136, "max_pixels": 200704}])
def test_bounds_of_pixels_go_before_a_size_as_in_transformers(tmp_path: Path, given: dict[str, int]):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    settings = {"size": {"shortest_edge": 4096, "longest_edge": 8192}, **given}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    found, theirs = read_vision(tmp_path, CONFIG), Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size
    assert (found.min_pixels, found.max_pixels) == (theirs["shortest_edge"], theirs["longest_edge"])
