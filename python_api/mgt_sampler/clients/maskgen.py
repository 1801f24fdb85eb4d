"""MaskGen (arXiv 2501.07730), text to image: `generate` of `MaskGen_VQ`, on our draw and re-masking."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mgt_kernels.checks import check_choice

from ..scheduler import draw_seeds
from ..schedules import mask_ratio
from .titok import draw_and_mask


def replacements(model: Any) -> dict[str, Any]:
    """The whole of `generate`: guidance, draw and score of a step are one read of both halves' logits."""
    return {"generate": partial(generate, model)}


@torch.no_grad()
def generate(
    model: Any,
    captions: Sequence[str],
    guidance_scale: float = 12.0,
    randomize_temperature: float = 1.5,
    sample_aesthetic_score: Any = None,
    softmax_temperature_annealing: bool = True,
    num_sample_steps: int = 16,
    guidance_decay: str = "cosine",
    guidance_decay_scale_pow: float = 1.0,
    clip_tokenizer: Any = None,
    clip_encoder: Any = None,
    prob_sorting: bool = True,
) -> Tensor:
    """Draw the tokens (B, N) of captions, as the original does; a sample's seed is taken from PyTorch's generator.

    Step k of T, with r = (k + 1) / T and t = randomize_temperature (1 - r)::

        l       = (c + s (c - u)) / a                a = 0.5 + 0.8 (1 - r), or t without annealing
        s       = 1 + (guidance_scale - 1) w         w = r if linear, (1 - cos(pi r^p)) / 2 if cosine,
                                                     cos(pi r^p) / 2 if flippedcosine; guidance_scale if none
        token   = argmax_j (l_j + t g_j)             p = guidance_decay_scale_pow
        score   = l_token + t g                      without noise where prob_sorting is False

    and the max(1, min(M - 1, floor(N gamma(r)))) lowest scores of M are masked again, gamma the model's own schedule:
    exactly as many, where the original masks all that equal the last, and at t = 0 nothing is divided by it. As in the
    original, the aesthetic score is the model's if any is given.
    """
    check_choice("guidance_decay", guidance_decay, ("linear", "cosine", "none", "flippedcosine"))
    places = [sys.modules[kind.__module__] for kind in type(model).__mro__]
    encode = next(place.open_clip_text_encoding for place in places if hasattr(place, "open_clip_text_encoding"))
    texts, empty = (encode(clip_tokenizer, clip_encoder, each) for each in (captions, [""]))
    halves = [torch.cat([one, other.repeat(len(one), 1, 1)]) for one, other in zip(texts, empty, strict=True)]
    batch_size, num_positions, device = len(halves[0]) // 2, model.image_seq_len, halves[0].device
    if sample_aesthetic_score is not None:
        halves.append(torch.full((2 * batch_size,), model.sample_aesthetic_score, device=device))
    ids = torch.full((batch_size, num_positions), model.mask_token_id, device=device)
    seeds, num_masked = draw_seeds(batch_size, None, device), num_positions
    for k in range(num_sample_steps):
        r = (k + 1) / num_sample_steps
        turn = math.cos(math.pi * r**guidance_decay_scale_pow)
        weight = {"linear": r, "cosine": (1 - turn) / 2, "flippedcosine": turn / 2}.get(guidance_decay, 1.0)
        scale = guidance_scale if guidance_decay == "none" else 1 + (guidance_scale - 1) * weight
        rows = 2 * batch_size if scale != 0 else batch_size
        logits = model.forward(ids.repeat(2, 1)[:rows], *(each[:rows] for each in halves))[0]
        uncond = logits[batch_size:] if scale != 0 else None
        temperature = randomize_temperature * (1 - r)
        divisor = 0.5 + 0.8 * (1 - r) if softmax_temperature_annealing else temperature or 1.0
        ratio = mask_ratio(torch.tensor(r), model.mask_schedule_strategy, name="mask_schedule_strategy")
        num_masked = max(1, min(num_masked - 1, int(ratio * num_positions))) if r < 1 else 0
        common: dict[str, Any] = {"mask_token_id": model.mask_token_id, "seed": seeds, "step": k}
        noise, logits = temperature if prob_sorting else 0.0, logits[:batch_size]
        ids = draw_and_mask(logits, uncond, ids, 1 + scale, divisor, temperature, noise, num_masked, **common)
    return ids
