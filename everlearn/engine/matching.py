"""What compiles grammars and follows them: two libraries behind one face, chosen by `engine.grammar`.

A compiler makes of a grammar a matcher at its start, or raises what its request is to be told. A matcher is copied for each sequence and
advanced by what that one draws. Limits on time, memory and numbers are grammar.py's; here is what the libraries know alone.

Axes: N rows, U words of 32 tokens.
"""

from __future__ import annotations

import importlib.util
import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from everlearn.errors import Unsupported
from everlearn.types import Grammar

if TYPE_CHECKING:
    from everlearn.models.load import BaseModel

PARAM = "response_format"
TRIAL_TOKENS = 32
# Processor time for one token of the trial walk beyond which a grammar counts as too ambiguous to serve.
SLOW_SECONDS = 0.1


class Matcher(Protocol):
    """Where a text stands in a grammar."""

    def copy(self) -> Matcher: ...

    def fill(self, allowed_NU: np.ndarray, row: int) -> None:
        """int32, a bit for each token that may come next. Bits of tokens that end texts mean nothing."""

    def consume(self, token: int) -> None: ...

    def is_complete(self) -> bool:
        """Whether the text may end here."""

    def is_over(self) -> bool:
        """Whether it must."""

    def error(self) -> str | None:
        """Why it can't be followed any further."""


class Compiler(Protocol):
    """For one tokenizer. `compile` runs in threads of its own, `fill` in the engine's."""

    def compile(self, grammar: Grammar) -> Matcher: ...

    def fill(self, following: Sequence[tuple[Matcher, int]], allowed_NU: np.ndarray) -> None:
        """The rows of all these matchers, on several threads."""


def num_words(base: BaseModel) -> int:
    """Words of 32 bits that a mask of the vocabulary takes."""
    return -(-num_tokens(base) // 32)


def num_tokens(base: BaseModel) -> int:
    return max(base.vocab_size, base.tokenizer.get_vocab_size() if base.tokenizer is not None else 0)


def check_installed(library: str) -> None:
    """Raises Unsupported, with the command that helps, where the chosen library isn't there. llguidance always is."""
    if library == "xgrammar" and importlib.util.find_spec("xgrammar") is None:
        raise Unsupported(
            'engine.grammar is "xgrammar", and that package isn\'t installed: pip install "xgrammar>=0.2.8,<0.3", or leave the setting out',
            param="engine.grammar",
        )


def make_compiler(library: str, base: BaseModel, threads: int) -> Compiler:
    """Takes a second for a large vocabulary. Raises Unsupported for a tokenizer that the library can't read."""
    if library == "xgrammar":
        from everlearn.engine.match_xgrammar import XGrammar

        return XGrammar(base, threads)
    from everlearn.engine.match_llguidance import Guidance

    return Guidance(base, threads)


def try_out(matcher: Matcher, words: int, eos: list[int]) -> None:
    """Walks a few random tokens. Raises ValueError where the library gives up or a step takes too long: better now than in a batch."""
    rng = random.Random(0)
    mask = np.zeros((1, words), np.int32)
    matcher.fill(mask, 0)
    for _ in range(TRIAL_TOKENS):
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8)[0], bitorder="little"))
        allowed = allowed[~np.isin(allowed, eos)]
        if matcher.is_over() or not len(allowed):
            return
        started = time.thread_time()
        matcher.consume(int(rng.choice(allowed)))
        matcher.fill(mask, 0)
        if (reason := matcher.error()) is not None:
            raise ValueError(reason)
        if time.thread_time() - started > SLOW_SECONDS:
            raise ValueError(f"a single step through it takes longer than {SLOW_SECONDS * 1000:.0f} ms; it is too ambiguous")
