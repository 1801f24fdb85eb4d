"""open-muse (arXiv 2401.01808), text to image: `generate2` of `MaskGiTUViT_v2`, on our draw and re-masking."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..scheduler import Generators
from ..schedules import mask_ratio
from .maskgit import decode, ratios


def replacements(model: Any) -> dict[str, Any]:
    """The whole of `generate2`: guidance, draw and score of a step are one read of both halves' logits."""
    return {"generate2": partial(generate2, model)}


@torch.no_grad()
def generate2(
    model: Any, encoder_hidden_states: Tensor, cond_embeds: Tensor, micro_conds: Tensor, empty_embeds: Any,
    empty_cond_embeds: Any, input_ids: Tensor | None = None, negative_embeds: Any = None,
    negative_cond_embeds: Any = None, temperature: float | tuple[float, float] = 1.0, timesteps: int = 18,
    guidance_scale: float = 0, guidance_schedule: str | None = None, noise_schedule: Callable[..., Any] = mask_ratio,
    generator: Generators = None, return_intermediate: bool = False, seq_len: int | None = None, use_tqdm: Any = None,
    topk_filter_thres: Any = None, noise_type: Any = None, predict_all_tokens: Any = None,
) -> Any:  # fmt: skip
    """Draw the tokens (B, N) of texts, as the original does; a list of generators has one for each sample.

    Step k of T, with r = (k + 1) / T and t from temperature to 0.01, or between the two that are given::

        l      = u + s (c - u)                       s = guidance_scale; k / (T - 1) of it if linear,
        token  ~ softmax(l)                          floor(guidance_scale cos(pi (1 - r) / 2)) if cosine
        score  = log softmax(l)[token] + t g

    and the max(1, min(M - 1, floor(seq_len noise_schedule(r)))) lowest scores of a sample's M are masked again: exactly
    as many. Known tokens stay, also where M = 0, when the original masks one; without guidance, when it fails, l = c.
    """
    shares = ratios(noise_schedule, timesteps, "timesteps")
    config, batch_size, guided = model.config, len(encoder_hidden_states), guidance_scale > 0
    num_positions = 256 if seq_len is None else seq_len
    ids = input_ids
    if ids is None:
        ids = torch.full((batch_size, num_positions), config.mask_token_id, device=model.device)
    scales = torch.full((timesteps,), float(guidance_scale))
    if guidance_schedule == "linear":
        scales = torch.linspace(0, guidance_scale, timesteps)
    elif guidance_schedule == "cosine":
        left = torch.tensor([1 - (k + 1) / timesteps for k in range(timesteps)])
        scales = (mask_ratio(left) * guidance_scale).floor()
    first, last = temperature if isinstance(temperature, tuple) else (temperature, 0.01)
    noises = torch.linspace(first, last, timesteps).tolist()

    def halves(given: Tensor, negative: Any, empty: Any) -> Tensor:
        other = empty if negative is None else negative
        return torch.cat([given, other.expand(batch_size, *other.shape[1:])]) if guided else given

    inputs = {
        "micro_conds": micro_conds.to(ids.device).expand(batch_size, -1).repeat(1 + guided, 1),
        "cond_embeds": halves(cond_embeds, negative_cond_embeds, empty_cond_embeds),
        "encoder_hidden_states": halves(encoder_hidden_states, negative_embeds, empty_embeds),
    }

    def predict(ids: Tensor) -> Any:
        return model(ids.repeat(1 + guided, 1), **inputs)[..., : config.codebook_size]

    found, draws = decode(
        predict, ids, config.mask_token_id, num_positions, shares, scales.tolist(), [1.0] * timesteps, noises,
        generator=generator, known_too=return_intermediate, use_tqdm=use_tqdm,
    )  # fmt: skip
    return (found, draws) if return_intermediate else found
