"""The oracles of merge_tokens and unmerge_tokens in float64."""

import torch
from torch import Tensor


def merge_tokens(x: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Return the means (B, num_rows, C) float64 of the tokens that share a row; a row without tokens is 0."""
    batch, _, num_channels = x.shape
    y = x.double()
    index = row[..., None].expand(-1, -1, num_channels)
    total = y.new_zeros(batch, num_rows, num_channels).scatter_add_(1, index, y)
    sizes = y.new_zeros(batch, num_rows).scatter_add_(1, row, y.new_ones(row.shape))
    return total / sizes.clamp(min=1)[..., None]


def unmerge_tokens(x: Tensor, row: Tensor) -> Tensor:
    """Return each token's row of x (B, M, C): (B, N, C), of the dtype of x."""
    # as integers, since PyTorch's copies of 16-bit floats change the bits of a signalling NaN
    bits = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    return bits.gather(1, row[..., None].expand(-1, -1, x.shape[-1])).view(x.dtype)
