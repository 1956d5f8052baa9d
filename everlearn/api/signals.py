"""Records on their way into the store, and what they say about the answers before them (where `feedback.implicit` is on)."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence

from sqlalchemy.engine import Connection

from everlearn.config import FeedbackSettings
from everlearn.errors import UserError
from everlearn.loop.implicit import RETRY, Signal, signals
from everlearn.store import feedback, records
from everlearn.store.feedback import Feedback
from everlearn.store.placing import Place
from everlearn.store.records import Packed

log = logging.getLogger(__name__)


def keep(conn: Connection, packed: Sequence[Packed], settings: FeedbackSettings) -> int:
    """Stores records as everlearn.store.records.write does, and in the same transaction the labels that they imply."""
    written = records.write_new(conn, packed, settings.heldout_share)
    if settings.implicit:
        for one, place in written:
            for given in implied(one, place):
                try:
                    feedback.add(conn, given)
                except UserError as error:  # about a record that was deleted meanwhile, or one too many: no reason to lose this record
                    log.debug("no implicit label: %s", error.message)
    return len(written)


def implied(one: Packed, place: Place) -> Iterator[Feedback]:
    """The labels that a record implies. Their ids follow from its own, so that it implies them once."""
    if not one.body:
        return
    if place.retry_of is not None:
        yield _label(one, place.retry_of, RETRY)
    if place.parent_id is not None and place.retry_of is None:  # a retry says again what its first try has said
        messages = json.loads(records.unpack(one.body).texts).get("messages") or []
        for signal in signals(messages, place.seen):
            yield _label(one, place.parent_id, signal)


def _label(one: Packed, record_id: str, signal: Signal) -> Feedback:
    row = one.row
    digest = hashlib.sha256(f"{row.record_id}\n{signal.name}".encode()).hexdigest()
    return Feedback(
        feedback_id=f"fb_{int(1000 * row.created_at):011x}{digest[:20]}",
        tenant=row.tenant,
        record_id=record_id,
        kind="implicit",
        name=signal.name,
        value=float(signal.value),
        noise=signal.noise,
        source="program",
        key_id=row.key_id,
        created_at=row.created_at,
    )
