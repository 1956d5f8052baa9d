"""docs/reference/losses.md can't drift from the table."""

from __future__ import annotations

from pathlib import Path

import torch

from everlearn.losses.metrics import policy_metrics
from everlearn.losses.spec import SPECS, Choice
from everlearn.losses.table import LOSSES
from everlearn.losses.value import value_metrics

PAGE = (Path(__file__).parents[2] / "docs/reference/losses.md").read_text()


SHARED = set(SPECS["importance_sampling"].config)


def rows() -> dict[str, str]:
    return {line.split("|")[1].strip().strip("`"): line for line in PAGE.splitlines() if line.startswith("| `")}


def test_every_loss_input_and_default_stands_in_the_table() -> None:
    for name, spec in SPECS.items():
        assert name in rows(), name
        for key, entry in spec.config.items():
            if key not in SHARED or name == "stable_reinforce":
                assert f"`{key}` ({entry.default:g})" in rows()[name], (name, key)
            else:
                assert "shared" in rows()[name], (name, key)
        for entry in spec.inputs:
            assert f"`{entry}`" in PAGE, entry


def test_every_shared_key_stands_in_a_table_with_its_default_and_choices() -> None:
    shared = [[cell.strip() for cell in line.split("|")[1:-1]] for line in rows().values() if line.count("|") == 4]
    found = {
        name.strip(" `"): (default.strip(" `"), about)
        for names, defaults, about in shared
        for name, default in zip(names.split(","), defaults.split(","), strict=True)
        if name.strip(" `") in SHARED
    }
    assert set(found) == SHARED
    for name, key in SPECS["importance_sampling"].config.items():
        default, about = found[name]
        assert default == (key.default if isinstance(key, Choice) else f"{key.default:g}"), name
        assert all(f"`{option}`" in about for option in getattr(key, "options", ())), name


def test_every_metric_of_the_losses_is_explained() -> None:
    inputs = {name: torch.full((2,), -1.0) for name in SPECS["ppo"].inputs if not name.startswith("clip")}
    config = {"importance_weight": "tis_token", "kl_coeff": 1.0, "entropy_coeff": 1.0, "product_ratio_high": 2.0}
    inputs["value_targets"] = torch.tensor([0.0, 1.0])
    found = policy_metrics(LOSSES["ppo"], torch.full((2,), -1.0), inputs, config, [(0, 2)])
    for name in found | value_metrics(torch.zeros(2), inputs, {"value_coeff": 0.5}):
        assert f"`{name.removeprefix('old_')}`" in PAGE, name
