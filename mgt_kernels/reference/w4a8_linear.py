"""The oracle of w4a8_linear: integers exactly, everything after them in float64."""

import torch
from torch import Tensor

from mgt_kernels.packing import PackedInt4

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def dynamic_scale(x: Tensor) -> Tensor:
    """Return the scale (M, 1) float32 of each row of x (M, K): max_k |x_k| / 127, never below the smallest normal."""
    return (x.float().abs().amax(-1, keepdim=True) / 127).clamp(min=_SMALLEST_SCALE)


def quantize_activations(x: Tensor, x_scale: Tensor) -> Tensor:
    """Return x_q (M, K) int8 of x (M, K) with scales (M, 1) float32: clamp(round(x * (1 / x_scale)), -128, 127).

    Two float32 operations, each rounded once, and halves to even: every backend gets the same integers.
    """
    return (x.float() * (1 / x_scale)).round().clamp(-128, 127).to(torch.int8)


def group_sums(x_q: Tensor, weight: PackedInt4) -> Tensor:
    """Return sum_{k in g} x_q[m, k] (w_q[n, k] - zero_point[n, g]), (M, N, groups) int64."""
    offset = weight.unpack().long() - weight.per_input(weight.zero_point).long()
    sums = [
        x_q[:, first : first + weight.group_size].double() @ offset[:, first : first + weight.group_size].double().T
        for first in range(0, weight.shape[1], weight.group_size)
    ]
    # integers below 2^53 are exact in float64
    return torch.stack(sums, dim=-1).long()


def w4a8_linear(x: Tensor, weight: PackedInt4, x_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return y (M, N) float64 of x (M, K) with scales (M, 1) float32; see `mgt_kernels.w4a8_linear`."""
    sums = group_sums(quantize_activations(x, x_scale), weight)
    y = torch.einsum("mng,ng->mn", sums.double(), weight.scale.double()) * x_scale.double()
    return y if bias is None else y + bias.double()
