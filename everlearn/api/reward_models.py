"""/v1/reward-models: what each deployment's reward model has learned, how far it may be trusted, and what it says of an answer."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from sqlalchemy import Connection

from everlearn.api import auth, bodies, bounds
from everlearn.api.auth import scope, tenant
from everlearn.api.openai import types
from everlearn.api.openai.embeddings import inputs_of
from everlearn.api.paging import After, Limit, page, refuse_unknown
from everlearn.api.services import Services, services
from everlearn.api.target import Target
from everlearn.api.tinker.forms import CHECK_ADDRESS
from everlearn.api.turns import Draw, open_text
from everlearn.errors import Conflict, InvalidRequest
from everlearn.loop import rewarded
from everlearn.rewards.stream import RewardModel
from everlearn.rewards.stream_files import unpack
from everlearn.store import names, reward_models
from everlearn.store.reward_models import Doubt, RewardVersion

router = APIRouter(prefix="/v1", tags=["reward models"], dependencies=[CHECK_ADDRESS])
READS = [scope("train", "read")]
UNEARNED = "reward_not_earned"  # an error's code


class ScoreForm(types.Form):
    """`input`: a text, token ids, or a list of either: prompt and answer together, as `POST /v1/embeddings` takes them; or `records`: ids
    of records. `as_reward`: refused while the model hasn't earned it."""

    input: str | list[Any] | None = None
    records: list[str] | None = None
    as_reward: bool = False


def version_json(one: RewardVersion) -> dict[str, Any]:
    shown = ("deployment", "base_model", "number", "cause", "labels_hash", "labels", "effective_labels", "earned", "why", "has_weights")
    told = {"id": one.model_id, "object": "reward_model", **{name: getattr(one, name) for name in shown}}
    return told | {"seconds": one.seconds, "created_at": int(one.created_at), "report": one.report}


def doubt_json(one: Doubt) -> dict[str, Any]:
    shown = ("choice", "deployment", "chance", "chance_sd", "disagreement")
    told = {"id": one.record_id, "object": "doubt", "record_id": one.record_id, **{name: getattr(one, name) for name in shown}}
    return told | {"reward_model": one.model_id, "created_at": int(one.created_at)}


@router.get("/reward-models", dependencies=READS)
async def list_reward_models(
    request: Request, limit: int = Limit, after: str | None = After, deployment: str | None = None
) -> dict[str, Any]:
    """Versions, newest first, each with its calibration; of one `deployment` or of all."""
    refuse_unknown(request, "limit", "after", "deployment")
    owner = tenant(request)
    found = await services(request).read(lambda conn: reward_models.list_versions(conn, owner, limit + 1, after, deployment))
    return page(found, limit, version_json)


@router.get("/reward-models/{model_id}", dependencies=READS)
async def get_reward_model(request: Request, model_id: str) -> dict[str, Any]:
    """One version by its id; by a deployment's name its newest."""
    owner = tenant(request)
    return version_json(await services(request).read(lambda conn: find(conn, owner, model_id)))


@router.get("/doubts", dependencies=READS)
async def list_doubts(request: Request, limit: int = Limit, after: str | None = After, deployment: str | None = None) -> dict[str, Any]:
    """Answers that a reward model is too unsure of, newest first: what a person should look at."""
    refuse_unknown(request, "limit", "after", "deployment")
    owner = tenant(request)
    found = await services(request).read(lambda conn: reward_models.list_doubts(conn, owner, limit + 1, after, deployment))
    return page(found, limit, doubt_json)


@router.post("/reward-models/{model_id}/score", dependencies=[scope("train", "sample")])
async def score(request: Request, model_id: str) -> dict[str, Any]:
    """What a version says of answers. By a deployment's name it is the newest one with all labels that came since."""
    svc, caller = services(request), auth.caller(request)
    form = await bodies.read(request, ScoreForm)
    found = await svc.read(lambda conn: find(conn, caller.tenant, model_id))
    if (form.input is None) == (form.records is None):
        raise InvalidRequest("give one of input and records", param="input")
    version, model = await model_of(svc, found, living=model_id == found.deployment)
    earned, why = model.earned()
    if form.as_reward and not earned:
        raise Conflict(f"the reward model of {found.deployment} isn't a reward yet: {why}; collect more labels", code=UNEARNED)
    ids_N = await tokens_of(svc, caller, found, form)
    with svc.limiter.admit(caller, found.deployment, sum(map(len, ids_N))):  # of the key's limits, as any other prompt
        features_ND = await svc.rewarding.features(svc.catalog.resolve(found.base_model), caller.tenant, ids_N)
    async with svc.rewarding.lock:
        scores = await asyncio.to_thread(model.score, features_ND.astype("float64"))
    columns = {name.removesuffix("_N"): values.tolist() for name, values in msgspec.structs.asdict(scores).items()}
    data = [{"object": "score", "index": place, **{name: values[place] for name, values in columns.items()}} for place in range(len(ids_N))]
    return {"object": "list", "data": data, "reward_model": version, "earned": earned, "why": why}


def find(conn: Connection, owner: str, model_id: str) -> RewardVersion:
    """By id, or the newest of a deployment."""
    if model_id.startswith("rm_"):
        return reward_models.get(conn, owner, model_id)
    name, number = names.parse(model_id)
    if number is not None:
        told = f"{model_id} is a version of a policy, and reward models have ids; GET /v1/reward-models?deployment={name} lists them"
        raise InvalidRequest(f"{told}, and {name!r} is the newest one", param="model_id")
    newest = reward_models.latest(conn, owner, name)
    return newest if newest is not None else reward_models.get(conn, owner, model_id)


async def model_of(svc: Services, found: RewardVersion, living: bool) -> tuple[str, RewardModel]:
    """A version's id and the version; of the `living` one's deployment the newest, which may have come since `found` was read."""
    if living:
        live = await svc.rewarding.model(found.tenant, found.deployment)
        return live.model_id, live.model
    packed = await svc.read(lambda conn: reward_models.weights(conn, found.tenant, found.model_id))
    return found.model_id, await asyncio.to_thread(unpack, *packed, found.tenant, found.model_id)


async def tokens_of(svc: Services, caller: auth.Caller, found: RewardVersion, form: ScoreForm) -> list[list[int]]:
    """The tokens of what is to be scored."""
    if form.records is not None:
        if not 1 <= len(form.records) <= bounds.MAX_PROMPTS:
            raise InvalidRequest(f"records holds {len(form.records)} ids; 1 to {bounds.MAX_PROMPTS} are taken", param="records")
        asked = form.records
        for one in asked:  # an answer that came a moment ago is waited for
            await svc.records.settled(one)
        answers = await svc.read(lambda conn: [rewarded.answer(conn, caller.tenant, one, 0) for one in asked])
        if missing := [one for one, answer in zip(asked, answers, strict=True) if answer is None]:
            raise InvalidRequest(f"the content of record {missing[0][:100]!r} isn't kept; leave it out", param="records")
        return [answer.ids for answer in answers if answer is not None]
    base = svc.catalog.resolve(found.base_model)
    opened = [
        await open_text(svc, caller.tenant, Target(base.name, base), one, Draw(max_tokens=0), grammar=None, stream=False)
        for one in inputs_of(form.input or "")
    ]
    return [one.spec.prompt for one in opened]
