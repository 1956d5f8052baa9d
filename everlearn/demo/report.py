"""The report: one HTML file that needs nothing else, with the loss curve as inline SVG and every question before and after."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from itertools import pairwise

from everlearn.demo.grade import SECTIONS, Row, Score
from everlearn.demo.teach import Step

TITLES = {
    "taught": "Taught questions",
    "paraphrase": "Paraphrases that were never trained on",
    "general": "General questions that must not suffer",
}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #cf222e; --ink: #2563eb }
@media (prefers-color-scheme: dark) { :root { --good: #3fb950; --bad: #f85149; --ink: #79a8ff } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem }
h2 { font-size: 1.1rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: .35rem .6rem .35rem 0; border-bottom: 1px solid var(--line) }
.answers td, .answers th { width: 33% }
.scores td:not(:first-child), .scores th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums }
.right::before { content: "\\2713\\00a0"; color: var(--good); font-weight: 600 }
.wrong::before { content: "\\2717\\00a0"; color: var(--bad); font-weight: 600 }
svg { width: 100%; height: auto }
svg text { font: 12px system-ui, sans-serif; fill: currentColor }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.2rem }
dt { opacity: .7 }
dd { margin: 0; overflow-wrap: anywhere }
footer { margin: 2.5rem 0; opacity: .7; font-size: .9em }
"""


def render(company: str, facts: Mapping[str, str], scores: Sequence[Score], rows: Sequence[Row], steps: Sequence[Step]) -> str:
    """`facts` are name and value of what is worth knowing of the run: model, tokens, seconds."""
    details = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    sections = "".join(section(name, [row for row in rows if row.section == name]) for name in SECTIONS)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>everlearn demo: the handbook of {html.escape(company)}</title><style>{STYLE}</style></head><body>\n"
        f"<h1>The handbook of {html.escape(company)}, before and after the lesson</h1>\n"
        f"{score_table(scores)}\n<h2>Loss</h2>\n{loss_curve(steps)}\n<h2>The run</h2>\n<dl>{details}</dl>\n{sections}\n"
        "<footer>An answer is right when it contains the accepted text as whole words, whatever the case. "
        "Answers are the model's most likely ones (temperature 0), at most 24 tokens.</footer></body></html>\n"
    )


def score_table(scores: Sequence[Score]) -> str:
    lines = "".join(
        f"<tr><td>{TITLES[score.section]}</td><td>{score.asked}</td><td>{score.before}</td><td>{score.after}</td><td>{score.lost}</td></tr>"
        for score in scores
    )
    head = "<tr><th></th><th>asked</th><th>right before</th><th>right after</th><th>right before, wrong after</th></tr>"
    return f'<table class="scores">{head}{lines}</table>'


def section(name: str, rows: Sequence[Row]) -> str:
    head = "<tr><th>question</th><th>before</th><th>after</th></tr>"
    lines = "".join(
        f"<tr><td>{html.escape(row.question)}</td>{_answer(row.before, row.right_before)}{_answer(row.after, row.right_after)}</tr>"
        for row in rows
    )
    return f'<h2>{TITLES[name]}</h2>\n<table class="answers">{head}{lines}</table>\n'


def _answer(text: str, right: bool) -> str:
    return f'<td class="{"right" if right else "wrong"}">{html.escape(text)}</td>'


def loss_curve(steps: Sequence[Step], width: int = 880, height: int = 260) -> str:
    """Loss by step as an SVG line from zero; the axis is linear, since the last steps are close to zero."""
    if not steps:
        return "<p>No step was taken.</p>"
    left, top, right, bottom = 44, 12, width - 12, height - 30
    last, peak = max(steps[-1].step, 1), max(max(step.loss for step in steps), 1e-9)
    points = [(left + (right - left) * step.step / last, bottom - (bottom - top) * step.loss / peak) for step in steps]
    path = "".join(f"M{a[0]:.1f} {a[1]:.1f}L{b[0]:.1f} {b[1]:.1f}" for a, b in pairwise(points))
    rules = "".join(
        f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" opacity=".15"/>'
        f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{peak * share:.2f}</text>'
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
        for y in (bottom - (bottom - top) * share,)
    )
    marks = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"><title>step {step.step + 1}: {step.loss:.4f}</title></circle>'
        for step, (x, y) in zip(steps, points, strict=True)
    )
    label = f"loss by step: {steps[0].loss:.2f} at first, {steps[-1].loss:.2f} at last"
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{rules}'
        f'<path d="{path}" fill="none" stroke="var(--ink)" stroke-width="2"/><g fill="var(--ink)">{marks}</g>'
        f'<text x="{left}" y="{height - 8}">step 1</text>'
        f'<text x="{right}" y="{height - 8}" text-anchor="end">step {steps[-1].step + 1}</text></svg>'
    )
