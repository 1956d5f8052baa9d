"""From what a client calls a model to the weights that answer: base id, alias, `name`, `name@version`, `tinker://...`, `base;tinker://...`.

The name that is asked for may move; a Target does not: version and folder are immutable, so whatever a request began with answers it
to the end.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib

import msgspec

from everlearn.api import routing
from everlearn.api.auth import Caller
from everlearn.api.services import Services
from everlearn.api.tinker.sampling import of_checkpoint
from everlearn.errors import Forbidden, InvalidRequest, NotFound
from everlearn.store import deployments, names
from everlearn.types import BaseModelInfo

MAX_NAME = 512
SHOWN = 10  # versions that an error lists, the newest


class Target(msgspec.Struct, frozen=True):
    """`name` is what answers, as shown: a base id, `support@8` or a tinker path. `version` "" is the base model itself."""

    name: str
    base: BaseModelInfo
    version: str = ""
    folder: str = ""
    adapter: str | None = None
    number: int | None = None
    shadow: Target | None = None  # a deployment's candidate that answers the same prompt, unseen

    @property
    def shown_version(self) -> str:
        """For x-everlearn-version: what to ask for to get these weights again."""
        return self.name

    @property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint: the same for the same bytes of weights."""
        return "fp_" + hashlib.sha256(f"{self.base.name}\n{self.version}".encode()).hexdigest()[:12]


async def resolve(svc: Services, caller: Caller, model: str, episode: routing.Episode | None = None) -> Target:
    """What answers. `episode` decides which arm of a deployment does (everlearn/api/routing.py); without one it is the champion. Raises
    NotFound(param="model") for what the caller's tenant has not got, InvalidRequest for what can't be a model's name."""
    if not model or len(model) > MAX_NAME:
        raise InvalidRequest(f"model must be 1 to {MAX_NAME} characters; GET /v1/models lists what there is", param="model")
    if "tinker://" in model:
        return await _of_path(svc, caller.tenant, model)
    if svc.catalog.knows(model):
        base = svc.catalog.resolve(model)
        return Target(base.name, base)
    name, at, number = model.partition("@")
    if at and not (number.isascii() and number.isdigit() and len(number) < 10):
        raise InvalidRequest(f"model {model[:100]!r}: a version is a whole number, as in {name[:80]}@3", param="model")
    try:
        found = await svc.read(lambda conn: routing.route(conn, caller.tenant, name, int(number) if at else None, episode))
    except (NotFound, InvalidRequest):
        hint = await _hint(svc, caller, name, model)
        raise NotFound(f"there is no model {model[:200]!r}; {hint}GET /v1/models lists what there is", param="model") from None
    return _target(svc, found)


def _target(svc: Services, found: routing.Routed) -> Target:
    shadow = None if found.shadow is None else _target(svc, found.shadow)
    base = svc.catalog.resolve(found.base_model)
    return Target(f"{found.name}@{found.number}", base, found.version, found.folder, found.name, found.number, shadow)


async def _hint(svc: Services, caller: Caller, name: str, model: str) -> str:
    """What `model` may have meant, of that which the caller may use: the versions of its name, else the names spelled like it; or ""."""
    with contextlib.suppress(NotFound):
        found = await svc.read(lambda conn: names.versions(conn, caller.tenant, name))
        numbers = [str(version.number) for version in found if may_use(svc, caller, str(version))][:SHOWN]
        return f"{name} has {'version' if len(numbers) == 1 else 'versions'} {', '.join(numbers)}; " if numbers else ""
    bases = [name for info in svc.catalog.list() for name in (info.name, *info.aliases)]
    lists = names.list_names, deployments.on_base
    named = await svc.read(lambda conn: {one.name for listed in lists for one in listed(conn, caller.tenant)})
    usable = [name for name in (*bases, *sorted(named)) if may_use(svc, caller, name)]
    near = difflib.get_close_matches(model[:MAX_NAME], usable)
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""


def may_use(svc: Services, caller: Caller, model: str) -> bool:
    try:
        svc.limiter.check_model(caller, model)
    except Forbidden:
        return False
    return True


async def _of_path(svc: Services, tenant: str, model: str) -> Target:
    """`tinker://run/sampler_weights/x`, alone or behind the base model's name and a semicolon, as Tinker's own endpoint takes it."""
    base_name, semicolon, path = model.rpartition(";")
    try:
        found = await of_checkpoint(svc, tenant, path, base_name if semicolon else None)
    except (NotFound, InvalidRequest) as error:
        raise type(error)(error.message, param="model") from None
    base = svc.catalog.resolve(found["base_model"])
    return Target(found["model_path"], base, found["version"], found["folder"])
