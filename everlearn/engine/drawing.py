"""The next token of each sequence of a step: its parameters beside its row of logits, and back from tensors to Python.

What the numbers mean is in logits.py, what a sequence does with its token in sequence.py. Nothing here remembers anything.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from everlearn.engine.edits import Edits, Pairs
from everlearn.engine.faults import OUT_OF_MEMORY, as_error
from everlearn.engine.logits import Draws, noise_keys, pick, top_logprobs
from everlearn.engine.masks import Masks
from everlearn.engine.scoring import LOGIT_ROWS, MISSING_LOGPROB
from everlearn.engine.sequence import Request, Sequence
from everlearn.errors import EverlearnError, InvalidRequest
from everlearn.models.head import Head


class Drawn(NamedTuple):
    """A token with its log-probability, and the likeliest tokens in its place as int32 and float32 [k] where they were asked for."""

    token: int
    logprob: float
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None


def draw(groups: list[list[Sequence]], logits_NV: torch.Tensor, masks: Masks) -> list[tuple[Sequence, Drawn | InvalidRequest]]:
    """One token for every sequence; the sequences of group i draw from row i. An error where a row can't be drawn from."""
    sequences = [s for group in groups for s in group]
    source = [i for i, group in enumerate(groups) for _ in group]
    drawn: list[tuple[Sequence, Drawn | InvalidRequest]] = []
    for first in range(0, len(sequences), LOGIT_ROWS):
        part, rows = sequences[first : first + LOGIT_ROWS], source[first : first + LOGIT_ROWS]
        same = len(rows) == len(logits_NV) == len(sequences)
        part_NV = logits_NV if same else logits_NV[torch.tensor(rows, device=logits_NV.device)]
        drawn += zip(part, _draw_rows(part, part_NV, masks), strict=True)
    return drawn


def _draw_rows(sequences: list[Sequence], logits_NV: torch.Tensor, masks: Masks) -> list[Drawn | InvalidRequest]:
    params = [s.request.params for s in sequences]
    keys = noise_keys([p.seed for p in params], [s.index for s in sequences], [len(s.generated) for s in sequences])
    columns = ([p.temperature for p in params], [p.top_k for p in params], [p.top_p for p in params], [p.min_p for p in params])
    allowed_NU, failed = masks.fill(sequences)
    picked = pick(logits_NV, Draws(keys, *columns), edits_of(sequences, allowed_NU))
    num_top = max(s.request.command.topk_sample_logprobs for s in sequences)
    if num_top:
        top_ids, top_values = top_logprobs(logits_NV, picked.log_total_N, num_top)
    # One transfer a step: ids are exact in float64.
    packed = torch.stack([picked.tokens_N.double(), picked.logprobs_N.double(), picked.log_total_N.double()]).cpu().numpy()
    drawn: list[Drawn | InvalidRequest] = []
    for i, sequence in enumerate(sequences):
        k = sequence.request.command.topk_sample_logprobs
        if not np.isfinite(packed[1:, i]).all():
            drawn.append(diverged(sequence.request))
        elif i in failed:
            drawn.append(failed[i])
        elif k:
            fill = k - min(k, top_ids.shape[1])
            ids, values = np.pad(top_ids[i, :k], (0, fill)), np.pad(top_values[i, :k], (0, fill), constant_values=MISSING_LOGPROB)
            drawn.append(Drawn(int(packed[0, i]), float(packed[1, i]), ids, values))
        else:
            drawn.append(Drawn(int(packed[0, i]), float(packed[1, i])))
    return drawn


def diverged(request: Request) -> InvalidRequest:
    version = request.command.version or "the base model"
    return InvalidRequest(f"{version}: the logits are not finite, its weights have diverged; sample an earlier version")


def score(request: Request, head: Head, hidden_RD: torch.Tensor, start: int) -> EverlearnError | None:
    """Scores rows of the request's prompt, the first of them row `start`; why it can't go on where it can't."""
    try:
        fine = request.scores.add(head, hidden_RD, start, request.adapter)
    except OUT_OF_MEMORY as error:  # it takes what this request asks for, whatever else is in the step
        return as_error(error, "while its prompt was scored", "prompt")
    return None if fine else diverged(request)


def edits_of(sequences: list[Sequence], allowed_NU: np.ndarray | None = None) -> Edits | None:
    """What these sequences ask for; None if nobody asks for anything. A row that a grammar masks has its bans in the mask."""
    asking = [(row, s) for row, s in enumerate(sequences) if s.request.edited]
    penalised = _pairs([(row, *s.penalties()) for row, s in asking if s.request.penalises])
    biased = _pairs([(row, *s.request.bias) for row, s in asking if s.request.bias is not None])
    banned = _pairs([(row, s.request.stop_ids) for row, s in asking if s.too_short and s.request.params.grammar is None])
    if penalised is None and biased is None and banned is None and allowed_NU is None:
        return None
    return Edits(penalised, biased, banned, allowed_NU)


def _pairs(parts: list[tuple[Any, ...]]) -> Pairs | None:
    """Joins (row, tokens, *values) of several rows."""
    if not parts:
        return None
    rows = [np.full(len(tokens), row) for row, tokens, *_ in parts]
    rows_M, tokens_M, *values = (np.concatenate(column) for column in (rows, *zip(*(part[1:] for part in parts), strict=True)))
    return Pairs(rows_M, tokens_M, tuple(values))
