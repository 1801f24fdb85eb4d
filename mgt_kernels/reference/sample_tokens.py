"""The oracle of sample_tokens in float64."""

from typing import Any

import torch
from torch import Tensor

from mgt_kernels import cpu
from mgt_kernels.reference.draws import gaussian, token_gumbel


def logits_and_noise(
    logits: Tensor,
    *,
    seed: Tensor,
    step: int,
    mask_token_id: int,
    uncond_logits: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    noise_scale: float = 0.0,
    temperature: float = 1.0,
    first_position: int | Tensor = 0,
    token_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (l, g): the logits that tokens are drawn from, and their Gumbel noise; (B, N, V) float64.

    guidance_scale and first_position are numbers or (B,), token_bias is (V,). g is 0 at temperature 0.
    """
    _, num_positions, num_tokens = logits.shape
    if isinstance(guidance_scale, Tensor) and guidance_scale.ndim:
        guidance_scale = guidance_scale.double()[:, None, None]
    cond = logits.double()
    guided = cond
    if uncond_logits is not None:
        uncond = uncond_logits.double()
        guided = uncond + guidance_scale * (cond - uncond)
        forbidden = (cond == -torch.inf) | (uncond == -torch.inf)
        # below 0, a scale would make -inf of it, which only forbids
        guided = guided.masked_fill(cond == torch.inf, torch.inf).masked_fill(forbidden, -torch.inf)
    if token_bias is not None:
        guided = (guided + token_bias.double()).masked_fill(token_bias == -torch.inf, -torch.inf)
    noisy = guided
    if noise_scale:
        noisy = guided + noise_scale * gaussian(seed, num_positions, num_tokens, step, first_position)
    tempered = noisy / temperature if temperature else noisy
    if 0 <= mask_token_id < num_tokens:
        tempered = tempered.clone()
        tempered[..., mask_token_id] = -torch.inf
    if not temperature:
        return tempered, torch.zeros_like(tempered)
    return tempered, token_gumbel(seed, num_positions, num_tokens, step, first_position)


def perturbed_logits(logits: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Return (l, l + g) of `logits_and_noise`."""
    tempered, noise = logits_and_noise(logits, **options)
    return tempered, tempered + noise


def row_statistics(tempered: Tensor) -> dict[str, Tensor]:
    """Return what a row's logits l (..., V) alone say, each (...); float64, but argmax int64."""
    max_logit, argmax = tempered.max(-1)
    logsumexp = tempered.logsumexp(-1)
    log_p = tempered - logsumexp[..., None]
    p = log_p.exp()
    second = p.scatter(-1, argmax[..., None], 0.0).amax(-1)
    return {
        # not the second of what max returns, which is any of equal ones
        "argmax": (tempered == max_logit[..., None]).long().argmax(-1),
        "max_logprob": max_logit - logsumexp,
        "margin": p.amax(-1) - second,
        "entropy": -torch.where(p > 0, p * log_p, 0.0).sum(-1),
        "logsumexp": logsumexp,
    }


def sample_tokens(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask_token_id: int,
    rows: str = "masked",
    temperature: float = 1.0,
    **options: Any,
) -> tuple[dict[str, Tensor], int]:
    """Return (outputs, first bad row or -1); see `mgt_kernels.sample_tokens`.

    Args:
        options: the others of `logits_and_noise`.

    Returns:
        All that `mgt_kernels.sample_tokens` can give, float64 and int64, each (B, N); and b N + n of the first row that
        is read and has bad logits.
    """
    tempered, scores = perturbed_logits(logits, mask_token_id=mask_token_id, temperature=temperature, **options)
    masked = tokens == mask_token_id
    read = {"masked": masked, "known": ~masked, "all": torch.ones_like(masked)}[rows]
    drawn = scores.argmax(-1)
    statistics = row_statistics(tempered)
    # a known token outside the codebook has no logit
    known = tokens.clamp(0, logits.shape[-1] - 1)
    drawn_logit, known_logit = tempered.gather(-1, torch.stack([drawn, known], -1)).unbind(-1)
    draws, scores = read & masked, read & ~masked
    outputs = {
        "token_ids": torch.where(draws, drawn, tokens),
        "logprob": torch.where(draws, drawn_logit - statistics["logsumexp"], torch.inf),
        "argmax": torch.where(read, statistics.pop("argmax"), tokens),
        **{name: torch.where(read, value, torch.inf) for name, value in statistics.items()},
        "known_logprob": torch.where(scores, known_logit - statistics["logsumexp"], torch.inf),
        "logit": torch.where(draws, drawn_logit * (temperature or 1.0), torch.inf),
    }
    bad = (tempered.isnan() | (tempered == torch.inf)).any(-1) | (tempered == -torch.inf).all(-1)
    return outputs, cpu.first_index(bad & read)
