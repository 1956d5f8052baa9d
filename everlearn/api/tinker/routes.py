"""The routers of the Tinker API. Order matters twice: where one path is a prefix of another the specific one comes first, and paths
are compared one after another, so the routers that are called all the time stand before the others."""

from __future__ import annotations

from fastapi import APIRouter

from everlearn.api.tinker import account, archives, copies, futures, rest, sampling, service, training, weights

# Each router with the scopes of which a key needs one; routes that change what others only read ask for more themselves.
ROUTERS: list[tuple[APIRouter, tuple[str, ...]]] = [
    (sampling.router, ("sample",)),
    (futures.router, ("train", "sample")),
    (training.router, ("train",)),
    (service.router, ("train", "sample", "read")),
    (weights.router, ("train",)),
    (copies.router, ("train",)),
    (archives.router, ("read", "train")),
    (account.router, ("train", "sample", "read")),
    (rest.router, ("read", "train")),
]
