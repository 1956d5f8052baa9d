"""A quicker and smaller start of a process that runs models: transformers without torch's compiler and its distributed tensors.

transformers marks a few functions for torch.compile, and torch its optimizers; either loads the whole compiler (with sympy: seconds
of CPU and a hundred MiB) in order to tell it to leave them alone. Nothing here is compiled, and one process has one device. The
stand-in below answers these marks; whoever asks it for anything else gets the real module, loaded then.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

COMPILER = "torch._dynamo"


class _Compiler(types.ModuleType):
    """Stands for torch._dynamo until more than its marks is wanted."""

    @staticmethod
    def disable(fn: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        return fn if fn is not None else _unchanged

    @staticmethod
    def allow_in_graph(fn: Any) -> Any:
        return fn

    @staticmethod
    def assume_constant_result(fn: Any) -> Any:
        return fn

    @staticmethod
    def graph_break(*args: Any, **kwargs: Any) -> None:
        """An optimizer step begins with it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]
        return getattr(importlib.import_module(COMPILER), name)


def _unchanged(fn: Any) -> Any:
    return fn


def import_lean() -> None:
    """Imports torch and transformers' base classes that way. Only for a process of our own, before it imports any model."""
    import torch  # noqa: F401

    if COMPILER not in sys.modules:
        found = importlib.util.find_spec(COMPILER)
        if found is not None and found.submodule_search_locations is not None:
            stand_in = _Compiler(COMPILER)
            stand_in.__path__ = list(found.submodule_search_locations)  # its submodules are imported as they are
            sys.modules[COMPILER] = stand_in
    from transformers import utils
    from transformers.utils import import_utils

    asked = import_utils.is_torch_distributed_available
    utils.is_torch_distributed_available = import_utils.is_torch_distributed_available = lambda: False
    try:
        importlib.import_module("transformers.modeling_utils")
    finally:
        utils.is_torch_distributed_available = import_utils.is_torch_distributed_available = asked
