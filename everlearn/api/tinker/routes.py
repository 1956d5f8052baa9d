"""The routers of the Tinker API. Order matters where one path is a prefix of another: the specific ones come first."""

from __future__ import annotations

from fastapi import APIRouter

from everlearn.api.tinker import account, archives, copies, futures, rest, sampling, service, training, weights

# Each router with the scopes of which a key needs one; routes that change what others only read ask for more themselves.
ROUTERS: list[tuple[APIRouter, tuple[str, ...]]] = [
    (service.router, ("train", "sample", "read")),
    (training.router, ("train",)),
    (weights.router, ("train",)),
    (copies.router, ("train",)),
    (sampling.router, ("sample",)),
    (futures.router, ("train", "sample")),
    (archives.router, ("read", "train")),
    (account.router, ("train", "sample", "read")),
    (rest.router, ("read", "train")),
]
