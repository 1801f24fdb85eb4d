"""The oracle of commit_tokens in float64."""

import torch
from torch import Tensor

from mgt_kernels.reference.draws import confidence_gumbel

# of an entropy, so that sums are exact in any order
ENTROPY_UNITS = 2.0**36
MOST_ENTROPY = 64.0


def commit_tokens(
    token_ids: Tensor,
    score: Tensor,
    tokens: Tensor,
    *,
    mask_token_id: int,
    count: Tensor,
    rule: str,
    value: float,
    start: Tensor,
    end: Tensor,
    temperature: float = 0.0,
    seed: Tensor | None = None,
    step: int = 0,
    argmax: Tensor | None = None,
    max_logprob: Tensor | None = None,
    replace_above: float = torch.inf,
    known_logprob: Tensor | None = None,
    mask_below: float = -torch.inf,
) -> tuple[Tensor, Tensor]:
    """Return tokens (B, N) int64 and done (B,) bool; see `mgt_kernels.commit_tokens`, whose thresholds are float32."""
    num_positions = tokens.shape[1]
    position = torch.arange(num_positions, dtype=torch.int64, device=tokens.device)
    inside = (position >= start[:, None]) & (position < end[:, None])
    competes = inside & (tokens == mask_token_id)
    confidence = (-score if rule == "entropy_bound" else score).double().clamp(max=torch.finfo(torch.float32).max)
    if temperature and seed is not None:
        confidence = confidence + temperature * confidence_gumbel(seed, num_positions, step)

    # those that compete first, of these the best first, among ties the higher position first
    order = confidence.argsort(dim=-1, stable=True)
    order = order.gather(-1, competes.gather(-1, order).to(torch.int8).argsort(dim=-1, stable=True)).flip(-1)
    ordered = confidence.gather(-1, order)
    n = position + 1
    if rule == "threshold":
        passes = ordered >= value
    elif rule == "factor":
        passes = (n + 1) * (1 - ordered) <= value
    elif rule == "entropy_bound":
        entropy = ((-ordered).clamp(0, MOST_ENTROPY) * ENTROPY_UNITS).long()
        passes = entropy.cumsum(-1) - entropy <= int(min(value, 2.0**20) * ENTROPY_UNITS)
    else:
        passes = torch.zeros_like(competes)
    first = passes.long().cumprod(-1).bool() | (n <= count[:, None])
    commits = torch.zeros_like(competes).scatter(-1, order, first) & competes

    after = torch.where(commits, token_ids, tokens)
    known = inside & (tokens != mask_token_id)
    if known_logprob is not None:
        after = torch.where(known & (known_logprob < mask_below), mask_token_id, after)
    if argmax is not None and max_logprob is not None:
        after = torch.where(known & (argmax != tokens) & (max_logprob > replace_above), argmax, after)
    return after, ~(inside & (after == mask_token_id)).any(-1)
