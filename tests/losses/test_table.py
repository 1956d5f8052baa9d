"""Packing datums for the engine, and the metrics of a request."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from everlearn.losses.metrics import policy_metrics, request_metrics
from everlearn.losses.spec import SPECS
from everlearn.losses.table import LOSSES, loss_and_grad, pack_inputs
from everlearn.types import Array, Datum


def datum(length: int, **inputs: object) -> Datum:
    arrays = {"target_tokens": Array.of(np.arange(length, dtype=np.int64))}
    arrays |= {name: Array.of(np.array(value, np.float32)) for name, value in inputs.items()}
    return Datum(Array.of(np.arange(length, dtype=np.int32)), arrays)


def test_datums_are_packed_one_after_the_other() -> None:
    data = [datum(2, weights=[1, 2]), datum(3, weights=[3, 4, 5])]
    inputs, segments = pack_inputs(LOSSES["cross_entropy"], data, {})
    assert segments == [(0, 2), (2, 5)]
    assert inputs["weights"].tolist() == [1, 2, 3, 4, 5]
    assert inputs["target_tokens"].dtype == torch.int64
    assert inputs["weights"].dtype == torch.float32


def test_targets_of_different_widths_are_padded_without_effect() -> None:
    wide = Datum(
        Array.of(np.zeros(2, np.int32)),
        {"target_tokens": Array.of(np.full((2, 3), 7)), "weights": Array.of(np.full((2, 3), 0.5, np.float32))},
    )
    inputs, segments = pack_inputs(LOSSES["cross_entropy"], [datum(1, weights=[2]), wide], {})
    assert inputs["weights"].tolist() == [[2, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    assert inputs["target_tokens"].shape == (3, 3)
    loss_D, grad = loss_and_grad(LOSSES["cross_entropy"], torch.full((3, 3), -1.0), inputs, {}, segments)
    assert loss_D.tolist() == [2.0, 3.0]
    assert grad[0].tolist() == [-2, 0, 0]


def test_bounds_that_only_some_datums_bring_are_filled_with_the_configured_ones() -> None:
    config = SPECS["ppo"].defaults
    common = {"logprobs": [-1, -1], "advantages": [1, 1]}
    data = [datum(2, **common, clip_high_threshold=[9, 9]), datum(2, **common)]
    inputs, _ = pack_inputs(LOSSES["ppo"], data, config)
    assert inputs["clip_high_threshold"].tolist() == pytest.approx([9, 9, 1.2, 1.2])
    assert "clip_low_threshold" not in inputs


def metrics_of(name: str, trained: list[float], **inputs: list[float]) -> dict[str, float]:
    tensors = {key: torch.tensor(value) for key, value in inputs.items()}
    return policy_metrics(LOSSES[name], torch.tensor(trained), tensors, SPECS[name].defaults, [(0, len(trained))])


def test_metrics_count_only_tokens_that_are_trained() -> None:
    got = metrics_of("ppo", [-9.0, -1.0, -2.0], logprobs=[0.0, -1.0, -2.5], advantages=[0.0, 1.0, -1.0])
    l1, l2 = 0.0, 0.5
    assert got == pytest.approx(
        {
            "trained_tokens:sum": 2,
            "logprob_diff_abs:mean": 0.25,
            "kl_sample_train_v1:mean": -0.25,
            "kl_k3:mean": (math.exp(l1) - 1 - l1 + math.exp(l2) - 1 - l2) / 2,
            "ratio:mean": (1 + math.exp(0.5)) / 2,
            "ratio:max": math.exp(0.5),
            "ratio:min": 1.0,
            "effective_sample_fraction:mean": (1 + math.exp(0.5)) ** 2 / (2 * (1 + math.exp(1.0))),
            "clip_fraction:mean": 0.5,
        }
    )


def test_metrics_of_recorded_sequences_count_sampled_tokens_also_without_advantage() -> None:
    got = metrics_of(
        "stable_reinforce",
        [-9.0, -3.0, -2.0],
        sampling_logprobs=[0.0, -1.0, -2.0],
        advantages=[0.0, 0.0, 0.0],
        sampled_mask=[0.0, 1.0, 1.0],
    )
    assert got["trained_tokens:sum"] == 2
    assert got["mask_fraction:mean"] == 0.5


def test_keys_name_a_reduction_and_nothing_is_reported_where_nothing_is_known() -> None:
    got = metrics_of("gspo", [-1.0], logprobs=[-1.0], advantages=[1.0], sequence_ratio_mask=[1.0])
    assert all(key.count(":") == 1 and key.split(":")[1] in ("sum", "mean", "max", "min") for key in got)
    assert metrics_of("ppo", [-1.0], logprobs=[-1.0], advantages=[0.0]) == {"trained_tokens:sum": 0.0}
    assert metrics_of("cross_entropy", [-1.0], weights=[1.0]) == {}


def test_metrics_of_what_else_a_request_asks_for() -> None:
    inputs = {
        "logprobs": torch.tensor([0.0, -1.0, -2.0, -1.0]),
        "old_logprobs": torch.tensor([0.0, -1.0, -1.0, -3.0]),
        "reference_logprobs": torch.tensor([0.0, -1.0, -1.5, -3.0]),
        "advantages": torch.tensor([0.0, 1.0, -1.0, 1.0]),
        "weights": torch.tensor([0.5, 0.0, 0.0, 0.0]),
    }
    trained, spans = torch.tensor([-4.0, -1.0, -1.0, -3.0]), [(0, 4)]
    got = policy_metrics(LOSSES["ppo"], trained, inputs, {"entropy_coeff": 0.1}, spans)
    assert got["cross_entropy:sum"] == 2.0
    assert got["clip_fraction:mean"] == 0.0, "the clip bounds the ratio to the old policy"
    for prefix in ("", "old_"):  # the trained policy is still the old one
        assert got[prefix + "logprob_diff_abs:mean"] == pytest.approx(1.0)
        assert got[prefix + "ratio:max"] == pytest.approx(math.e)
        assert got[prefix + "kl_k3:mean"] == pytest.approx((math.e - 2 + math.exp(-2) + 1) / 3)
        assert 0 < got[prefix + "effective_sample_fraction:mean"] < 1
    assert got["kl_reference_k3:mean"] == pytest.approx((math.exp(-0.5) - 1 + 0.5) / 3)
    assert got["entropy_sampled:mean"] == pytest.approx(5 / 3)
    assert "mask_fraction:mean" not in got and "truncated_fraction:mean" not in got
    band = policy_metrics(LOSSES["ppo"], trained, inputs, {"importance_weight": "icepop", "ratio_low": 0.5}, spans)
    assert band["mask_fraction:mean"] == pytest.approx(1 / 3)
    cut = policy_metrics(LOSSES["ppo"], trained, inputs, {"importance_weight": "tis_token", "tis_threshold": 2.0}, spans)
    assert cut["truncated_fraction:mean"] == pytest.approx(1 / 3) and "mask_fraction:mean" not in cut
    out = policy_metrics(LOSSES["ppo"], trained, inputs, {"product_ratio_low": 0.9}, spans)
    assert out["mask_fraction:mean"] == 1.0


def test_metrics_of_text_alone_count_no_token_and_its_loss() -> None:
    inputs = {"logprobs": torch.zeros(2), "advantages": torch.zeros(2), "weights": torch.tensor([1.0, 0.5])}
    got = policy_metrics(LOSSES["ppo"], torch.tensor([-1.0, -2.0]), inputs, {}, [(0, 2)])
    assert got == {"trained_tokens:sum": 0.0, "cross_entropy:sum": 2.0}


def test_weights_that_only_some_datums_bring_are_zero_on_the_others() -> None:
    common = {"logprobs": [-1, -1], "advantages": [1, 1]}
    inputs, _ = pack_inputs(LOSSES["ppo"], [datum(2, **common), datum(2, **common, weights=[1, 2])], SPECS["ppo"].defaults)
    assert inputs["weights"].tolist() == [0, 0, 1, 2]
    assert "weights" not in pack_inputs(LOSSES["ppo"], [datum(2, **common)], SPECS["ppo"].defaults)[0]


def test_metrics_of_a_request_are_those_of_its_datums_together() -> None:
    data = [datum(2, logprobs=[-1, -1], advantages=[1, 0]), datum(1, logprobs=[-2], advantages=[1])]
    got = request_metrics(LOSSES["ppo"], data, [torch.tensor([-1.0, -7.0]), torch.tensor([-3.0])], SPECS["ppo"].defaults)
    assert got["trained_tokens:sum"] == 2
    assert got["kl_sample_train_v1:mean"] == 0.5
    assert request_metrics(LOSSES["cross_entropy"], [datum(1, weights=[1])], [torch.tensor([-1.0])], {}) == {}
