"""From what was said about answers to the items of a dataset: which answers, with which label and which weight.

`gather` reads; `everlearn.store.datasets.create` freezes what it returns. Three forms: `sft` (corrections, and on wish answers that were
called good), `preference` (two answers to one prompt, a correction counting as better than what it corrects), `kto` (answers with a label
that the sources agree on), `prompts` (where users were when they said something). Weights: everlearn/loop/weights.py.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy.engine import Connection

from everlearn.errors import InvalidRequest, NotFound, TooLarge
from everlearn.loop.weights import EQUAL, weigh
from everlearn.store import datasets, episodes, feedback, records
from everlearn.store.datasets import Draft
from everlearn.store.feedback import Feedback
from everlearn.store.placing import plain

LABELS = ("boolean", "float", "outcome")  # kinds with a value that says how good an answer is
WORDS = (*LABELS, "demonstration", "preference")
MAX_LABELS = 200_000
MAX_BYTES = 256 * 2**20  # of all items, packed
EVEN = 1e-9


class Filters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which feedback. `model`, `user`, `key_id` are those of the answer; a `model` without a number takes all its versions in. `since`,
    `until`: when it was said; `after_feedback`: behind this one. `threshold`: a figure is good from here on. `good`: answers that were
    called good are taught too (sft). `implicit`: weak labels count as well (kto)."""

    model: str | None = None
    user: str | None = None
    key_id: str | None = None
    since: float | None = None
    until: float | None = None
    after_feedback: str | None = None
    sources: list[str] | None = None
    names: list[str] | None = None
    threshold: float = 0.5
    good: bool = False
    implicit: bool = False


class Gathered(msgspec.Struct, frozen=True):
    """`left_out`: how many items there would be besides, by reason."""

    drafts: list[Draft]
    left_out: dict[str, int]


class Answer(msgspec.Struct, frozen=True):
    """One choice of a record, as far as learning needs it. `memory`: in which memory it was given, and as which turn."""

    record_id: str
    choice: int
    episode_id: str
    split: str
    model: str
    prompt: list[dict[str, Any]]
    message: dict[str, Any]
    tools: Any
    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    memory: tuple[str, int] | None = None


class Unfit(Exception):
    """Why an answer can't be learned from."""


Place = tuple[str, int]  # a record's id and a choice
Weighed = tuple[Feedback, float]


def gather(
    conn: Connection, tenant: str, form: str, filters: Filters, cap: float = 100.0, by_source: Mapping[str, float] = EQUAL
) -> Gathered:
    """The items of such a dataset, as the store has it now. Raises InvalidRequest, and TooLarge for more than fits into one."""
    maker = MAKERS.get(form)
    if maker is None:
        raise InvalidRequest(f"form {form[:60]!r} is one of {', '.join(MAKERS)}", param="form")
    found = _labels(conn, tenant, form, filters)
    reader = Reader(conn, tenant, filters)
    drafts, size = [], 0
    for one in maker(list(zip(found, weigh(found, cap, by_source), strict=True)), reader, filters):
        drafts.append(one)
        size += len(one.body)
        if size > MAX_BYTES:
            raise TooLarge(f"these items have more than {MAX_BYTES:,} bytes; choose narrower filters", param="filters")
    return Gathered(drafts, dict(reader.left_out))


class Reader:
    """Reads answers, and counts those that can't be learned from."""

    def __init__(self, conn: Connection, tenant: str, filters: Filters):
        self.conn, self.tenant, self.filters = conn, tenant, filters
        self.left_out: Counter[str] = Counter()
        self._splits: dict[str, str] = {}

    def answer(self, place: Place) -> Answer | None:
        """None, and counted, where it can't be learned from; None, and not counted, where the filters leave it out."""
        try:
            return self._answer(*place)
        except Unfit as unfit:
            if unfit.args:
                self.left_out[unfit.args[0]] += 1
            return None

    def _answer(self, record_id: str, choice: int) -> Answer:
        try:
            row, body = records.get(self.conn, self.tenant, record_id)
        except NotFound:
            raise Unfit("of records that are gone") from None
        chosen = self.filters
        if chosen.model is not None and row.model != chosen.model and not row.model.startswith(f"{chosen.model}@"):
            raise Unfit
        if chosen.user not in (None, row.user) or chosen.key_id not in (None, row.key_id):
            raise Unfit
        if body is None:
            raise Unfit("of records without content")
        texts = json.loads(body.texts)
        prompt, said = texts.get("messages"), texts.get("answer") or []
        if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt) or choice >= len(said):
            raise Unfit("of completions, which are no conversations")
        sampled = body.choices[choice]
        return Answer(
            record_id,
            choice,
            row.episode_id or "",
            self._split(row.episode_id or ""),
            row.model,
            prompt,
            said[choice],
            (texts.get("params") or {}).get("tools"),
            array("i", body.prompt.data).tolist(),
            array("i", sampled.tokens.data).tolist(),
            array("f", sampled.logprobs.data).tolist(),
            episodes.memory_of(self.conn, self.tenant, row.episode_id or "", record_id),
        )

    def _split(self, episode_id: str) -> str:
        if episode_id not in self._splits:
            self._splits[episode_id] = episodes.get(self.conn, self.tenant, episode_id).split
        return self._splits[episode_id]


def _labels(conn: Connection, tenant: str, form: str, filters: Filters) -> list[Feedback]:
    of = {"sft": ("demonstration",), "preference": ("demonstration", "preference"), "kto": LABELS, "prompts": WORDS}
    kinds: tuple[str, ...] = of[form]
    if form == "sft" and filters.good:
        kinds += LABELS
    if form == "kto" and filters.implicit:
        kinds += ("implicit",)
    after, since, until = filters.after_feedback, filters.since, filters.until
    found = feedback.labels(conn, tenant, kinds=kinds, after=after, since=since, until=until, limit=MAX_LABELS + 1)
    if len(found) > MAX_LABELS:
        raise TooLarge(f"more than {MAX_LABELS:,} words are chosen; choose a shorter time (since, until)", param="filters")
    return [
        one
        for one in found
        if (filters.sources is None or one.source in filters.sources) and (filters.names is None or one.name in filters.names)
    ]


def _by_place(labels: Sequence[Weighed], reader: Reader) -> dict[Place, list[Weighed]]:
    """Labels by the answer that they are about, in the order of the answers."""
    found: dict[Place, list[Weighed]] = {}
    for label in labels:
        if label[0].record_id is None:
            reader.left_out["about whole episodes"] += 1
        elif label[0].span_start is not None and label[0].kind != "demonstration":
            reader.left_out["about a part of an answer"] += 1
        elif label[1] > EVEN:
            found.setdefault((label[0].record_id, label[0].choice), []).append(label)
    return dict(sorted(found.items()))


def verdict(labels: Sequence[Weighed], threshold: float) -> float:
    """What the labels of one answer say together: the sum of w (1 - 2 noise) (+1 for good, -1 for bad). Sources that contradict each other
    cancel out."""
    return sum(weight * (1.0 - 2.0 * (one.noise or 0.0)) * (1.0 if (one.value or 0.0) >= threshold else -1.0) for one, weight in labels)


def _sft(labels: Sequence[Weighed], reader: Reader, filters: Filters) -> Iterator[Draft]:
    for place, said in _by_place(labels, reader).items():
        answer = reader.answer(place)
        if answer is None:
            continue
        corrections = [(one, weight) for one, weight in said if one.kind == "demonstration" and one.answer is not None]
        for one, weight in corrections:
            taught = [*answer.prompt, {"role": "assistant", "content": one.answer}]
            yield _draft([answer], [(one, weight)], weight, {"messages": taught})
        judged = [(one, weight) for one, weight in said if one.kind != "demonstration"]
        worth = verdict(judged, filters.threshold)
        if not corrections and worth > EVEN:
            yield _draft([answer], judged, worth, {"messages": [*answer.prompt, answer.message], **_tokens("completion", answer)})


def _preference(labels: Sequence[Weighed], reader: Reader, filters: Filters) -> Iterator[Draft]:
    for place, said in _by_place(labels, reader).items():
        answer = reader.answer(place)
        if answer is None:
            continue
        for one, weight in said:
            if one.kind == "demonstration":
                if (one.answer or "").strip() == str(answer.message.get("content") or "").strip():
                    reader.left_out["corrections that change nothing"] += 1
                    continue
                sides = {"chosen": [{"role": "assistant", "content": one.answer}], "rejected": [answer.message]}
                tokens = {"chosen_token_ids": None, "chosen_logprobs": None, **_tokens("rejected", answer)}
                yield _draft([answer], [(one, weight)], weight, {"prompt": answer.prompt, **sides, **tokens})
                continue
            worse = reader.answer((one.over_record_id or "", one.over_choice or 0))
            if worse is None:
                continue
            if [plain(message) for message in answer.prompt] != [plain(message) for message in worse.prompt]:
                reader.left_out["preferences between answers to different prompts"] += 1
                continue
            if answer.split != worse.split:
                reader.left_out["preferences across the splits"] += 1
                continue
            sides = {"chosen": [answer.message], "rejected": [worse.message]}
            tokens = {**_tokens("chosen", answer), **_tokens("rejected", worse)}
            yield _draft([answer, worse], [(one, weight)], weight, {"prompt": answer.prompt, **sides, **tokens})


def _kto(labels: Sequence[Weighed], reader: Reader, filters: Filters) -> Iterator[Draft]:
    for place, said in _by_place(labels, reader).items():
        answer = reader.answer(place)
        if answer is None:
            continue
        worth = verdict(said, filters.threshold)
        if abs(worth) <= EVEN:
            reader.left_out["with labels that contradict each other"] += 1
            continue
        body = {"prompt": answer.prompt, "completion": [answer.message], "label": worth > 0, **_tokens("completion", answer)}
        yield _draft([answer], said, abs(worth), body)


def _prompts(labels: Sequence[Weighed], reader: Reader, filters: Filters) -> Iterator[Draft]:
    """Each prompt once, whatever was said of its answers; `corrected` is the newest correction of one of them, null where there is none."""
    of: dict[tuple[int, ...], list[Weighed]] = {}
    answers: dict[tuple[int, ...], list[Answer]] = {}
    for place, said in _by_place(labels, reader).items():
        if (answer := reader.answer(place)) is not None:
            prompt = (*answer.prompt_ids, 0 if answer.split == "train" else 1)  # the same prompt may be in an episode of either split
            of.setdefault(prompt, []).extend(said)
            answers.setdefault(prompt, []).append(answer)
    for prompt, said in of.items():
        corrections = sorted((one.feedback_id, one.answer) for one, _ in said if one.kind == "demonstration" and one.answer is not None)
        body = {"prompt": answers[prompt][0].prompt, "corrected": corrections[-1][1] if corrections else None}
        yield _draft(answers[prompt], said, 1.0, body)


MAKERS = {"sft": _sft, "preference": _preference, "kto": _kto, "prompts": _prompts}


def _tokens(side: str, answer: Answer) -> dict[str, Any]:
    return {f"{side}_token_ids": answer.ids, f"{side}_logprobs": answer.logprobs}


def _draft(answers: Sequence[Answer], labels: Sequence[Weighed], weight: float, body: dict[str, Any]) -> Draft:
    """The first answer is the one that the item is about."""
    first, feedback_ids = answers[0], sorted(one.feedback_id for one, _ in labels)
    about = {"record_id": first.record_id, "choice": first.choice, "episode_id": first.episode_id, "model": first.model}
    about |= {"feedback_ids": feedback_ids, "weight": round(weight, 9), "prompt_token_ids": first.prompt_ids}
    if first.tools:
        about["tools"] = first.tools
    if first.memory is not None:
        about["memory"] = {"memory": first.memory[0], "turn": first.memory[1]}
    sources = [("feedback", feedback_id) for feedback_id in feedback_ids]
    for answer in answers:
        sources += [("record", answer.record_id), ("episode", answer.episode_id)]
    return datasets.draft(first.split, first.episode_id, weight, {**body, **about}, sources)
