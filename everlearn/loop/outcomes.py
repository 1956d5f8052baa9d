"""What the gate is told of traffic: feedback and guardrails of both arms, one outcome for each unit of chance, in order of arrival.

An episode belongs to the arm that answered it first, and ends for it where the other one answers: when the candidate's share grows, some go
over to it. What is said of the answers behind that, and what they are, counts for nobody: the first arm didn't give them, and to the other
one only those come that go on for long. Where chance assigned episodes each is an outcome; where it assigned a user, as it
does where the client names no episodes, that user's first episode with an arm is: what the same person says again says less than what
another says, and a test that took all of it for new would be surer than it may be. Of each source the words about its first
`feedback.source_cap` episodes count, and each outcome of people's words is told with who said it, so that the gate can see what hangs on
one of them (everlearn/loop/sources.py). Read over the public API: records, and the feedback on them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import msgspec

from everlearn.config import FeedbackSettings
from everlearn.errors import NotFound
from everlearn.loop.description import IN_SHADOW
from everlearn.loop.evidence import Evidence, Outcome
from everlearn.loop.rule import Rule
from everlearn.loop.service import Api, Deployed, pages
from everlearn.loop.sources import COUNTING, NOBODY
from everlearn.loop.weights import within

SHADOW = "shadow"  # the route of answers that nobody saw
SHADOW_TOKENS = 512  # where they are cut (everlearn/api/shadow.py)
EMBEDDINGS = "embeddings"  # and of vectors, which nobody judges
HUMAN = "human"
REVIEW = "review"  # the name of words that settle an answer in the review (everlearn/store/review.py)
FOUND = "ep_"  # how the id of an episode begins that no client named (everlearn/store/placing.py)
REFUSES = re.compile(r"\b(?:I(?:'m| am) sorry|I can(?:'t|not)|I(?:'m| am) (?:unable|not able)|as an AI)\b", flags=re.IGNORECASE)
Episode = list[dict[str, Any]]  # its records, oldest first
FEEDBACK = "feedback"
HOUR = 3600.0
SOURCE_CAP = FeedbackSettings().source_cap


class Told(NamedTuple):
    """An outcome and who said it: "" for whoever isn't named, None where nothing was said or where it isn't a person's word."""

    outcome: Outcome
    source: str | None


class Traffic:
    """What both arms answered since a time, and what was said of it. `settle`: how long after its last answer an episode's feedback has to
    come to count in the rate; what comes later counts as feedback all the same. `known`: measures of texts by record, kept between looks.
    `each`: every episode is an outcome, whoever was assigned (of a version that everybody gets nothing was assigned). `ended`: what came
    after `until` is left out, for a time that is over. `listed`: the records, where the caller has them, oldest first. `cap`: the number of
    episodes about which what a source says counts."""

    def __init__(
        self, api: Api, now: Deployed, since: float, settle: float, until: float,
        known: dict[str, dict[str, float]] | None = None, each: bool = False, ended: bool = False,
        listed: Sequence[dict[str, Any]] | None = None, cap: float = SOURCE_CAP,
    ):  # fmt: skip
        self.api, self.now, self.settle, self.until = api, now, settle, until
        self.known = {} if known is None else known
        arms = {now.champion: False, now.candidate: True}
        end = until if ended else math.inf
        bounds: dict[str, Any] = {"until": math.floor(end) + 1} if ended else {}  # rows show whole seconds
        found = pages(api, "/v1/records", since, model=now.name, **bounds) if listed is None else listed
        records = [row for row in found if row["model"] in arms and row["created_at"] <= end]
        self.shadows: Episode = [row for row in records if row["route"] == SHADOW]
        self.episodes: dict[str, Episode] = {}
        self.over: dict[str, dict[str, Any]] = {}  # the first answer of the other arm, where an episode has one
        for row in records:
            if row["route"] not in (SHADOW, EMBEDDINGS):
                rows = self.episodes.setdefault(episode := row.get("episode_id") or row["id"], [])
                if rows and row["model"] != rows[0]["model"]:
                    self.over.setdefault(episode, row)
                elif episode not in self.over:
                    rows.append(row)
        self.arms = {episode: arms[rows[0]["model"]] for episode, rows in self.episodes.items()}
        counted = {row["id"] for rows in self.episodes.values() for row in rows}
        words: Episode = []
        self.tools: dict[str, Episode] = {}
        for row in pages(api, "/v1/feedback", since, counts=True):
            episode = row["target"]["episode_id"]
            if row["created_at"] > end or not self._concerns(row, counted):
                continue
            if (value := self._value(row)) is not None:
                words.append({**row, "worth": value})
            if row["kind"] == "outcome" and row.get("value") is not None:
                self.tools.setdefault(episode, []).append(row)
        self.said: dict[str, Episode] = {}
        places = [(source_of(row), row["target"]["episode_id"]) for row in words]
        for row, (_, episode), counts in zip(words, places, within(places, cap), strict=True):
            if counts:
                self.said.setdefault(episode, []).append(row)
        self.spoke = Counter(source for episode, rows in self.said.items() for source in {source_of(row) for row in rows})
        self.units = {episode: episode if each else unit_of(episode, rows[0]) for episode, rows in self.episodes.items()}

    def _concerns(self, row: dict[str, Any], counted: set[str]) -> bool:
        """Whether a word is about the arm that its episode belongs to: about one of its answers (`counted`), or about the episode, before
        the other arm had answered there."""
        episode, record = row["target"]["episode_id"], row["target"]["record_id"]
        if record or episode not in self.episodes:
            return record in counted
        other = self.over.get(episode)
        return other is None or row["created_at"] <= other["created_at"] + other["seconds"]

    def _feedback(self) -> list[Told]:
        order = sorted((rows[0]["created_at"], rows[0]["id"], episode) for episode, rows in self.said.items())
        return self._firsts((episode, self._mean(episode), self._source(episode)) for _, _, episode in order)

    def _means(self, episode: str) -> dict[str, float]:
        """Of what each of an episode's sources said of it."""
        by_source: dict[str, list[float]] = {}
        for row in self.said[episode]:
            by_source.setdefault(source_of(row), []).append(row["worth"])
        return {source: fmean(worths) for source, worths in by_source.items()}

    def _mean(self, episode: str) -> float:
        """Over its sources, of the mean of what each said: whoever says more isn't heard more."""
        return fmean(self._means(episode).values())

    def _source(self, episode: str) -> str:
        """On whom the episode's mean hangs: the source without whom it would be furthest from what it is. Without one of n sources it moves
        by |its mean - the mean of all| / (n - 1), so that is whoever is furthest from the others. Two sources always move it by the same,
        and so do those who agree: of such it is the one who spoke of most episodes. An outcome has one source here, and where a source is
        left out what others said of such an episode goes with it; of an episode that hangs on another its own share stays."""
        means = self._means(episode)
        middle = fmean(means.values())
        return max(means, key=lambda source: (round(abs(means[source] - middle), 9), self.spoke[source], source))

    def _spoke_by(self, episode: str, time: float) -> str:
        """On whom it hangs that anything was said of an episode by a time: of those who did, the one who spoke of most episodes."""
        told = {source_of(row) for row in self.said[episode] if float(row["created_at"]) <= time}
        return max(told, key=lambda source: (self.spoke[source], source))

    def told(self, names: Sequence[str]) -> dict[str, list[Told]]:
        """Feedback and these guardrails, each outcome with who said it."""
        found = {FEEDBACK: self._feedback()}
        for name in names:
            found[name] = OF_FEEDBACK[name](self) if name in OF_FEEDBACK else self._each(name)
        return found

    def _tool_errors(self) -> list[Told]:
        """The share of its tools' outcomes that failed (below one half), of each episode that has any; in the order of the first."""
        ordered = sorted((rows[0]["created_at"], rows[0]["id"], episode) for episode, rows in self.tools.items())
        failed = {episode: fmean(float(row["value"] < 0.5) for row in rows) for episode, rows in self.tools.items()}
        return self._firsts((episode, failed[episode], None) for _, _, episode in ordered)

    def _firsts(self, found: Iterable[tuple[str, float, str | None]]) -> list[Told]:
        """Of each unit the first episode with each arm; what was told once stays."""
        seen: set[tuple[str, bool]] = set()
        kept = []
        for episode, value, source in found:
            unit = (self.units[episode], self.arms[episode])
            if unit not in seen:
                seen.add(unit)
                kept.append(Told(Outcome(self.arms[episode], value), source))
        return kept

    def _rate(self) -> list[Told]:
        """1 for an episode that got feedback in time, 0 for one that got none; those whose time isn't over are left out, and those that
        went over to the other arm within it: they had less time than others.

        Both enter when their time is over, also those with feedback: entering when it comes, they would be all that is known of an arm
        whose share has just grown. What has entered stays, with its value.
        """
        now = int(self.until)  # rows have whole seconds: in the present one more may come
        order = sorted((at, episode) for episode in self.episodes if (at := self._settled(episode)) is not None)
        over = [(episode, self._said_by(episode, at), at) for at, episode in order if at < now]
        return self._firsts((episode, float(said), self._spoke_by(episode, at) if said else None) for episode, said, at in over)

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
        value = self._of(name, row)
        return min(value, float(SHADOW_TOKENS)) if name == "length" else value

    def _value(self, row: dict[str, Any]) -> float | None:
        """`value_of`, but a demonstration that says what was answered, word for word, is approval: somebody sent it as it was."""
        told, target = value_of(row), row["target"]
        if told is None or row["kind"] != "demonstration" or not target["record_id"] or target["span"] is not None or not row["answer"]:
            return told
        kept = self.known.setdefault("as it was", {})
        if row["id"] not in kept:
            given = self.contents({"id": target["record_id"]})[target["choice"] :][:1]
            kept[row["id"]] = float([text.strip() for text in given] == [row["answer"].strip()])
        return kept[row["id"]]

    def contents(self, row: dict[str, Any]) -> list[str]:
        """What was answered, as text, choice by choice; none where that isn't kept."""
        try:
            found = self.api.get(f"/v1/records/{row['id']}")["content"]
        except NotFound:
            return []
        return [str(message.get("content") or "") for message in (found or {}).get("answer") or []]

    def _each(self, name: str) -> list[Told]:
        return self._firsts((episode, fmean(self._of(name, row) for row in rows), None) for episode, rows in self.episodes.items())

    def _of(self, name: str, row: dict[str, Any]) -> float:
        """One answer's measure; what needs its text is read once."""
        if name not in OF_TEXT:
            return MEASURES[name](self, row)
        kept = self.known.setdefault(name, {})
        if row["id"] not in kept:
            kept[row["id"]] = MEASURES[name](self, row)
        return kept[row["id"]]

    def _settled(self, episode: str) -> float | None:
        """When the episode's time for feedback is over: `settle` after its last answer, or the last before so long a pause. None where the
        other arm answered before."""
        first, *others = (float(row["created_at"]) for row in self.episodes[episode])
        over = first + self.settle
        for answered in others:
            if answered > over:
                break
            over = answered + self.settle
        other = self.over.get(episode)
        return None if other is not None and other["created_at"] <= over else over

    def _said_by(self, episode: str, time: float) -> bool:
        return episode in self.said and float(self.said[episode][0]["created_at"]) <= time


def unit_of(episode: str, row: dict[str, Any]) -> str:
    """What chance assigned to an arm (everlearn/api/routing.py): the episode that the client named, or the memory; else the user; else the
    episode, known by how it began."""
    return f"user:{row['user']}" if episode.startswith(FOUND) and row.get("user") else episode


def source_of(row: dict[str, Any]) -> str:
    """Who says it; "" where that is only the key's owner, who speaks for whomever he serves."""
    source = row.get("source_id") or ""
    return "" if source == row.get("key_id") else source


def of_canary(traffic: Traffic, asked: Rule) -> Evidence:
    """What the gate is shown of a canary so far: what was found offline, and the traffic since it began."""
    cycle = traffic.now.cycle
    return msgspec.structs.replace(
        msgspec.convert(cycle["offline"], Evidence),
        stage="canary",
        step=int(cycle.get("step", 0)),
        hours=max(0.0, traffic.until - float(cycle["canary_began"])) / HOUR,
        **evident(traffic.told(list(asked.guardrails))),
    )


def evident(told: Mapping[str, Sequence[Told]]) -> dict[str, Any]:
    """`feedback`, `guardrails`, `sources` and `counting` of an Evidence; sources as numbers, in the order in which they come. Whoever isn't
    named is one source where those who are give at least half of each version's feedback, else everybody and in nobody's place."""
    named = {one.source: None for found in told.values() for one in found if one.source}
    if named and not _everybody(told.get(FEEDBACK, ())):
        named = {one.source: None for found in told.values() for one in found if one.source is not None}
    numbers: dict[str | None, int] = {source: number for number, source in enumerate(named)}
    sources = {
        name: tuple(numbers.get(one.source, NOBODY) for one in found)
        for name, found in told.items()
        if any(one.source in numbers for one in found)
    }
    outcomes = {name: tuple(one.outcome for one in found) for name, found in told.items()}
    how = {"sources": sources, "counting": COUNTING} if sources else {"sources": msgspec.UNSET, "counting": msgspec.UNSET}
    return {"feedback": outcomes.pop(FEEDBACK, ()), "guardrails": outcomes, **how}


def _everybody(feedback: Sequence[Told]) -> bool:
    """Whether the unnamed give more than half of what was said of one of the versions. Of one, not of both together: left out as a source
    they would leave too little of that version for any harm to show, however long the other's record is."""
    named = Counter(one.outcome.candidate for one in feedback if one.source)
    nameless = Counter(one.outcome.candidate for one in feedback if one.source == "")
    return any(nameless[arm] > named[arm] for arm in (True, False))


def value_of(row: dict[str, Any]) -> float | None:
    """0 bad to 1 good; None where it says neither, and where it isn't the word of a person who met the answer: not of programs and models,
    nor of reviewers, who are shown answers because something seems to be wrong with them. Whoever corrects an answer wasn't pleased."""
    if row["source"] != HUMAN or row["name"] == REVIEW:
        return None
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
    "refusal": lambda traffic, row: float(REFUSES.search(" ".join(traffic.contents(row))) is not None),
}
OF_TEXT = ("refusal",)  # each of these asks the server for the record
OF_FEEDBACK: dict[str, Callable[[Traffic], list[Told]]] = {
    "feedback_rate": Traffic._rate,
    "tool_errors": Traffic._tool_errors,
}
