"""The study of the reward model: a round of it, and the plot drawn from the figures that are kept with it."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

STUDY = "reward_model"


def test_a_policy_moves_towards_what_the_model_likes(study):
    rows = study.optimise(0, 3)
    assert [row["model"] for row in rows] == ["frozen", "frozen_pessimistic", "streaming"]
    for row in rows:
        course = row["course"]
        assert len(course) == 4 and course[-1]["kl"] > course[0]["kl"] == 0 and course[-1]["proxy"] > course[0]["proxy"]


def test_runs_of_several_seeds_become_means(study):
    course = [{"kl": 0.0, "gold": 0.4, "proxy": 0.5, "alarm": False}]
    rounds = study.curves([course, [{**course[0], "gold": 0.6, "alarm": True}]])
    assert rounds[0]["gold"] == pytest.approx(0.5) and rounds[0]["alarm"] == 0.5 and rounds[0]["gold_error"] == pytest.approx(0.1)
    tables = [[{"kind": "thumb", "everlearn": {"auc": value}, "earned": value > 0.6}] for value in (0.6, 0.8)]
    assert study.averaged(tables) == [{"kind": "thumb", "everlearn": {"auc": pytest.approx(0.7)}, "earned": 0.5}]


def test_the_kept_plot_shows_the_kept_curves_and_the_kept_table_its_promises(study, root: Path):
    kept = sorted((root / "benchmarks" / "results").glob("*-reward-model.json"))
    if not kept:
        pytest.skip("no result is kept yet; benchmarks/reward_model.py --collect makes one")
    results = json.loads(kept[-1].read_text())["results"]
    svg = study.plot(results["optimise"])
    assert svg == kept[-1].with_suffix(".svg").read_text()
    assert len([element for element in ElementTree.fromstring(svg) if element.tag.endswith("polyline")]) == 6
    online = [row["online_against_batch"] for row in results["table"] if "online_against_batch" in row]
    assert len(online) == 9 and all(row["deleted_equals_never_seen"] == 1 for row in online)
    assert all(row["mean_difference_of_chances"] < 0.05 and abs(row["auc_online"] - row["auc_batch"]) < 0.02 for row in online)
    assert all(row["add_ms_median"] <= 5 for row in results["cost"])
    assert results["gap"]["streaming_minus_frozen_at_the_end"] > 0
