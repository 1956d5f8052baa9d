"""The `tinker` package's own protobuf schema, loaded without the package.

`import tinker` pulls torch and takes seconds. The API process needs one generated file of it, which depends on protobuf only.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from google.protobuf.message import DecodeError

from everlearn.errors import InternalError

__all__ = ["DecodeError", "pb"]

MODULE = "tinker.proto.tinker_public_pb2"


def load() -> ModuleType:
    """The module of message classes; the one that the package itself loaded, where it did."""
    if MODULE in sys.modules:
        return sys.modules[MODULE]
    package = importlib.util.find_spec("tinker")
    if package is None or package.origin is None:
        raise InternalError(
            "the `tinker` package is missing, whose protobuf schema the Tinker API speaks; install everlearn with its dependencies"
        )
    path = Path(package.origin).parent / "proto" / "tinker_public_pb2.py"
    spec = importlib.util.spec_from_file_location("everlearn_tinker_public_pb2", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pb: Any = load()
