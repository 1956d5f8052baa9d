from __future__ import annotations

import numpy as np
import pytest

from everlearn.errors import InvalidRequest
from everlearn.loop.labels import label_of
from everlearn.rewards.stream import RewardModel, StreamSettings

ONE, OTHER = np.array([1.0, 0.0]), np.array([0.0, 1.0])


@pytest.mark.parametrize(
    ("kind", "value", "wanted"),
    [
        ("boolean", 1.0, ("thumb", 1, "thumb")),
        ("boolean", 0.0, ("thumb", 0, "thumb")),
        ("float", 0.0, ("stars", 0, "stars")),
        ("float", 0.5, ("stars", 2, "stars")),
        ("float", 1.0, ("stars", 4, "stars")),
        ("outcome", 0.8, ("thumb", 1, "thumb:outcome:tests")),
        ("implicit", 0.0, ("thumb", 0, "thumb:implicit:tests")),
    ],
)
def test_judgements_of_one_answer(kind: str, value: float, wanted: tuple[str, int, str]):
    label = label_of("fb_1", kind, value, ONE, name="tests")
    assert (label.kind, label.value, label.noise_group) == wanted and label.other is None


def test_comparisons_prefer_the_better_answer_and_the_corrected_one():
    preferred = label_of("fb_1", "preference", 1.0, ONE, other=OTHER)
    corrected = label_of("fb_2", "demonstration", None, ONE, other=OTHER)
    assert (preferred.features is ONE, preferred.other is OTHER, preferred.value) == (True, True, 1)
    assert (corrected.features is OTHER, corrected.other is ONE, corrected.value) == (True, True, 1)
    with pytest.raises(InvalidRequest, match="compares two answers"):
        label_of("fb_3", "preference", 1.0, ONE)


def test_what_teaches_nothing_is_no_label_and_what_cannot_be_is_refused():
    assert label_of("fb_1", "comment", None, ONE) is None and label_of("fb_1", "boolean", 1.0, ONE, weight=0.0) is None
    with pytest.raises(InvalidRequest, match=r"has the value 7"):
        label_of("fb_1", "float", 7.0, ONE)


def test_a_model_takes_them_all():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 2))
    kinds = ("boolean", "float", "preference", "demonstration", "outcome", "implicit")
    labels = [label_of(f"fb_{k}", kinds[k % 6], float(x[0] > 0), x, other=rng.normal(size=2), name="run") for k, x in enumerate(features)]
    model = RewardModel.fit("ana", labels, StreamSettings(size=2, heads=2))
    assert set(model.state.groups) == {"thumb", "stars", "preference", "preference:correction", "thumb:outcome:run", "thumb:implicit:run"}
