"""What a request wants to know of its own prompt, filled in as the prompt is computed.

The hidden state of position i scores token i + 1, so row i of everything below speaks of prompt token i + 1. Rows may arrive in
chunks and, after a preemption, resume where they stopped; `next_row` is the first one that is missing. A prefix that needs no
scores may come from the prefix cache, later ones may not. Pooling reads hidden states themselves, that of the last token included, which
scores nothing: there is one row more.

Axes: P prompt tokens, R rows of one chunk, D hidden size, K alternatives, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

from everlearn.engine.logits import ALTERNATIVES, draw, noise_keys, top_logprobs
from everlearn.engine.protocol import Sample
from everlearn.models.head import Head
from everlearn.models.lora import AdapterWeights, Segment
from everlearn.types import Array, TopK

# Rows whose full logits exist at one time: 64 x 49,152 floats are 12 MiB.
LOGIT_ROWS = 64
MISSING_LOGPROB = -99999.0
MEAN, LAST = "mean", "last"


class PromptScores:
    def __init__(self, command: Sample, prompt: np.ndarray):
        self.command, self.prompt = command, prompt
        self.num_rows = len(prompt) - 1
        self.end = len(prompt) if command.pooling else self.num_rows
        last_n = command.prompt_logprobs_last_n
        self.first_own = 0 if last_n is None else max(self.num_rows - last_n, 0)
        self.targets = command.target_prompt_logprobs.numpy() if command.target_prompt_logprobs is not None else None
        self.next_row = self._first_row()
        self.sum_D: np.ndarray | None = None  # of the hidden states that are pooled
        rows, alternatives, topk = self.num_rows, command.prompt_alt_tokens_k, command.topk_prompt_logprobs
        self.own = np.full(len(prompt), np.nan, np.float32) if command.prompt_logprobs else None
        self.target = np.full(self.targets.shape, np.nan, np.float32) if self.targets is not None else None
        self.topk_ids = np.zeros((len(prompt), topk), np.int32) if topk else None
        self.topk_logprobs = np.full((len(prompt), topk), MISSING_LOGPROB, np.float32) if topk else None
        self.alt_tokens = np.zeros((rows, alternatives), np.int64) if alternatives else None
        self.alt_logprobs = np.zeros((rows, alternatives), np.float32) if alternatives else None

    def _first_row(self) -> int:
        """The first row that anything asks for; that of the last token where nothing does."""
        command, first = self.command, self.num_rows
        if command.prompt_alt_tokens_k or command.pooling == MEAN:
            return 0
        if command.prompt_logprobs or command.topk_prompt_logprobs:
            first = min(first, self.first_own)
        if self.targets is not None and (self.targets >= 0).any():
            first = min(first, int((self.targets >= 0).any(axis=1).argmax()))
        return first

    @property
    def complete(self) -> bool:
        return self.next_row >= self.end

    def add(self, head: Head, hidden_RD: torch.Tensor, start: int, adapter: AdapterWeights | None) -> bool:
        """Scores and pools the rows of `hidden_RD`, whose first is row `start`; False if the model's numbers are none."""
        skip = max(self.next_row - start, 0)
        hidden_RD, start = hidden_RD[skip : max(self.end - start, 0)], start + skip
        if not len(hidden_RD):
            return True
        self.next_row = start + len(hidden_RD)
        pooled = self._pool(hidden_RD) if self.command.pooling else True
        hidden_RD = hidden_RD[: max(self.num_rows - start, 0)]
        return self._score(head, hidden_RD, start, adapter) and pooled if len(hidden_RD) else pooled

    def _pool(self, hidden_RD: torch.Tensor) -> bool:
        part_RD = hidden_RD if self.command.pooling == MEAN else hidden_RD[-1:]
        sum_D = part_RD.sum(dim=0, dtype=torch.float32).cpu().numpy()
        self.sum_D = sum_D if self.sum_D is None or self.command.pooling == LAST else self.sum_D + sum_D
        return bool(np.isfinite(sum_D).all())

    def _score(self, head: Head, hidden_RD: torch.Tensor, start: int, adapter: AdapterWeights | None) -> bool:
        command, fine = self.command, True
        if command.topk_prompt_logprobs or command.prompt_alt_tokens_k:
            for first in range(0, len(hidden_RD), LOGIT_ROWS):
                part_RD = hidden_RD[first : first + LOGIT_ROWS]
                logits_RV = head.logits(part_RD, [Segment(adapter, 0, len(part_RD))])
                fine = self._add_from_logits(logits_RV, start + first) and fine
        elif self.own is not None or self.targets is not None:
            wanted_RK = self._wanted(start, len(hidden_RD)).to(hidden_RD.device)
            logprobs_RK = head.logprobs(hidden_RD, wanted_RK, [Segment(adapter, 0, len(hidden_RD))])
            fine = self._store(start, logprobs_RK)
        return fine

    def _wanted(self, start: int, num: int) -> torch.Tensor:
        """int64 [R, 1 + K]: the prompt's own token, then the targets (-1 scored as token 0 and masked later)."""
        own_R1 = self.prompt[start + 1 : start + 1 + num, None].astype(np.int64)
        columns = [own_R1] if self.targets is None else [own_R1, np.maximum(self.targets[start : start + num], 0)]
        return torch.from_numpy(np.concatenate(columns, axis=1))

    def _store(self, start: int, logprobs_RK: torch.Tensor) -> bool:
        values = logprobs_RK.cpu().numpy()
        rows = slice(start, start + len(values))
        if self.own is not None:
            self.own[rows.start + 1 : rows.stop + 1] = values[:, 0]
        if self.target is not None and self.targets is not None:
            self.target[rows] = np.where(self.targets[rows] >= 0, values[:, 1:], np.nan)
        return bool(np.isfinite(values).all())

    def _add_from_logits(self, logits_RV: torch.Tensor, start: int) -> bool:
        num = len(logits_RV)
        log_total_R = logits_RV.logsumexp(dim=1)
        wanted_RK = self._wanted(start, num).to(logits_RV.device)
        fine = self._store(start, logits_RV.gather(1, wanted_RK) - log_total_R.unsqueeze(1))
        if self.topk_ids is not None and self.topk_logprobs is not None:
            ids, logprobs = top_logprobs(logits_RV, log_total_R, self.topk_ids.shape[1])
            self.topk_ids[start + 1 : start + 1 + num, : ids.shape[1]] = ids
            self.topk_logprobs[start + 1 : start + 1 + num, : ids.shape[1]] = logprobs
        if self.alt_tokens is not None and self.alt_logprobs is not None:
            tokens_RK = self._draw_alternatives(logits_RV, start)
            self.alt_tokens[start : start + num] = tokens_RK.cpu().numpy()
            self.alt_logprobs[start : start + num] = (logits_RV.gather(1, tokens_RK) - log_total_R.unsqueeze(1)).cpu().numpy()
        return fine

    def _draw_alternatives(self, logits_RV: torch.Tensor, start: int) -> torch.Tensor:
        """int64 [R, K] from the distribution at the request's temperature, with replacement; neither top_k nor top_p applies."""
        num, k, params = len(logits_RV), self.command.prompt_alt_tokens_k, self.command.params
        if params.temperature <= 0.0:
            return logits_RV.argmax(dim=1, keepdim=True).expand(num, k)
        weights_RV = ((logits_RV - logits_RV.amax(dim=1, keepdim=True)) / params.temperature).exp_()
        keys_RK = noise_keys([params.seed], ALTERNATIVES + np.arange(k), np.arange(start, start + num)[:, None])
        return draw(weights_RV, keys_RK)

    def prompt_logprobs(self) -> Array | None:
        """float32 [P]; NaN at position 0 and before the last n."""
        if self.own is None:
            return None
        self.own[: self.first_own + 1] = np.nan
        return Array.of(self.own)

    def topk(self) -> TopK | None:
        """[P, k]; position 0 and those before the last n hold id 0 and the sentinel."""
        if self.topk_ids is None or self.topk_logprobs is None:
            return None
        self.topk_ids[: self.first_own + 1] = 0
        self.topk_logprobs[: self.first_own + 1] = MISSING_LOGPROB
        return TopK(Array.of(self.topk_ids), Array.of(self.topk_logprobs))

    def target_logprobs(self) -> Array | None:
        """float32 [P - 1, K]; NaN where nothing was asked for."""
        return Array.of(self.target) if self.target is not None else None

    def pooled(self) -> Array | None:
        """float32 [D]; None where it wasn't asked for, or the request ended before its prompt was computed."""
        if self.sum_D is None or not self.complete:
            return None
        return Array.of(self.sum_D / (len(self.prompt) if self.command.pooling == MEAN else 1))
