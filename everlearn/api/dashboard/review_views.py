"""What the page Review shows: the answers that want a person, in a stated order, with all that a person needs to say something of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection

from everlearn.api.dashboard.episode_views import words
from everlearn.api.feedback import feedback_json
from everlearn.store import feedback, records, review
from everlearn.store.review import ORDER, Waiting

# The order, as the page states it.
TOLD = {
    "wrong": "a person said that it is wrong, and nobody what would be right",
    "disagreed": "some say that it is good, others that it isn't",
    "unsure": "the reward model can't tell",
    "sign": "a program or the next turn says that it is wrong",
}
SAID = 50  # words about an answer that are shown


def queue(conn: Connection, tenant: str, model: str | None = None, after: str | None = None, limit: int = 20) -> dict[str, Any]:
    """A page of the queue, behind the answer `after`; one that waits for several reasons has the place of the first of them."""
    waiting = merged([*review.waiting(conn, tenant, model), *review.unsure(conn, tenant, model)])
    keys = [one.key for one in waiting]
    start = keys.index(after) + 1 if after in keys else 0
    page = waiting[start : start + limit]
    more = len(waiting) > start + limit
    counts = Counter(one.why for one in waiting)
    told = [{"why": why, "told": TOLD[why], "waiting": counts[why]} for why in ORDER]
    data = [card(conn, tenant, one) for one in page]
    return {
        "object": "list",
        "order": told,
        "waiting": len(waiting),
        "data": data,
        "has_more": more,
        "last_id": page[-1].key if more else None,
    }


def merged(waiting: Sequence[Waiting]) -> list[Waiting]:
    """Each answer once, in the order of the reasons."""
    rank = {why: number for number, why in enumerate(ORDER)}
    found: dict[str, Waiting] = {}
    for one in sorted(waiting, key=lambda one: rank[one.why]):
        found.setdefault(one.key, one)
    return list(found.values())


def card(conn: Connection, tenant: str, one: Waiting) -> dict[str, Any]:
    """One answer: who was asked what, what was answered (None where that isn't kept), and what was said of it."""
    row, body = records.get(conn, tenant, one.record_id)
    texts: Mapping[str, Any] = json.loads(body.texts) if body is not None else {}
    said = feedback.list_feedback(conn, tenant, SAID, record_id=one.record_id)
    return {
        "id": one.key,
        "record_id": one.record_id,
        "choice": one.choice,
        "why": one.why,
        "told": TOLD[one.why],
        "said_at": int(one.said_at),
        "episode_id": row.episode_id,
        "model": row.model,
        "user": row.user,
        "created_at": int(row.created_at),
        **conversation(texts, one.choice),
        "feedback": [feedback_json(word) for word in said if word.choice == one.choice][::-1],
    }


def conversation(texts: Mapping[str, Any], choice: int) -> dict[str, Any]:
    """`earlier`: the turns before the last one that was asked; `asked`; `answer`, None where it isn't kept; `calls`: the tools that were
    called, as they stand in the answer."""
    messages, answers = texts.get("messages"), texts.get("answer")
    turns = messages if isinstance(messages, list) else [messages] if messages is not None else []
    shown = [
        {"role": str(turn.get("role", "user")) if isinstance(turn, dict) else "user", "text": "\n".join(words(turn))} for turn in turns
    ]
    answer = answers[choice] if isinstance(answers, list) and choice < len(answers) else None
    calls = answer.get("tool_calls") if isinstance(answer, dict) else None
    return {
        "earlier": shown[:-1],
        "asked": shown[-1]["text"] if shown else None,
        "answer": None if answer is None else "\n".join(words(answer)),
        "calls": calls or [],
    }
