"""Learning curves as an SVG: panels in rows of ACROSS, in each a line for each arm, the mean of its seeds, within the band of all seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

Curve = Sequence[tuple[float, float]]  # (x, y) of one seed; all seeds of an arm have the same xs
COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#475569")
WIDTH, HEIGHT, LEFT, TOP, GAP = 340, 220, 52, 34, 26
ACROSS, ROW = 4, HEIGHT + TOP + GAP


def svg(panels: Mapping[str, Mapping[str, Sequence[Curve]]], x_name: str, y_name: str, y_max: float = 1.0, y_min: float = 0.0) -> str:
    """`panels` has for each title, for each arm, the curves of its seeds. Colours go to arms in the order in which they first appear."""
    arms = list(dict.fromkeys(arm for panel in panels.values() for arm in panel))
    colour = {arm: COLOURS[place % len(COLOURS)] for place, arm in enumerate(arms)}
    drawn = []
    for place, (title, panel) in enumerate(panels.items()):
        one = _panel(LEFT + place % ACROSS * (WIDTH + GAP + LEFT), title, panel, colour, (y_min, y_max))
        drawn.append(f'<g transform="translate(0,{place // ACROSS * ROW})">{one}</g>' if place >= ACROSS else one)
    bottom = TOP + HEIGHT + (len(panels) - 1) // ACROSS * ROW
    drawn.append(
        f'<text x="{LEFT}" y="{bottom + 34}">{escape(y_name)} over {escape(x_name)}; line: mean of the seeds, band: all seeds</text>'
    )
    for place, arm in enumerate(arms):
        x = LEFT + place * 190
        drawn.append(f'<path d="M{x},{bottom + 52} h22" stroke="{colour[arm]}" stroke-width="2.5"/>')
        drawn.append(f'<text x="{x + 28}" y="{bottom + 56}">{escape(arm)}</text>')
    width = max(LEFT + min(len(panels), ACROSS) * (WIDTH + GAP + LEFT), LEFT + 190 * len(arms))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 70}" font-family="system-ui, sans-serif" '
        f'font-size="12" fill="#666">' + "".join(drawn) + "</svg>\n"
    )


def _panel(left: float, title: str, arms: Mapping[str, Sequence[Curve]], colour: Mapping[str, str], bounds: tuple[float, float]) -> str:
    low, high = bounds
    last = max((x for curves in arms.values() for curve in curves for x, _ in curve), default=1.0) or 1.0

    def at(x: float, y: float) -> str:
        share = (min(max(y, low), high) - low) / (high - low)
        return f"{left + x / last * WIDTH:.1f},{TOP + HEIGHT - share * HEIGHT:.1f}"

    drawn = [f'<text x="{left}" y="{TOP - 14}" font-weight="600">{escape(title)}</text>']
    for tick in range(5):
        y = low + (high - low) * tick / 4
        drawn.append(f'<path d="M{at(0, y)} h{WIDTH}" stroke="#ddd"/>')
        drawn.append(f'<text x="{left - 8}" y="{TOP + HEIGHT - tick / 4 * HEIGHT + 4:.1f}" text-anchor="end">{y:g}</text>')
    drawn.append(f'<text x="{left}" y="{TOP + HEIGHT + 16}">0</text>')
    drawn.append(f'<text x="{left + WIDTH}" y="{TOP + HEIGHT + 16}" text-anchor="end">{last:g}</text>')
    for arm, curves in arms.items():
        columns = list(zip(*curves, strict=True))
        xs = [column[0][0] for column in columns]
        ys = [[y for _, y in column] for column in columns]
        up = [at(x, max(values)) for x, values in zip(xs, ys, strict=True)]
        down = [at(x, min(values)) for x, values in zip(xs, ys, strict=True)]
        mean = [at(x, sum(values) / len(values)) for x, values in zip(xs, ys, strict=True)]
        drawn.append(f'<path d="M{" ".join([*up, *reversed(down)])} Z" fill="{colour[arm]}" opacity="0.15"/>')
        drawn.append(f'<path d="M{" ".join(mean)}" fill="none" stroke="{colour[arm]}" stroke-width="2"/>')
    return "".join(drawn)


def smoothed(curve: Curve, width: int) -> list[tuple[float, float]]:
    """The mean of each point and of up to `width` - 1 points before it."""
    found = []
    for place, (x, _) in enumerate(curve):
        window = [y for _, y in curve[max(0, place - width + 1) : place + 1]]
        found.append((x, sum(window) / len(window)))
    return found
