"""Recorded decoding steps give what steps that are run as they are give. On a CPU the padded step runs without a recording."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from everlearn.engine.graphs import WIDTH, WORTH, DecodeGraphs, padded_width
from everlearn.types import SampleResult
from tests.engine.harness import adapter, load_tiny
from tests.engine.sampling import make_sampler, prompts, request, run, tokens_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_versions", [1, 3])
def test_replayed_steps_equal_steps_that_are_run(tiny_model: Path, device: str, num_versions: int) -> None:
    base = load_tiny(tiny_model, torch.device(device))
    adapters = [adapter(base, f"run-{i}", rank=2 + 3 * i, seed=i) for i in range(num_versions)]
    for i, made in enumerate(adapters):
        with torch.no_grad():
            for _, b in made.pairs().values():
                b.copy_(0.05 * torch.randn(b.shape, generator=torch.Generator().manual_seed(i)))
    lengths = [int(n) for n in np.random.default_rng(3).integers(1, 150, 11)]
    answers = []
    for graphs in (None, DecodeGraphs(base)):
        sampler = make_sampler(base)
        sampler.graphs = graphs
        for i, made in enumerate(adapters):
            sampler.bank.publish(f"v{i}", made.scale, made.pairs())
        asked = [request(str(i), p, max_tokens=12 + i, seed=i, version=f"v{i % num_versions}") for i, p in enumerate(prompts(1, lengths))]
        answers.append(run(sampler, *asked))
    assert graphs is not None and graphs.recordings
    plain, replayed = answers
    for key, expected in plain.items():
        got = replayed[key]
        assert isinstance(expected, SampleResult) and isinstance(got, SampleResult)
        assert tokens_of(got) == tokens_of(expected)
        np.testing.assert_allclose(got.sequences[0].logprobs.numpy(), expected.sequences[0].logprobs.numpy(), atol=1e-5)


def test_widths_hold_the_context_and_waste_little() -> None:
    for context in [*range(1, 3000, 7), 32768, 100_001]:
        width = padded_width(context)
        assert context <= width < context + max(WIDTH, context / 4)


def test_a_layout_is_recorded_once_it_lasts(tiny_model: Path) -> None:
    base = load_tiny(tiny_model)
    sampler = make_sampler(base)
    sampler.graphs = graphs = DecodeGraphs(base)
    run(sampler, request("short", prompts(1, [5])[0], max_tokens=WORTH, seed=0))
    assert not graphs.recordings
    run(sampler, request("long", prompts(1, [5])[0], max_tokens=2 * WORTH, seed=0))
    assert len(graphs.recordings) == 1
