"""A quicker and smaller start of a process that runs models: transformers without torch's compiler and its distributed tensors.

transformers marks a few functions for torch.compile, and torch its optimizers; either loads the whole compiler (with sympy: seconds
of CPU and a hundred MiB) in order to tell it to leave them alone. Nothing here is compiled, and one process has one device. The
stand-in below answers these marks; whoever asks it for anything else gets the real module, loaded then. torchvision, which transformers
imports where it is installed and nothing here uses, would ask at once: it counts as absent.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from typing import Any

COMPILER = "torch._dynamo"
LIGHT = COMPILER + "._trace_wrapped_higher_order_op"  # transformers' masks need it; it doesn't need the compiler


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
        return getattr(_real(), name)


def _unchanged(fn: Any) -> Any:
    return fn


def _real() -> types.ModuleType:
    if isinstance(sys.modules.get(COMPILER), _Compiler):
        del sys.modules[COMPILER]
    return importlib.import_module(COMPILER)


class _Submodules:
    """Asked first for every module: an import of a part of the compiler loads the whole before, which loads most parts itself.
    Left to the usual way, the whole would look for that part while it's half loaded, and fail."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(COMPILER + ".") or name == LIGHT or not isinstance(sys.modules.get(COMPILER), _Compiler):
            return None
        _real()
        return importlib.util.spec_from_loader(name, _Loaded()) if name in sys.modules else None


class _Loaded(Loader):
    """For what is there already, and must not be executed again."""

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def import_lean() -> None:
    """Imports torch and transformers' base classes that way. Only for a process of our own, before it imports any model."""
    import torch  # noqa: F401

    if COMPILER not in sys.modules:
        found = importlib.util.find_spec(COMPILER)
        if found is not None and found.submodule_search_locations is not None:
            stand_in = _Compiler(COMPILER)
            stand_in.__path__ = list(found.submodule_search_locations)
            sys.modules[COMPILER] = stand_in
            sys.meta_path.insert(0, _Submodules)
    from transformers import utils
    from transformers.utils import import_utils

    utils.is_torchvision_available = import_utils.is_torchvision_available = lambda: False
    asked = import_utils.is_torch_distributed_available
    utils.is_torch_distributed_available = import_utils.is_torch_distributed_available = lambda: False
    try:
        importlib.import_module("transformers.modeling_utils")
    finally:
        utils.is_torch_distributed_available = import_utils.is_torch_distributed_available = asked
