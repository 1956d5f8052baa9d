"""Curves of several seeds, drawn: a line within a band, in the panel, and nothing outside of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import curves


def paths(svg: str) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
    found = []
    for element in ElementTree.fromstring(svg):
        points = re.findall(r"(-?[\d.]+),(-?[\d.]+)", element.attrib.get("d", ""))
        if len(points) > 1:
            found.append((element.attrib, [(float(x), float(y)) for x, y in points]))
    return found


def test_a_line_is_the_mean_of_its_seeds_and_the_band_holds_them():
    svg = curves.svg({"left & right": {"a": [[(0, 0.0), (10, 1.0)], [(0, 0.5), (10, 0.5)]]}}, "steps", "share")
    (_, band), (_, line) = paths(svg)
    bottom, height = curves.TOP + curves.HEIGHT, curves.HEIGHT
    assert line == [(curves.LEFT, bottom - 0.25 * height), (curves.LEFT + curves.WIDTH, bottom - 0.75 * height)]
    assert [y for _, y in band] == [bottom - 0.5 * height, bottom - height, bottom - 0.5 * height, bottom]
    assert "left &amp; right" in svg and ElementTree.fromstring(svg).attrib["viewBox"]


def test_arms_keep_their_colour_and_values_outside_are_cut():
    panels = {"one": {"a": [[(0, 2.0), (1, -1.0)]], "b": [[(0, 0.0), (1, 0.0)]]}, "two": {"b": [[(0, 0.0), (1, 1.0)]]}}
    lines = [(attributes, points) for attributes, points in paths(curves.svg(panels, "x", "y")) if attributes["fill"] == "none"]
    assert [attributes["stroke"] for attributes, _ in lines] == [curves.COLOURS[0], curves.COLOURS[1], curves.COLOURS[1]]
    assert [y for _, y in lines[0][1]] == [curves.TOP, curves.TOP + curves.HEIGHT]


def test_smoothing_looks_back_only():
    assert curves.smoothed([(0, 1.0), (1, 3.0), (2, 5.0)], 2) == [(0, 1.0), (1, 2.0), (2, 4.0)]


def test_the_difference_of_two_sides_has_its_error(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))  # scripts import their neighbours by name
    from benchmarks import rl_cookbook

    def run(*rewards: float) -> dict[str, Any]:
        return {"rows": [{"reward": reward} for reward in rewards]}

    found = rl_cookbook.compared({"cookbook": [run(0, 0, 3), run(0, 0, 6)], "everlearn": [run(0, 0, 9), run(3, 3, 6)]}, "reward")
    assert found["whole"]["cookbook"]["seeds"] == [1, 2] and found["whole"]["difference"] == 3.5 - 1.5
    assert found["last_third"]["everlearn"]["seeds"] == [9, 6] and found["last_third"]["difference"] == 3
    assert found["whole"]["standard_error"] == pytest.approx((0.5 / 2 + 0.5 / 2) ** 0.5)
