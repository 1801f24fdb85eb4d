"""The oracle of mask_by_confidence in float64."""

import torch
from torch import Tensor

from mgt_kernels.reference.draws import confidence_gumbel


def mask_by_confidence(
    token_ids: Tensor,
    logprob: Tensor,
    mask_len: Tensor,
    *,
    mask_token_id: int,
    temperature: float,
    seed: Tensor,
    step: int,
) -> Tensor:
    """Return tokens (B, N) int64 with the mask_len lowest confidences masked; see `mgt_kernels.mask_by_confidence`."""
    confidence = logprob.double()
    if temperature:
        confidence = confidence + temperature * confidence_gumbel(seed, logprob.shape[1], step)
    # a stable sort keeps lower positions first among ties
    order = confidence.argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], dtype=torch.int64, device=order.device).expand_as(order)
    )
    return token_ids.masked_fill(rank < mask_len[:, None], mask_token_id)
