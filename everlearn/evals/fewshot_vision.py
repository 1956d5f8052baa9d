"""The few-shot vision study: how many photos of each class must a model have seen until it names the class of a new one?

Pure parts: which photos are taught, in which order, what is asked and how an answer is judged. Data is a folder for each class; the
prompt, the prefilled answer, exact match and as many steps for every number of shots are those of the tinker-cookbook's study
(vlm_classifier). Every choice follows from a seed by name, so runs can be repeated one by one. Neither tensors nor a client here.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from everlearn.errors import InvalidRequest, NotFound
from everlearn.render.images import FORMATS

PROMPT = "What is the name of the subject in this photo?"
PREFILL = "The subject in this photo is:"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
LONGEST_SIDE = 480  # pixels that a photo is sent with at most
TEST_SHARE = 0.3  # of a class's photos, where the data set has no test folder
CONFIDENCE = 0.95  # of the intervals over seeds


class Photo(NamedTuple):
    path: Path
    label: str  # the name of its folder


class Split(NamedTuple):
    """Photos by class: those that shots are chosen from, and those that are asked about."""

    train: dict[str, list[Photo]]
    test: dict[str, list[Photo]]


class Shown(NamedTuple):
    """A photo as it is taught: `flip` mirrors it."""

    photo: Photo
    flip: bool


# --- words ---


def name_of(label: str) -> str:
    """What a class is called: its folder's name in lower case, with spaces for marks."""
    return " ".join(re.sub(r"[._-]+", " ", label).lower().split())


def sentence(name: str) -> str:
    """What follows the prefilled words."""
    return f" {name}\n"


def judged(answer: str, name: str) -> bool:
    """Whether the text behind the last colon is the name, whatever the case."""
    return answer.rpartition(":")[2].strip().lower() == name


# --- photos ---


def read_photos(folder: Path, classes: Sequence[str] | None = None) -> dict[str, list[Photo]]:
    """Photos by class, in the order of their names; `classes` keeps those alone. Raises a UserError where there is nothing to study."""
    if not folder.is_dir():
        raise NotFound(f"there is no folder {folder}; name one that holds a folder of photos for each class", param="data")
    found = {
        place.name: [Photo(path, place.name) for path in sorted(place.iterdir()) if path.suffix.lower() in SUFFIXES]
        for place in sorted(folder.iterdir())
        if place.is_dir() and not place.name.startswith(".")
    }
    found = {label: photos for label, photos in found.items() if photos}
    if not found:
        raise InvalidRequest(f"{folder} holds no photos ({', '.join(sorted(SUFFIXES))}) in folders by class", param="data")
    for label in classes or ():
        if label not in found:
            raise NotFound(f"{folder} has no class {label!r}; it has {', '.join(found)}", param="classes")
    return {label: found[label] for label in classes} if classes else found


def read_split(data: Path, classes: Sequence[str] | None = None, hold_out: Sequence[str] = ()) -> Split:
    """The folders train and test where the data set has them; else the last three of ten photos of each class, in an order drawn once, are
    asked about. `hold_out` names classes that take no part."""
    if (data / "train").is_dir() and (data / "test").is_dir():
        train, test = read_photos(data / "train", classes), read_photos(data / "test", classes)
        test = {label: photos for label, photos in test.items() if label in train}
    else:
        train, test = {}, {}
        for label, photos in read_photos(data, classes).items():
            order = random.Random(f"split:{label}").sample(photos, len(photos))
            kept = len(order) - math.ceil(TEST_SHARE * len(order))
            train[label], test[label] = order[:kept], order[kept:]
    for label in hold_out:
        if label not in train:
            raise NotFound(f"{data} has no class {label!r} to hold out; it has {', '.join(train)}", param="hold_out")
    labels = [label for label in train if label not in hold_out]
    return Split({label: train[label] for label in labels}, {label: test.get(label, []) for label in labels})


def check(split: Split, shots: Sequence[int]) -> None:
    """Raises InvalidRequest where a class can't give the largest number of shots, or nothing can be asked about it."""
    if len(split.train) < 2:
        raise InvalidRequest(f"there are {len(split.train)} classes; naming takes two or more: name more with --classes", param="classes")
    if not shots or min(shots) < 1 or len(set(shots)) != len(shots):
        raise InvalidRequest(f"shots are {list(shots)}; give different numbers from 1 on, like 1,2,4", param="shots")
    for label, photos in split.train.items():
        if len(photos) < max(shots):
            raise InvalidRequest(
                f"class {label!r} has {len(photos)} photos to learn from and {max(shots)} shots are asked for; "
                "ask for fewer, or leave the class out with --hold-out",
                param="shots",
            )
        if not split.test[label]:
            raise InvalidRequest(f"class {label!r} has no photos to ask about; add some, or leave it out with --hold-out", param="data")
    names = [name_of(label) for label in split.train]
    if len(set(names)) != len(names):
        raise InvalidRequest(f"two classes have the same name: {', '.join(sorted(names))}; rename a folder", param="data")


def tests_of(split: Split, most: int) -> list[Photo]:
    """At most `most` photos to ask about, drawn once: every method and every seed is asked the same."""
    photos = [photo for of_class in split.test.values() for photo in of_class]
    return random.Random("tests").sample(photos, min(most, len(photos)))


def choose(train: Mapping[str, Sequence[Photo]], shots: int, seed: int) -> dict[str, list[Photo]]:
    """The photos that `seed` teaches of each class. More shots of a seed hold its fewer ones."""
    return {label: random.Random(f"shots:{seed}:{label}").sample(photos, len(photos))[:shots] for label, photos in train.items()}


def lesson(chosen: Mapping[str, Sequence[Photo]], examples_per_class: int, seed: int) -> list[Shown]:
    """What is shown, in order: passes over the chosen photos, each pass shuffled, every photo mirrored half of the time, until each class
    was shown `examples_per_class` times. Fewer shots are repeated more often, so every number of shots takes as many steps."""
    rng = random.Random(f"lesson:{seed}")
    left = dict.fromkeys(chosen, examples_per_class)
    shown: list[Shown] = []
    while any(left.values()):
        passed = [photo for label, photos in chosen.items() for photo in photos[: left[label]]]
        for photo in rng.sample(passed, len(passed)):
            left[photo.label] -= 1
            shown.append(Shown(photo, rng.random() < 0.5))
    return shown


def shown_bytes(photo: Photo, flip: bool = False) -> bytes:
    """The photo as it is sent: turned as its EXIF says, at most 480 pixels long, JPEG. Raises InvalidRequest where it is none."""
    from PIL import Image, ImageOps

    try:
        with Image.open(photo.path, formats=FORMATS) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise InvalidRequest(f"{photo.path} can't be read as a photo: {error}; replace it or take it away", param="data") from None
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BICUBIC)
    out = BytesIO()
    (ImageOps.mirror(image) if flip else image).save(out, "JPEG", quality=95)
    return out.getvalue()


# --- figures ---


def interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and the two ends of its 95 % interval over seeds, by Student's t: mean ± t s / sqrt(n). Ends within 0 and 1; with one value they
    are not known (None)."""
    centre = mean(values)
    if len(values) < 2:
        return centre, None, None
    half = student(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return centre, max(0.0, centre - half), min(1.0, centre + half)


def student(degrees: int) -> float:
    """The t that a variable of Student's distribution stays within with a probability of 95 %, either sign. The distribution is exact for
    whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4), in the angle whose tangent is t / sqrt(degrees); it is bisected."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, degrees) < CONFIDENCE else (low, angle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """The probability of -t to t. One sum for both formulas: with odd degrees its powers of the cosine are odd, with even ones even."""
    power = degrees % 2
    term, total = math.cos(angle) ** power, 0.0
    while power <= degrees - 2:
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
        power += 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if degrees % 2 else total
