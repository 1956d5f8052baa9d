"""Linear layers that read the same input, computed as one product while no gradient is wanted.

A decoding step is a handful of tokens through hundreds of small products, and most of its time is the cost of starting them. The
query, key and value projections of a layer read one tensor, and so do gate and up: their weights are laid end to end (each layer's
own weight becomes a view of the whole), and so are the A matrices of a frozen adapter. The first layer of a family that runs
computes for all of them; the others take their part, if they are given the very same tensor. This module knows nothing of
attention or activations.

Axes: N rows, I input size, O output size of all layers of a family together, R ranks of all of them together.
"""

from __future__ import annotations

import torch
from torch import nn

from everlearn.models.lora import AdapterWeights, Block, LoraLinear, Segment, frozen_product
from everlearn.models.quant import PackedWeight, dense_of

FAMILIES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Siblings:
    """A family of layers. `layers[i]` owns output rows [borders[i], borders[i + 1])."""

    def __init__(self, layers: list[LoraLinear]):
        self.layers = layers
        self.borders = [0]
        for layer in layers:
            self.borders.append(self.borders[-1] + layer.out_features)
        with torch.no_grad():
            self.weight = torch.cat([dense_of(layer.weight) for layer in layers])
            biased = layers[0].bias is not None
            self.bias = torch.cat([layer.bias for layer in layers if layer.bias is not None]) if biased else None
        for index, layer in enumerate(layers):
            layer.weight = nn.Parameter(self.weight[self.borders[index] : self.borders[index + 1]], requires_grad=False)
            layer.siblings = self
        self._input: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()

    def output(self, layer: LoraLinear, x: torch.Tensor, segments: list[Segment]) -> torch.Tensor | None:
        """What `layer` makes of `x`; None where it has to compute that by itself (an adapter that still trains is not laid out)."""
        if layer is self.layers[0]:
            if any(s.adapter is not None and not s.adapter.frozen for s in segments):
                return None
            y_NO = self._product(x.reshape(-1, x.shape[-1]), segments)
            self._input, self._outputs = x, y_NO.view(*x.shape[:-1], -1).split([each.out_features for each in self.layers], dim=-1)
            return self._outputs[0]
        if self._input is not x:
            return None
        output = self._outputs[self.layers.index(layer)]
        if layer is self.layers[-1]:
            self._input, self._outputs = None, ()
        return output

    def _product(self, x_NI: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
        parts = [(s.rows, s.adapter.scale, *self._matrices(s.adapter)) for s in segments if s.adapter is not None]
        return frozen_product(x_NI, self.weight, self.bias, [part for part in parts if part[-1]])

    def _matrices(self, adapter: AdapterWeights) -> tuple[torch.Tensor, list[Block]]:
        """The adapter's A [R, I] for the family, and for each layer: its rows of y, its rows of A x, its B."""
        found = adapter.families.get(self.layers[0].path)
        if found is None:
            found = adapter.families[self.layers[0].path] = self._lay_out(adapter)
        return found

    def _lay_out(self, adapter: AdapterWeights) -> tuple[torch.Tensor, list[Block]]:
        present = [(i, layer.path) for i, layer in enumerate(self.layers) if layer.path in adapter.pairs]
        if not present:
            return self.weight[:0], []
        a_RI = torch.cat([adapter.pairs[path][0] for _, path in present])
        blocks, at = [], 0
        for index, path in present:
            rank, b = adapter.pairs[path][0].shape[0], adapter.pairs[path][1]
            adapter.pairs[path] = (a_RI[at : at + rank], b)  # one copy in memory, not two
            blocks.append((slice(self.borders[index], self.borders[index + 1]), slice(at, at + rank), b))
            at += rank
        return a_RI, blocks


def join_siblings(decoder: nn.Module) -> None:
    """Finds the families of `decoder` and joins their layers."""
    for module in decoder.modules():
        for names in FAMILIES:
            layers = [child for name in names if isinstance(child := getattr(module, name, None), LoraLinear)]
            same = {(layer.in_features, layer.bias is None, layer.weight.dtype) for layer in layers}
            packed = any(isinstance(layer.weight, PackedWeight) for layer in layers)  # joining would mean unpacking for good
            if len(layers) == len(names) and len(same) == 1 and not packed:
                Siblings(layers)
