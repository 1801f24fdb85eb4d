"""The oracle of match_tokens in float64."""

import torch
from torch import Tensor

from mgt_kernels.reference.draws import merge_corner


def destinations(height: int, width: int, seed: Tensor, step: int | Tensor, is_random: bool) -> Tensor:
    """Return the position of each cell's destination: (B, height width / 4) int64, cells in reading order."""
    cell = torch.arange(height * width // 4, dtype=torch.int64, device=seed.device)
    row, column = cell // (width // 2) * 2, cell % (width // 2) * 2
    corner = merge_corner(seed, len(cell), step) if is_random else torch.zeros_like(cell).expand(len(seed), -1)
    return (row + corner // 2) * width + column + corner % 2


def similarities(x: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's largest cosine to a destination, and which one has it, the lowest position among ties.

    Args:
        x: (B, N, C), any dtype.
        to: int64 (B, D), positions in x.

    Returns:
        float64 (B, N), the tokens that are destinations among them, and int64 (B, N) positions. A row of zeros has
        cosine 0 to all.
    """
    y = x.double()
    norm = y.square().sum(-1, keepdim=True).sqrt()
    unit = torch.where(norm > 0, y / norm.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    to = to.sort(-1).values
    cosine = unit @ unit.gather(1, to[..., None].expand(-1, -1, x.shape[-1])).transpose(1, 2)
    best, place = cosine.max(-1).values, cosine.argmax(-1)
    # of equal ones argmax may give any
    place = (cosine == best[..., None]).to(torch.int8).argmax(-1)
    return best, to.gather(1, place)


def match_tokens(
    x: Tensor, height: int, width: int, num_merged: int, threshold: float, seed: Tensor, step: int, is_random: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return row (B, N), members (B, N), starts (B, N + 1) and num_rows (B,), int64; see `mgt_kernels.match_tokens`.

    num_merged below 0: all with a cosine of at least threshold.
    """
    to = destinations(height, width, seed, step, is_random)
    cosine, destination = similarities(x, to)
    position = torch.arange(height * width, dtype=torch.int64, device=x.device).expand(len(x), -1)
    is_source = torch.ones_like(position, dtype=torch.bool).scatter_(1, to, False)
    if num_merged < 0:
        merged = is_source & (cosine >= threshold)
    else:
        # the most similar first, among ties the lower position
        order = cosine.masked_fill(~is_source, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        merged = torch.zeros_like(is_source).scatter_(1, order[:, :num_merged], True)
    kept_row = (~merged).long().cumsum(-1) - 1
    row = torch.where(merged, kept_row.gather(1, destination), kept_row)
    return row, *_listed(row), (~merged).sum(-1)


def _listed(row: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's tokens one after the other in reading order, and where each row's begin."""
    members = row.argsort(dim=-1, stable=True)
    sizes = torch.zeros_like(row).scatter_add_(1, row, torch.ones_like(row))
    starts = torch.cat([row.new_zeros(len(row), 1), sizes.cumsum(-1)], dim=1)
    return members, starts
