"""Adapter versions in memory.

A bank holds a bounded number of frozen versions of adapters; the sampler borrows them, the trainer publishes them. It knows nothing
of requests or HTTP. Invariant: the weights of a version never change. A new step is a new version, so a cached prefix can't be
served by other weights. Idle versions leave in least-recently-used order and are read again from their folder when wanted.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file

from everlearn.errors import NotFound
from everlearn.models.lora import AdapterWeights, expert_scale

WEIGHTS_FILE = "adapter.safetensors"


class Bank:
    """At most `slots` idle-or-borrowed versions; borrowed ones are never dropped, so the bound can be passed while all are in use."""

    def __init__(self, slots: int, device: torch.device, dtype: torch.dtype):
        self.slots, self.device, self.dtype = slots, device, dtype
        self.versions: OrderedDict[str, AdapterWeights] = OrderedDict()
        self.borrowed: dict[str, int] = {}
        self.on_disk: set[str] = set()

    def acquire(self, version: str, folder: str) -> AdapterWeights | None:
        """The weights of `version`, read from `folder` if they are not in memory; None for the base model ("")."""
        if not version:
            return None
        if version not in self.versions:
            self.versions[version] = self._read(version, folder)
            self.on_disk.add(version)
        self.versions.move_to_end(version)
        self.borrowed[version] = self.borrowed.get(version, 0) + 1
        self._drop_idle()
        return self.versions[version]

    def release(self, version: str) -> None:
        """Gives back what `acquire` lent."""
        if not version:
            return
        self.borrowed[version] -= 1
        if not self.borrowed[version]:
            del self.borrowed[version]
        self._drop_idle()

    def publish(self, version: str, scale: float, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], expert_scale: float = 0.0) -> None:
        """Freezes a copy of `pairs` under a new name; live for the next request. `written` must follow before it may be dropped."""
        copies = {path: (a.detach().to(self.dtype, copy=True), b.detach().to(self.dtype, copy=True)) for path, (a, b) in pairs.items()}
        self.versions[version] = AdapterWeights(version, scale, copies, frozen=True, expert_scale=expert_scale)
        self._drop_idle()

    def written(self, version: str) -> None:
        """The version's folder is complete on disk."""
        self.on_disk.add(version)  # called by the writer's thread: what may be dropped now is dropped by the device's next call

    def _drop_idle(self) -> None:
        for version in list(self.versions):
            if len(self.versions) <= self.slots:
                return
            if version not in self.borrowed and version in self.on_disk:
                del self.versions[version]
                self.on_disk.discard(version)

    def _read(self, version: str, folder: str) -> AdapterWeights:
        path = Path(folder)
        if not (path / WEIGHTS_FILE).exists():
            raise NotFound(f"adapter version {version!r}: folder {folder} holds no {WEIGHTS_FILE}; it was deleted or has expired")
        manifest = json.loads((path / "manifest.json").read_text())
        tensors = load_file(path / WEIGHTS_FILE, device=str(self.device))
        paths = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
        # Copies: a tensor in a file's buffer is not aligned as an allocation is, and matrix products then round differently.
        pairs = {p: (tensors[f"{p}.lora_A"].to(self.dtype, copy=True), tensors[f"{p}.lora_B"].to(self.dtype, copy=True)) for p in paths}
        return AdapterWeights(
            version, manifest["alpha"] / manifest["rank"], pairs, frozen=True, expert_scale=expert_scale(manifest["alpha"], pairs)
        )
