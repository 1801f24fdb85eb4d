"""The oracle of remask_tokens' scores in float64."""

import torch
from torch import Tensor

from mgt_kernels.reference.draws import remask_gumbel
from mgt_kernels.reference.sample_tokens import perturbed_logits


def remask_score(
    logits: Tensor | None,
    tokens: Tensor,
    *,
    variant: str,
    mask_token_id: int,
    seed: Tensor,
    step: int,
    uncond_logits: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Return the score (B, N) float64 of each known token, +inf where masked; see `mgt_kernels.remask_tokens`."""
    known = tokens != mask_token_id
    if variant == "random" or logits is None:
        score = remask_gumbel(seed, tokens.shape[1], step)
    else:
        guided, _ = perturbed_logits(
            logits, seed=seed, step=step, mask_token_id=mask_token_id, uncond_logits=uncond_logits,
            guidance_scale=guidance_scale, temperature=0.0,
        )  # fmt: skip
        log_p = guided.log_softmax(-1)
        own = log_p.gather(-1, torch.where(known, tokens, 0)[..., None])[..., 0]
        score = own if variant == "paper" else -log_p.amax(-1)
    return torch.where(known, score, torch.inf)
