"""Grammars, compiled beside the engine's thread and kept for the next request.

A grammar comes from a client, so it is hostile until shown otherwise. What bounds it: its source has a largest size; llguidance counts
its own work and gives up over limits; the threads that compile have stacks deep enough for any source of that size; a trial walk finds
grammars whose single steps would stall the engine; whatever takes more processor time than `engine.grammar_seconds` fails its request,
while its thread is given up on until it returns. On a busy machine a grammar may be late that takes little: its request is told to come
again, nothing is held against it, and what its thread finds in the end is kept for the next. Tenants take turns at the threads, and who
holds much memory waits until some of it is free: a short source may compile to 40 MiB, but not quickly, so processor time stands for
memory. How masks are used is in masks.py.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import threading
import time
import weakref
from collections import OrderedDict, deque
from functools import cached_property
from typing import TYPE_CHECKING, cast

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from tokenizers import Tokenizer

from everlearn.engine.fairness import FairQueue
from everlearn.errors import EverlearnError, InvalidRequest, TooLarge, Unavailable, Unsupported
from everlearn.models.load import BaseModel
from everlearn.render.callgrammar import SPACING
from everlearn.types import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

log = logging.getLogger(__name__)
PARAM = "response_format"
# Free white space lets a small model write nothing else; what a keyword means that the compiler doesn't know can't be promised.
STYLE = cast("JsonCompileOptions", {**SPACING, "lenient": False})
# A regular expression can say more in a byte than a schema; the conversion of GBNF is Python and quadratic.
MAX_SOURCE = {"json_schema": 2**17, "json_object": 2**17, "lark": 2**17, "regex": 2**14, "ebnf": 2**14}
LIMITS = LLParserLimits(max_lexer_states=25_000, verbose_errors=False)
THREADS = 2
# What is late by the clock alone, beyond so many times engine.grammar_seconds and a second, is late because the machine is busy.
PATIENCE = 3.0
# Threads given up on at one time before no new ones are started.
MAX_LOST = 4
# Rules may nest as deep as a source is long: at 3 KiB a level the largest needs about 40 MiB of stack (address space until used).
STACK_BYTES = 2**28
NICENESS = 5
KEPT_BYTES = 2**22  # of sources
# Seconds of compiling that the cache keeps, and that the unfinished requests of one tenant may hold; about 40 MiB each.
KEPT_SECONDS, HELD_SECONDS = 5.0, 10.0
TRIAL_TOKENS = 32
# Processor time for one token of the trial walk beyond which a grammar counts as too ambiguous to serve.
SLOW_SECONDS = 0.1


class Compilation:
    """One grammar on its way: `matcher` (at its start, never to be advanced itself) or `error` once it is `done`."""

    def __init__(self, grammar: Grammar):
        self.grammar = grammar
        self.matcher: LLMatcher | None = None
        self.error: EverlearnError | None = None
        self.started = math.inf  # on the monotonic clock
        self.clock, self.begun = 0, 0.0  # the processor clock of its thread, and where that stood
        self.seconds = 0.0  # of processor time
        self.counted = self.lost = False

    @property
    def done(self) -> bool:
        return self.matcher is not None or self.error is not None

    def spent(self) -> float:
        """Processor time up to now. Only while its thread is known to live."""
        return time.clock_gettime(self.clock) - self.begun


class Grammars:
    """All grammars for one base model's tokenizer."""

    def __init__(self, base: BaseModel, seconds: float, kept: int):
        self.base, self.seconds, self.kept = base, seconds, kept
        self.compiles = 0
        self.lock = threading.Lock()
        self.tokenizer_lock = threading.Lock()
        self.tokenizer: LLTokenizer | None = None
        self.known: OrderedDict[Grammar, Compilation] = OrderedDict()
        self.known_bytes, self.known_seconds = 0, 0.0
        self.held: dict[str, float] = {}  # seconds of compiling in memory, by the tenant that asked first
        self.released: deque[tuple[str, float]] = deque()  # by finalisers, which run wherever they like and take no lock
        self.queue: FairQueue[Compilation] = FairQueue()
        self.compiling: list[Compilation] = []
        self.late: list[Compilation] = []  # whose requests were told to come again; their threads go on
        self.threads = self.lost = 0

    @cached_property
    def words(self) -> int:
        """Words of 32 bits that a mask of the vocabulary takes."""
        return -(-self._num_tokens() // 32)

    def compile(self, grammar: Grammar, tenant: str) -> Compilation:
        """The grammar's compilation, perhaps one that is done. Raises TooLarge and Unsupported at once."""
        if self.base.tokenizer is None:
            raise Unsupported(f"{self.base.info.name} has no tokenizer, so no grammar can be applied", param=PARAM)
        if len(grammar.source) > MAX_SOURCE[grammar.kind]:
            text = f"the {grammar.kind} has {len(grammar.source)} characters; {MAX_SOURCE[grammar.kind]} is the limit; make it smaller"
            raise TooLarge(text, param=PARAM)
        with self.lock:
            known = self.known.get(grammar)
            if known is not None:
                self.known.move_to_end(grammar)
                return known
            made = Compilation(grammar)
            if any(late.grammar == grammar for late in self.late):
                made.error = self._busy(grammar)
                return made
            self._remember(made)
            self.queue.append(tenant, made)
            self._start_thread()
        return made

    def tend(self) -> None:
        """Ends what takes too long; to be called now and then while something compiles."""
        now = time.monotonic()
        with self.lock:
            for made in [c for c in self.compiling if now - c.started > self.seconds]:
                if made.spent() > self.seconds:
                    self._give_up(made, self._too_slow(made.grammar))
                elif now - made.started > PATIENCE * self.seconds + 1.0:
                    self._give_up(made, self._busy(made.grammar))
                    self.late.append(made)
                    self._forget(made)
            for made in [c for c in self.late if c.spent() > self.seconds]:  # it is the grammar after all
                self.late.remove(made)
                self._remember(Compilation(made.grammar)).error = self._too_slow(made.grammar)
            self._start_thread()  # for those who held too much a moment ago
            while self.queue and self.lost >= MAX_LOST and not self.threads:
                made = self.queue.pop()[1]
                made.error = Unavailable(f"{self.lost} grammars keep the compiler's threads busy; send this again later")
                self._forget(made)

    def _give_up(self, made: Compilation, error: EverlearnError) -> None:
        self.compiling.remove(made)
        made.lost, made.error = True, error
        self.threads, self.lost = self.threads - 1, self.lost + 1
        log.warning("a grammar did not compile within %g s; %d threads are given up on", self.seconds, self.lost)
        self._start_thread()

    def _too_slow(self, grammar: Grammar) -> InvalidRequest:
        text = f"the {grammar.kind} did not compile within {self.seconds:g} s (engine.grammar_seconds); make it simpler"
        return InvalidRequest(text, param=PARAM)

    def _busy(self, grammar: Grammar) -> Unavailable:
        return Unavailable(f"the machine is too busy to compile the {grammar.kind} in time; send this again later", param=PARAM)

    def _remember(self, made: Compilation) -> Compilation:
        if (before := self.known.get(made.grammar)) is not None:
            self._forget(before)
        self.known[made.grammar] = made
        self.known_bytes += len(made.grammar.source)
        self._shrink()
        return made

    def _shrink(self) -> None:
        while self.known and (len(self.known) > self.kept or self.known_bytes > KEPT_BYTES or self.known_seconds > KEPT_SECONDS):
            self._forget(next(iter(self.known.values())))

    def _forget(self, made: Compilation) -> None:
        if self.known.get(made.grammar) is made:
            del self.known[made.grammar]
            self.known_bytes -= len(made.grammar.source)
            self.known_seconds -= made.seconds if made.counted else 0.0

    def _next(self) -> tuple[str, Compilation] | None:
        """The next to compile; tenants that hold too much are passed over."""
        while self.released:
            tenant, seconds = self.released.popleft()
            self.held[tenant] -= seconds
            if self.held[tenant] < 1e-9:
                del self.held[tenant]
        found = self.queue.pop_of_others({tenant for tenant, seconds in self.held.items() if seconds > HELD_SECONDS})
        if found is not None:
            self.compiling.append(found[1])
        return found

    def _count(self, tenant: str, made: Compilation) -> None:
        """Counts what was compiled as long as anyone has it."""
        self.held[tenant] = self.held.get(tenant, 0.0) + made.seconds
        weakref.finalize(made, self.released.append, (tenant, made.seconds))
        if self.known.get(made.grammar) is made:
            made.counted = True
            self.known_seconds += made.seconds
            self._shrink()

    def _start_thread(self) -> None:
        """Called with the lock held. The stack size is the process's for a moment; a foreign thread born then has a deeper stack."""
        if self.threads < THREADS and self.lost < MAX_LOST and (found := self._next()):
            self.threads += 1
            before = threading.stack_size(STACK_BYTES)
            threading.Thread(target=self._work, args=found, name="grammar", daemon=True).start()
            threading.stack_size(before)

    def _work(self, tenant: str, made: Compilation) -> None:
        """A thread lives as long as something waits."""
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)  # on Linux a thread has its own
        while True:
            matcher, error = self._try(made)
            with self.lock:
                self.compiles += 1
                self.queue.charge(tenant, made.seconds)
                if made.lost:
                    self.lost -= 1
                    self._keep_late(tenant, made, matcher, error)
                    return
                self.compiling.remove(made)
                if matcher is not None:
                    self._count(tenant, made)
                made.matcher, made.error = matcher, error
                found = self._next()
                if found is None:
                    self.threads -= 1
                    return
                tenant, made = found

    def _keep_late(self, tenant: str, made: Compilation, matcher: LLMatcher | None, error: EverlearnError | None) -> None:
        """What came of it after its request was told to come again: the next one finds it."""
        if made in self.late:
            self.late.remove(made)
            kept = self._remember(Compilation(made.grammar))
            kept.seconds = made.seconds
            kept.matcher, kept.error = matcher, error
            if matcher is not None:
                self._count(tenant, kept)

    def _try(self, made: Compilation) -> tuple[LLMatcher | None, EverlearnError | None]:
        begun = time.thread_time()
        try:
            with self.tokenizer_lock:
                self.tokenizer = self.tokenizer or self._wrap_tokenizer()
            begun, made.clock = time.thread_time(), time.pthread_getcpuclockid(threading.get_ident())
            made.begun, made.started = begun, time.monotonic()
            return self._compile(self.tokenizer, spell(made.grammar)), None
        except EverlearnError as error:
            return None, error
        except BaseException as error:  # noqa: BLE001 - a panic in Rust is no Exception, and it is this request's affair alone
            reason = str(error).splitlines() or [type(error).__name__]
            return None, InvalidRequest(f"the {made.grammar.kind} can't be used: {reason[0][:300]}", param=PARAM)
        finally:
            made.seconds = time.thread_time() - begun

    def _compile(self, tokenizer: LLTokenizer, spelled: str) -> LLMatcher:
        matcher = LLMatcher(tokenizer, spelled, limits=LIMITS, log_level=0)
        mask = allocate_token_bitmask(1, 32 * self.words)
        if not matcher.is_error():
            fill_next_token_bitmask(matcher, mask)  # the first mask is the dearest; copies inherit what it found out
        if not matcher.is_error():
            try_out(matcher.deep_copy(), mask, self.base.info.eos_token_ids)
        if matcher.is_error():
            raise ValueError(matcher.get_error() or "nothing matches it")
        return matcher

    def _num_tokens(self) -> int:
        tokenizer = self.base.tokenizer
        return max(self.base.vocab_size, tokenizer.get_vocab_size() if tokenizer is not None else 0)

    def _wrap_tokenizer(self) -> LLTokenizer:
        assert self.base.tokenizer is not None
        tokenizer = Tokenizer.from_str(self.base.tokenizer.to_str())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        try:
            return LLTokenizer(tokenizer.to_str(), n_vocab=self._num_tokens(), eos_token=self.base.info.eos_token_ids or None)
        except Exception as error:
            raise Unsupported(f"no grammar can be applied to the tokenizer of {self.base.info.name}: {error}", param=PARAM) from error


def spell(grammar: Grammar) -> str:
    """The grammar as llguidance reads it. Raises where it isn't even that."""
    match grammar.kind:
        case "json_object":
            return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=STYLE)
        case "json_schema":
            schema = json.loads(grammar.source)
            schema = {} if schema is True else schema
            if not isinstance(schema, dict):
                raise InvalidRequest(f"the json_schema is {grammar.source[:40]!r}; it must be an object", param=PARAM)
            schema.pop("x-guidance", None)  # the compiler's options; a schema doesn't set them
            return LLMatcher.grammar_from_json_schema(schema, overrides=STYLE)
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.source)
        case "ebnf":
            return LLMatcher.grammar_from_lark(gbnf_to_lark(grammar.source))


def try_out(matcher: LLMatcher, mask: np.ndarray, eos: list[int]) -> None:
    """Walks a few random tokens. Raises where llguidance gives up or a step takes too long: better now than in a batch."""
    rng = random.Random(0)
    for _ in range(TRIAL_TOKENS):
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8)[0], bitorder="little"))
        allowed = allowed[~np.isin(allowed, eos)]
        if matcher.is_stopped() or not len(allowed):
            return
        started = time.thread_time()
        matcher.consume_token(int(rng.choice(allowed)))
        fill_next_token_bitmask(matcher, mask)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        if time.thread_time() - started > SLOW_SECONDS:
            raise ValueError(f"a single step through it takes longer than {SLOW_SECONDS * 1000:.0f} ms; it is too ambiguous")
