"""From what was said about a deployment's answers to what its reward model learns from: which feedback, of which tokens, with which weight.

It reads the store, and knows neither how features are computed nor where a model is kept (everlearn/api/rewarding.py does both).
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from sqlalchemy.engine import Connection

from everlearn.errors import NotFound
from everlearn.loop.labels import TEACHING, label_of
from everlearn.loop.weights import share, weigh
from everlearn.rewards.labels import Label
from everlearn.store import episodes, feedback, records
from everlearn.store.feedback import Change, Feedback
from everlearn.store.reward_models import StoredLabel, Stream


class Wanted(msgspec.Struct, frozen=True):
    """A label that is to be made: features of `ids` (prompt and answer), and for a comparison of `other`, or of `prompt` with the text
    `corrected` behind it."""

    said: Feedback
    arrived: int
    policy: str
    held_out: bool
    ids: list[int]
    other: list[int] | None = None
    prompt: list[int] = []
    corrected: str | None = None

    def stored(self, features: bytes, other: bytes | None) -> StoredLabel:
        said = self.said
        return StoredLabel(
            said.feedback_id, self.arrived, said.record_id or "", said.over_record_id, said.episode_id, said.kind, said.name, said.value,
            said.source, said.source_id, self.policy, self.held_out, features, other, said.created_at,
        )  # fmt: skip


class Answered(msgspec.Struct, frozen=True):
    """An answer: the record's id and choice, and the tokens of prompt and answer."""

    record_id: str
    choice: int
    ids: list[int]


def wanted(conn: Connection, stream: Stream, changes: Sequence[Change], implicit: bool) -> tuple[list[Wanted], list[str]]:
    """What these changes of the tenant's feedback bring to the stream, and the ids of feedback whose label they take away (or replace).

    Feedback about spans and whole episodes says nothing of one answer, and that about records whose content isn't kept has no tokens:
    neither is a label. What only expired stays one.
    """
    came: dict[str, Wanted] = {}
    went: dict[str, None] = {}
    for change in changes:
        came.pop(change.feedback_id, None)
        if change.act == "expired":
            continue
        if change.act == "deleted":
            went[change.feedback_id] = None
        try:
            said = feedback.get(conn, stream.tenant, change.feedback_id)
            went[change.feedback_id] = None  # what is neither there nor deleted has expired since
            found = _wanted(conn, stream, said, change.id, implicit)
        except NotFound:
            continue
        if found is not None:
            came[change.feedback_id] = found
    return list(came.values()), list(went)


def _wanted(conn: Connection, stream: Stream, said: Feedback, arrived: int, implicit: bool) -> Wanted | None:
    if not said.counts or said.record_id is None or said.kind not in TEACHING or (said.kind == "implicit" and not implicit):
        return None
    if said.span_start is not None and said.kind != "demonstration":
        return None
    if said.value is not None and not 0 <= said.value <= 1:
        return None
    row, body = records.get(conn, stream.tenant, said.record_id)
    if body is None or row.model.partition("@")[0] != stream.deployment or said.choice >= len(body.choices):
        return None
    split = episodes.get(conn, stream.tenant, row.episode_id).split if row.episode_id else "train"
    prompt = _ids(body.prompt.data)
    made = Wanted(said, arrived, row.model, split != "train", prompt + _ids(body.choices[said.choice].tokens.data))
    if said.kind == "demonstration":
        return None if said.answer is None else msgspec.structs.replace(made, prompt=prompt, corrected=said.answer)
    if said.kind == "preference":
        over = answer(conn, stream.tenant, said.over_record_id or "", said.over_choice or 0)
        return None if over is None else msgspec.structs.replace(made, other=over.ids)
    return made


def answer(conn: Connection, tenant: str, record_id: str, choice: int) -> Answered | None:
    """None where its content isn't kept."""
    _, body = records.get(conn, tenant, record_id)
    if body is None or choice >= len(body.choices):
        return None
    return Answered(record_id, choice, _ids(body.prompt.data) + _ids(body.choices[choice].tokens.data))


def labels_of(stored: Sequence[StoredLabel], cap: float, by_source: Mapping[str, float]) -> list[Label]:
    """Labels in their order, each with the weight that its source has among all of them."""
    found = [_label(one, weight) for one, weight in zip(stored, weigh(stored, cap, by_source), strict=True)]
    return [one for one in found if one is not None]


def later(stored: Sequence[StoredLabel], before: Counter[tuple[str, str]], cap: float, by_source: Mapping[str, float]) -> list[Label]:
    """Labels that come one by one behind others, of whose sources there were `before` so many: each weighs what it does when it comes.
    `before` counts them too afterwards."""
    found = []
    for one in stored:
        before[one.source, one.source_id] += 1
        label = _label(one, by_source[one.source] * share(before[one.source, one.source_id], cap))
        if label is not None:
            found.append(label)
    return found


def _label(one: StoredLabel, weight: float) -> Label | None:
    other = None if one.other is None else numbers(one.other)
    about = {"name": one.name, "weight": weight, "policy": one.policy, "held_out": one.held_out}
    return label_of(one.feedback_id, one.kind, one.value, numbers(one.features), other=other, **about)  # type: ignore[arg-type]


def numbers(features: bytes) -> np.ndarray:
    """float64 [D] of stored features."""
    return np.frombuffer(features, "<f4").astype(np.float64)


def _ids(data: bytes) -> list[int]:
    return array("i", data).tolist()
