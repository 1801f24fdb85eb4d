"""Lumina-DiMOO (arXiv 2510.06308): the loop of its `generate_image`, as a method of the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mgt_kernels import mask_by_confidence

from ..scheduler import Generators, check_generators, draw_seeds
from ..schedules import mask_ratio
from .draws import sample_and_score


def replacements(model: Any) -> dict[str, Any]:
    """A `generate_image`, which image_generation_generator.py has as a function of the model."""
    return {"generate_image": partial(generate_image, model)}


@torch.no_grad()
def generate_image(
    model: Any, prompt: Tensor, *, seq_len: int = 1024, newline_every: int = 16, timesteps: int = 18,
    mask_token_id: int = 126336, newline_id: int = 126084, temperature: float = 1.0, cfg_scale: float = 0.0,
    uncon_ids: Tensor, code_start: int | None = None, codebook_size: int = 8192,
    noise_schedule: Callable[[Tensor], Tensor] = mask_ratio, text_vocab_size: int | None = None,
    generator: Generators = None, use_cache: bool = False, cache_ratio: float = 0.9, refresh_interval: int = 5,
    warmup_ratio: float = 0.3,
) -> Tensor:  # fmt: skip
    """Draw images' tokens (B, seq_len) as `generate_image(model, prompt, ...)` does, ids of the whole vocabulary.

    Step k of T has M of N positions masked at first, and logits l of the codebook alone; s = cfg_scale, t the
    temperature, also of the noise, g ~ Gumbel::

        l         = c + s (c - u)                       u with uncon_ids before the image;  c where s = 0
        token     ~ softmax(l / t),                     argmax l where t = 0
        masks     = min(M - 1, max(1, floor(N noise_schedule((k + 1) / T)))),  0 in the last step;
                    the lowest log softmax(l)[token] + t g

    The original's noise has the logits' dtype, in which 16 bits draw almost the likeliest alone. Here prompts may be
    several and are not written to, and use_cache needs no guidance.
    """
    ids, guided = prompt.to(next(model.parameters()).device, copy=True), cfg_scale > 0
    check_generators(generator, len(ids))
    if guided and code_start is None:
        raise ValueError("code_start: expected where the image begins, since cfg_scale is above 0, got None")
    image = ids[:, code_start:-2]
    if ((image != newline_id).sum(1) != seq_len).any():
        raise ValueError(f"seq_len: expected the image tokens from code_start on, got {seq_len}")
    model.caching(use_cache)
    if text_vocab_size is None:
        text_vocab_size = model(ids.new_zeros(1, 1), infer=True).logits.shape[-1] - codebook_size
    # the image and the two tokens before it, which the unconditional half has too
    start = code_start - 2 if guided and code_start is not None else 0
    here, prefix = ids[:, start:], uncon_ids.to(ids.device).expand(len(ids), -1) if guided else ids[:, :0]
    common: dict[str, Any] = {"mask_token_id": -1, "seed": draw_seeds(len(ids), generator, ids.device)}
    at_first, warm_up = (here == mask_token_id).sum(1), int(timesteps * warmup_ratio)
    changing: dict[str, Tensor] = {}
    refreshes = [not use_cache or k <= warm_up or (k - warm_up) % refresh_interval == 0 for k in range(timesteps)]
    for k in range(timesteps):
        masked = here == mask_token_id
        if not masked.any():
            break
        if use_cache and k > 0 and refreshes[k]:
            model.empty_cache()
        halves: dict[str, Tensor] = {"cond": ids}
        if guided:
            halves["uncond"] = torch.cat([prefix, here], 1)
        for name, given in halves.items():
            computed = None if refreshes[k] else changing[name]
            found = model(given, infer=True, cat=name, use_cache=use_cache, to_compute_mask=computed).logits
            halves[name] = found = found[..., text_vocab_size : text_vocab_size + codebook_size]
            if use_cache and k < timesteps - 1 and not refreshes[k + 1]:
                best = found.amax(-1)
                changing[name] = best <= best.float().quantile(1 - cache_ratio, dim=-1, keepdim=True)
        code, score = sample_and_score(
            halves["cond"][:, start:], here.masked_fill(masked, -1), temperature=temperature, step=k,
            uncond_logits=halves["uncond"][:, prefix.shape[1] :] if guided else None, guidance_scale=cfg_scale + 1.0,
            first_position=start, **common,
        )  # fmt: skip
        share = noise_schedule(torch.tensor([(k + 1) / timesteps])).to(ids.device)
        count = (at_first * share).floor().long().clamp(min=1).minimum(masked.sum(1) - 1).clamp(min=0)
        code = mask_by_confidence(
            code, score, count if k < timesteps - 1 else 0, temperature=temperature, step=k, **common
        )
        here.copy_(torch.where(masked, torch.where(code == -1, mask_token_id, code + text_vocab_size), here))
    return image[image != newline_id].view(len(ids), seq_len)
