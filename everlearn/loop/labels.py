"""From feedback, as the store keeps it, to labels that a reward model learns from. Pure: whoever calls has read the rows and has features.

| feedback | label |
|---|---|
| `boolean` | a thumb |
| `float`, 0 to 1 | stars, one to five |
| `preference` | a preference: this answer over the other |
| `demonstration` | a preference: the corrected answer over the one that was given |
| `outcome`, 0 to 1 | a thumb of its own group: tools are wrong in other ways than people |
| `implicit` | a thumb of its own group, the rate of flips being known or found |

Comments say nothing that a linear head could learn from.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from everlearn.errors import InvalidRequest
from everlearn.rewards.labels import CATEGORIES, Label

TEACHING = ("boolean", "float", "preference", "demonstration", "outcome", "implicit")


def label_of(
    feedback_id: str,
    kind: str,
    value: float | None,
    features: np.ndarray,
    *,
    other: np.ndarray | None = None,
    name: str = "",
    weight: float = 1.0,
    policy: str = "",
    held_out: bool = False,
) -> Label | None:
    """The label of one feedback; None for a kind that teaches nothing here, and for a weight of 0.

    `features` are of the answer that the feedback is about; `other` of the worse answer of a preference, and for a demonstration of the
    corrected answer. `weight` is what its source counts (everlearn/loop/weights.py). Raises InvalidRequest for a value outside 0 to 1 and
    for a comparison without a second answer.
    """
    if kind not in TEACHING or not weight:
        return None
    common: dict[str, Any] = {"id": feedback_id, "weight": min(weight, 1.0), "policy": policy, "held_out": held_out}
    if kind in ("preference", "demonstration"):
        if other is None:
            raise InvalidRequest(f"feedback {feedback_id} compares two answers, and there are features of one", param="other")
        better, worse = (features, other) if kind == "preference" else (other, features)
        return Label(kind="preference", value=1, features=better, other=worse, group="" if kind == "preference" else "correction", **common)
    if value is None or not 0 <= value <= 1:
        raise InvalidRequest(f"feedback {feedback_id} has the value {value}; a {kind} lies between 0 and 1", param="value")
    if kind == "float":
        return Label(kind="stars", value=min(int(value * CATEGORIES["stars"]), CATEGORIES["stars"] - 1), features=features, **common)
    group = {"boolean": "", "outcome": f"outcome:{name}", "implicit": f"implicit:{name}"}[kind]
    return Label(kind="thumb", value=int(value >= 0.5), features=features, group=group, **common)
