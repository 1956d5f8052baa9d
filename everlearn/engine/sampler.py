"""The sampler: schedule, run, postprocess.

Every step computes one packed row: the next token of each running sequence and, within a budget, chunks of prompts. A sequence
waits, runs, and ends; state lives on it (sequence.py). Tenants take turns at the batch. When blocks run out the youngest sequence
gives up its own and computes them again later: it costs time, never tokens, because noise depends on the seed and the position alone.
The sampler knows nothing of HTTP, of text beyond stop strings, or of training; the adapter's weights are lent by the bank.
"""

from __future__ import annotations

import heapq
import logging
import os
import time
from bisect import bisect_left
from collections import deque

import torch

from everlearn.config import Settings
from everlearn.engine.admission import admit
from everlearn.engine.blocks import Blocks
from everlearn.engine.drawing import Drawn, draw, score
from everlearn.engine.fairness import FairQueue
from everlearn.engine.faults import OUT_OF_MEMORY, as_error
from everlearn.engine.grammar import Grammars
from everlearn.engine.graphs import DecodeGraphs
from everlearn.engine.kvcache import BlockPool, KVCache, StateCache, num_blocks_for, num_states_for
from everlearn.engine.masks import Masks, advance
from everlearn.engine.paged import Chunk, PagedBatch, segments_of
from everlearn.engine.protocol import STEP_TOKENS, Completed, Failed, Sample, Tokens
from everlearn.engine.scoring import LOGIT_ROWS
from everlearn.engine.sequence import Request, Sequence
from everlearn.engine.sight import of_chunks, see
from everlearn.engine.stops import StopStrings
from everlearn.errors import EverlearnError, InvalidRequest, TooLarge
from everlearn.models.bank import Bank
from everlearn.models.load import BaseModel

log = logging.getLogger(__name__)
# A CPU reaches its full speed with a few rows; a longer step would only make decoding and cancellation wait.
CPU_PREFILL, GPU_PREFILL = 256, 2048
# Prompt tokens that a stop string's decoder sees before the first drawn token.
STOP_CONTEXT = 4


class Sampler:
    """All sampling on one base model."""

    def __init__(self, base: BaseModel, settings: Settings, bank: Bank):
        engine = settings.engine
        self.base, self.bank = base, bank
        self.max_batch = engine.max_batch
        self.prefill_tokens = engine.prefill_tokens or (CPU_PREFILL if base.device.type == "cpu" else GPU_PREFILL)
        form, item = base.cache_form, base.dtype.itemsize
        self.token_bytes = form.floats * item
        self.states = StateCache(form, num_states_for(form, engine.max_batch, item, base.device), base.device, base.dtype)
        most = engine.max_batch * base.info.max_context
        num_blocks = num_blocks_for(engine.kv_tokens, engine.block_size, self.token_bytes, base.device, most)
        self.pool = BlockPool(num_blocks, engine.block_size)
        self.cache = KVCache(form, num_blocks, engine.block_size, base.device, base.dtype)
        self.graphs = DecodeGraphs(base) if base.device.type == "cuda" and base.steps_can_be_recorded else None
        self.blocks = Blocks(self.pool, self.cache, self.states)
        threads = engine.threads or os.cpu_count() or 1
        self.grammars = Grammars(base, engine.grammar_seconds, engine.grammar_cache, engine.grammar, threads)
        self.masks = Masks(self.grammars)
        self.compiling: list[Request] = []
        self.requests: dict[str, Request] = {}
        self.running: list[Sequence] = []
        self.begun: deque[Sequence] = deque()  # ran and lost their blocks: they go before all others
        self.waiting: FairQueue[Sequence] = FairQueue()
        self.deadlines: list[tuple[float, str]] = []  # a heap; entries of requests that have ended are passed over
        self.streaming: dict[str, Request] = {}  # requests that want to hear of this step
        self.events: list[Completed | Failed] = []
        self.step_tokens, self.step_sizes = 0, [0] * (len(STEP_TOKENS) + 1)
        self.sampled_tokens = self.prompt_tokens = self.prefix_hit_tokens = self.preemptions = self.deadlines_passed = 0

    # --- what the engine calls ---

    def add(self, command: Sample) -> None:
        """Queues a request. Raises a UserError where it can't be honoured."""
        if command.request_id in self.requests:
            return
        request = Request(command, admit(command, self.base, self.pool.num_tokens), self.base.info.eos_token_ids, self.base.position_axes)
        if command.params.grammar is not None:
            request.compilation = self.grammars.compile(command.params.grammar, command.cache_salt)
        self.requests[command.request_id] = request
        if command.deadline:
            request.expires = time.monotonic() + command.deadline
            heapq.heappush(self.deadlines, (request.expires, command.request_id))
        self.compiling.append(request)
        self._take_compiled()

    def cancel(self, request_id: str) -> bool:
        """Frees everything a request holds; False if it isn't here."""
        request = self.requests.get(request_id)
        if request is not None:
            self._fail(request, InvalidRequest("the request was cancelled", code="cancelled"))
        return request is not None

    def has_work(self) -> bool:
        self._take_compiled()
        return bool(self.running or self.begun or self.waiting or self.events or self._expired())

    def step(self) -> list[Tokens | Completed | Failed]:
        """One packed row, what was drawn for those who stream, and what finished by it."""
        self._take_compiled()
        self._end_expired()
        with torch.inference_mode():
            chunks = self._seen(self._schedule())
            if chunks:
                tokens = sum(chunk.stop - chunk.start for chunk in chunks)
                self.step_tokens += tokens
                self.step_sizes[bisect_left(STEP_TOKENS, tokens)] += 1
                try:
                    self._postprocess(chunks, *self._run(chunks))
                except OUT_OF_MEMORY as error:
                    self._fail_largest(chunks, error)
                except Exception as error:
                    # Nothing says whose fault it was; the engine and everything outside this step live on.
                    reason = as_error(error, f"in a sampling step of {len(chunks)} sequences")
                    log.exception("a sampling step of %d sequences failed", len(chunks))
                    for chunk in chunks:
                        self._fail(chunk.sequence.request, reason)
        events = [*(request.news() for request in self.streaming.values()), *self.events]
        self.streaming, self.events = {}, []
        return events

    def stats(self) -> dict[str, int]:
        """Numbers for the heartbeat; safe to read from another thread."""
        return {
            "running": len(self.running),
            "waiting": len(self.begun) + len(self.waiting),
            "compiling": len(self.compiling),
            "kv_blocks_used": self.pool.num_used,
            "kv_blocks_total": self.pool.num_blocks - 1,
            "sampled_tokens": self.sampled_tokens,
            "prompt_tokens": self.prompt_tokens,
            "prefix_hit_tokens": self.prefix_hit_tokens,
            "preemptions": self.preemptions,
            "deadlines_passed": self.deadlines_passed,
            "grammar_compiles": self.grammars.compiles,
            "step_tokens": self.step_tokens,
        }

    # --- schedule ---

    def _take_compiled(self) -> None:
        """Requests whose grammar is ready, or that have none, begin to wait for their turn."""
        if not self.compiling:
            return
        self.grammars.tend()
        for request in [r for r in self.compiling if r.compilation is None or r.compilation.done]:
            if request.compilation is not None and request.compilation.error is not None:
                self._fail(request, request.compilation.error)
            else:
                self.compiling.remove(request)
                self.waiting.append(request.command.cache_salt, request.sequences[0])

    def _schedule(self) -> list[Chunk]:
        """What to compute now. Running sequences go first, in order; then waiting ones as long as batch, budget and blocks allow."""
        chunks: list[Chunk] = []
        budget = self.prefill_tokens
        coming: set[bytes] = set()  # full blocks of prompts that this step computes
        for sequence in list(self.running):
            start, stop = sequence.computed, sequence.num_tokens
            if stop - start > 1:
                # A long prompt leaves half of the step to those who wait behind it.
                shared = self.waiting and len(self.running) < self.max_batch
                stop = min(stop, start + (-(-budget // 2) if shared else budget))
            if start >= stop or not sequence.blocks or not self._reserve(sequence, stop):
                continue
            budget -= stop - start
            chunks.append(self._chunk(sequence, stop, coming))
        passed_over: list[Sequence] = []
        while (self.begun or self.waiting) and len(self.running) < self.max_batch and budget > 0 and len(passed_over) < self.max_batch:
            sequence = self.begun.popleft() if self.begun else self.waiting.pop()[1]
            if not self._admit(sequence.request):
                continue
            if not self.blocks.match(sequence, coming):
                passed_over.append(sequence)
                continue
            stop = min(sequence.num_tokens, sequence.computed + budget)
            # One spare block for each running sequence: admitting must not be what preempts them a moment later.
            if chunks and self.blocks.missing(sequence, stop) + len(self.running) > self.pool.num_free:
                self.blocks.give_back(sequence)
                passed_over.append(sequence)
                break
            self._reserve(sequence, stop)
            self.running.append(sequence)
            sequence.request.begin()
            budget -= stop - sequence.computed
            chunks.append(self._chunk(sequence, stop, coming))
        self._put_back(passed_over)
        chunks.sort(key=lambda c: c.sequence.request.command.version)
        return chunks

    def _chunk(self, sequence: Sequence, stop: int, coming: set[bytes]) -> Chunk:
        coming.update(self.blocks.coming(sequence, stop))
        self.waiting.charge(sequence.request.command.cache_salt, stop - sequence.computed)
        return Chunk(sequence, sequence.computed, stop)

    def _put_back(self, sequences: list[Sequence]) -> None:
        """They are the next ones again, in this order."""
        for sequence in reversed(sequences):
            if sequence.begun:
                self.begun.appendleft(sequence)
            else:
                self.waiting.put_back(sequence.request.command.cache_salt, sequence)

    def _admit(self, request: Request) -> bool:
        """Borrows the adapter for a request's first sequence; False (and the request has failed) where it can't be had."""
        if not request.admitted:
            try:
                request.adapter = self.bank.acquire(request.command.version, request.command.folder)
            except Exception as error:
                self._fail(request, as_error(error, "while its adapter was read"))
                return False
            request.admitted = True
        return True

    def _reserve(self, sequence: Sequence, stop: int) -> bool:
        """Gives the sequence every block it needs to compute up to `stop`. Others lose theirs for it, those that wait before those
        that run and youngest first; False if the sequence itself was the youngest."""
        while self.blocks.missing(sequence, stop) > self.pool.num_free:
            victim = next(reversed(self.blocks.forks), None) or self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        self.blocks.extend(sequence, stop)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.blocks.give_back(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
            sequence.begun = True
            self.begun.appendleft(sequence)

    # --- run ---

    def _seen(self, chunks: list[Chunk]) -> list[Chunk]:
        """The chunks, their images seen; a request with an image that can't be read fails by itself."""
        tower = self.base.vision
        if tower is None:
            return chunks
        for chunk in chunks:
            try:
                see(tower, chunk)
            except Exception as error:
                self._fail(chunk.sequence.request, as_error(error, "while its images were read"))
        return [chunk for chunk in chunks if not chunk.sequence.stop_reason]

    def _run(self, chunks: list[Chunk]) -> tuple[PagedBatch, torch.Tensor]:
        batch = PagedBatch(chunks, self.cache, self.states, self.base.device, self.base.dtype)
        visual = of_chunks(self.base.vision, chunks, batch.stops) if batch.shows else None
        hidden_TD = self.graphs.hidden(batch) if self.graphs is not None and visual is None else None
        return batch, self.base.hidden(batch.tokens_T, batch.positions_T, batch, visual) if hidden_TD is None else hidden_TD

    # --- postprocess ---

    def _postprocess(self, chunks: list[Chunk], batch: PagedBatch, hidden_TD: torch.Tensor) -> None:
        """Scores prompts, draws tokens for sequences that are computed to their end, retires those that stop."""
        drawing: list[tuple[Chunk, int]] = []
        batch.keep_routes(chunks)
        for chunk, stop_row in zip(chunks, batch.stops, strict=True):
            sequence, request = chunk.sequence, chunk.sequence.request
            if sequence.stop_reason:  # another sample of this request has just failed it
                continue
            self._computed(chunk)
            if not request.scores.complete:
                first_row = stop_row - (chunk.stop - chunk.start)
                if error := score(request, self.base.head, hidden_TD[first_row:stop_row], chunk.start):
                    self._fail(request, error)
                    continue
            if chunk.stop == sequence.num_tokens and request.max_new:
                drawing.append((chunk, stop_row - 1))
            elif chunk.stop == sequence.num_tokens:
                self._finish_unsampled(request)
        for first in range(0, len(drawing), LOGIT_ROWS):
            part = drawing[first : first + LOGIT_ROWS]
            stops = list(range(1, len(part) + 1))
            rows = torch.tensor([row for _, row in part], device=hidden_TD.device)
            logits_NV = self.base.head.logits(hidden_TD[rows], segments_of([chunk for chunk, _ in part], stops))
            for sequence, drawn in draw([self._samples(chunk.sequence) for chunk, _ in part], logits_NV, self.masks):
                if sequence.stop_reason:  # another sample of this request has just failed it
                    continue
                if isinstance(drawn, InvalidRequest):
                    self._fail(sequence.request, drawn)
                else:
                    self._append(sequence, drawn)

    def _computed(self, chunk: Chunk) -> None:
        sequence, request = chunk.sequence, chunk.sequence.request
        if not sequence.generated and not request.prompt_counted:
            request.prompt_counted, request.hit_tokens = True, chunk.start
            self.prompt_tokens += len(request.prompt)
            self.prefix_hit_tokens += chunk.start
        if request.features and chunk.stop >= len(request.prompt):
            request.features.clear()
        self.blocks.computed(sequence, chunk.stop)

    def _samples(self, sequence: Sequence) -> list[Sequence]:
        """The sequences that draw from this one's logits: itself, and at a prompt's end the other samples, next in their lane."""
        request = sequence.request
        if sequence.generated or len(request.sequences) == request.command.num_samples:
            return [sequence]
        forks = [self.blocks.fork(sequence, index) for index in range(1, request.command.num_samples)]
        request.sequences += forks
        self._put_back(forks)
        return request.sequences

    def _append(self, sequence: Sequence, drawn: Drawn) -> None:
        request = sequence.request
        if request.stop_strings and sequence.stops is None and self.base.tokenizer is not None:
            sequence.stops = StopStrings(self.base.tokenizer, request.stop_strings, request.prompt[-STOP_CONTEXT:].tolist())
        sequence.append(drawn.token, drawn.logprob)
        if drawn.top_ids is not None and drawn.top_logprobs is not None:
            sequence.topk_ids.append(drawn.top_ids)
            sequence.topk_logprobs.append(drawn.top_logprobs)
        self.sampled_tokens += 1
        if request.compilation is not None and sequence.stop_reason != "stop" and (error := advance(sequence, drawn.token)):
            self._fail(request, error)
            return
        if request.command.stream:
            self.streaming[request.command.request_id] = request
        if sequence.stop_reason:
            self._remove(sequence)
            if request.done:
                self._complete(request)

    # --- the end of a request ---

    def _finish_unsampled(self, request: Request) -> None:
        """max_tokens 0: the prompt's scores are all that was asked for."""
        self._samples(request.sequences[0])
        self._end(request, "length")

    def _end_expired(self) -> None:
        """Requests whose deadline has passed end with what they have."""
        while self._expired():
            expires, request_id = heapq.heappop(self.deadlines)
            request = self.requests.get(request_id)
            if request is not None and request.expires == expires:
                self.deadlines_passed += 1
                self._end(request, "deadline")

    def _expired(self) -> bool:
        return bool(self.deadlines) and self.deadlines[0][0] <= time.monotonic()

    def _end(self, request: Request, reason: str) -> None:
        """Ends what has not ended yet; samples that were never begun have no tokens."""
        request.sequences += [Sequence(request, index) for index in range(len(request.sequences), request.command.num_samples)]
        for sequence in request.sequences:
            sequence.stop_reason = sequence.stop_reason or reason
            self._remove(sequence)
        if request.command.stream:
            self.streaming[request.command.request_id] = request
        self._complete(request)

    def _complete(self, request: Request) -> None:
        self._close(request)
        self.events.append(Completed(request.command.request_id, request.result(), request.times()))

    def _remove(self, sequence: Sequence) -> None:
        self.blocks.give_back(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.begun:
            self.begun.remove(sequence)
        else:
            self.waiting.remove(sequence.request.command.cache_salt, sequence)

    def _close(self, request: Request) -> None:
        del self.requests[request.command.request_id]
        if request in self.compiling:
            self.compiling.remove(request)
        if request.admitted:
            self.bank.release(request.command.version)

    def _fail(self, request: Request, error: EverlearnError) -> None:
        if request.command.request_id not in self.requests:
            return
        for sequence in request.sequences:
            sequence.stop_reason = sequence.stop_reason or "failed"
            self._remove(sequence)
        self.streaming.pop(request.command.request_id, None)
        self._close(request)
        self.events.append(Failed(request.command.request_id, error.code, error.message, error.param))

    def _fail_largest(self, chunks: list[Chunk], error: Exception) -> None:
        """Out of memory: the largest chunk is given up, the others run again in the next step. Some may have been computed to their
        end without a token drawn from it; their last position is computed once more."""
        largest = max(chunks, key=lambda c: c.stop - c.start).sequence.request
        for sequence in [s for chunk in chunks for s in chunk.sequence.request.sequences]:
            if sequence.state is not None:
                self._preempt(sequence)  # some layers have read their tokens and some have not
            sequence.computed = min(sequence.computed, sequence.num_tokens - 1)
        self._fail(largest, TooLarge(f"memory ran out in this step: {error}; shorten the prompt or lower engine.prefill_tokens"))
