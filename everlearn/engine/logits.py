"""From logits to tokens: seeded, truncated, vectorised over the batch.

Noise is a pure function of (seed, sample index, position): splitmix64 (Steele, Lea and Flood 2014) with those three as the key, so a
sequence draws the same tokens whatever else is in its batch and after any restart. A draw is an exponential race (Gumbel-max:
argmax p_v / E_v) in two rounds, first between tiles of the vocabulary by their mass, then inside the tile. That needs a few hundred
random numbers a row where one race over the whole vocabulary needs one for each entry, and by the chain rule it is exact. A race is
preferred to the inverse of the cumulative distribution because logits differ in their last bits between batch shapes: a race is
upset by about the relative error itself, a cumulative sum by that times the square root of the vocabulary.

Axes: N rows, V vocabulary, K draws of a row, C tiles, W entries of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from everlearn.engine.edits import Edits

TILE = 256
# Rows with top_p look at this many candidates first; a full sort of the vocabulary is the exception.
CANDIDATES = 1024
# Random numbers that exist at one time where a row is drawn from often: 32 MiB while they are made.
NOISE = 1 << 22
MASK_64 = (1 << 64) - 1
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Prompt alternatives use sample indices from here on, so that they share no noise with the request's own samples.
ALTERNATIVES = 1 << 32


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def noise_keys(seeds: list[int], samples: list[int] | np.ndarray, positions: list[int] | np.ndarray) -> np.ndarray:
    """uint64 [N]: the streams of N draws, or of another shape that the three have together. Seeds are taken modulo 2^64."""
    key = _mix(np.array([seed & MASK_64 for seed in seeds], dtype=np.uint64) + GOLDEN)
    for part in (samples, positions):
        key = _mix((key ^ np.array(part, dtype=np.uint64)) + GOLDEN)
    return key


def exponentials(keys: np.ndarray, num: int) -> np.ndarray:
    """float32 [..., num]: `num` draws from Exp(1) for every key."""
    counters = np.arange(1, num + 1, dtype=np.uint64) * GOLDEN
    bits = _mix(keys[..., None] + counters) >> np.uint64(11)
    return -np.log((bits.astype(np.float64) + 0.5) * 2.0**-53).astype(np.float32)


def draw(weights_NV: torch.Tensor, keys_NK: np.ndarray) -> torch.Tensor:
    """int64 [N, K]: independent draws from each row's (unnormalised) weights, one for every key; as many at a time as NOISE holds."""
    num_rows, vocab = weights_NV.shape
    if vocab % TILE:
        weights_NV = F.pad(weights_NV, (0, -vocab % TILE))
    tiles_NCW = weights_NV.view(num_rows, -1, TILE)
    num_tiles = tiles_NCW.shape[1]
    mass_N1C = tiles_NCW.sum(dim=2).unsqueeze(1)
    rows_N1 = torch.arange(num_rows, device=weights_NV.device).unsqueeze(1)
    step = max(1, NOISE // (num_rows * (num_tiles + TILE)))
    parts = []
    for first in range(0, keys_NK.shape[1], step):
        noise = torch.from_numpy(exponentials(keys_NK[:, first : first + step], num_tiles + TILE)).to(weights_NV.device)
        tile_NK = (mass_N1C / noise[..., :num_tiles]).argmax(dim=2)
        entry_NK = (tiles_NCW[rows_N1, tile_NK] / noise[..., num_tiles:]).argmax(dim=2)
        parts.append((tile_NK * TILE + entry_NK).clamp_(max=vocab - 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def truncate(weights_NV: torch.Tensor, top_ks: list[int], top_ps: list[float]) -> torch.Tensor:
    """Zeroes what top_k and then top_p leave out. top_k < 1 and top_p >= 1 mean off; the likeliest token always stays."""
    vocab = weights_NV.shape[1]
    limits = [min(k, vocab) if k > 0 else vocab for k in top_ks]
    bounded = [limit for limit in limits if limit < vocab]
    num = max(bounded) if len(bounded) == len(limits) else min(vocab, max(CANDIDATES, *bounded, 0))
    top_NJ, order_NJ = weights_NV.topk(num)
    total_N = weights_NV.sum(dim=1)
    p_N1 = torch.tensor(top_ps, device=weights_NV.device).unsqueeze(1)
    if any(limit > num for limit in limits):
        open_rows = torch.tensor([limit > num for limit in limits], device=weights_NV.device)
        if bool((open_rows & (top_NJ.sum(dim=1) < p_N1[:, 0] * total_N)).any()):
            top_NJ, order_NJ = weights_NV.sort(dim=1, descending=True)
            num = vocab
    limit_N1 = torch.tensor(limits, device=weights_NV.device).unsqueeze(1)
    rank_J = torch.arange(num, device=weights_NV.device)
    top_NJ = torch.where(rank_J < limit_N1, top_NJ, 0.0)
    mass_N1 = torch.where(limit_N1 < vocab, top_NJ.sum(dim=1, keepdim=True), total_N.unsqueeze(1))
    before_NJ = top_NJ.cumsum(dim=1) - top_NJ
    keep_NJ = (before_NJ < p_N1 * mass_N1) | (p_N1 >= 1.0) | (rank_J == 0)
    return torch.zeros_like(weights_NV).scatter_(1, order_NJ, torch.where(keep_NJ, top_NJ, 0.0))


@dataclass(frozen=True)
class Draws:
    """How each of N rows wants its token; lists because they come from Python objects and most of them are constant."""

    keys: np.ndarray
    temperatures: list[float]
    top_ks: list[int]
    top_ps: list[float]
    min_ps: list[float] = field(default_factory=list)  # empty: nobody asks


@dataclass(frozen=True)
class Picked:
    tokens_N: torch.Tensor
    logprobs_N: torch.Tensor
    log_total_N: torch.Tensor  # not finite where the row's logits hold NaN or infinity


def pick(logits_NV: torch.Tensor, draws: Draws, edits: Edits | None = None) -> Picked:
    """One token of each row. Log-probabilities are those of the raw logits: temperature 1, nothing edited or truncated.

    Shifts `logits_NV` in place so that each row's largest is 0; `log_total_N` belongs to the shifted logits.
    """
    peak_N1 = logits_NV.amax(dim=1, keepdim=True)
    shifted_NV = logits_NV.sub_(peak_N1)
    weights_NV = shifted_NV.exp()
    log_total_N = weights_NV.sum(dim=1).log_()
    scores_NV = shifted_NV if edits is None else edits.apply(shifted_NV, peak_N1)
    greedy = [t <= 0.0 for t in draws.temperatures]
    if all(greedy):
        tokens_N = scores_NV.argmax(dim=1)
    else:
        if edits is not None or any(t != 1.0 for t in draws.temperatures):
            divisors = [1.0 if g else t for g, t in zip(greedy, draws.temperatures, strict=True)]
            weights_NV = torch.div(scores_NV, torch.tensor(divisors, device=logits_NV.device).unsqueeze(1), out=weights_NV).exp_()
        cut = [i for i, (k, p, g) in enumerate(zip(draws.top_ks, draws.top_ps, greedy, strict=True)) if (k > 0 or p < 1.0) and not g]
        if cut:
            rows = torch.tensor(cut, device=logits_NV.device)
            weights_NV[rows] = truncate(weights_NV[rows], [draws.top_ks[i] for i in cut], [draws.top_ps[i] for i in cut])
        if any(p > 0.0 for p in draws.min_ps):  # of the likeliest token's weight, which is 1
            weights_NV[weights_NV < torch.tensor(draws.min_ps, device=logits_NV.device).unsqueeze(1)] = 0.0
        tokens_N = draw(weights_NV, draws.keys[:, None])[:, 0]
        if any(greedy):
            tokens_N = torch.where(torch.tensor(greedy, device=logits_NV.device), scores_NV.argmax(dim=1), tokens_N)
    logprobs_N = shifted_NV.gather(1, tokens_N.unsqueeze(1))[:, 0] - log_total_N
    return Picked(tokens_N, logprobs_N, log_total_N)


def top_logprobs(logits_NV: torch.Tensor, log_total_N: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k likeliest tokens of each row: ids int32 [N, k] and log-probabilities float32 [N, k]."""
    values_NK, ids_NK = logits_NV.topk(min(k, logits_NV.shape[1]))
    return ids_NK.int().cpu().numpy(), (values_NK - log_total_N.unsqueeze(1)).cpu().numpy()
