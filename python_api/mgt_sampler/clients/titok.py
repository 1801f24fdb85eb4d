"""TiTok's two generators (arXiv 2406.07550), `ImageBert` and `UViTBert`: `generate`, on our draw and re-masking."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgt_kernels import mask_by_confidence, sample_tokens
from mgt_kernels.checks import check_choice

from ..scheduler import draw_seeds


def replacements(model: Any) -> dict[str, Any]:
    """The whole of `generate`: guidance, draw and score of a step are one read of both halves' logits."""
    return {"generate": partial(generate, model)}


@torch.no_grad()
def generate(
    model: Any,
    condition: Tensor,
    guidance_scale: float = 3.0,
    guidance_decay: str = "constant",
    guidance_scale_pow: float = 3.0,
    randomize_temperature: float = 4.5,
    softmax_temperature_annealing: bool = False,
    num_sample_steps: int = 8,
) -> Tensor:
    """Draw the tokens (B, N) of classes, as the original does; a sample's seed is taken from PyTorch's generator.

    Step k of T, with r = (k + 1) / T, f = k / T and t = randomize_temperature (1 - r)::

        l       = (u + s (c - u)) / a                a = 0.5 + 0.8 (1 - r), or 1 without annealing
        s       = 1 + guidance_scale                 constant; 1 + f guidance_scale if linear
        s       = 1 + (guidance_scale - 1) (1 - cos(pi f^guidance_scale_pow)) / 2       power-cosine
        token   = argmax_j (l_j + t g_j)
        score   = l_token + t g

    and the max(1, min(M - 1, floor(N 2 / pi acos(r)))) lowest scores of M are masked again: exactly as many, where the
    original masks all that equal the last. Where s = 1, the model is not asked for u.
    """
    check_choice("guidance_decay", guidance_decay, ("constant", "linear", "power-cosine"))
    num_masked = num_positions = model.image_seq_len
    ids = torch.full((len(condition), num_positions), model.mask_token_id, device=condition.device)
    seeds = draw_seeds(len(ids), None, ids.device)
    for k in range(num_sample_steps):
        before, r = k / num_sample_steps, (k + 1) / num_sample_steps
        scale = 1 + guidance_scale * (before if guidance_decay == "linear" else 1.0)
        if guidance_decay == "power-cosine":
            scale = 1 + (guidance_scale - 1) * (1 - math.cos(math.pi * before**guidance_scale_pow)) / 2
        logits = model.forward(ids, condition, cond_drop_prob=0.0)
        uncond = None if scale == 1 else model.forward(ids, condition, cond_drop_prob=1.0)
        divisor = 0.5 + 0.8 * (1 - r) if softmax_temperature_annealing else 1.0
        temperature = randomize_temperature * (1 - r)
        # in float64 by NumPy, as there: the floor is up to the last bit
        ratio = np.arccos(r) / (math.pi * 0.5)
        num_masked = max(1, min(num_masked - 1, math.floor(num_positions * ratio))) if r < 1 else 0
        common: dict[str, Any] = {"mask_token_id": model.mask_token_id, "seed": seeds, "step": k}
        ids = draw_and_mask(logits, uncond, ids, scale, divisor, temperature, temperature, num_masked, **common)
    return ids


def draw_and_mask(
    logits: Tensor, uncond: Tensor | None, ids: Tensor, scale: float, divisor: float, temperature: float, noise: float,
    num_masked: int, **common: Any,
) -> Tensor:  # fmt: skip
    """Tokens argmax (l + temperature g), l the guided logits over the divisor, of which num_masked are masked again."""
    drawn = sample_tokens(
        logits, ids, uncond_logits=uncond, guidance_scale=scale, temperature=divisor * temperature,
        statistics=("logit",), **common,
    )  # fmt: skip
    assert drawn.logit is not None
    return mask_by_confidence(drawn.token_ids, drawn.logit / divisor, num_masked, temperature=noise, **common)
