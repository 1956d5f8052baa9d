"""A folder's tensors in the names and forms that the model has, where its makers chose others.

transformers keeps renamings and conversions of each family; both are taken from there. A renaming changes the name that a tensor is looked
up by, whatever its format. A conversion makes weights out of a group of tensors (a layer's joint projection, its experts); it is tried on
shapes alone before memory is taken, and run on one group after the other, so that loading holds no more than one beside the model.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from everlearn.errors import Unsupported


@dataclass(eq=False)
class Conversion:
    """`sources` (names of the folder's tensors, and the converter's patterns that they match) become weights; `first` is one of those."""

    first: str
    converter: Any
    sources: list[tuple[str, str]] = field(default_factory=list)

    def run(self, model: nn.Module, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights by name. `read` gives a tensor of the folder."""
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.first, name, pattern, partial(read, name))
        try:
            found = converter.convert(self.first, model=model, config=model.config)
        except (ValueError, RuntimeError, LookupError, TypeError, AttributeError, AssertionError) as error:
            name = self.sources[0][0]
            raise Unsupported(f"transformers can't convert {name} and what belongs to it: {str(error)[:300]}") from error
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in found.items()}


def new_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """What transformers calls each of a folder's tensors. One that the model has by its own name keeps it, and so do two that would
    get the same."""
    from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

    known, renamings = model.state_dict(keep_vars=True), [each for each in _mapping(model) if isinstance(each, WeightRenaming)]
    renamed = {}
    for name in sorted(names, key=dot_natural_key):  # some renamings hold only behind others
        new, _ = rename_source_key(name, renamings, [], _prefix(model), known)
        renamed[name] = name if name in known and new not in known else new
    taken = Counter(renamed.values())
    return {name: new if taken[new] == 1 else name for name, new in renamed.items()}


def conversions_of(model: nn.Module, names: Iterable[str]) -> list[Conversion]:
    """The conversions that take tensors of these names, renamed already."""
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    known, converters = model.state_dict(keep_vars=True), [each for each in _mapping(model) if isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, Conversion] = {}
    for name in sorted(names, key=dot_natural_key):  # experts are stacked in the order of their numbers
        first, pattern = rename_source_key(name, [], converters, _prefix(model), known)
        if pattern is not None and first in known:
            found.setdefault(first, Conversion(first, by_pattern[pattern])).sources.append((name, pattern))
    return list(found.values())


def _mapping(model: nn.Module) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    found: list[Any] = get_model_conversion_mapping(model)
    return found


def _prefix(model: nn.Module) -> str:
    return str(getattr(model, "base_model_prefix", ""))
