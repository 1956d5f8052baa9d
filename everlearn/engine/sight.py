"""What a packed row shows of images: which of its rows hold features, and the features that belong there.

A training row shows its images whole. A sampling row may hold any stretch of one, so a request keeps its images' features until its
prompt is computed; what the prefix cache holds needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from everlearn.engine.paged import Chunk
from everlearn.models.lora import AdapterWeights
from everlearn.models.vision import Shown, VisionTower, Visual, positions_of
from everlearn.types import Datum, ImageSpan

Placed = tuple[int, Datum, str, AdapterWeights | None]  # a datum's first row, the datum, its tenant, its adapter


def of_datums(tower: VisionTower | None, placed: Iterable[Placed]) -> Visual | None:
    """What a row of whole datums shows, in row order."""
    found = [(first + image.start, Shown(tenant, image, adapter)) for first, datum, tenant, adapter in placed for image in datum.images]
    if tower is None or not found:
        return None
    features = tower.features([shown for _, shown in found])
    return tower.show([(row, features_FVD) for (row, _), features_FVD in zip(found, features, strict=True)])


def row_positions(datums: Sequence[tuple[int, list[ImageSpan]]], axes: int = 3) -> np.ndarray:
    """int64 positions of a row of datums, given each one's length and images: [T], or [3, T] where one of them has an image and the
    model's positions have three axes."""
    needed = axes if any(images for _, images in datums) else 1
    return np.concatenate([positions_of(length, images, needed) for length, images in datums], axis=-1)


def see(tower: VisionTower, chunk: Chunk) -> None:
    """Lets the chunk's request have the features of the images that the chunk covers. Raises a UserError where one can't be read."""
    request = chunk.sequence.request
    missing = [i for i in chunk.sequence.images(chunk.start, chunk.stop) if i not in request.features]
    shown = [Shown(request.command.cache_salt, request.command.images[i], request.adapter) for i in missing]
    request.features |= dict(zip(missing, tower.features(shown), strict=True))


def of_chunks(tower: VisionTower | None, chunks: Sequence[Chunk], stops: Sequence[int]) -> Visual | None:
    """What the chunks of a sampling row cover of their images, which they have seen; `stops` are the rows after them."""
    found = []
    for chunk, stop in zip(chunks, stops, strict=True):
        for i in chunk.sequence.images(chunk.start, chunk.stop):
            image = chunk.sequence.request.command.images[i]
            first, last = max(chunk.start, image.start), min(chunk.stop, image.stop)
            features_FVD = chunk.sequence.request.features[i][:, first - image.start : last - image.start]
            found.append((stop - chunk.stop + first, features_FVD))
    return tower.show(found) if tower is not None else None
