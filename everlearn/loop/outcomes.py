"""What the gate is told of traffic: feedback and guardrails of both arms, one outcome for each episode, in order of arrival.

An episode belongs to the arm that answered it first. Read over the public API: records, and the feedback on them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from everlearn.errors import NotFound
from everlearn.loop.description import IN_SHADOW
from everlearn.loop.evidence import Outcome
from everlearn.loop.service import Api, Deployed, pages

SHADOW = "shadow"  # the route of answers that nobody saw
SHADOW_TOKENS = 512  # where they are cut (everlearn/api/shadow.py)
EMBEDDINGS = "embeddings"  # and of vectors, which nobody judges
REFUSES = re.compile(r"\b(?:I(?:'m| am) sorry|I can(?:'t|not)|I(?:'m| am) (?:unable|not able)|as an AI)\b", flags=re.IGNORECASE)
Episode = list[dict[str, Any]]  # its records, oldest first


class Traffic:
    """What both arms answered since a time, and what was said of it. `settle`: how long after its last answer an episode's feedback has to
    come to count in the rate; what comes later counts as feedback all the same."""

    def __init__(self, api: Api, now: Deployed, since: float, settle: float, until: float):
        self.api, self.now, self.settle, self.until = api, now, settle, until
        arms = {now.champion: False, now.candidate: True}
        records = [row for row in pages(api, "/v1/records", since, model=now.name) if row["model"] in arms]
        self.shadows: Episode = [row for row in records if row["route"] == SHADOW]
        self.episodes: dict[str, Episode] = {}
        for row in records:
            if row["route"] not in (SHADOW, EMBEDDINGS):
                self.episodes.setdefault(row.get("episode_id") or row["id"], []).append(row)
        self.arms = {episode: arms[rows[0]["model"]] for episode, rows in self.episodes.items()}
        self.said: dict[str, Episode] = {}
        for row in pages(api, "/v1/feedback", since, counts=True):
            episode = row["target"]["episode_id"]
            if episode in self.arms and value_of(row) is not None:
                self.said.setdefault(episode, []).append(row)

    def feedback(self) -> tuple[Outcome, ...]:
        """The mean of each episode's feedback, 0 bad to 1 good, in the order in which the first of it came."""
        means = [
            (rows[0]["created_at"], rows[0]["id"], episode, fmean(value_of(row) or 0.0 for row in rows))
            for episode, rows in self.said.items()
        ]
        return tuple(Outcome(self.arms[episode], mean) for _, _, episode, mean in sorted(means))

    def guardrails(self, names: Sequence[str]) -> dict[str, tuple[Outcome, ...]]:
        found: dict[str, tuple[Outcome, ...]] = {}
        for name in names:
            found[name] = self.feedback_rate() if name == "feedback_rate" else self._each(name)
        return found

    def feedback_rate(self) -> tuple[Outcome, ...]:
        """1 for an episode that got feedback in time, 0 for one that got none; those whose time isn't over are left out.

        Both enter when their time is over, also those with feedback: entering when it comes, they would be all that is known of an arm
        whose share has just grown. What has entered stays, with its value.
        """
        now = int(self.until)  # rows have whole seconds: in the present one more may come
        order = sorted((self._settled(episode), episode) for episode in self.episodes)
        return tuple(Outcome(self.arms[episode], float(self._said_by(episode, at))) for at, episode in order if at < now)

    def unseen(self, names: Sequence[str]) -> dict[str, tuple[Outcome, ...]]:
        """The same of the shadow's answers against the champion's, answer by answer; both as long as a shadow's can be."""
        shown = [(row["id"], row, False) for rows in self.episodes.values() for row in rows]
        both = sorted([*shown, *((row["id"], row, True) for row in self.shadows)], key=lambda item: item[0])
        return {
            name: tuple(Outcome(candidate, self._within_shadow(name, row)) for _, row, candidate in both)
            for name in names
            if name in IN_SHADOW
        }

    def _within_shadow(self, name: str, row: dict[str, Any]) -> float:
        value = MEASURES[name](self, row)
        return min(value, float(SHADOW_TOKENS)) if name == "length" else value

    def content(self, row: dict[str, Any]) -> str:
        """What was answered, as text; "" where that isn't kept."""
        try:
            found = self.api.get(f"/v1/records/{row['id']}")["content"]
        except NotFound:
            return ""
        return " ".join(str(message.get("content") or "") for message in found["answer"]) if found and found.get("answer") else ""

    def _each(self, name: str) -> tuple[Outcome, ...]:
        measure = MEASURES[name]
        return tuple(Outcome(self.arms[episode], fmean(measure(self, row) for row in rows)) for episode, rows in self.episodes.items())

    def _settled(self, episode: str) -> float:
        """When the episode's time for feedback is over: `settle` after its last answer, or the last before so long a pause."""
        first, *others = (float(row["created_at"]) for row in self.episodes[episode])
        over = first + self.settle
        for answered in others:
            if answered > over:
                break
            over = answered + self.settle
        return over

    def _said_by(self, episode: str, time: float) -> bool:
        return episode in self.said and float(self.said[episode][0]["created_at"]) <= time


def value_of(row: dict[str, Any]) -> float | None:
    """0 bad to 1 good; None where it says neither. Whoever corrects an answer wasn't pleased with it."""
    if row["kind"] == "demonstration":
        return 0.0
    if row["kind"] in ("boolean", "float") and row.get("value") is not None:
        return min(max(float(row["value"]), 0.0), 1.0)
    return None


# What guardrails are measured on, answer by answer; an episode has the mean of its answers.
MEASURES: dict[str, Callable[[Traffic, dict[str, Any]], float]] = {
    "length": lambda traffic, row: float(row["usage"]["completion_tokens"]),
    "cut_off": lambda traffic, row: float("length" in row["finish_reasons"]),
    "tool_calls": lambda traffic, row: float("tool_calls" in row["finish_reasons"]),
    "seconds": lambda traffic, row: float(row["seconds"]),
    "refusal": lambda traffic, row: float(REFUSES.search(traffic.content(row)) is not None),
}
