"""A sampler whose logits are disturbed, on purpose: plain importance weights explode, truncated and masked ones stay bounded.

The policy is a table: one softmax over 16 tokens at each of 8 positions, of which one token is right. At each step 32 sequences are
drawn from a disturbed copy, weighed, and the true policy takes a step of gradient descent. All in float64, all seeded.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from everlearn.losses.table import LOSSES, loss_and_grad

POSITIONS, VOCABULARY, SEQUENCES, STEPS = 8, 16, 32, 60
Way = dict[str, float | str]
TIS: Way = {"importance_weight": "tis_token", "tis_threshold": 2.0}
ICEPOP: Way = {"importance_weight": "icepop", "ratio_low": 0.5, "ratio_high": 5.0}


class Run(NamedTuple):
    largest_norm: float  # of the gradient, over the steps
    skill: float  # mean probability of the right tokens at the end


def train(way: Way, noise: float, share: float, seed: int, rate: float) -> Run:
    """`share` of the sampler's logits are off by a normal error of deviation `noise`, drawn anew at each step."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(POSITIONS, VOCABULARY, dtype=torch.float64)
    right = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)
    places = torch.arange(POSITIONS).expand(SEQUENCES, POSITIONS)
    spans = [(i * POSITIONS, (i + 1) * POSITIONS) for i in range(SEQUENCES)]
    norms = []
    for _ in range(STEPS):
        error = noise * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        disturbed = (logits + error * (torch.rand(logits.shape, generator=generator) < share)).log_softmax(-1)
        tokens = torch.multinomial(disturbed.exp(), SEQUENCES, replacement=True, generator=generator).t()
        rewards = (tokens == right).double().mean(1)
        leaf = logits.clone().requires_grad_()
        own = leaf.log_softmax(-1)[places, tokens].flatten()
        inputs = {
            "logprobs": disturbed[places, tokens].flatten(),
            "old_logprobs": own.detach(),
            "advantages": (rewards - rewards.mean()).repeat_interleave(POSITIONS),
        }
        _, grad = loss_and_grad(LOSSES["importance_sampling"], own, inputs, way, spans)
        (slope,) = torch.autograd.grad((own * grad).sum(), leaf)
        norms.append(float(slope.norm()) / SEQUENCES)
        logits = logits - rate * POSITIONS * slope / SEQUENCES
    return Run(max(norms), float(logits.softmax(-1)[torch.arange(POSITIONS), right].mean()))


@pytest.mark.parametrize("seed", range(3))
def test_a_sampler_that_is_wrong_everywhere_explodes_plain_weights_alone(seed: int) -> None:
    quiet = train({}, noise=0.0, share=1.0, seed=seed, rate=0.5).largest_norm
    assert train({}, noise=3.0, share=1.0, seed=seed, rate=0.5).largest_norm > 5 * quiet
    for way in (TIS, ICEPOP):
        assert train(way, noise=3.0, share=1.0, seed=seed, rate=0.5).largest_norm < quiet


@pytest.mark.parametrize("seed", range(3))
def test_a_sampler_that_is_wrong_in_places_is_survived_without_loss(seed: int) -> None:
    """Few tokens far off, as numerics and stale weights make them: bounding their weight costs nothing that is learned."""
    quiet = train({}, noise=0.0, share=0.1, seed=seed, rate=1.0)
    plain = train({}, noise=6.0, share=0.1, seed=seed, rate=1.0)
    assert plain.largest_norm > 2 * quiet.largest_norm
    for way in (TIS, ICEPOP):
        held = train(way, noise=6.0, share=0.1, seed=seed, rate=1.0)
        assert held.largest_norm < 1.2 * quiet.largest_norm
        assert held.skill > quiet.skill - 0.05
