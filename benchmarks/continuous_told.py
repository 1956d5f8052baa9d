"""What is told of the runs of benchmarks/loop_continuous.py: figures of each arm, what each of them is, and a table of them."""

from __future__ import annotations

import math
import statistics
from typing import Any


def summed(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What is told of an arm: of all its seeds together, or mean and standard error over seeds. WHAT says what each figure is."""
    delays = [hour for one in found for hour in one["delay_hours"]["all"]]
    corrected = sum(one["corrected"] for one in found)
    figures = ("learning_seconds", "training_tokens", "worst_fall", "versions", "rejected")
    return {
        "seeds": len(found),
        "corrected": corrected,
        "learned": len(delays),
        "delay_hours_quartiles": statistics.quantiles(delays, n=4) if len(delays) > 1 else delays,
        "delay_hours_quartiles_of_all": [quantile(delays, corrected, share) for share in (0.25, 0.5, 0.75)],
        **{name: spread([one[name] for one in found]) for name in figures},
        "gold": spread([one["gold"]["mean"] for one in found]),
        "kept_least": spread([one["kept"]["least"] for one in found]),
    }


FOLLOWED = 48.0  # hours after a correction that the plot shows
WHAT = {
    "corrected": "changed facts that a user corrected; learned: those that some serving version answered right before the end",
    "delay_hours_quartiles": "hours from that correction to the first serving version that answers right, of those learned",
    "delay_hours_quartiles_of_all": "the same of all corrected, what still waits counting as longest; null: not within the study",
    "gold": "share of all questions that the serving version answers right by what is true now, mean over the time",
    "kept_least": "the same of facts that never changed, at its least",
    "worst_fall": "largest share of right answers that a new version lost at once",
    "versions": "promoted by the gate; rejected: stopped by it",
    "learning_seconds": "of a wall clock, training and gate; training_tokens: all that was trained on, repeats included",
}


def quantile(delays: list[float], corrected: int, share: float) -> float | None:
    """Of all that were corrected; None where the one in question is still waiting."""
    place = math.ceil(share * corrected) - 1
    return sorted(delays)[place] if 0 <= place < len(delays) else None


def within(found: dict[str, Any], hours: float) -> float:
    """The share of a run's corrected facts that were answered right so soon."""
    return sum(delay <= hours for delay in found["delay_hours"]["all"]) / max(found["corrected"], 1)


def table(shown: dict[str, dict[str, Any]]) -> str:
    """For people, in Markdown."""

    def hours(value: float | None) -> str:
        return "later" if value is None else f"{value:.1f}" if value >= 0.1 else f"{60 * value:.1f} min"

    def mean(of: dict[str, Any], name: str, form: str) -> str:
        return f"{of[name]['mean']:{form}}" + (f" ± {of[name]['error']:{form}}" if of["seeds"] > 1 else "")

    rows = [("seeds", [str(of["seeds"]) for of in shown.values()])]
    rows.append(("facts corrected, and learned by the end", [f"{of['corrected']}, {of['learned']}" for of in shown.values()]))
    told = "hours from correction to right answer, a quarter, half, three quarters of all"
    rows.append((told, [", ".join(map(hours, of["delay_hours_quartiles_of_all"])) for of in shown.values()]))
    for name, words, form in (
        ("gold", "right by what is true now, mean over time", ".3f"),
        ("kept_least", "right of what never changed, at its least", ".3f"),
        ("worst_fall", "largest share of right answers lost at once", ".3f"),
        ("versions", "versions promoted", ".1f"),
        ("rejected", "versions rejected", ".1f"),
        ("learning_seconds", "seconds of learning", ".0f"),
        ("training_tokens", "tokens trained on", ",.0f"),
    ):
        rows.append((words, [mean(of, name, form) for of in shown.values()]))
    head = f"| | {' | '.join(shown)} |\n|---|{'---|' * len(shown)}\n"
    return head + "\n".join(f"| {words} | {' | '.join(cells)} |" for words, cells in rows)


def spread(values: list[float]) -> dict[str, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "error": error}
