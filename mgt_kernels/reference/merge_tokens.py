"""The oracles of merge_tokens and unmerge_tokens in float64."""

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
    return x.gather(1, row[..., None].expand(-1, -1, x.shape[-1]))
