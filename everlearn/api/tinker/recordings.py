"""What was recorded of sampled sequences (`record_stability_info`), for losses that train on it.

The recording is the sampling request itself: its result holds tokens and log-probabilities, its log entry the prompt. It lasts as
long as results do (store.result_retention_seconds).
"""

from __future__ import annotations

import asyncio
import base64
import zlib
from typing import Any

import msgspec
import numpy as np
from sqlalchemy import Connection

from everlearn.api.services import Services
from everlearn.errors import NotFound
from everlearn.losses import provenance
from everlearn.store import log
from everlearn.types import Array, Datum, Result, SampleResult

_decode = msgspec.msgpack.Decoder(Result).decode


def sequence_ids(request_id: str, num_samples: int) -> list[str]:
    return [f"{request_id}:{i}" for i in range(num_samples)]


def pack_prompt(tokens: np.ndarray) -> str:
    return base64.b85encode(zlib.compress(tokens.astype("<i4").tobytes())).decode()


async def attach_recordings(svc: Services, tenant: str, data: list[Datum]) -> list[Datum]:
    """The datums with the sampler's recorded log-probabilities among their inputs."""
    wanted = provenance.sequence_ids(data)
    recorded = await svc.read(lambda conn: find(conn, tenant, wanted))
    return await asyncio.to_thread(lambda: [provenance.attach(i, datum, recorded) for i, datum in enumerate(data)])


def find(conn: Connection, tenant: str, wanted: set[str]) -> dict[str, provenance.RecordedSequence]:
    """The recordings of `wanted` that there are."""
    requests = {sequence_id.rpartition(":")[0] for sequence_id in wanted}
    found: dict[str, provenance.RecordedSequence] = {}
    for request_id in requests:
        for i, sequence in enumerate(_of_request(conn, tenant, request_id)):
            found[f"{request_id}:{i}"] = sequence
    return {sequence_id: found[sequence_id] for sequence_id in wanted if sequence_id in found}


def _of_request(conn: Connection, tenant: str, request_id: str) -> list[provenance.RecordedSequence]:
    try:
        entry, body, _ = log.get(conn, tenant, request_id)
    except NotFound:
        return []
    result: Any = _decode(body) if body is not None and entry.kind == "sample" and "prompt" in entry.meta else None
    if not isinstance(result, SampleResult):
        return []
    data = zlib.decompress(base64.b85decode(entry.meta["prompt"]))
    prompt = Array("int32", [len(data) // 4], data)
    version = str(entry.meta.get("version", ""))
    return [provenance.RecordedSequence(prompt, sequence.tokens, sequence.logprobs, version) for sequence in result.sequences]
