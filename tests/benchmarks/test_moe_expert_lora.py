"""The plot of the benchmark of adapters on experts, drawn from the figures that are kept with it."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest


def test_the_kept_plot_shows_the_kept_curves(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))  # scripts import their neighbours by name
    from benchmarks import moe_expert_lora

    kept = sorted((root / "benchmarks" / "results").glob("*-moe-expert-lora.json"))[-1]
    runs = json.loads(kept.read_text())["results"]["runs"]
    svg = moe_expert_lora.plot(runs)
    assert svg == kept.with_suffix(".svg").read_text()
    drawn = ElementTree.fromstring(svg)
    _, _, width, height = map(float, drawn.attrib["viewBox"].split())
    lines = [element.attrib["points"] for element in drawn if element.tag.endswith("polyline")]
    assert len(lines) == 2 * len(runs)
    points = [tuple(map(float, point.split(","))) for line in lines for point in line.split()]
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
