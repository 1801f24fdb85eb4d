"""The oracle of sample_tokens in float64."""

import math
from typing import Any

import torch
from torch import Tensor

from mgt_kernels import cpu
from mgt_kernels.reference.draws import gaussian, token_gumbel


def capped(logits: Tensor, softcap: float) -> Tensor:
    """Return c tanh(l / c), float64, infinities as they are."""
    logits = logits.double()
    if softcap == math.inf:
        return logits
    return torch.where(logits.isinf(), logits, softcap * torch.tanh(logits / softcap))


def guided_logits(
    logits: Tensor,
    uncond_logits: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    second_uncond_logits: Tensor | None = None,
    second_guidance_scale: float | Tensor = 1.0,
    guidance: str = "nested",
    softcap: float = math.inf,
) -> Tensor:
    """Return what guidance makes of the halves, (B, N, V) float64; the scales are numbers or (B,)."""
    scale, second_scale = (
        given.double()[:, None, None] if isinstance(given, Tensor) and given.ndim else given
        for given in (guidance_scale, second_guidance_scale)
    )
    cond = capped(logits, softcap)
    guided, halves = cond, [cond]
    if uncond_logits is not None:
        uncond = capped(uncond_logits, softcap)
        halves.append(uncond)
        guided = uncond + scale * (cond - uncond)
    if second_uncond_logits is not None:
        second = capped(second_uncond_logits, softcap)
        halves.append(second)
        if guidance == "nested":
            guided = second + second_scale * (guided - second)
        else:
            guided = guided + (second_scale - 1) * (cond - second)
    infinite, forbidden = (torch.stack([half == value for half in halves]).any(0) for value in (torch.inf, -torch.inf))
    # a scale below 0 would make -inf of it, which only forbids
    return guided.masked_fill(infinite, torch.inf).masked_fill(forbidden, -torch.inf)


def logits_and_noise(
    logits: Tensor,
    *,
    seed: Tensor,
    step: int,
    mask_token_id: int,
    noise_scale: float = 0.0,
    temperature: float = 1.0,
    first_position: int | Tensor = 0,
    token_bias: Tensor | None = None,
    **guidance: Any,
) -> tuple[Tensor, Tensor]:
    """Return (l, g): the logits that tokens are drawn from, and their Gumbel noise; (B, N, V) float64.

    first_position is a number or (B,), token_bias is (V,). g is 0 at temperature 0.

    Args:
        guidance: the other arguments of `guided_logits`.
    """
    _, num_positions, num_tokens = logits.shape
    guided = guided_logits(logits, **guidance)
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


def kept_tokens(tempered: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Return which tokens a truncated draw may draw, (..., V) bool, of the logits l.

    top_k keeps the k largest; of those, top_p the fewest largest whose probabilities add up to it; of those, min_p the
    ones of at least min_p times the largest probability. Equal ones at a border are all kept.
    """
    kept = tempered > -torch.inf
    if top_k:
        kept &= tempered >= tempered.topk(top_k).values[..., -1:]
    if top_p < 1:
        falling = tempered.masked_fill(~kept, -torch.inf).sort(-1, descending=True).values
        p = falling.softmax(-1)
        before = p.cumsum(-1) - p
        # the first always, and each whose predecessors do not reach top_p
        count = (before < top_p).sum(-1, keepdim=True).clamp(min=1)
        kept &= tempered >= falling.gather(-1, count - 1)
    if min_p:
        kept &= tempered >= tempered.amax(-1, keepdim=True) + math.log(min_p)
    return kept


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
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    logprob_of: str = "kept",
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
    bad = (tempered.isnan() | (tempered == torch.inf)).any(-1) | (tempered == -torch.inf).all(-1)
    left_out = ~kept_tokens(tempered, top_k, top_p, min_p)
    scores = scores.masked_fill(left_out, -torch.inf)
    if logprob_of == "kept":
        tempered = tempered.masked_fill(left_out, -torch.inf)
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
    return outputs, cpu.first_index(bad & read)
