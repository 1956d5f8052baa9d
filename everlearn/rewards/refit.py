"""A fit in a process of its own, so that whoever serves meanwhile doesn't wait: labels on its input, a version on its output, then it ends.

    python -m everlearn.rewards.refit < job > version

It is as small a neighbour as it can be: one thread, and the lowest claim on the processor. Both ends are MessagePack.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import msgspec
import numpy as np

from everlearn.rewards.labels import Kind, Label
from everlearn.rewards.stream import RewardModel, StreamSettings
from everlearn.rewards.stream_files import pack

ENVIRON = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class PackedLabel(msgspec.Struct, frozen=True, array_like=True):
    """A Label whose features are float64 bytes."""

    id: str
    kind: Kind
    value: int
    features: bytes
    other: bytes | None
    group: str
    weight: float
    policy: str
    held_out: bool


class Job(msgspec.Struct, frozen=True):
    tenant: str
    version: int
    settings: StreamSettings
    labels: list[PackedLabel]


class Fitted(msgspec.Struct, frozen=True):
    """As `stream_files.pack` made them."""

    manifest: bytes
    tensors: bytes


def job(tenant: str, version: int, settings: StreamSettings, labels: Sequence[Label]) -> bytes:
    """What the process reads."""
    packed = [
        PackedLabel(
            one.id, one.kind, one.value, _bytes(one.features), None if one.other is None else _bytes(one.other),
            one.group, one.weight, one.policy, one.held_out,
        )
        for one in labels
    ]  # fmt: skip
    return msgspec.msgpack.encode(Job(tenant, version, settings, packed))


def fit(packed: bytes) -> Fitted:
    """The version that a job asks for: the same, bit for bit, wherever it is fitted on one machine."""
    asked = msgspec.msgpack.decode(packed, type=Job)
    labels = [
        Label(
            id=one.id, kind=one.kind, value=one.value, features=np.frombuffer(one.features),
            other=None if one.other is None else np.frombuffer(one.other),
            group=one.group, weight=one.weight, policy=one.policy, held_out=one.held_out,
        )
        for one in asked.labels
    ]  # fmt: skip
    return Fitted(*pack(RewardModel.fit(asked.tenant, labels, asked.settings, version=asked.version)))


def _bytes(features: np.ndarray) -> bytes:
    return np.ascontiguousarray(features, dtype=np.float64).tobytes()


def main() -> None:
    os.nice(19)
    made = fit(sys.stdin.buffer.read())
    sys.stdout.buffer.write(msgspec.msgpack.encode(made))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
