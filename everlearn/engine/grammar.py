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

import logging
import math
import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from functools import cached_property

from everlearn.engine.fairness import FairQueue
from everlearn.engine.matching import PARAM, Compiler, Matcher, check_installed, make_compiler, num_words
from everlearn.errors import EverlearnError, InvalidRequest, TooLarge, Unavailable, Unsupported
from everlearn.models.load import BaseModel
from everlearn.types import Grammar

log = logging.getLogger(__name__)
# A regular expression can say more in a byte than a schema; the conversion of GBNF is Python and quadratic.
MAX_SOURCE = {"json_schema": 2**17, "json_object": 2**17, "lark": 2**17, "regex": 2**14, "ebnf": 2**14}
THREADS = 2
THREAD_NAME = "grammar"
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


class Compilation:
    """One grammar on its way: `matcher` (at its start, never to be advanced itself) or `error` once it is `done`."""

    def __init__(self, grammar: Grammar):
        self.grammar = grammar
        self.matcher: Matcher | None = None
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
    """All grammars for one base model's tokenizer. `library`: which one compiles; `fill_threads`: on how many it fills a batch's masks.
    Raises Unsupported where that library isn't installed."""

    def __init__(self, base: BaseModel, seconds: float, kept: int, library: str = "llguidance", fill_threads: int = 1):
        check_installed(library)
        self.base, self.seconds, self.kept, self.library, self.fill_threads = base, seconds, kept, library, fill_threads
        self.compiles = 0
        self.lock = threading.Lock()
        self.compiler_lock = threading.Lock()
        self.compiler: Compiler | None = None
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
        return num_words(self.base)

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
            made = found[1]
            before = threading.stack_size(STACK_BYTES)
            try:
                threading.Thread(target=self._work, args=found, name=THREAD_NAME, daemon=True).start()
                self.threads += 1
            except RuntimeError as error:  # limits of the system
                self.compiling.remove(made)
                self._forget(made)
                made.error = Unavailable(f"no thread for compiling the {made.grammar.kind}: {error}; send this again later", param=PARAM)
            finally:
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

    def _keep_late(self, tenant: str, made: Compilation, matcher: Matcher | None, error: EverlearnError | None) -> None:
        """What came of it after its request was told to come again: the next one finds it."""
        if made in self.late:
            self.late.remove(made)
            kept = self._remember(Compilation(made.grammar))
            kept.seconds = made.seconds
            kept.matcher, kept.error = matcher, error
            if matcher is not None:
                self._count(tenant, kept)

    def _try(self, made: Compilation) -> tuple[Matcher | None, EverlearnError | None]:
        begun = time.thread_time()
        try:
            with self.compiler_lock:
                self.compiler = self.compiler or make_compiler(self.library, self.base, self.fill_threads)
            begun, made.clock = time.thread_time(), time.pthread_getcpuclockid(threading.get_ident())
            made.begun, made.started = begun, time.monotonic()
            return self.compiler.compile(made.grammar), None
        except EverlearnError as error:
            return None, error
        except BaseException as error:  # noqa: BLE001 - a panic in Rust is no Exception, and it is this request's affair alone
            reason = str(error).splitlines() or [type(error).__name__]
            return None, InvalidRequest(f"the {made.grammar.kind} can't be used: {reason[0][:300]}", param=PARAM)
        finally:
            made.seconds = time.thread_time() - begun
