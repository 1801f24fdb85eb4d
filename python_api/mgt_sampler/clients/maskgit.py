"""The loop of MaskGIT (arXiv 2202.04200), which several projects have: the surest tokens stay, by log-probability."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mgt_kernels import mask_by_confidence, sample_tokens

from ..scheduler import Generators, check_generators, draw_seeds
from ..schedules import mask_len


def ratios(schedule: Callable[..., Any], num_steps: int, name: str) -> list[float]:
    """Shares of the tokens that stay masked after each step: the schedule of (k + 1) / T, a float32.

    Raises:
        ValueError: there is no step; the message names the argument.
    """
    if num_steps < 1:
        raise ValueError(f"{name}: expected at least 1, got {num_steps}")
    return [float(schedule(torch.tensor((k + 1) / num_steps))) for k in range(num_steps)]


def decode(
    predict: Callable[[Tensor], Tensor],
    ids: Tensor,
    mask_token_id: int,
    num_positions: int,
    mask_ratios: Sequence[float],
    scales: Sequence[float],
    temperatures: Sequence[float],
    noises: Sequence[float],
    *,
    generator: Generators = None,
    known_too: bool = False,
    use_tqdm: Any = False,
) -> tuple[Tensor, list[Tensor]]:
    """Replace the masks of ids (B, N) by tokens; there is a ratio, scale, temperature and noise for each step::

        l      = (u + scale (c - u)) / temperature
        token  ~ softmax(l)
        score  = log softmax(l)[token] + noise g

    and the max(1, min(M - 1, floor(num_positions ratio))) lowest scores of a sample's M masked positions are masked
    again, none where M = 0 and none after the last step.

    Args:
        predict: gives the logits of ids, and below them those of the unconditional half if there is guidance.
        generator: one, or a list with one for each sample; seeds are taken from PyTorch's where it is None.
        known_too: the second result has tokens drawn for known positions as well; they keep their own all the same.

    Returns:
        The tokens, and what each step drew.
    """
    check_generators(generator, len(ids))
    seeds, draws = draw_seeds(len(ids), generator, ids.device), []
    for k, scale in enumerate(tqdm(scales, disable=not use_tqdm)):
        common: dict[str, Any] = {"mask_token_id": mask_token_id, "seed": seeds, "step": k}
        logits, masked = predict(ids), ids == mask_token_id
        drawn = sample_tokens(
            logits[: len(ids)],
            torch.full_like(ids, mask_token_id) if known_too else ids,
            uncond_logits=logits[len(ids) :] if len(logits) > len(ids) else None,
            guidance_scale=scale,
            temperature=temperatures[k],
            **common,
        )
        draws.append(drawn.token_ids)
        ids = torch.where(masked, drawn.token_ids, ids)
        if k + 1 < len(scales):
            score = drawn.logprob.where(masked, math.inf)
            left = mask_len(masked.sum(1), mask_ratios[k], num_positions)
            ids = mask_by_confidence(ids, score, left, temperature=noises[k], **common)
    return ids, draws
