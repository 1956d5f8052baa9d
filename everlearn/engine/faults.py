"""What an exception in the device thread means: whose request fails, or whether the process has to go.

A request that fails alone is answered with its error. A device that is lost (a CUDA context after an illegal access) fails every
request after it as well, so then the process ends: its successor has a new context, and the log gives it the same work again.
The same where a change of an adapter broke off in the middle. Who is told that a request failed must be able to count on it that
nothing happened, because a rebuild leaves failed requests out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from everlearn.errors import EverlearnError, InternalError, TooLarge

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


def device_is_lost(error: BaseException) -> bool:
    """Whether nothing on this device will work any more."""
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


class BrokenOff(Exception):
    """An adapter is neither what it was nor what it should have become."""


@contextmanager
def whole() -> Iterator[None]:
    """Around the steps that change an adapter, after all that may well fail (files, memory): from here on it is all of them, or the end
    of the process."""
    try:
        yield
    except Exception as error:
        raise BrokenOff("a change of an adapter broke off") from error


def as_error(error: Exception, doing: str, param: str | None = None) -> EverlearnError:
    """The answer to a request during which `error` was raised; raises it again where the process has to go."""
    if isinstance(error, EverlearnError):
        return error
    if isinstance(error, BrokenOff) or device_is_lost(error):
        raise error
    if isinstance(error, OUT_OF_MEMORY):
        return TooLarge(f"out of memory {doing}: {error}; send less at once", param=param)
    return InternalError(f"{type(error).__name__} {doing}: {error}")
