"""The report of the whole loop: one HTML file that needs nothing else, with what the gate saw, what was learned, and what was stopped."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from everlearn.demo.grade import SECTIONS
from everlearn.demo.report import STYLE, score_table, section
from everlearn.demo.story import Story
from everlearn.loop import gate
from everlearn.loop.evidence import Evidence
from everlearn.loop.rule import Rule

RESULTS = {"pass": "right", "fail": "wrong"}


def render(company: str, told: Story, facts: Mapping[str, str]) -> str:
    """`facts` are name and value of what is worth knowing of the run: model, seconds, where to look further."""
    details = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    sections = "".join(section(name, [row for row in told.rows if row.section == name]) for name in SECTIONS)
    name = html.escape(company)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>everlearn demo: {name} corrects its model</title><style>{STYLE}</style></head><body>\n"
        f"<h1>{name} corrects its model, and the model learns it</h1>\n"
        f"<p>{_summary(told)}</p>\n{score_table(told.scores)}\n"
        f"<h2>What happened</h2>\n{_history(told.events)}\n{''.join(_verdicts(told.events))}"
        f"<h2>The run</h2>\n<dl>{details}</dl>\n{sections}\n"
        "<footer>An answer is right when it contains the accepted text as whole words, whatever the case. "
        "Answers are the model's most likely ones (temperature 0), at most 24 tokens.</footer></body></html>\n"
    )


def _summary(told: Story) -> str:
    (_, trained), (_, held_out) = told.trained, told.held_out
    return (
        f"{told.corrections} answers were corrected; {trained} corrections were trained, {held_out} held out. "
        f"From the last correction to the version that answers everybody it took {told.learned:.0f} s. "
        f"A planted bad version was stopped, and a rollback took {told.rollback_seconds:.3f} s. "
        f"Reward model: {html.escape(reward_told(told.reward_model))}."
    )


def reward_told(found: Mapping[str, Any] | None) -> str:
    """One line about a reward model as the server shows it."""
    if found is None:
        return "none yet, for there were too few labels"
    may = "may be a reward" if found["earned"] else f"is no reward yet ({found['why']})"
    return f"version {found['number']} has learned {found['labels']} labels and {may}"


def _history(events: Sequence[dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(event['kind'])}</td><td>{html.escape(event['champion'])}</td>"
        f"<td>{html.escape(event['candidate'] or '')}</td><td>{event['share']:.0%}</td><td>{html.escape(event['reason'])}</td></tr>"
        for event in events
    )
    head = "<tr><th></th><th>champion</th><th>candidate</th><th>its share</th><th>why</th></tr>"
    return f"<table>{head}{rows}</table>"


def _verdicts(events: Sequence[dict[str, Any]]) -> list[str]:
    """The parts of each verdict that decided something, derived again from the log before they are shown."""
    shown = []
    for event in events:
        kept = event["evidence"]
        if "verdict" not in kept:
            continue
        verdict, rule = msgspec.convert(kept["verdict"], gate.Verdict), msgspec.convert(kept["rule"], Rule)
        evidence = msgspec.convert(kept["evidence"], Evidence)
        gate.replay(verdict, rule, evidence)
        rows = "".join(
            f'<tr><td class="{RESULTS.get(part.result, "")}">{html.escape(part.name)}</td><td>{html.escape(part.reason)}</td></tr>'
            for part in verdict.parts
        )
        title = f"{verdict.decision}: {evidence.candidate} against {evidence.champion}, {evidence.stage}"
        shown.append(f"<h2>{html.escape(title)}</h2>\n<table>{rows}</table>\n{interval(gate.course(rule, evidence))}\n")
    return shown


def interval(course: Sequence[tuple[int, float, float]], width: int = 880, height: int = 200) -> str:
    """How the canary's interval of candidate minus champion came closer, over outcomes; nothing where it never moved."""
    if not course:
        return ""
    left, top, right, bottom = 44, 12, width - 12, height - 26
    last = max(course[-1][0], 1)

    def at(outcomes: int, difference: float) -> str:
        return f"{left + (right - left) * outcomes / last:.1f},{top + (bottom - top) * (1 - difference) / 2:.1f}"

    ends = []
    for place in (1, 2):
        before, points = (-1.0 if place == 1 else 1.0), []
        for step in course:
            points += [at(step[0], before), at(step[0], step[place])]
            before = step[place]
        ends.append([at(0, -1.0 if place == 1 else 1.0), *points])
    lines = "".join(
        f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" opacity=".2"/>'
        f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:+g}</text>'
        for value in (-1, 0, 1)
        for y in (top + (bottom - top) * (1 - value) / 2,)
    )
    area = "M" + "L".join([*ends[0], *reversed(ends[1])]) + "Z"
    label = f"candidate minus champion after {last} outcomes: {course[-1][1]:+.2f} to {course[-1][2]:+.2f}"
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{lines}'
        f'<path d="{area}" fill="var(--ink)" opacity=".25" stroke="var(--ink)"/>'
        f'<text x="{left}" y="{height - 6}">no outcome</text>'
        f'<text x="{right}" y="{height - 6}" text-anchor="end">{last} outcomes</text></svg>'
    )
