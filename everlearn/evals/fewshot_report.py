"""What the few-shot study found: curves over shots with their intervals, as one SVG and as one HTML page that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from everlearn.evals.fewshot_study import Run
from everlearn.evals.fewshot_vision import PREFILL, PROMPT, Photo, interval, name_of

COLOURS = ("#2563eb", "#d97706", "#16a34a", "#9333ea", "#dc2626", "#0891b2")
STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem }
h2 { font-size: 1.1rem; margin-top: 2.2rem }
table { border-collapse: collapse }
td, th { text-align: right; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid #8884; font-variant-numeric: tabular-nums }
td:first-child, th:first-child { text-align: left }
.same { background: #2563eb33 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.2rem }
dt { opacity: .7 }
dd { margin: 0; overflow-wrap: anywhere }
footer { margin: 2.5rem 0; opacity: .7; font-size: .9em }
"""
FOOTNOTE = (
    f"Asked: “{PROMPT}”, with the answer begun: “{PREFILL}”. The model writes on freely, and an answer counts when the text behind the "
    "last colon is the class's name exactly; baselines choose among the classes. Intervals are Student's t over seeds: they tell how much "
    "depends on which photos were taught, not how much on which were asked. The dashed line is chance."
)


class Point(NamedTuple):
    """Accuracy over seeds; `low` and `high` are the ends of its 95 % interval (None with one seed)."""

    method: str
    shots: int
    accuracy: float
    low: float | None
    high: float | None
    seeds: int


def points(runs: Sequence[Run]) -> list[Point]:
    """One for each method and number of shots, in the order of the runs."""
    groups: dict[tuple[str, int], list[float]] = {}
    for run in runs:
        groups.setdefault((run.method, run.shots), []).append(run.accuracy)
    found = [Point(method, shots, *interval(values), len(values)) for (method, shots), values in groups.items()]
    methods = list(dict.fromkeys(point.method for point in found))
    return sorted(found, key=lambda point: (methods.index(point.method), point.shots))


def told(point: Point) -> str:
    """As tables show it: per cent, with the interval where there is one."""
    if point.low is None or point.high is None:
        return f"{100 * point.accuracy:.1f}"
    return f"{100 * point.accuracy:.1f} ({100 * point.low:.1f} to {100 * point.high:.1f})"


def curves(found: Sequence[Point], num_classes: int, width: int = 880, height: int = 420) -> str:
    """Accuracy over shots (each doubling is as wide) as a self-contained SVG; the dashed line is chance."""
    shown = [point for point in found if point.shots > 0]
    left, top, right, bottom = 52, 16, width - 16, height - 40
    ticks = sorted({point.shots for point in shown})
    span = math.log2(ticks[-1] / ticks[0]) or 1.0

    def x(shots: int) -> float:
        return left + 20 + (right - left - 40) * math.log2(shots / ticks[0]) / span

    def y(accuracy: float) -> float:
        return bottom - (bottom - top) * accuracy

    parts = [
        f'<line x1="{left}" x2="{right}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="currentColor" opacity=".15"/>'
        f'<text x="{left - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.0%}</text>'
        for v in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    ]
    parts += [f'<text x="{x(shots):.1f}" y="{bottom + 18}" text-anchor="middle">{shots}</text>' for shots in ticks]
    chance = y(1 / num_classes)
    parts.append(
        f'<line x1="{left}" x2="{right}" y1="{chance:.1f}" y2="{chance:.1f}" stroke="currentColor" stroke-dasharray="4 4" opacity=".5"/>'
    )
    parts.append(f'<text x="{(left + right) / 2:.0f}" y="{height - 4}" text-anchor="middle">photos of each class</text>')
    for number, method in enumerate(dict.fromkeys(point.method for point in shown)):
        colour, mine = COLOURS[number % len(COLOURS)], [point for point in shown if point.method == method]
        shift = 5 * (number - 1)  # side by side, or intervals would cover each other
        line = " ".join(f"{x(point.shots) + shift:.1f},{y(point.accuracy):.1f}" for point in mine)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for point in mine:
            at = x(point.shots) + shift
            if point.low is not None and point.high is not None:
                parts.append(
                    f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y(point.low):.1f}" y2="{y(point.high):.1f}" stroke="{colour}" opacity=".6"/>'
                )
            title = f"{html.escape(method)}, {point.shots}: {told(point)}"
            parts.append(f'<circle cx="{at:.1f}" cy="{y(point.accuracy):.1f}" r="3.5" fill="{colour}"><title>{title}</title></circle>')
        at = bottom - 14 - 18 * number
        parts.append(f'<rect x="{right - 300}" y="{at - 9}" width="12" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{right - 282}" y="{at - 3}">{html.escape(method)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="accuracy by photos of a class">'
        f"<style>text {{ font: 12px system-ui, sans-serif; fill: currentColor }}</style>{''.join(parts)}</svg>"
    )


def page(
    title: str, facts: Mapping[str, str], found: Sequence[Point], runs: Sequence[Run], tests: Sequence[Photo], labels: Sequence[str]
) -> str:
    """The whole report. `facts` are name and value of what is worth knowing of the study."""
    details = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    most = max(run.shots for run in runs)
    last = [run for run in runs if run.shots == most]
    matrices = "".join(
        f"<h2>{html.escape(method)}: what was said with {most} photos of each class</h2>"
        + _matrix([run for run in last if run.method == method], tests, labels)
        for method in dict.fromkeys(run.method for run in last)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n"
        f"{curves(found, len(labels))}\n<h2>Accuracy in per cent, with its 95 % interval over seeds</h2>\n{_table(found)}\n"
        f"<h2>The study</h2>\n<dl>{details}</dl>\n{matrices}\n"
        f"<footer>{FOOTNOTE}</footer></body></html>\n"
    )


def _table(found: Sequence[Point]) -> str:
    shots = sorted({point.shots for point in found})
    cells = {(point.method, point.shots): told(point) for point in found}
    head = "<tr><th></th>" + "".join(f"<th>{n} {'photo' if n == 1 else 'photos'}</th>" for n in shots) + "</tr>"
    rows = "".join(
        f"<tr><td>{html.escape(method)}</td>" + "".join(f"<td>{cells.get((method, n), '')}</td>" for n in shots) + "</tr>"
        for method in dict.fromkeys(point.method for point in found)
    )
    return f"<table>{head}{rows}</table>"


def _matrix(runs: Sequence[Run], tests: Sequence[Photo], labels: Sequence[str]) -> str:
    """Rows are what was shown, columns what was said, all seeds together."""
    names = [name_of(label) for label in labels]
    counts = {(shown, said): 0 for shown in names for said in [*names, ""]}
    for run in runs:
        for photo, answer in zip(tests, run.answers, strict=True):
            said = answer.rpartition(":")[2].strip().lower()
            counts[name_of(photo.label), said if said in names else ""] += 1
    head = "<tr><th>shown</th>" + "".join(f"<th>{html.escape(name)}</th>" for name in names) + "<th>something else</th></tr>"
    rows = "".join(
        f"<tr><td>{html.escape(shown)}</td>"
        + "".join(f"<td{' class=same' if said == shown else ''}>{counts[shown, said] or ''}</td>" for said in [*names, ""])
        + "</tr>"
        for shown in names
    )
    return f"<table>{head}{rows}</table>"
