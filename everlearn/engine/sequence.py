"""A sampling request and its sequences: all state of sampling lives here.

A request begins as one sequence. When its prompt is computed the other samples fork from it: they share its blocks and copy the
partly filled last one before they write. A sequence that loses its blocks keeps its tokens and computes them again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from everlearn.engine.kvcache import next_digest, root_digest
from everlearn.engine.protocol import Sample, Times, TokenPart, Tokens
from everlearn.engine.routes import recorded
from everlearn.engine.scoring import PromptScores
from everlearn.engine.stops import StopStrings
from everlearn.models.lora import AdapterWeights
from everlearn.models.vision import positions_of
from everlearn.types import Array, ImageSpan, SampledSequence, SampleResult, TopK

if TYPE_CHECKING:
    import torch

    from everlearn.engine.grammar import Compilation
    from everlearn.engine.masks import Follower


class Request:
    """One Sample command while the engine works on it."""

    def __init__(self, command: Sample, max_new: int, eos: Iterable[int] = (), position_axes: int = 3):
        self.command, self.params, self.max_new = command, command.params, max_new
        self.prompt = prompt = command.prompt.numpy().astype(np.int32, copy=False)
        # In three dimensions positions fall behind the count of tokens; from the prompt's end on by the same number.
        planes = bool(command.images) and position_axes == 3
        self.positions_3P = positions_of(len(prompt), command.images) if planes else None
        self.lag = len(prompt) - 1 - int(self.positions_3P[:, -1].max()) if self.positions_3P is not None else 0
        self.features: dict[int, torch.Tensor] = {}  # of images by their place in the command, while the prompt is being computed
        self.image_digests = [digest_of(image) for image in command.images]
        self.root = root_digest(command.cache_salt, command.base, command.version)
        # A grammar's text ends where the model says that it ends, also for clients who switched that off.
        self.stop_tokens = frozenset([*command.params.stop_tokens, *(eos if command.params.grammar is not None else ())])
        self.stop_strings = [s for s in command.params.stop_strings if s]
        self.stop_ids = np.array(sorted(self.stop_tokens), np.int64)
        params = command.params
        self.penalises = bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)
        ids, values = np.array(list(params.logit_bias), np.int64), np.array(list(params.logit_bias.values()), np.float32)
        self.bias = (ids, values) if len(ids) else None
        self.compilation: Compilation | None = None
        self.grammar_seconds = 0.0  # what its grammar has cost the engine's thread, less what it may cost
        self.edited = bool(self.penalises or len(ids) or params.min_tokens or params.grammar is not None)
        self.scores = PromptScores(command, prompt)
        self.adapter: AdapterWeights | None = None
        self.admitted = self.prompt_counted = False
        self.hit_tokens = 0
        # On the monotonic clock; 0: never, or not yet.
        self.expires = self.scheduled = self.first_token = self.last_token = 0.0
        self.arrived = time.monotonic()
        self.sequences = [Sequence(self, 0)]

    @property
    def done(self) -> bool:
        return len(self.sequences) == self.command.num_samples and all(s.stop_reason for s in self.sequences)

    def begin(self) -> None:
        """Its turn has come."""
        self.scheduled = self.scheduled or time.monotonic()

    def times(self) -> Times:
        now = time.monotonic()
        prefill = (self.first_token or now) - self.scheduled if self.scheduled else 0.0
        return Times((self.scheduled or now) - self.arrived, prefill, self.last_token - self.first_token)

    def news(self) -> Tokens:
        """What its samples have drawn since this was asked last."""
        parts = [s.part() for s in self.sequences if s.num_told < len(s.generated) or (s.stop_reason and not s.end_told)]
        return Tokens(self.command.request_id, parts, self.hit_tokens)

    def result(self) -> SampleResult:
        scores = self.scores
        return SampleResult(
            sequences=[s.result() for s in self.sequences],
            prompt_logprobs=scores.prompt_logprobs(),
            topk_prompt_logprobs=scores.topk(),
            target_prompt_logprobs=scores.target_logprobs(),
            prompt_alt_tokens=Array.of(scores.alt_tokens) if scores.alt_tokens is not None else None,
            prompt_alt_logprobs=Array.of(scores.alt_logprobs) if scores.alt_logprobs is not None else None,
            prompt_cache_hit_tokens=self.hit_tokens,
            pooled=scores.pooled(),
        )


def digest_of(image: ImageSpan) -> bytes:
    return blake2b(f"{image.rows}x{image.columns}:".encode() + image.data, digest_size=16).digest()


class TokenCounts:
    """The different tokens of a sequence and how often each was generated (0 for those of the prompt alone)."""

    def __init__(self, prompt: np.ndarray):
        known = np.unique(prompt)
        self.place = {int(token): i for i, token in enumerate(known)}
        self.tokens, self.times = np.zeros(len(known) + 64, np.int64), np.zeros(len(known) + 64, np.float32)
        self.tokens[: len(known)] = known

    def add(self, token: int) -> None:
        i = self.place.setdefault(token, len(self.place))
        if i == len(self.tokens):
            self.tokens, self.times = (np.concatenate([array, np.zeros_like(array)]) for array in (self.tokens, self.times))
        self.tokens[i] = token
        self.times[i] += 1

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 tokens [M] and float32 times [M]; views."""
        return self.tokens[: len(self.place)], self.times[: len(self.place)]


class Sequence:
    """One sample: its tokens, how many of them are computed, and the blocks that hold them."""

    def __init__(self, request: Request, index: int):
        self.request, self.index = request, index
        self.generated: list[int] = []
        self.logprobs: list[float] = []
        self.topk_ids: list[np.ndarray] = []
        self.topk_logprobs: list[np.ndarray] = []
        self.routes: list[tuple[int, np.ndarray]] = []  # first position, experts' ids (routes.py)
        self.blocks: list[int] = []
        self.computed = 0
        self.digests: list[bytes] = []
        self.state: int | None = None  # its slot, where layers keep a state of the whole sequence
        self.stops: StopStrings | None = None
        self.stop_reason = ""
        self.begun = False  # ran, lost its blocks and waits again
        self.num_told, self.end_told = 0, False
        self.counts: TokenCounts | None = None
        self.follower: Follower | None = None  # where it stands in its grammar

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt) + len(self.generated)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """int32 tokens [start, stop) of prompt and continuation."""
        prompt = self.request.prompt
        if stop <= len(prompt):
            return prompt[start:stop]
        split = len(prompt)
        fresh = np.array(self.generated[max(start - split, 0) : stop - split], dtype=np.int32)
        return fresh if start >= split else np.concatenate([prompt[start:], fresh])

    def positions(self, start: int, stop: int) -> np.ndarray:
        """int64 positions of tokens [start, stop): [n], or [3, n] where one of them stands in an image's plane."""
        prompt_3P = self.request.positions_3P
        if prompt_3P is None:
            return np.arange(start, stop)
        later = np.arange(max(start, len(self.request.prompt)), stop) - self.request.lag
        if not self.images(start, stop):
            return np.concatenate([prompt_3P[0, start:stop], later])
        return np.concatenate([prompt_3P[:, start:stop], np.broadcast_to(later, (3, len(later)))], axis=1)

    def position(self, index: int) -> int | np.ndarray:
        """The position of one token: a number, or [3] where it may belong to an image."""
        request = self.request
        if request.positions_3P is None or index >= len(request.prompt):
            return index - request.lag
        return request.positions_3P[:, index] if self.images(index, index + 1) else request.positions_3P[0, index]

    def images(self, start: int, stop: int) -> list[int]:
        """Which of the prompt's images have tokens in [start, stop)."""
        return [i for i, image in enumerate(self.request.command.images) if image.start < stop and start < image.stop]

    def token(self, position: int) -> int:
        split = len(self.request.prompt)
        return self.generated[position - split] if position >= split else int(self.request.prompt[position])

    @property
    def too_short(self) -> bool:
        """Stop tokens may not be drawn yet."""
        return len(self.generated) < self.request.params.min_tokens

    def penalties(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, what repetition divides their logits by, and what presence and frequency subtract from them; [M] each."""
        params = self.request.params
        if self.counts is None:
            self.counts = TokenCounts(self.request.prompt if params.repetition_penalty != 1.0 else self.request.prompt[:0])
            for token in self.generated:
                self.counts.add(token)
        tokens, times = self.counts.arrays()
        subtracted = params.frequency_penalty * times + params.presence_penalty * (times > 0)
        return tokens, np.full(len(tokens), params.repetition_penalty, np.float32), subtracted.astype(np.float32)

    def block_digests(self, num: int, block_size: int) -> list[bytes]:
        """Digests of the first `num` blocks, which must be full."""
        while len(self.digests) < num:
            start = len(self.digests) * block_size
            parent = self.digests[-1] if self.digests else self.request.root
            content = self.tokens(start, start + block_size).tobytes()
            for i in self.images(start, start + block_size):  # image tokens are all alike
                content += self.request.image_digests[i] + (self.request.command.images[i].start - start).to_bytes(8, "little", signed=True)
            self.digests.append(next_digest(parent, content))
        return self.digests[:num]

    def fork(self, index: int) -> Sequence:
        """Another sample of the same computed prompt. The caller takes a reference on every block."""
        other = Sequence(self.request, index)
        other.blocks, other.computed, other.digests = list(self.blocks), self.computed, list(self.digests)
        other.routes = list(self.routes)
        return other

    def append(self, token: int, logprob: float) -> None:
        """Takes a drawn token and decides whether it was the last one."""
        request = self.request
        request.last_token = time.monotonic()
        request.first_token = request.first_token or request.last_token
        self.generated.append(token)
        self.logprobs.append(logprob)
        if self.counts is not None:
            self.counts.add(token)
        if token in request.stop_tokens or (self.stops is not None and self.stops.add(token)):
            self.stop_reason = "stop"
        elif len(self.generated) >= request.max_new:
            self.stop_reason = "length"

    def part(self) -> TokenPart:
        """The tokens that nobody was told of yet."""
        first, self.num_told, self.end_told = self.num_told, len(self.generated), bool(self.stop_reason)
        top_ids, top_logprobs = ([row.tolist() for row in rows[first:]] for rows in (self.topk_ids, self.topk_logprobs))
        return TokenPart(self.index, self.generated[first:], self.logprobs[first:], top_ids, top_logprobs, self.stop_reason)

    def result(self) -> SampledSequence:
        topk = None
        if self.request.command.topk_sample_logprobs:
            k = self.request.command.topk_sample_logprobs
            ids = np.stack(self.topk_ids) if self.topk_ids else np.zeros((0, k), np.int32)
            logprobs = np.stack(self.topk_logprobs) if self.topk_logprobs else np.zeros((0, k), np.float32)
            topk = TopK(Array.of(ids), Array.of(logprobs))
        tokens, logprobs_N = np.array(self.generated, dtype=np.int32), np.array(self.logprobs, dtype=np.float32)
        routing = recorded(self.routes, self.num_tokens)
        return SampledSequence(self.stop_reason, Array.of(tokens), Array.of(logprobs_N), topk, routing)
