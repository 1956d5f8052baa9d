"""/v1/runs: what a training run reports of its steps. Of every finished request by itself; of the steps of the loop that drives it, what
that loop tells (everlearn/rl/server_sink.py does)."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Path, Query, Request, Response
from sqlalchemy import Connection

from everlearn.api import bodies
from everlearn.api.auth import scope, tenant
from everlearn.api.paging import After, Limit, page, refuse_unknown
from everlearn.api.services import services
from everlearn.errors import InvalidRequest
from everlearn.store import steps

router = APIRouter(prefix="/v1/runs", tags=["runs"], dependencies=[scope("read", "train")])
CHANGES = [scope("train")]
MAX_TOLD = 1000  # steps, or groups, of one request
SOURCES = (steps.CLIENT, steps.LOG)
RunId = Annotated[str, Path(pattern=r"^[A-Za-z0-9:._-]{1,200}$")]
Number = Annotated[int, Path(ge=0, le=steps.MAX_STEP)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


class StepForm(msgspec.Struct, forbid_unknown_fields=True):
    step: int
    metrics: dict[str, float]


class StepsForm(msgspec.Struct, forbid_unknown_fields=True):
    steps: list[StepForm] = []
    settings: dict[str, Any] | None = None


class GroupForm(msgspec.Struct, forbid_unknown_fields=True):
    """`record`: a group as everlearn/rl/records.py writes it."""

    number: int
    record: dict[str, Any]


class RolloutsForm(msgspec.Struct, forbid_unknown_fields=True):
    step: int
    groups: list[GroupForm]


def step_json(step: steps.Step) -> dict[str, Any]:
    told = {"number": step.number, "kind": step.kind, "name": step.name, "metrics": step.metrics}
    return {"id": step.number, "object": "run.step", **told, "created_at": step.created_at}


@router.post("/{run_id}/steps", status_code=204, dependencies=CHANGES)
async def tell_steps(request: Request, run_id: RunId) -> Response:
    """Metrics of steps, and the settings of the loop. A step that is told again replaces what was told of it."""
    form, owner = await bodies.read(request, StepsForm), tenant(request)
    if len(form.steps) > MAX_TOLD:
        raise InvalidRequest(f"steps has {len(form.steps)} entries; send {MAX_TOLD} at a time", param="steps")

    def write(conn: Connection) -> None:
        steps.tell(conn, owner, run_id, [(told.step, told.metrics) for told in form.steps])
        if form.settings is not None:
            steps.describe(conn, owner, run_id, form.settings)

    await services(request).write(write)
    return Response(status_code=204)


@router.get("/{run_id}/steps")
async def list_steps(
    request: Request,
    run_id: RunId,
    limit: int = Limit,
    after: int | None = Query(None, ge=0, le=steps.MAX_STEP),
    source: str = steps.CLIENT,
) -> dict[str, Any]:
    """In their order. `source`: `client` for what the loop told, `log` for the run's own finished requests."""
    refuse_unknown(request, "limit", "after", "source")
    if source not in SOURCES:
        raise InvalidRequest(f"source is {source[:40]!r}; it must be one of {', '.join(SOURCES)}", param="source")
    owner = tenant(request)
    found = await services(request).read(lambda conn: steps.list_steps(conn, owner, run_id, source, limit + 1, after))
    return page(found, limit, step_json)


@router.post("/{run_id}/rollouts", status_code=204, dependencies=CHANGES)
async def tell_rollouts(request: Request, run_id: RunId) -> Response:
    """Groups that were played in one step. The newest of each run are kept (10,000 and 64 MiB, and as long as records are)."""
    form, owner = await bodies.read(request, RolloutsForm), tenant(request)
    if len(form.groups) > MAX_TOLD:
        raise InvalidRequest(f"groups has {len(form.groups)} entries; send {MAX_TOLD} at a time", param="groups")
    if not 0 <= form.step <= steps.MAX_STEP or any(not 0 <= group.number <= steps.MAX_STEP for group in form.groups):
        raise InvalidRequest(f"step and number must lie between 0 and {steps.MAX_STEP}", param="step")
    packed = await asyncio.to_thread(pack, form)
    await services(request).write(lambda conn: steps.add_groups(conn, owner, run_id, form.step, packed))
    return Response(status_code=204)


def pack(form: RolloutsForm) -> list[steps.Packed]:
    return [steps.pack(form.step, group.number, group.record, summary_of(group.record)) for group in form.groups]


@router.get("/{run_id}/rollouts")
async def list_rollouts(
    request: Request, run_id: RunId, step: int | None = Query(None, ge=0, le=steps.MAX_STEP), limit: int = Limit, after: str | None = After
) -> dict[str, Any]:
    """What was played, newest step first, behind the one whose id is `after`: summaries. /v1/runs/{id}/rollouts/{step}/{number} has one
    whole."""
    refuse_unknown(request, "step", "limit", "after")
    owner, behind = tenant(request), None if after is None else place_of(after)
    found = await services(request).read(lambda conn: steps.list_groups(conn, owner, run_id, step, limit + 1, behind))
    return page(found, limit, group_json)


def place_of(group_id: str) -> tuple[int, int]:
    """Step and number of a group."""
    found = re.fullmatch(r"([0-9]{1,16})/([0-9]{1,16})", group_id)
    if found is None or max(int(part) for part in found.groups()) > steps.MAX_STEP:
        raise InvalidRequest(f"after is {group_id[:40]!r}; it must be the id of a group, as 12/0 is", param="after")
    return int(found[1]), int(found[2])


@router.get("/{run_id}/rollouts/{step}/{number}")
async def get_rollouts(request: Request, run_id: RunId, step: Number, number: Number) -> dict[str, Any]:
    owner = tenant(request)
    found = await services(request).read(lambda conn: steps.get_group(conn, owner, run_id, step, number))
    return {**group_json(found), "record": found.body}


def group_json(group: steps.Group) -> dict[str, Any]:
    told = {"step": group.step, "number": group.number, "bytes": group.bytes, "created_at": group.created_at, **group.summary}
    return {"id": f"{group.step}/{group.number}", "object": "run.rollouts", **told}


class PartForm(msgspec.Struct):
    name: str
    value: float
    reason: str


class RewardForm(msgspec.Struct):
    total: float
    parts: list[PartForm]


class FailureForm(msgspec.Struct):
    kind: str
    message: str


class SeenForm(msgspec.Struct):
    """A part of a prompt: text or an image."""

    type: str
    tokens: list[TokenId] = []
    text: str | None = None


class ActionForm(msgspec.Struct):
    tokens: list[TokenId]
    logprobs: list[float | None]
    stop_reason: str


class TurnForm(msgspec.Struct):
    continues: bool
    prompt: list[SeenForm]
    action: ActionForm
    reward: RewardForm
    metrics: dict[str, Any]
    logs: dict[str, Any]


class MemberForm(msgspec.Struct):
    failure: FailureForm | None
    reward: RewardForm | None
    turns: list[TurnForm]


class RecordForm(msgspec.Struct):
    """What a page must find in a record; what else there is may be anything."""

    members: list[MemberForm]
    tags: list[str] = []


def summary_of(record: dict[str, Any]) -> dict[str, Any]:
    """What a list shows of a group. Raises InvalidRequest for what isn't a record of one."""
    try:
        found = msgspec.convert(record, RecordForm)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"record is no group as everlearn/rl/records.py writes it: {error}", param="record") from None
    rewards = [member.reward.total for member in found.members if member.reward is not None]
    mean = sum(rewards) / len(rewards) if rewards else None
    failed = sum(member.failure is not None for member in found.members)
    return {"tags": found.tags, "members": len(found.members), "failed": failed, "rewards": rewards, "mean": mean}
