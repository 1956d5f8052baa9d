"""Products of a few rows give what one plain product gives, whichever layout they take."""

from __future__ import annotations

import pytest
import torch

from everlearn.models.few_rows import FEW_ROWS, are_few, product_of_few


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 7, FEW_ROWS])
@pytest.mark.parametrize("num_out", [1, 7, 6, 20, 48])  # what no, one and every number of pieces divides
def test_product_is_the_plain_product(num_rows, num_out):
    x_NI, weight_OI = torch.randn(num_rows, 24), torch.randn(num_out, 24)
    found = product_of_few(x_NI, weight_OI)
    assert found.is_contiguous()
    torch.testing.assert_close(found, x_NI @ weight_OI.t())


def test_a_weight_that_lies_across_is_taken_too():
    x_NI, weight_IO = torch.randn(5, 24), torch.randn(24, 16)
    torch.testing.assert_close(product_of_few(x_NI, weight_IO.t()), x_NI @ weight_IO)


def test_many_rows_are_not_few():
    assert are_few(torch.zeros(FEW_ROWS, 2)) and not are_few(torch.zeros(FEW_ROWS + 1, 2))
