"""Products of a few rows with a frozen weight on a CPU: what a decoding step consists of.

They wait for memory, and BLAS reaches its speed only in some layouts. Measured with torch's own CPU build on two AVX2 cores: a
matrix-vector product reads 11 GB/s where the same weight cut into pieces, as a batch of smaller products, reads 20 on one thread and 26 on
two; two and three rows are quickest with the weight on the left; more rows with the weight on the right, in pieces. From some forty rows on
one whole product is as quick as anything. No gradient.

Axes: N rows, I input size, O output size, P pieces.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

FEW_ROWS = 32
PIECES = (16, 8, 4, 2)  # of a single row's weight, the first that divides it; of several rows' the smaller ones
WEIGHT_LEFT = 3  # rows


def are_few(x_NI: torch.Tensor) -> bool:
    """Whether `product_of_few` is the quicker one for these rows."""
    return x_NI.device.type == "cpu" and len(x_NI) <= FEW_ROWS


def product_of_few(x_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x W^T [N, O], contiguous."""
    num_rows, num_out = len(x_NI), len(weight_OI)
    if 1 < num_rows <= WEIGHT_LEFT:
        return (weight_OI @ x_NI.t()).t().contiguous()
    pieces = next((each for each in PIECES[0 if num_rows == 1 else 2 :] if num_out % each == 0), 1)
    if pieces == 1 or not weight_OI.is_contiguous():
        return F.linear(x_NI, weight_OI)
    weight_PoI = weight_OI.view(pieces, num_out // pieces, -1)
    if num_rows == 1:
        # The row as the column of a row-major matrix: laid out the other way the library takes four times as long.
        return torch.bmm(weight_PoI, x_NI.t().expand(pieces, -1, -1)).view(1, num_out)
    return torch.bmm(x_NI.expand(pieces, -1, -1), weight_PoI.transpose(1, 2)).transpose(0, 1).reshape(num_rows, num_out)
