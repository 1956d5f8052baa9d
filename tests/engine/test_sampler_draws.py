"""Noise, truncation and draws against slow references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from everlearn.engine.logits import TILE, Draws, draw, exponentials, noise_keys, pick, truncate


def test_noise_depends_on_seed_sample_and_position_alone() -> None:
    keys = noise_keys([1, 1, 1, 2, -1, 2**64 - 1], [0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0])
    assert len(set(keys.tolist())) == 5 and keys[4] == keys[5]  # seeds are taken modulo 2^64
    assert noise_keys([1], [1], [0])[0] == keys[2]


def test_noise_is_exponential_and_uncorrelated() -> None:
    keys = noise_keys([3] * 2000, [0] * 2000, list(range(2000)))
    noise = exponentials(keys, 64)
    ordered = np.sort(noise.ravel())
    gap = np.abs(1 - np.exp(-ordered) - (np.arange(len(ordered)) + 0.5) / len(ordered)).max()
    assert gap < 1.95 / np.sqrt(len(ordered))  # Kolmogorov and Smirnov at 0.001
    assert abs(np.corrcoef(noise[:-1, 0], noise[1:, 0])[0, 1]) < 0.1
    assert np.abs(np.corrcoef(noise.T) - np.eye(64)).max() < 0.12


@pytest.mark.parametrize("vocab", [7, TILE, 3 * TILE + 5])
def test_draws_follow_the_weights(vocab: int) -> None:
    weights = torch.rand(2, vocab, generator=torch.Generator().manual_seed(0)) ** 4
    weights[0, 3] = 0.0
    num = 20000
    keys = noise_keys([5] * 2 * num, [0] * 2 * num, list(range(2 * num))).reshape(2, num)
    drawn = torch.cat([draw(weights, part) for part in np.split(keys, 20, axis=1)], dim=1).numpy()
    for row in range(2):
        expected = num * (weights[row] / weights[row].sum()).double().numpy()
        counts = np.bincount(drawn[row], minlength=vocab)
        assert counts[weights[row].numpy() == 0].sum() == 0
        common = expected >= 5
        chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum()
        assert chi2 < common.sum() + 4 * np.sqrt(2 * common.sum())


def test_many_draws_of_a_row_are_made_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, sizes = torch.rand(3, 2 * TILE + 9, generator=torch.Generator().manual_seed(0)), []
    keys = noise_keys([7], np.arange(100), np.arange(3)[:, None])
    singly = noise_keys([7] * 300, list(range(100)) * 3, [row for row in range(3) for _ in range(100)])
    np.testing.assert_array_equal(keys.ravel(), singly)
    whole = draw(weights, keys)

    def counted(keys: np.ndarray, num: int) -> np.ndarray:
        sizes.append(keys.size * num)
        return exponentials(keys, num)

    monkeypatch.setattr("everlearn.engine.logits.exponentials", counted)
    monkeypatch.setattr("everlearn.engine.logits.NOISE", 10_000)
    assert torch.equal(draw(weights, keys), whole)
    assert max(sizes) <= 10_000 and sum(sizes) == 300 * (3 + TILE)


def slow_truncate(weights: np.ndarray, k: int, p: float) -> np.ndarray:
    order = np.argsort(-weights, kind="stable")
    if k > 0:
        order = order[:k]
    kept, mass, total = [], 0.0, weights[order].astype(np.float64).sum()
    for v in order:
        if kept and p < 1.0 and mass >= p * total:
            break
        kept.append(v)
        mass += weights[v]
    return np.isin(np.arange(len(weights)), kept)


@pytest.mark.parametrize("vocab", [40, 3000])
@pytest.mark.parametrize("scale", [0.1, 3.0])  # flat rows need more than the first candidates, peaked ones don't
def test_truncation_keeps_what_the_definition_keeps(vocab: int, scale: float) -> None:
    ks, ps = [-1, 5, 5, 1, 0, -1, vocab, 2000], [0.9, 1.0, 0.5, 0.5, 0.0, 0.3, 0.7, 1.0]
    weights = (scale * torch.randn(len(ks), vocab, generator=torch.Generator().manual_seed(1))).exp()
    for rows in ([0], [1, 2, 3], list(range(len(ks)))):
        cut = truncate(weights[rows], [ks[i] for i in rows], [ps[i] for i in rows]).numpy()
        for row, i in enumerate(rows):
            np.testing.assert_array_equal(cut[row] > 0, slow_truncate(weights[i].numpy(), ks[i], ps[i]), err_msg=f"k={ks[i]} p={ps[i]}")


def test_rows_are_picked_as_each_asks() -> None:
    logits = 2 * torch.randn(5, 600, generator=torch.Generator().manual_seed(2))
    keys = noise_keys([1] * 5, [0] * 5, [0, 1, 2, 3, 4])
    temperatures, ks, ps = [0.0, 1.0, 0.5, 1.0, 1.0], [-1, -1, -1, 1, -1], [1.0, 1.0, 1.0, 1.0, 0.0]
    mixed = pick(logits.clone(), Draws(keys, temperatures, ks, ps))
    best = logits.argmax(1)
    assert mixed.tokens_N[[0, 3, 4]].tolist() == best[[0, 3, 4]].tolist()
    for i in range(5):
        alone = pick(logits[i : i + 1].clone(), Draws(keys[i : i + 1], temperatures[i : i + 1], ks[i : i + 1], ps[i : i + 1]))
        assert alone.tokens_N[0] == mixed.tokens_N[i]
    expected = logits.log_softmax(1)[torch.arange(5), mixed.tokens_N]
    torch.testing.assert_close(mixed.logprobs_N, expected)


def test_logits_that_are_no_numbers_show_in_the_total() -> None:
    logits = torch.zeros(4, 300)
    logits[0, 299], logits[1, 0], logits[2, 5] = float("nan"), float("inf"), float("-inf")
    picked = pick(logits, Draws(noise_keys([0] * 4, [0] * 4, [0] * 4), [1.0] * 4, [-1] * 4, [1.0] * 4))
    assert torch.isfinite(picked.log_total_N).tolist() == [False, False, True, True]
    assert (picked.tokens_N < 300).all()
