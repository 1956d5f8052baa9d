"""The sampler: schedule, run, postprocess.

Every step computes one packed row: the next token of each running sequence and, within a budget, chunks of prompts. A sequence
waits, runs, and ends; state lives on it (sequence.py). When blocks run out the youngest sequence gives up its own and computes them
again later: it costs time, never tokens, because noise depends on the seed and the position alone. The sampler knows nothing of
HTTP, of text beyond stop strings, or of training; the adapter's weights are lent by the bank.
"""

from __future__ import annotations

import logging
from collections import deque

import numpy as np
import torch

from everlearn.config import Settings
from everlearn.engine.admission import admit
from everlearn.engine.faults import as_error
from everlearn.engine.kvcache import BlockPool, KVCache, num_blocks_for
from everlearn.engine.logits import Draws, noise_keys, pick, top_logprobs
from everlearn.engine.paged import Chunk, PagedBatch, segments_of
from everlearn.engine.protocol import Completed, Failed, Sample
from everlearn.engine.scoring import LOGIT_ROWS, MISSING_LOGPROB
from everlearn.engine.sequence import Request, Sequence
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
        self.base, self.bank, self.block_size = base, bank, engine.block_size
        self.max_batch = engine.max_batch
        self.prefill_tokens = engine.prefill_tokens or (CPU_PREFILL if base.device.type == "cpu" else GPU_PREFILL)
        token_bytes = 2 * base.num_layers * base.num_kv_heads * base.head_dim * base.dtype.itemsize
        most = engine.max_batch * base.info.max_context
        num_blocks = num_blocks_for(engine.kv_tokens, engine.block_size, token_bytes, base.device, most)
        self.pool = BlockPool(num_blocks, engine.block_size)
        heads_GD = (base.num_kv_heads, base.head_dim)
        self.cache = KVCache(base.num_layers, num_blocks, engine.block_size, heads_GD, base.device, base.dtype)
        self.requests: dict[str, Request] = {}
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.events: list[Completed | Failed] = []
        self.sampled_tokens = self.prompt_tokens = self.prefix_hit_tokens = self.preemptions = 0

    # --- what the engine calls ---

    def add(self, command: Sample) -> None:
        """Queues a request. Raises a UserError where it can't be honoured."""
        if command.request_id in self.requests:
            return
        request = Request(command, admit(command, self.base, self.pool.num_tokens))
        self.requests[command.request_id] = request
        self.waiting.append(request.sequences[0])

    def cancel(self, request_id: str) -> bool:
        """Frees everything a request holds; False if it isn't here."""
        request = self.requests.get(request_id)
        if request is not None:
            self._fail(request, InvalidRequest("the request was cancelled", code="cancelled"))
        return request is not None

    def has_work(self) -> bool:
        return bool(self.running or self.waiting or self.events)

    def step(self) -> list[Completed | Failed]:
        """One packed row, and what finished by it."""
        with torch.inference_mode():
            chunks = self._schedule()
            if chunks:
                try:
                    self._postprocess(chunks, *self._run(chunks))
                except torch.OutOfMemoryError as error:
                    self._fail_largest(chunks, error)
                except Exception as error:
                    # Nothing says whose fault it was; the engine and everything outside this step live on.
                    reason = as_error(error, f"in a sampling step of {len(chunks)} sequences")
                    log.exception("a sampling step of %d sequences failed", len(chunks))
                    for chunk in chunks:
                        self._fail(chunk.sequence.request, reason)
        events, self.events = self.events, []
        return events

    def stats(self) -> dict[str, int]:
        """Numbers for the heartbeat; safe to read from another thread."""
        return {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "kv_blocks_used": self.pool.num_used,
            "kv_blocks_total": self.pool.num_blocks - 1,
            "sampled_tokens": self.sampled_tokens,
            "prompt_tokens": self.prompt_tokens,
            "prefix_hit_tokens": self.prefix_hit_tokens,
            "preemptions": self.preemptions,
        }

    # --- schedule ---

    def _schedule(self) -> list[Chunk]:
        """What to compute now. Running sequences go first, in order; then waiting ones as long as batch, budget and blocks allow."""
        chunks: list[Chunk] = []
        budget = self.prefill_tokens
        coming: set[bytes] = set()  # full blocks of prompts that this step computes
        for sequence in list(self.running):
            start, stop = sequence.computed, sequence.num_tokens
            if stop - start > 1:
                stop = min(stop, start + budget)
            if start >= stop or not sequence.blocks or not self._reserve(sequence, stop):
                continue
            budget -= stop - start
            chunks.append(self._chunk(sequence, stop, coming))
        passed_over: list[Sequence] = []
        while self.waiting and len(self.running) < self.max_batch and budget > 0 and len(passed_over) < self.max_batch:
            sequence = self.waiting.popleft()
            if not self._admit(sequence.request):
                continue
            if self._prefix_is_coming(sequence, coming):
                passed_over.append(sequence)
                continue
            stop = min(sequence.num_tokens, sequence.computed + budget)
            # One spare block for each running sequence: admitting must not be what preempts them a moment later.
            if chunks and self._missing_blocks(sequence, stop) + len(self.running) > self.pool.num_free:
                self._give_back(sequence)
                self.waiting.appendleft(sequence)
                break
            self._reserve(sequence, stop)
            self.running.append(sequence)
            budget -= stop - sequence.computed
            chunks.append(self._chunk(sequence, stop, coming))
        self.waiting.extendleft(reversed(passed_over))
        chunks.sort(key=lambda c: c.sequence.request.command.version)
        return chunks

    def _chunk(self, sequence: Sequence, stop: int, coming: set[bytes]) -> Chunk:
        if stop - sequence.computed > 1:
            full = stop // self.block_size
            coming.update(sequence.block_digests(full, self.block_size)[sequence.computed // self.block_size :])
        return Chunk(sequence, sequence.computed, stop)

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

    def _prefix_is_coming(self, sequence: Sequence, coming: set[bytes]) -> bool:
        """Takes what the prefix cache holds for a sequence without blocks. True if the next block is being computed for a
        neighbour: a step later it is free."""
        if sequence.blocks:
            return False
        limit = sequence.num_tokens - 1
        if not sequence.request.scores.complete:
            limit = min(limit, sequence.request.scores.next_row)
        digests = sequence.block_digests(limit // self.block_size, self.block_size)
        num_known = 0
        while num_known < len(digests) and digests[num_known] in self.pool.block_of:
            num_known += 1
        if num_known < len(digests) and digests[num_known] in coming:
            return True
        sequence.blocks = self.pool.match(digests)
        sequence.computed = len(sequence.blocks) * self.block_size
        return False

    def _missing_blocks(self, sequence: Sequence, stop: int) -> int:
        """Blocks to allocate before tokens up to `stop` can be written; a shared last block counts, it is copied."""
        missing = -(-stop // self.block_size) - len(sequence.blocks)
        return missing + self._must_copy(sequence)

    def _must_copy(self, sequence: Sequence) -> bool:
        index = sequence.computed // self.block_size
        return index < len(sequence.blocks) and self.pool.references[sequence.blocks[index]] > 1

    def _reserve(self, sequence: Sequence, stop: int) -> bool:
        """Gives the sequence every block it needs to compute up to `stop`. Others lose theirs for it, youngest first; False if the
        sequence itself was the youngest."""
        while self._missing_blocks(sequence, stop) > self.pool.num_free:
            victim = next((s for s in reversed(self.waiting) if s.blocks), None) or self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        if self._must_copy(sequence):
            index = sequence.computed // self.block_size
            block = self.pool.allocate()
            self.cache.copy_blocks([(sequence.blocks[index], block)])
            self.pool.release(sequence.blocks[index])
            sequence.blocks[index] = block
        while len(sequence.blocks) * self.block_size < stop:
            sequence.blocks.append(self.pool.allocate())
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._give_back(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
            self.waiting.appendleft(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        """Releases blocks, last first: the beginning of a prefix is the likeliest to be wanted again."""
        for block in reversed(sequence.blocks):
            self.pool.release(block)
        sequence.blocks, sequence.computed = [], 0

    # --- run ---

    def _run(self, chunks: list[Chunk]) -> tuple[PagedBatch, torch.Tensor]:
        batch = PagedBatch(chunks, self.cache, self.base.device, self.base.dtype)
        return batch, self.base.hidden(batch.tokens_T, batch.positions_T, batch)

    # --- postprocess ---

    def _postprocess(self, chunks: list[Chunk], batch: PagedBatch, hidden_TD: torch.Tensor) -> None:
        """Scores prompts, draws tokens for sequences that are computed to their end, retires those that stop."""
        drawing: list[tuple[Chunk, int]] = []
        for chunk, stop_row in zip(chunks, batch.stops, strict=True):
            sequence, request = chunk.sequence, chunk.sequence.request
            if sequence.stop_reason:  # another sample of this request has just failed it
                continue
            self._computed(chunk)
            if not request.scores.complete:
                first_row = stop_row - (chunk.stop - chunk.start)
                if not request.scores.add(self.base.head, hidden_TD[first_row:stop_row], chunk.start, request.adapter):
                    self._fail_diverged(request)
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
            self._draw([self._samples(chunk.sequence) for chunk, _ in part], logits_NV)

    def _computed(self, chunk: Chunk) -> None:
        """The chunk's keys and values are in the cache: its full blocks can be found from now on."""
        sequence = chunk.sequence
        if not sequence.generated and not sequence.request.prompt_counted:
            request = sequence.request
            request.prompt_counted, request.hit_tokens = True, chunk.start
            self.prompt_tokens += len(request.prompt)
            self.prefix_hit_tokens += chunk.start
        sequence.computed = chunk.stop
        first, full = chunk.start // self.block_size, chunk.stop // self.block_size
        if full > first:
            digests = sequence.block_digests(full, self.block_size)
            for index in range(first, full):
                self.pool.register(sequence.blocks[index], digests[index])

    def _samples(self, sequence: Sequence) -> list[Sequence]:
        """The sequences that draw from this one's logits: itself, and at the end of a prompt the request's other samples."""
        request = sequence.request
        if sequence.generated or len(request.sequences) == request.command.num_samples:
            return [sequence]
        for index in range(1, request.command.num_samples):
            for block in sequence.blocks:
                self.pool.share(block)
            request.sequences.append(sequence.fork(index))
        self.waiting.extendleft(reversed(request.sequences[1:]))
        return request.sequences

    def _draw(self, groups: list[list[Sequence]], logits_NV: torch.Tensor) -> None:
        """One token for every sequence; the sequences of group i draw from row i."""
        sequences = [s for group in groups for s in group]
        source = [i for i, group in enumerate(groups) for _ in group]
        for first in range(0, len(sequences), LOGIT_ROWS):
            part, rows = sequences[first : first + LOGIT_ROWS], source[first : first + LOGIT_ROWS]
            same = len(rows) == len(logits_NV) == len(sequences)
            part_NV = logits_NV if same else logits_NV[torch.tensor(rows, device=logits_NV.device)]
            self._draw_rows(part, part_NV)

    def _draw_rows(self, sequences: list[Sequence], logits_NV: torch.Tensor) -> None:
        params = [s.request.params for s in sequences]
        keys = noise_keys([p.seed for p in params], [s.index for s in sequences], [len(s.generated) for s in sequences])
        draws = Draws(keys, [p.temperature for p in params], [p.top_k for p in params], [p.top_p for p in params])
        picked = pick(logits_NV, draws)
        num_top = max(s.request.command.topk_sample_logprobs for s in sequences)
        if num_top:
            top_ids, top_values = top_logprobs(logits_NV, picked.log_total_N, num_top)
        # One transfer a step: ids are exact in float64.
        packed = torch.stack([picked.tokens_N.double(), picked.logprobs_N.double(), picked.log_total_N.double()]).cpu().numpy()
        for i, sequence in enumerate(sequences):
            if sequence.stop_reason:
                continue
            if not np.isfinite(packed[1:, i]).all():
                self._fail_diverged(sequence.request)
                continue
            if num_top:
                self._keep_top(sequence, top_ids[i], top_values[i])
            self._append(sequence, int(packed[0, i]), float(packed[1, i]))

    def _keep_top(self, sequence: Sequence, ids: np.ndarray, values: np.ndarray) -> None:
        k = sequence.request.command.topk_sample_logprobs
        if k:
            fill = k - min(k, len(ids))
            sequence.topk_ids.append(np.pad(ids[:k], (0, fill)))
            sequence.topk_logprobs.append(np.pad(values[:k], (0, fill), constant_values=MISSING_LOGPROB))

    def _append(self, sequence: Sequence, token: int, logprob: float) -> None:
        request = sequence.request
        if request.stop_strings and sequence.stops is None and self.base.tokenizer is not None:
            sequence.stops = StopStrings(self.base.tokenizer, request.stop_strings, request.prompt[-STOP_CONTEXT:].tolist())
        sequence.append(token, logprob)
        self.sampled_tokens += 1
        if sequence.stop_reason:
            self._remove(sequence)
            if request.done:
                self._complete(request)

    # --- the end of a request ---

    def _finish_unsampled(self, request: Request) -> None:
        """max_tokens 0: the prompt's scores are all that was asked for."""
        for sequence in self._samples(request.sequences[0]):
            sequence.stop_reason = "length"
            self._remove(sequence)
        self._complete(request)

    def _complete(self, request: Request) -> None:
        self._close(request)
        self.events.append(Completed(request.command.request_id, request.result()))

    def _remove(self, sequence: Sequence) -> None:
        self._give_back(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _close(self, request: Request) -> None:
        del self.requests[request.command.request_id]
        if request.admitted:
            self.bank.release(request.command.version)

    def _fail(self, request: Request, error: EverlearnError) -> None:
        if request.command.request_id not in self.requests:
            return
        for sequence in request.sequences:
            sequence.stop_reason = sequence.stop_reason or "failed"
            self._remove(sequence)
        self._close(request)
        self.events.append(Failed(request.command.request_id, error.code, error.message, error.param))

    def _fail_diverged(self, request: Request) -> None:
        version = request.command.version or "the base model"
        self._fail(request, InvalidRequest(f"{version}: the logits are not finite, its weights have diverged; sample an earlier version"))

    def _fail_largest(self, chunks: list[Chunk], error: Exception) -> None:
        """Out of memory: the largest chunk is given up, the others run again in the next step. Some may have been computed to their
        end without a token drawn from it; their last position is computed once more."""
        largest = max(chunks, key=lambda c: c.stop - c.start).sequence.request
        for sequence in [s for chunk in chunks for s in chunk.sequence.request.sequences]:
            sequence.computed = min(sequence.computed, sequence.num_tokens - 1)
        message = f"the device ran out of memory on this request: {error}; shorten the prompt or lower engine.prefill_tokens"
        self._fail(largest, TooLarge(message))
