"""From hidden states to log-probabilities, without logits of the whole batch.

The head is read in tiles of the vocabulary that stay in cache; a running maximum and sum (online softmax, Milakov and Gimelshein
2018, arXiv:1805.02867) give log p(target) in one pass. The gradient needs no second pass over the vocabulary either: for
l = log softmax(h W^T)[y],  dl/dh = W[y] - sum_v p_v W_v,  and the sum is accumulated beside the normaliser, as attention does with
its values. Only a head that trains its own adapter keeps a chunk's probabilities, because dB is a sum over tokens of p ⊗ z.

At a segment's temperature T everything above is said of the logits divided by T, whose derivative by h brings the factor 1/T along.

Axes: T tokens, N rows to sample from, K targets of a token, V vocabulary, D hidden size, R rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from everlearn.models.lora import HEAD, Segment, frozen_parts, frozen_product, parts_of

# dloss/dlogprob [t, K] of some tokens, given their log-probabilities [t, K] and their places in the row [t].
GradientOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
WIDE_FLOATS = 2**24  # rows of the head that are gathered at one time for targets [T, K], whatever K is: 64 MiB


def product_float32(x_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x W^T with a float32 result: logits that are rounded to bfloat16 carry errors of 1e-2 into every log-probability."""
    if x_NI.dtype == torch.float32:
        return x_NI @ weight_OI.t()
    if x_NI.is_cuda:
        return torch.mm(x_NI, weight_OI.t(), out_dtype=torch.float32)
    return x_NI.float() @ weight_OI.float().t()


class Head:
    """The frozen output projection [V, D]. `chunk_tokens` x `tile` bounds the largest temporary."""

    def __init__(self, weight_VD: torch.Tensor, chunk_tokens: int, tile: int):
        self.weight = weight_VD
        self.vocab_size = weight_VD.shape[0]
        self.chunk_tokens, self.tile = chunk_tokens, tile

    def logits(self, hidden_ND: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
        """[N, V] float32: for the few rows that are sampled from. Segments count the rows of `hidden_ND`."""
        if hidden_ND.dtype == torch.float32:
            return frozen_product(hidden_ND, self.weight, None, frozen_parts(segments, HEAD))
        logits_NV = product_float32(hidden_ND, self.weight)
        for segment, a_RD, b_VR in parts_of(segments, HEAD):
            assert segment.adapter is not None
            rows = segment.rows
            logits_NV[rows] += product_float32(hidden_ND[rows] @ a_RD.t(), b_VR) * segment.adapter.scale
        return logits_NV

    def logprobs(self, hidden_TD: torch.Tensor, targets_TK: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
        """log p(target) float32 [T, K]; no gradient."""
        out = torch.empty(targets_TK.shape, dtype=torch.float32, device=hidden_TD.device)
        with torch.no_grad():
            for chunk in self._chunks(segments, hidden_TD.shape[0]):
                rows = slice(chunk.start, chunk.stop)
                out[rows] = _Pass(self, hidden_TD[rows], targets_TK[rows], chunk, needs_gradient=False).logprobs
        return out

    def backward(
        self, hidden_TD: torch.Tensor, targets_TK: torch.Tensor, segments: list[Segment], active_T: torch.Tensor, gradient_of: GradientOf,
        same_T: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Log-probabilities [T, K] and dloss/dhidden [T, D]; gradients of head adapters are added into their buffers.

        `active_T` (bool) marks the tokens that can have a gradient at all: for the others (prompts, tokens without an advantage)
        only log-probabilities are computed, which is half of the work, and none where `same_T` names an earlier token with the same state
        and the same targets (for all others itself).
        """
        logprobs = torch.empty(targets_TK.shape, dtype=torch.float32, device=hidden_TD.device)
        dhidden = torch.zeros_like(hidden_TD)
        copied_t = torch.empty(0, dtype=torch.int64, device=hidden_TD.device)
        if same_T is not None:
            copied_t = torch.nonzero(~active_T & (same_T != torch.arange(len(same_T), device=same_T.device))).flatten()
        order = _active_first(active_T, segments, copied_t)
        with torch.no_grad():
            for rows_t, segment, trains in order:
                for start in range(0, len(rows_t), self.chunk_tokens):
                    index_t = rows_t[start : start + self.chunk_tokens]
                    part = Segment(segment.adapter, 0, len(index_t), segment.temperature)
                    run = _Pass(self, hidden_TD[index_t], targets_TK[index_t], part, needs_gradient=trains)
                    logprobs[index_t] = run.logprobs
                    if trains:
                        dhidden[index_t] = run.gradient(gradient_of(run.logprobs, index_t))
        if same_T is not None:
            logprobs[copied_t] = logprobs[same_T[copied_t]]
        return logprobs, dhidden

    def _chunks(self, segments: list[Segment], num_tokens: int) -> list[Segment]:
        spans = segments or [Segment(None, 0, num_tokens)]
        return [
            Segment(s.adapter, start, min(start + self.chunk_tokens, s.stop), s.temperature)
            for s in spans
            for start in range(s.start, s.stop, self.chunk_tokens)
        ]


def _active_first(active_T: torch.Tensor, segments: list[Segment], copied_t: torch.Tensor) -> list[tuple[torch.Tensor, Segment, bool]]:
    """For each segment its tokens with and its tokens without a gradient, as index tensors; those that are `copied` are in neither."""
    parts, wanted_T = [], torch.ones_like(active_T)
    wanted_T[copied_t] = False
    for segment in segments:
        flags, wanted = active_T[segment.rows], wanted_T[segment.rows]
        for trains in (True, False):
            index = torch.nonzero((flags == trains) & wanted).flatten() + segment.start
            if len(index):
                parts.append((index, segment, trains))
    return parts


class _Pass:
    """One chunk of tokens of one adapter against the whole vocabulary, tile by tile."""

    def __init__(self, head: Head, hidden_TD: torch.Tensor, targets_TK: torch.Tensor, segment: Segment, needs_gradient: bool):
        self.head, self.hidden, self.targets, self.temperature = head, hidden_TD, targets_TK, segment.temperature
        self.adapter = segment.adapter if segment.adapter is not None and HEAD in segment.adapter.pairs else None
        self.low_TR: torch.Tensor | None = None
        if self.adapter is not None:
            self.low_TR = (hidden_TD @ self.adapter.pairs[HEAD][0].t()) * self.adapter.scale
        self.keep_probs = needs_gradient and self.adapter is not None and self.adapter.grads is not None
        self.probs: list[tuple[torch.Tensor, torch.Tensor]] = []  # per tile: exp(logits - max so far), that max
        self._run(needs_gradient)

    def _tile_logits(self, start: int, stop: int) -> torch.Tensor:
        logits = product_float32(self.hidden, self.head.weight[start:stop])
        if self.adapter is not None and self.low_TR is not None:
            b_VR = self.adapter.pairs[HEAD][1][start:stop]
            if b_VR.dtype == torch.float32:
                logits.addmm_(self.low_TR, b_VR.t())
            else:
                logits += product_float32(self.low_TR, b_VR)
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)

    def _run(self, needs_gradient: bool) -> None:
        num_tokens, device = self.hidden.shape[0], self.hidden.device
        peak_T = torch.full((num_tokens, 1), float("-inf"), device=device)
        total_T = torch.zeros((num_tokens, 1), device=device)
        mean_TD = torch.zeros(self.hidden.shape, device=device, dtype=torch.float32) if needs_gradient else None
        mean_TR = torch.zeros_like(self.low_TR, dtype=torch.float32) if needs_gradient and self.low_TR is not None else None
        target_logit = torch.zeros(self.targets.shape, device=device)
        for start in range(0, self.head.vocab_size, self.head.tile):
            stop = min(start + self.head.tile, self.head.vocab_size)
            logits = self._tile_logits(start, stop)
            inside = (self.targets >= start) & (self.targets < stop)
            picked = logits.gather(1, (self.targets - start).clamp(0, stop - start - 1))
            target_logit = torch.where(inside, picked, target_logit)
            new_peak = torch.maximum(peak_T, logits.amax(dim=1, keepdim=True))
            shrink = (peak_T - new_peak).exp()
            weights = logits.sub_(new_peak).exp_()
            total_T = total_T * shrink + weights.sum(dim=1, keepdim=True)
            if mean_TD is not None:
                mean_TD = (
                    torch.addmm(mean_TD * shrink, weights, self.head.weight[start:stop])
                    if weights.dtype == self.head.weight.dtype
                    else (mean_TD * shrink + (weights.to(self.head.weight.dtype) @ self.head.weight[start:stop]).float())
                )
            if mean_TR is not None and self.adapter is not None:
                mean_TR = torch.addmm(mean_TR * shrink, weights, self.adapter.pairs[HEAD][1][start:stop].float())
            if self.keep_probs:
                self.probs.append((weights, new_peak))
            peak_T = new_peak
        self.log_total = peak_T + total_T.log()
        self.logprobs = target_logit - self.log_total
        self.peak, self.total, self.mean_TD, self.mean_TR = peak_T, total_T, mean_TD, mean_TR

    def gradient(self, g_TK: torch.Tensor) -> torch.Tensor:
        """dloss/dhidden [T, D] for dloss/dlogprob g [T, K]; adds the head adapter's gradients."""
        assert self.mean_TD is not None
        if self.temperature != 1.0:
            g_TK = g_TK / self.temperature  # everything below is linear in it
        g_T1 = g_TK.sum(dim=1, keepdim=True)
        weight = self.head.weight
        own_TD = _weighted_rows(g_TK, weight, self.targets) if g_TK.shape[1] > 1 else g_T1 * weight[self.targets[:, 0]]
        d_TD = own_TD - g_T1 / self.total * self.mean_TD
        if self.adapter is not None and self.mean_TR is not None:
            a_RD, b_VR = self.adapter.pairs[HEAD]
            own_TR = _weighted_rows(g_TK, b_VR, self.targets)
            dlow_TR = (own_TR - g_T1 / self.total * self.mean_TR) * self.adapter.scale
            if self.adapter.grads is not None:
                self._adapter_gradient(g_TK, dlow_TR)
            d_TD = d_TD + dlow_TR @ a_RD.float()
        return d_TD.to(self.hidden.dtype)

    def _adapter_gradient(self, g_TK: torch.Tensor, dlow_TR: torch.Tensor) -> None:
        """dA += dlow^T h;  dB[v] += sum_t g_t (1[v = y_t] - p_tv) low_t."""
        assert self.adapter is not None and self.adapter.grads is not None and self.low_TR is not None
        da_RD, db_VR = self.adapter.grads[HEAD]
        da_RD.addmm_(dlow_TR.t(), self.hidden.float())
        low = self.low_TR.float()
        g_T1 = g_TK.sum(dim=1, keepdim=True)
        start = 0
        for weights, peak in self.probs:
            stop = start + weights.shape[1]
            z_TR = low * (g_T1 * (peak - self.log_total).exp())
            db_VR[start:stop].addmm_(weights.t(), z_TR, alpha=-1.0)
            start = stop
        for columns in _columns(self.targets, low.shape[1]):
            contributions = (g_TK[:, columns].unsqueeze(2) * low.unsqueeze(1)).flatten(0, 1)
            db_VR.index_add_(0, self.targets[:, columns].flatten(), contributions)


def _weighted_rows(g_TK: torch.Tensor, table_VD: torch.Tensor, targets_TK: torch.Tensor) -> torch.Tensor:
    """float32 [T, D]: sum_k g[t, k] · table[targets[t, k]]."""
    first, *others = _columns(targets_TK, table_VD.shape[1])
    out_TD = torch.einsum("tk,tkd->td", g_TK[:, first], table_VD[targets_TK[:, first]].float())
    for columns in others:
        out_TD += torch.einsum("tk,tkd->td", g_TK[:, columns], table_VD[targets_TK[:, columns]].float())
    return out_TD


def _columns(targets_TK: torch.Tensor, size: int) -> list[slice]:
    """Cuts K so that T x columns x `size` floats stay within WIDE_FLOATS."""
    num_tokens, width = targets_TK.shape
    step = max(1, WIDE_FLOATS // (num_tokens * size))
    return [slice(start, start + step) for start in range(0, width, step)]
