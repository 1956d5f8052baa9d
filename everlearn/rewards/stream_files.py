"""A version of a reward model on the disk: numbers as safetensors, the rest as JSON with the numbers' digest. It never changes.

Nothing that is read can run: no pickle, and what doesn't belong together is refused.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from everlearn.errors import Conflict, Damaged, NotFound
from everlearn.rewards.posterior import Link, State
from everlearn.rewards.stream import Prediction, Report, RewardModel, StreamSettings
from everlearn.rewards.whitening import Whitening

TENSORS, MANIFEST = "reward_model.safetensors", "reward_model.json"


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`report` is what was published when it was saved; everything else is needed to go on."""

    tenant: str
    version: int
    settings: StreamSettings
    spread: float
    groups: dict[str, Link]
    policies: dict[str, int]
    weight: float
    since_fit: int
    report: Report
    sha256: str


def pack(model: RewardModel) -> tuple[bytes, bytes]:
    """The manifest and the tensors of a version, as bytes that belong together."""
    state, made = model.state, model.predictions
    tensors = {
        "mean": state.mean_R,
        "covariance": state.covariance_RR,
        "heads": state.heads_MR,
        "whitening.mean": state.whitening.mean_D,
        "whitening.projection": np.ascontiguousarray(state.whitening.projection_DR),
        "predictions": np.array([msgspec.to_builtins(one) for one in made], dtype=np.float64).reshape(len(made), 5),
    }
    content = save_tensors(tensors)
    manifest = Manifest(
        tenant=model.tenant,
        version=model.version,
        settings=model.settings,
        spread=state.spread,
        groups=state.groups,
        policies=dict(model.policies),
        weight=model.weight,
        since_fit=model.since_fit,
        report=model.report(),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    return msgspec.json.format(msgspec.json.encode(manifest)) + b"\n", content


def save(model: RewardModel, folder: Path) -> Report:
    """Writes the model into a new folder, complete or not at all; returns what it publishes. Raises Conflict where the folder exists."""
    if folder.exists():
        raise Conflict(f"{folder.name} exists; versions never change, save under another name", param="folder")
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    manifest, content = pack(model)
    _write(partial / TENSORS, content)
    _write(partial / MANIFEST, manifest)
    partial.rename(folder)
    return msgspec.json.decode(manifest, type=Manifest).report


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def load(folder: Path, tenant: str) -> RewardModel:
    """The model as it was saved. Raises NotFound where there is none or it is another tenant's, Damaged where the files don't agree."""
    try:
        manifest, content = (folder / MANIFEST).read_bytes(), (folder / TENSORS).read_bytes()
    except FileNotFoundError:
        raise NotFound(f"there is no reward model {folder.name}", param="folder") from None
    return unpack(manifest, content, tenant, folder.name)


def unpack(packed: bytes, content: bytes, tenant: str, name: str) -> RewardModel:
    """The model of a manifest and its tensors; `name` is what errors call it. Raises as `load` does."""
    try:
        manifest = msgspec.json.decode(packed, type=Manifest)
    except msgspec.MsgspecError as error:
        raise Damaged(f"{name}/{MANIFEST} isn't what was written there: {error}", param="folder") from None
    if manifest.tenant != tenant:
        raise NotFound(f"there is no reward model {name}", param="folder")
    if hashlib.sha256(content).hexdigest() != manifest.sha256:
        told = "isn't what was written there (another sha256); fit it again from its labels"
        raise Damaged(f"{name}/{TENSORS} {told}", param="folder")
    try:
        tensors = load_tensors(content)
        white = Whitening(tensors["whitening.mean"], tensors["whitening.projection"])
        state = State(tensors["mean"], tensors["covariance"], tensors["heads"], white, manifest.spread, manifest.groups)
    except (SafetensorError, KeyError) as error:
        raise Damaged(f"{name}/{TENSORS} can't be read: {error}", param="folder") from None
    model = RewardModel(tenant, manifest.settings, state, manifest.version)
    model.predictions = [
        Prediction(float(chance), bool(event), float(log), bool(shifted), bool(held_out))
        for chance, event, log, shifted, held_out in tensors["predictions"]
    ]
    model.policies, model.weight, model.since_fit = Counter(manifest.policies), manifest.weight, manifest.since_fit
    return model
