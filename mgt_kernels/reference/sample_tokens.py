"""The oracle of sample_tokens in float64."""

import torch
from torch import Tensor

from mgt_kernels import cpu
from mgt_kernels.reference.draws import gaussian, token_gumbel


def perturbed_logits(
    logits: Tensor,
    *,
    seed: Tensor,
    step: int,
    mask_token_id: int,
    uncond_logits: Tensor | None = None,
    guidance_scale: float = 1.0,
    noise_scale: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return (l, l + g): the logits that tokens are drawn from, and with their Gumbel noise; (B, N, V) float64."""
    _, num_positions, num_tokens = logits.shape
    cond = logits.double()
    guided = cond
    if uncond_logits is not None:
        uncond = uncond_logits.double()
        guided = uncond + guidance_scale * (cond - uncond)
        forbidden = (cond == -torch.inf) | (uncond == -torch.inf)
        # below 0, a scale would make -inf of it, which only forbids
        guided = guided.masked_fill(cond == torch.inf, torch.inf).masked_fill(forbidden, -torch.inf)
    noisy = guided
    if noise_scale:
        noisy = guided + noise_scale * gaussian(seed, num_positions, num_tokens, step)
    tempered = noisy / temperature if temperature else noisy
    if 0 <= mask_token_id < num_tokens:
        tempered = tempered.clone()
        tempered[..., mask_token_id] = -torch.inf
    noise = token_gumbel(seed, num_positions, num_tokens, step) if temperature else 0.0
    return tempered, tempered + noise


def sample_tokens(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask_token_id: int,
    seed: Tensor,
    step: int,
    uncond_logits: Tensor | None = None,
    guidance_scale: float = 1.0,
    noise_scale: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, int]:
    """Return (token_ids int64, logprob float64, first bad row or -1); see `mgt_kernels.sample_tokens`."""
    tempered, scores = perturbed_logits(
        logits,
        seed=seed,
        step=step,
        mask_token_id=mask_token_id,
        uncond_logits=uncond_logits,
        guidance_scale=guidance_scale,
        noise_scale=noise_scale,
        temperature=temperature,
    )
    masked = tokens == mask_token_id
    bad = (tempered.isnan() | (tempered == torch.inf)).any(-1) | (tempered == -torch.inf).all(-1)
    drawn = scores.argmax(-1)
    logprob = tempered.gather(-1, drawn[..., None])[..., 0] - tempered.logsumexp(-1)
    return (
        torch.where(masked, drawn, tokens),
        torch.where(masked, logprob, torch.inf),
        cpu.first_index(bad & masked),
    )
