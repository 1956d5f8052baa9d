"""From a `tinker://` path in a request to the checkpoint that it may use."""

from __future__ import annotations

from everlearn.api.services import Services
from everlearn.errors import Forbidden, NotFound, Unauthenticated
from everlearn.store import checkpoints, keys, runs

parse_source = checkpoints.parse_path


async def checkpoint_of(svc: Services, tenant: str, path: str, access_token: str | None = None) -> checkpoints.Checkpoint:
    """The tenant's own checkpoint, a published one, or (`access_token` is another tenant's key) one of theirs."""
    parsed = parse_source(path)
    if access_token:
        key = await svc.read(lambda conn: keys.find(conn, access_token))
        if key is None:
            raise Unauthenticated("weights_access_token is no key of this server, or a revoked one", param="weights_access_token")
        if not {"train", "read", "admin"}.intersection(key.scopes):
            raise Forbidden(
                "weights_access_token is a key without the scope to read weights; ask for one with scope read", param="weights_access_token"
            )
        tenant = key.tenant
    return await svc.read(lambda conn: checkpoints.get(conn, tenant, parsed, public=True))


async def run_of(svc: Services, checkpoint: checkpoints.Checkpoint) -> runs.Run:
    """The training run that saved it: it knows base model and adapter shape."""
    try:
        return await svc.read(lambda conn: runs.get_run(conn, checkpoint.tenant, checkpoint.run_id))
    except NotFound:
        raise NotFound(f"the training run of {checkpoint.path} is gone, and with it the checkpoint's base model", param="path") from None


async def base_model_of(svc: Services, checkpoint: checkpoints.Checkpoint) -> str:
    return (await run_of(svc, checkpoint)).base_model
