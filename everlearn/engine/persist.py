"""Writing adapters to disk beside the device thread, and reading them back.

The device thread hands over copies (a version's bytes never change under the writer); one writer thread turns them into folders
that are whole or absent (store/folders.py), and reports each when it is durable. Layout of a folder: `adapter.safetensors`
(float32, `<path>.lora_A` [rank, in], `<path>.lora_B` [out, rank]; on experts either may have an axis in front),
`optimizer.safetensors` (`.exp_avg_A` ... and `.grad_A` ... where a gradient was pending), `value_head.safetensors` where the adapter has
one (params, moments, step, pending gradient), and manifest.json, which also holds what the adapter is.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save

from everlearn.engine.adapter import TrainingAdapter, split
from everlearn.engine.valuehead import ValueHead
from everlearn.errors import InvalidRequest, NotFound
from everlearn.models.bank import WEIGHTS_FILE
from everlearn.store.folders import read_manifest, write_folder
from everlearn.types import LoraSpec

OPTIMIZER_FILE = "optimizer.safetensors"
VALUE_FILE = "value_head.safetensors"
FORMAT = "everlearn-adapter-1"
WAITING = 8  # copies of adapters that may wait for the disk
Report = Callable[[int, str, float, Exception | None], None]  # bytes, sha256, seconds, error


class State:
    """A copy of an adapter at one moment; what a folder is written from."""

    def __init__(self, adapter: TrainingAdapter, optimizer: bool, gradient: bool, metadata: dict[str, str] | None = None):
        shapes = adapter.shapes
        self.weights = _named(split(adapter.params.to("cpu", copy=True), shapes), "lora")
        self.extra: dict[str, torch.Tensor] = {}
        moments = adapter.moments() if optimizer else None
        if moments is not None:
            for name, flat in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                self.extra |= _named(split(flat.to("cpu", copy=True), shapes), name)
        if gradient and adapter.has_grad:
            self.extra |= _named(split(adapter.grad.to("cpu", copy=True), shapes), "grad")
        self.value = adapter.value.state(optimizer, gradient and adapter.has_grad) if adapter.value is not None else None
        lora = adapter.lora
        self.manifest: dict[str, Any] = {
            "format": FORMAT,
            "base": adapter.base,
            "model_id": adapter.model_id,
            "rank": adapter.lora.rank,
            "alpha": lora.alpha,
            "seed": lora.seed,
            "train_attn": lora.train_attn,
            "train_mlp": lora.train_mlp,
            "train_unembed": lora.train_unembed,
            "expert_lora": lora.expert_lora,
            "train_vision": lora.train_vision,
            "step": adapter.step if optimizer else 0,
            "seq": adapter.seq,
            "optimizer": optimizer,
            "metadata": metadata or {},
        }

    def write(self, folder: Path) -> tuple[int, str]:
        files: dict[str, bytes | Callable[..., None] | Path] = {WEIGHTS_FILE: save(self.weights)}
        if self.manifest["optimizer"]:
            files[OPTIMIZER_FILE] = save(self.extra or {"empty": torch.zeros(0)})
        if self.value is not None:
            files[VALUE_FILE] = save(self.value)
        return write_folder(folder, files, self.manifest)


def _named(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], kind: str) -> dict[str, torch.Tensor]:
    named = {}
    for path, (a, b) in pairs.items():
        named[f"{path}.{kind}_A"], named[f"{path}.{kind}_B"] = a.contiguous(), b.contiguous()
    return named


class Found(NamedTuple):
    """What a folder holds for an adapter, in the shape of the adapter's buffers; None where it starts anew."""

    params: torch.Tensor
    moments: tuple[torch.Tensor, torch.Tensor] | None
    grad: torch.Tensor | None
    step: int
    value: ValueHead | None = None


def find(adapter: TrainingAdapter, folder: Path, optimizer: bool) -> Found:
    """The folder's weights; moments, step and a pending gradient too if `optimizer`. Changes nothing.

    Raises InvalidRequest where the folder's adapter has another shape (rank, switches, base).
    """
    manifest = read_manifest(folder)
    path = folder / WEIGHTS_FILE
    if not path.exists():
        raise NotFound(f"{folder} holds no {WEIGHTS_FILE}; it is not a checkpoint of weights", param="path")
    weights = _fitting(adapter, load_file(path), "lora", folder)
    extra = load_file(folder / OPTIMIZER_FILE) if optimizer and (folder / OPTIMIZER_FILE).exists() else {}
    kinds = {name.rsplit(".", 1)[1][:-2] for name in extra if "." in name}
    state = {
        kind: _filled(adapter, _fitting(adapter, extra, kind, folder), kind) for kind in ("exp_avg", "exp_avg_sq", "grad") if kind in kinds
    }
    moments = (state["exp_avg"], state["exp_avg_sq"]) if "exp_avg" in state else None
    value = ValueHead.of(load_file(folder / VALUE_FILE), optimizer, adapter.device) if (folder / VALUE_FILE).exists() else None
    return Found(_filled(adapter, weights, "lora"), moments, state.get("grad"), int(manifest["step"]) if extra else 0, value)


def put(adapter: TrainingAdapter, found: Found) -> None:
    """The adapter becomes what was found."""
    adapter.params.copy_(found.params)
    adapter.clear_gradient()
    adapter.value = found.value
    adapter.reset_moments()
    adapter.step = found.step
    if found.moments is not None:
        adapter.set_moments(*found.moments, step=found.step)
    if found.grad is not None:
        adapter.grad.copy_(found.grad)
        adapter.has_grad = True
    adapter.refresh()


def restore(adapter: TrainingAdapter, folder: Path, optimizer: bool) -> None:
    put(adapter, find(adapter, folder, optimizer))


def _fitting(adapter: TrainingAdapter, tensors: dict[str, torch.Tensor], kind: str, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of one kind, if they are the adapter's in name and shape."""
    targets = _named_views(split(adapter.params, adapter.shapes), kind)
    given = {name for name in tensors if name.rsplit(".", 1)[-1] in (f"{kind}_A", f"{kind}_B")}
    if given != set(targets):
        odd = sorted(given ^ set(targets))[0]
        raise InvalidRequest(
            f"checkpoint {folder.name}: layer {odd!r} is in only one of checkpoint and adapter; "
            "create the adapter with the same LoRA config",
            param="path",
        )
    for name, target in targets.items():
        if tensors[name].shape != target.shape:
            raise InvalidRequest(
                f"checkpoint {folder.name}: {name} has shape {list(tensors[name].shape)}, the adapter's is {list(target.shape)}; "
                "ranks and the layout of matrices on experts must agree",
                param="path",
            )
    return {name: tensors[name] for name in targets}


def _filled(adapter: TrainingAdapter, tensors: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    """The tensors of one kind in one flat buffer."""
    flat = torch.zeros_like(adapter.params)
    for name, target in _named_views(split(flat, adapter.shapes), kind).items():
        target.copy_(tensors[name])
    return flat


def _named_views(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], kind: str) -> dict[str, torch.Tensor]:
    return {f"{path}.{kind}_{side}": tensor for path, pair in pairs.items() for side, tensor in zip("AB", pair, strict=True)}


def lora_of(folder: Path) -> LoraSpec:
    """The LoRA configuration that a checkpoint folder was trained with."""
    manifest = read_manifest(folder)
    return LoraSpec(**{name: manifest[name] for name in LoraSpec.__struct_fields__ if name in manifest})  # older ones lack some


class Writer:
    """One thread that writes folders in order. `rate` (bytes a second) is measured, and read by the snapshot policy.

    Copies that wait for the disk are bounded: past WAITING of them `write` waits too.
    """

    def __init__(self) -> None:
        self.jobs: queue.Queue[tuple[State, Path, Report] | None] = queue.Queue(WAITING)
        self.rate = 100e6
        self.thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self.thread.start()

    def write(self, state: State, folder: Path, report: Report) -> None:
        self.jobs.put((state, folder, report))

    def close(self) -> None:
        """Waits until everything handed over is on disk."""
        self.jobs.put(None)
        self.thread.join()

    def _run(self) -> None:
        while (job := self.jobs.get()) is not None:
            state, folder, report = job
            started = time.perf_counter()
            try:
                size, digest = state.write(folder)
            except Exception as error:  # the disk's answer belongs to the request that asked, not to this thread
                report(0, "", time.perf_counter() - started, error)
                continue
            seconds = time.perf_counter() - started
            self.rate = 0.5 * self.rate + 0.5 * size / max(seconds, 1e-3)
            report(size, digest, seconds, None)
