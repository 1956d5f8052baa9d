"""The routers of the Tinker API. Order matters where one path is a prefix of another: the specific ones come first."""

from __future__ import annotations

from fastapi import APIRouter

from everlearn.api.tinker import account, archives, copies, futures, rest, sampling, service, training, weights

ROUTERS: list[APIRouter] = [
    service.router,
    training.router,
    weights.router,
    copies.router,
    sampling.router,
    futures.router,
    archives.router,
    account.router,
    rest.router,
]
