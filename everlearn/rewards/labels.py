"""Labels: what people said of answers, as numbers that a reward model learns from. It knows nothing of texts or of who may read them.

Order is order of arrival. Whoever keeps the labels gives all of them again at a re-fit; one that is missing then was never there.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec
import numpy as np

from everlearn.errors import InvalidRequest

Kind = Literal["thumb", "preference", "stars"]
CATEGORIES: dict[str, int] = {"thumb": 2, "preference": 2, "stars": 5}
MOST_FLIPPED = 0.45  # share of labels that are wrong; at 0.5 they would say nothing


class Label(msgspec.Struct, frozen=True, kw_only=True):
    """One label. `features` are of the answer; of a preference, of the first answer, and `other` of the second.

    `value`: 0 or 1 for a thumb, 1 where the first answer of a preference is the better one (a correction prefers the edited answer), 0 to
    4 for one to five stars. `weight`: what it counts, less than 1 where one source gave very many. `group`: labels that share a rate of
    noise, for instance "implicit"; the kind itself unless said otherwise. `policy`: the version that answered. `held_out` labels are
    never learned from.
    """

    id: str
    kind: Kind
    value: int
    features: np.ndarray
    other: np.ndarray | None = None
    group: str = ""
    weight: float = 1.0
    policy: str = ""
    held_out: bool = False

    @property
    def noise_group(self) -> str:
        return f"{self.kind}:{self.group}" if self.group else self.kind

    @property
    def turned(self) -> bool:
        """Whether a preference is counted from its other side: half of all are, or every correction would be a "1"."""
        return self.kind == "preference" and hashed(self.id, 0) & 1 == 1


def check(label: Label, size: int) -> Label:
    """The label. Raises InvalidRequest for features of another size or not finite, for a value that its kind doesn't have, and for a
    preference without (or another kind with) a second answer."""
    if (label.other is not None) != (label.kind == "preference"):
        has = "no second answer" if label.other is None else "a second answer"
        rule = "a preference has features of two answers, any other kind of one"
        raise InvalidRequest(f"label {label.id} is of kind {label.kind} and has {has}; {rule}", param="other")
    if not 0 <= label.value < CATEGORIES[label.kind]:
        rule = f"a {label.kind} has values 0 to {CATEGORIES[label.kind] - 1}"
        raise InvalidRequest(f"label {label.id} has the value {label.value}; {rule}", param="value")
    if not 0 < label.weight <= 1:
        raise InvalidRequest(f"label {label.id} has the weight {label.weight}; weights lie above 0 and up to 1", param="weight")
    for name, features in (("features", label.features), ("other", label.other)):
        if features is not None and (features.shape != (size,) or not np.all(np.isfinite(features))):
            rule = f"this reward model takes {size} finite numbers"
            raise InvalidRequest(f"label {label.id} has {name} of shape {features.shape}; {rule}", param=name)
    return label


def flip_rate(agreed: int, pairs: int) -> float:
    """How often a label of two kinds is wrong, from answers that were labelled twice by different people, `agreed` of `pairs` alike.

    Two labels agree if both are right or both are wrong, (1 - e)^2 + e^2; 0.45 where they agree no more often than by chance.
    """
    if not 0 <= agreed <= pairs or not pairs:
        raise InvalidRequest(f"{agreed} of {pairs} pairs agree; give at least one pair", param="pairs")
    return min((1 - max(2 * agreed / pairs - 1, 0.0) ** 0.5) / 2, MOST_FLIPPED)


def hashed(text: str, salt: int) -> int:
    """The same whole number for the same text on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{salt}:{text}".encode(), digest_size=8).digest(), "big")


POISSON = np.cumsum([np.exp(-1.0) / np.prod(np.arange(1.0, k + 1.0)) for k in range(12)])


def bagged(label: Label, num_heads: int) -> np.ndarray:
    """[heads] how often each head saw this label: Poisson(1), online bagging (Oza and Russell, 2001), drawn from the label's id, so that
    a re-fit gives each head the labels that it had."""
    uniform = np.array([hashed(label.id, head + 1) / 2.0**64 for head in range(num_heads)])
    return np.searchsorted(POISSON, uniform).astype(np.float64)
