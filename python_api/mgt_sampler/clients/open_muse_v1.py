"""open-muse's first transformer, `MaskGitTransformer`: its `generate2`, on our draw and re-masking."""

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
    model: Any,
    input_ids: Tensor | None = None,
    class_ids: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    negative_embeds: Tensor | None = None,
    temperature: float = 1.0,
    timesteps: int = 18,
    guidance_scale: float = 0,
    noise_schedule: Callable[..., Any] = mask_ratio,
    generator: Generators = None,
    **kwargs: Any,
) -> Tensor:
    """Draw the tokens (B, N) of classes or texts, as the original does; a list of generators has one for each sample.

    A step is that of `open_muse.generate2`, with s = guidance_scale, u of negative_embeds or zeros, and after step k::

        t = temperature (1 - 1 / T) (1 - 2 / T) ... (1 - (k + 1) / T)

    as the original multiplies them, which is less noise than its model MaskGIT's temperature (1 - (k + 1) / T). Known
    tokens stay, and class_ids too, to which the original adds the size of the codebook.
    """
    config, states = model.config, encoder_hidden_states
    given = states if class_ids is None else class_ids
    if given is None:
        raise ValueError("class_ids, encoder_hidden_states: expected a tensor for one of them, got None for both")
    guided = states is not None and guidance_scale > 0
    if states is not None and guided:
        states = torch.cat([states, torch.zeros_like(states) if negative_embeds is None else negative_embeds])
    ids = input_ids
    if ids is None:
        ids = torch.full((len(given), config.num_vq_tokens), config.mask_token_id, device=model.device)

    def predict(ids: Tensor) -> Any:
        if class_ids is not None:
            ids = torch.cat([class_ids[:, None] + config.codebook_size, ids], dim=1)
        logits = model(ids.repeat(1 + guided, 1), encoder_hidden_states=states)[..., : config.codebook_size]
        return logits if class_ids is None else logits[:, 1:]

    noises, noise = [], temperature
    for k in range(timesteps):
        noise *= 1 - (k + 1) / timesteps
        noises.append(noise)
    every_step = [[float(guidance_scale)] * timesteps, [1.0] * timesteps, noises]
    shares = ratios(noise_schedule, timesteps, "timesteps")
    return decode(predict, ids, config.mask_token_id, config.num_vq_tokens, shares, *every_step, generator=generator)[0]
