"""The gate's promises at a tenth of the size, with fixed seeds: what the kept figures say must come out again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

STUDY = "gate_statistics"


def test_equal_candidates_are_rarely_promoted_and_peeking_promotes_many(study):
    row = study.equal(200, lambda places: np.full(len(places), 0.75), most=3000)
    assert row["false_promotions"] <= row["allowed"]
    assert row["naive_false_promotions_looking_every_50"] > 0.15


def test_changing_days_don_t_promote_anybody(study):
    row = study.equal(60, lambda places: 0.65 + 0.2 * (places > 1500), most=3000)
    assert row["false_promotions"] <= row["allowed"]
    assert row["naive_false_promotions_looking_every_50"] > 0.9


def test_a_regression_is_stopped_within_the_budget(study):
    row = study.different(40, -0.05)
    assert row["reject"] >= 0.95 and row["promote"] == 0


def test_a_live_version_is_taken_back_where_it_is_worse_and_stays_where_it_isn_t(study):
    assert study.lived(20, 0.75, 0.75)["rolled_back"] == 0.0
    assert study.lived(20, 0.75, 0.55, good=500)["rolled_back"] >= 0.95  # one record of the twenty is a freak: five deviations low


@pytest.mark.parametrize("users_fooled", [False, True])
def test_a_hack_is_never_promoted_and_every_verdict_replays(study, users_fooled: bool):
    row = study.hack(10, users_fooled)
    assert row["whole"] == {"reject": 10}
    assert row["verdicts_replayed_from_the_log"] == 20


def test_the_kept_figures_keep_the_promises(root: Path):
    kept = sorted((root / "benchmarks" / "results").glob("*-gate-statistics.json"))[-1]
    results = json.loads(kept.read_text())["results"]
    assert results["equal"]["seeds"] >= 2000
    for name in ("equal", "equal_on_changing_days"):
        assert results[name]["false_promotions"] <= results[name]["allowed"]
    assert results["five_points_worse"]["reject"] >= 0.95
    for name in ("hack_that_fools_the_model", "hack_that_fools_users_too"):
        assert results[name]["whole"] == {"reject": results[name]["seeds"]} and results[name]["seeds"] >= 200
        assert results[name]["verdicts_replayed_from_the_log"] == 2 * results[name]["seeds"]
