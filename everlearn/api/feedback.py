"""/v1/feedback: what people, programs and models say of answers and of whole episodes; and tokens with which a browser may say it."""

from __future__ import annotations

import hashlib
import json
import re
import time
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request, Response

from everlearn.api import auth, bodies, grants, splice
from everlearn.api.auth import Caller, scope, tenant
from everlearn.api.openai import types
from everlearn.api.paging import After, Limit, Moment, page, refuse_unknown
from everlearn.api.services import Services, services
from everlearn.api.tinker.forms import CHECK_ADDRESS
from everlearn.errors import Expired, InvalidRequest, NotFound, Unsupported
from everlearn.loop.weights import factors, share
from everlearn.store import episodes, feedback, records
from everlearn.store.feedback import Change, Feedback, Share

router = APIRouter(prefix="/v1/feedback", tags=["feedback"], dependencies=[CHECK_ADDRESS])

# Who may sample says what its users thought of the answers; what others said is read with the scope that reads their conversations.
SAYS, READS = [scope("sample")], [scope("read")]
WITHOUT_KEY = [scope("sample", grants.SCOPE)]
FILTERS = ("record_id", "episode_id", "kind", "source", "source_id", "name", "counts", "since", "until")
RECORD_TIME = re.compile(r"rec_([0-9a-f]{11})[0-9a-z]+")


class Over(types.Form):
    record_id: str
    choice: int = 0


class FeedbackForm(types.Form):
    """`span`: [first, end) of the choice's token ids. `over`: the worse answer of a preference."""

    kind: str
    record_id: str | None = None
    episode_id: str | None = None
    choice: int = 0
    span: tuple[int, int] | None = None
    value: bool | float | None = None
    noise: float | None = None
    name: str = ""
    text: str | None = None
    over: Over | None = None
    source: str = "human"
    source_id: str = ""
    reason: str = ""
    idempotency_key: str | None = None
    dry_run: bool = False


class EditForm(types.Form):
    value: bool | float | None = None
    text: str | None = None
    reason: str | None = None


class TokenForm(types.Form):
    record_id: str | None = None
    episode_id: str | None = None
    expires_in: int = 86_400
    source_id: str = ""


def feedback_json(one: Feedback) -> dict[str, Any]:
    value: Any = one.value
    if one.value is not None and one.kind in ("boolean", "implicit", "preference"):
        value = one.value == 1.0
    span = None if one.span_start is None else [one.span_start, one.span_end]
    over = None if one.over_record_id is None else {"record_id": one.over_record_id, "choice": one.over_choice}
    return {
        "id": one.feedback_id,
        "object": "feedback",
        "created_at": int(one.created_at),
        "updated_at": int(one.updated_at),
        "kind": one.kind,
        "name": one.name,
        "target": {"episode_id": one.episode_id, "record_id": one.record_id, "choice": one.choice, "span": span},
        "over": over,
        "value": value,
        "noise": one.noise,
        "text": one.answer if one.text is None else one.text,
        "answer": one.answer,
        "reason": one.reason,
        "source": one.source,
        "source_id": one.source_id,
        "key_id": one.key_id,
        "counts": one.counts,
        "revision": one.revision,
    }


def change_json(change: Change) -> dict[str, Any]:
    return {"id": change.id, "act": change.act, "before": change.before, "created_at": int(change.created_at)}


def followed_json(change: Change) -> dict[str, Any]:
    """Without what the words were before: that is in the history of each."""
    told = {"object": "feedback.change", "feedback_id": change.feedback_id, "act": change.act}
    return {"id": change.id, **told, "created_at": int(change.created_at)}


@router.post("", dependencies=WITHOUT_KEY)
async def give_feedback(request: Request) -> Response:
    """Keeps a word about an answer, a span of it, or an episode. With `dry_run` it is only checked."""
    svc, caller = services(request), auth.caller(request)
    form = await bodies.read(request, FeedbackForm)
    if caller.grant is not None:
        grants.check_target(caller.grant, form.record_id, form.episode_id, form.kind)
        form = msgspec.structs.replace(
            form, record_id=caller.grant.record_id, episode_id=caller.grant.episode_id, source="human", source_id=caller.grant.source_id
        )
    given = await _given(svc, caller, form)
    try:
        if form.dry_run:
            made = await svc.read(lambda conn: feedback.replayed(conn, given) or feedback.prepare(conn, given))
        else:
            made = await svc.write(lambda conn: feedback.add(conn, given))
            svc.metrics.feedback.labels(made.kind, made.source).inc()
    except NotFound as error:
        raise gone(svc, error, given) from None
    told = feedback_json(made) | ({"dry_run": True} if form.dry_run else {})
    return Response(json.dumps(told), media_type="application/json")


async def _given(svc: Services, caller: Caller, form: FeedbackForm) -> Feedback:
    if (form.record_id is None) == (form.episode_id is None):
        raise InvalidRequest("feedback is about record_id or about episode_id; name one of them", param="record_id")
    if form.episode_id is not None and (form.span is not None or form.choice):
        raise InvalidRequest("span and choice are of a record; name it by record_id", param="span")
    for record_id in (form.record_id, form.over.record_id if form.over else None):
        if record_id is not None:
            await svc.records.settled(record_id)
    if not caller.content and (form.text or form.reason):
        field = "text" if form.text else "reason"
        raise Unsupported(f"{field}: what is said with this key isn't kept (its owner wants it so); leave it out", param=field)
    body = {name: value for name, value in msgspec.to_builtins(form).items() if name not in ("dry_run", "idempotency_key")}
    given = Feedback(
        tenant=caller.tenant,
        episode_id=form.episode_id or "",
        record_id=form.record_id,
        choice=form.choice,
        span_start=form.span[0] if form.span else None,
        span_end=form.span[1] if form.span else None,
        over_record_id=form.over.record_id if form.over else None,
        over_choice=form.over.choice if form.over else None,
        kind=form.kind,
        name=form.name,
        value=_number(form.kind, form.value),
        noise=form.noise,
        text=form.text,
        reason=form.reason,
        source=form.source,
        source_id=form.source_id,
        key_id=caller.key_id,
        idempotency_key=form.idempotency_key,
        fingerprint=hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() if form.idempotency_key else None,
    )
    try:
        return await corrected(svc, given)
    except NotFound as error:
        raise gone(svc, error, given) from None


def _number(kind: str, value: bool | float | None) -> float | None:
    if kind == "preference" and value is None:
        return 1.0
    if isinstance(value, bool) and kind == "float":
        raise InvalidRequest("value of kind float must be a number", param="value")
    if not isinstance(value, bool) and value is not None and kind in ("boolean", "implicit", "preference"):
        raise InvalidRequest(f"value of kind {kind} must be true or false", param="value")
    if kind == "preference" and value is False:
        raise InvalidRequest("a preference is for record_id over the other one; turn the two around", param="value")
    return None if value is None else float(value)


async def corrected(svc: Services, given: Feedback) -> Feedback:
    """A demonstration with the whole answer: its text, or the recorded answer with the text in the place of the span."""
    if given.kind != "demonstration" or given.text is None:
        return given
    if given.span_start is None or given.span_end is None or given.record_id is None:
        return msgspec.structs.replace(given, text=None, answer=given.text)
    record_id, span = given.record_id, (given.span_start, given.span_end)
    row, body = await svc.read(lambda conn: records.get(conn, given.tenant, record_id))
    return msgspec.structs.replace(given, answer=await splice.spliced(svc, row, body, given.choice, span, given.text))


def gone(svc: Services, error: NotFound, given: Feedback) -> NotFound:
    """An id of a record holds its time: one that would have been dropped by now is told apart from one that never was."""
    keeps = svc.settings.store.record_retention_seconds
    for record_id in (given.record_id, given.over_record_id):
        found = RECORD_TIME.fullmatch(record_id or "")
        if error.param == "record_id" and found and int(found[1], 16) / 1000 < time.time() - keeps:
            text = f"record {record_id} is older than {keeps:g} s and was dropped (store.record_retention_seconds); say it sooner"
            return Expired(text, param="record_id")
    return error


@router.get("", dependencies=READS)
async def list_feedback(
    request: Request,
    limit: int = Limit,
    after: str | None = After,
    record_id: str | None = None,
    episode_id: str | None = None,
    kind: str | None = None,
    source: str | None = None,
    source_id: str | None = None,
    name: str | None = None,
    counts: bool | None = None,
    since: Moment = None,
    until: Moment = None,
) -> dict[str, Any]:
    """The tenant's feedback, newest first."""
    refuse_unknown(request, "limit", "after", *FILTERS)
    owner = tenant(request)
    equal: dict[str, Any] = {"record_id": record_id, "episode_id": episode_id, "kind": kind, "source": source, "source_id": source_id}
    equal |= {"name": name, "counts": counts}
    found = await services(request).read(
        lambda conn: feedback.list_feedback(conn, owner, limit + 1, after, since=since, until=until, **equal)
    )
    return page(found, limit, feedback_json)


@router.get("/summary", dependencies=READS)
async def summary(request: Request, since: Moment = None, until: Moment = None) -> dict[str, Any]:
    """How much was said that counts, by source and by kind, and what it is worth under the cap of each source."""
    refuse_unknown(request, "since", "until")
    svc, owner = services(request), tenant(request)
    return summed(await svc.read(lambda conn: feedback.shares(conn, owner, since, until)), svc.settings.feedback.source_cap, svc)


def summed(found: list[Share], cap: float, svc: Services) -> dict[str, Any]:
    weights = factors(svc.settings.feedback)
    totals: dict[tuple[str, str], int] = {}
    for one in found:
        totals[one.source, one.source_id] = totals.get((one.source, one.source_id), 0) + one.labels
    worth = {place: weights[place[0]] * share(count, cap) for place, count in totals.items()}
    kinds: dict[str, dict[str, float]] = {}
    for one in found:
        kind = kinds.setdefault(one.kind, {"labels": 0, "effective": 0.0})
        kind["labels"] += one.labels
        kind["effective"] = round(kind["effective"] + one.labels * worth[one.source, one.source_id], 6)
    by_source = [
        {"source": source, "source_id": source_id, "labels": count, "effective": round(count * worth[source, source_id], 6)}
        for (source, source_id), count in sorted(totals.items(), key=lambda item: -item[1])
    ]
    effective = round(sum(count * worth[place] for place, count in totals.items()), 6)
    told = {"object": "feedback.summary", "labels": sum(totals.values()), "effective": effective, "source_cap": cap}
    return told | {"by_kind": kinds, "by_source": by_source[:1000]}


@router.get("/changes", dependencies=READS)
async def list_changes(request: Request, limit: int = Limit, after: Annotated[int, Query(ge=0, le=2**62)] = 0) -> dict[str, Any]:
    """What happened to the tenant's feedback since the change `after`, oldest first, and the number of the `newest` change of all: for
    whoever keeps something that was made of feedback."""
    refuse_unknown(request, "limit", "after")
    owner = tenant(request)
    found, newest = await services(request).read(
        lambda conn: (feedback.changes_after(conn, owner, after, limit + 1), feedback.newest_change(conn, owner))
    )
    return page(found, limit, followed_json) | {"newest": newest}


@router.post("/tokens", dependencies=SAYS)
async def make_token(request: Request) -> dict[str, Any]:
    """A token with which a browser may give feedback about one record or one episode, until it expires."""
    svc, caller = services(request), auth.caller(request)
    form = await bodies.read(request, TokenForm)
    if (form.record_id is None) == (form.episode_id is None):
        raise InvalidRequest("a token is for one record_id or one episode_id; name one of them", param="record_id")
    if not 1 <= form.expires_in <= grants.MAX_SECONDS:
        raise InvalidRequest(f"expires_in {form.expires_in} must lie in 1..{grants.MAX_SECONDS} seconds", param="expires_in")
    if form.record_id is not None:
        record_id = form.record_id
        await svc.records.settled(record_id)
        about = Feedback(tenant=caller.tenant, record_id=record_id, kind="boolean")
        try:
            await svc.read(lambda conn: records.get(conn, caller.tenant, record_id))
        except NotFound as error:
            raise gone(svc, error, about) from None
    else:
        await svc.read(lambda conn: episodes.get(conn, caller.tenant, form.episode_id or ""))
    expires = int(time.time()) + form.expires_in
    grant = grants.Grant(caller.tenant, expires, form.record_id, form.episode_id, form.source_id[:200], caller.content)
    token = grants.sign(auth.signing_secret(svc.settings.home), grant)
    return {"object": "feedback.token", "token": token, "expires_at": expires, "path": f"{grants.PATH}?token={token}"}


@router.get("/{feedback_id}", dependencies=READS)
async def get_feedback(request: Request, feedback_id: str) -> dict[str, Any]:
    """One word, with what happened to it."""
    owner = tenant(request)
    found, changes = await services(request).read(
        lambda conn: (feedback.get(conn, owner, feedback_id), feedback.history(conn, owner, feedback_id))
    )
    return feedback_json(found) | {"history": [change_json(change) for change in changes]}


@router.patch("/{feedback_id}", dependencies=SAYS)
async def edit_feedback(request: Request, feedback_id: str) -> dict[str, Any]:
    """Other words in the place of these; what they were stays in the history."""
    svc, caller = services(request), auth.caller(request)
    form = await bodies.read(request, EditForm)
    if not caller.content and (form.text or form.reason):
        raise Unsupported("text: what is said with this key isn't kept (its owner wants it so); leave it out", param="text")
    found = await svc.read(lambda conn: feedback.get(conn, caller.tenant, feedback_id))
    fields: dict[str, Any] = {}
    if form.value is not None:
        fields["value"] = _number(found.kind, form.value)
    if form.reason is not None:
        fields["reason"] = form.reason
    if form.text is not None:
        made = await corrected(svc, msgspec.structs.replace(found, text=form.text))
        fields |= {"text": made.text, "answer": made.answer}
    return feedback_json(await svc.write(lambda conn: feedback.edit(conn, caller.tenant, feedback_id, **fields)))


@router.delete("/{feedback_id}", status_code=204, dependencies=SAYS)
async def delete_feedback(request: Request, feedback_id: str) -> Response:
    """Forgets a word with its history; datasets and versions that learned from it are marked."""
    owner = tenant(request)
    await services(request).write(lambda conn: feedback.delete(conn, owner, feedback_id))
    return Response(status_code=204)
