"""The oracle of w4a16_linear: both operands rounded to bfloat16, then float64."""

import torch
from torch import Tensor

from mgt_kernels.packing import PackedInt4


def w4a16_linear(x: Tensor, weight: PackedInt4, bias: Tensor | None = None) -> Tensor:
    """Return y (M, N) float64 of x (M, K); see `mgt_kernels.w4a16_linear`."""
    y = x.bfloat16().double() @ weight.dequantize(torch.bfloat16).double().T
    return y if bias is None else y + bias.double()
