"""Which tokens a grammar lets each sequence of a step draw.

A sequence follows its grammar with a matcher of its own, a copy of the compiled one that is advanced by every token it draws; it stays
with the sequence when that loses its blocks. The end is part of the promise: stop tokens can be drawn where the text is complete and
nowhere else, so what ends with "stop" matches. Masks of a batch are filled by several threads at once; only when that took
suspiciously long they are filled one by one, to see whose grammar is to blame.

Axes: N rows, U words of 32 tokens.
"""

from __future__ import annotations

import time

import numpy as np

from everlearn.engine.grammar import Grammars
from everlearn.engine.matching import PARAM, Matcher
from everlearn.engine.sequence import Request, Sequence
from everlearn.errors import InvalidRequest

# Processor time of the engine's thread that a request's grammar may cost: at once, and for each token. Usual is 0.0001 a token.
BURST_SECONDS, TOKEN_SECONDS = 1.0, 0.005
# A batch whose masks took longer than this, and this for each row, is looked at row by row the next time.
LONG_FILL, LONG_ROW = 0.01, 0.001


class Follower:
    """Where one sequence stands in its grammar. `end_U` has a bit for each stop token."""

    def __init__(self, request: Request, matcher: Matcher, end_U: np.ndarray):
        self.request, self.matcher, self.end_U = request, matcher, end_U

    def fill(self, allowed_NU: np.ndarray, row: int) -> None:
        started = time.thread_time()
        self.matcher.fill(allowed_NU, row)
        self.request.grammar_seconds += time.thread_time() - started  # from the bucket that `consume` drains

    def consume(self, token: int) -> None:
        started = time.thread_time()
        self.matcher.consume(token)
        self.request.grammar_seconds = max(0.0, self.request.grammar_seconds + time.thread_time() - started - TOKEN_SECONDS)

    def mark_end(self, allowed_U: np.ndarray, too_short: bool) -> None:
        """Stop tokens where the text is complete, and only there; not before min_tokens, unless nothing else is left."""
        others_U = allowed_U & ~self.end_U
        if self.matcher.is_complete() and not (too_short and others_U.any()):
            allowed_U |= self.end_U
        elif others_U.any():
            allowed_U[:] = others_U

    def error(self) -> InvalidRequest | None:
        reason = self.matcher.error()
        if reason is None and self.request.grammar_seconds > BURST_SECONDS:
            reason = f"it costs more than {TOKEN_SECONDS * 1000:.0f} ms a token, it is too ambiguous"
        if reason is None:
            return None
        return InvalidRequest(f"the grammar can't be followed any further: {reason}; make it simpler", param=PARAM)


class Masks:
    def __init__(self, grammars: Grammars):
        self.grammars = grammars
        self.suspicious = False

    def fill(self, sequences: list[Sequence]) -> tuple[np.ndarray | None, dict[int, InvalidRequest]]:
        """int32 [N, U], a bit for each token that may be drawn, None if no sequence has a grammar; and the rows that fail."""
        following = [(row, self._follower(s)) for row, s in enumerate(sequences) if s.request.compilation is not None]
        if not following:
            return None, {}
        allowed_NU = np.full((len(sequences), self.grammars.words), -1, np.int32)
        started = time.perf_counter()
        if self.suspicious:
            for row, follower in following:
                follower.fill(allowed_NU, row)
        else:
            assert self.grammars.compiler is not None
            self.grammars.compiler.fill([(follower.matcher, row) for row, follower in following], allowed_NU)
        self.suspicious = time.perf_counter() - started > LONG_FILL + LONG_ROW * len(following)
        failed: dict[int, InvalidRequest] = {}
        for row, follower in following:
            if error := follower.error():
                failed[row] = error
                allowed_NU[row] = -1
            else:
                follower.mark_end(allowed_NU[row], sequences[row].too_short)
        return allowed_NU, failed

    def _follower(self, sequence: Sequence) -> Follower:
        if sequence.follower is None:
            compilation = sequence.request.compilation
            assert compilation is not None and compilation.matcher is not None
            end_U = np.zeros(self.grammars.words, np.uint32)
            for token in sequence.request.stop_tokens:
                end_U[token // 32] |= np.uint32(1 << token % 32)
            sequence.follower = Follower(sequence.request, compilation.matcher.copy(), end_U.view(np.int32))
        return sequence.follower


def advance(sequence: Sequence, token: int) -> InvalidRequest | None:
    """Tells the sequence's grammar of its newest token, which was no stop token; the error if it can't go on."""
    follower = sequence.follower
    assert follower is not None
    follower.consume(token)
    if (sequence.stop_reason or not sequence.request.stop_tokens) and follower.matcher.is_over():
        sequence.stop_reason = "stop"  # complete with its last token, or there is no token that could say so
    return follower.error()
