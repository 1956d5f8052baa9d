"""docs/reference/losses.md can't drift from the table."""

from __future__ import annotations

from pathlib import Path

from everlearn.losses.spec import SPECS

PAGE = (Path(__file__).parents[2] / "docs/reference/losses.md").read_text()


def test_every_loss_input_and_default_stands_in_the_table() -> None:
    rows = {line.split("|")[1].strip().strip("`"): line for line in PAGE.splitlines() if line.startswith("| `")}
    for name, spec in SPECS.items():
        assert name in rows, name
        for key, entry in spec.config.items():
            assert f"`{key}` ({entry.default:g})" in rows[name], (name, key)
        for entry in spec.inputs:
            assert f"`{entry}`" in PAGE, entry
