"""MaskBit (arXiv 2409.16211): its function `sample`, as a method of its two generators, on our draw and re-masking."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mgt_kernels.checks import check_choice

from ..schedules import mask_ratio
from .maskgit import decode, ratios

# what is drawn where no labels are given, before one that is random: from a goldfish to a teddy bear
_CLASSES = (1, 7, 282, 604, 724, 179, 751, 404, 850)


def replacements(model: Any) -> dict[str, Any]:
    """A method `sample`, which the model has not by itself."""
    return {"sample": partial(sample, model)}


@torch.no_grad()
def sample(
    model: Any, vqgan_model: Any, num_samples: int = 10, labels: Tensor | None = None, softmax_temperature: float = 1.0,
    randomize_temperature: float = 4.5, mask_schedule_strategy: str = "linear", num_steps: int = 12,
    guidance_scale: float = 3.0, mask_token: int = 1024, patch_size: int = 16, guidance_annealing: str = "none",
    use_sampling_annealing: bool = False, scale_pow: float = 4.0, codebook_size: int = 1024, codebook_splits: int = 1,
    use_tqdm: bool = False,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Draw images of classes, as MaskBit's `sample(model, ...)` does: `model.sample(...)`, the rest of it unchanged.

    Step k of T, with r = (k + 1) / T, f = k / T, and gamma by mask_schedule_strategy, over all N groups of bits::

        l      = (c + w guidance_scale (c - u)) / a         w = 1; f if linear; (1 - cos(pi f^scale_pow)) / 2 if cosine
        token  ~ softmax(l)                                 a = softmax_temperature, or 0.5 + 0.8 (1 - r) annealed
        score  = log softmax(l)[token] + randomize_temperature (1 - r) g

    and the max(1, min(M - 1, floor(N gamma(r)))) lowest scores of M are masked again: exactly as many, where the
    original masks all that equal the last, and everything where M = 1. A sample's seed is taken from PyTorch's
    generator. Returned are the images, and the tokens of each step (B, patch_size^2, codebook_splits).
    """
    check_choice("guidance_annealing", guidance_annealing, ("none", "linear", "cosine"))
    schedule = partial(mask_ratio, schedule=mask_schedule_strategy, name="mask_schedule_strategy")
    shares = ratios(schedule, num_steps, "num_steps")
    model.eval()
    vqgan_model.eval()
    if labels is None:
        classes = torch.tensor([*_CLASSES, int(torch.randint(999, ()))], device=model.device)
        labels = classes.repeat(num_samples // 10 + 1)[:num_samples]
    shape = (num_samples, patch_size**2, codebook_splits)
    ids = torch.full((num_samples, math.prod(shape[1:])), mask_token, device=model.device)
    halves = 1 if guidance_scale == 0 else 2
    conditions = torch.cat([labels] * halves)
    dropped = torch.arange(len(conditions), device=model.device) >= num_samples

    def predict(ids: Tensor) -> Any:
        # the model writes to the labels
        return model(ids.view(shape).repeat(halves, 1, 1), conditions.clone(), dropped).flatten(1, 2)

    before = [k / num_steps for k in range(num_steps)]
    left = [1 - (k + 1) / num_steps for k in range(num_steps)]
    weights = {
        "none": [1.0] * num_steps,
        "linear": before,
        "cosine": [(1 - math.cos(math.pi * each**scale_pow)) / 2 for each in before],
    }[guidance_annealing]
    _, draws = decode(
        predict, ids, mask_token, ids.shape[1], shares, [1 + guidance_scale * weight for weight in weights],
        [0.5 + 0.8 * each if use_sampling_annealing else softmax_temperature for each in left],
        [randomize_temperature * each for each in left], use_tqdm=use_tqdm,
    )  # fmt: skip
    tokens = [drawn.view(shape) for drawn in draws]
    shifts = torch.arange(codebook_splits, device=model.device) * (int(math.log2(codebook_size)) // codebook_splits)
    # float32 as there, which is exact for codebooks up to 2^24
    return vqgan_model.decode_tokens((tokens[-1] << shifts).sum(-1).float()), tokens
