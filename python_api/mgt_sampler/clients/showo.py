"""Show-o (arXiv 2408.12528): `t2i_generate` of `Showo`, on our draw and mask; and the loop that MMaDA has too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mgt_kernels import mask_by_confidence, sample_tokens

from ..scheduler import Generators, check_generators, draw_seeds
from ..schedules import mask_ratio


def replacements(model: Any) -> dict[str, Any]:
    """The whole of `t2i_generate`: guidance and draw of a step are one read of the image tokens of both halves."""
    return {"t2i_generate": partial(t2i_generate, model)}


def t2i_generate(
    model: Any, input_ids: Tensor, uncond_input_ids: Tensor | None = None, attention_mask: Any = None,
    temperature: float = 1.0, timesteps: int = 18, guidance_scale: float = 0,
    noise_schedule: Callable[[Tensor], Tensor] = mask_ratio, generator: Generators = None, config: Any = None,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Draw images' ids (B, N) of the codebook as the original does; `fill_image` has the formulas."""
    settings = config.model.showo
    first_id = settings.llm_vocab_size + settings.num_new_special_tokens
    return fill_image(
        lambda ids: model(ids, attention_mask=attention_mask), input_ids, uncond_input_ids,
        config.dataset.preprocessing.max_seq_length + 1, settings.num_vq_tokens, slice(first_id, -1),
        model.config.mask_token_id, temperature, timesteps, guidance_scale, noise_schedule, generator,
    )  # fmt: skip


@torch.no_grad()
def fill_image(
    logits_of: Callable[[Tensor], Tensor], input_ids: Tensor, uncond_input_ids: Tensor | None, prefix_length: int,
    num_tokens: int, codebook: slice, mask_token_id: int, temperature: float, timesteps: int, guidance_scale: float,
    noise_schedule: Callable[[Tensor], Tensor], generator: Generators,
) -> Tensor:  # fmt: skip
    """Draw the masked ones of N image tokens, the last but one of input_ids (B, L), as ids of the codebook.

    Step k of T has r = (k + 1) / T, M positions masked, and logits l of the codebook alone; s = guidance_scale::

        l         = c + s (c - u)                       u with another prefix;  c where s = 0
        token     ~ softmax(l)
        masks     = max(1, min(M - 1, floor(N noise_schedule(r)))),     the lowest log softmax(l)[token] + t_k g
        t_k       = t_(k-1) (1 - r),  g ~ Gumbel        from the temperature t_(-1); MaskGIT has t_(-1) (1 - r)

    What the last step draws is returned. input_ids are not written to, and what is known is never masked again.
    """
    check_generators(generator, len(input_ids))
    if timesteps < 1:
        raise ValueError(f"timesteps: expected at least 1, got {timesteps}")
    if input_ids.shape[1] <= num_tokens:
        raise ValueError(f"input_ids: expected more than {num_tokens} columns, got {input_ids.shape[1]}")
    ids, places, batch = input_ids.clone(), slice(-num_tokens - 1, -1), len(input_ids)
    guided = uncond_input_ids is not None and guidance_scale > 0
    code = torch.where(ids[:, places] == mask_token_id, -1, ids[:, places] - codebook.start)
    common: dict[str, Any] = {"mask_token_id": -1, "seed": draw_seeds(batch, generator, ids.device)}
    for k in range(timesteps):
        given = ids
        if guided and uncond_input_ids is not None:
            given = torch.cat([ids, torch.cat([uncond_input_ids[:, :prefix_length], ids[:, prefix_length:]], 1)])
        logits = logits_of(given)[:, places, codebook]
        drawn = sample_tokens(
            logits[:batch], code, uncond_logits=logits[batch:] if guided else None,
            guidance_scale=guidance_scale + 1.0, step=k, **common,
        )  # fmt: skip
        ratio, masked = (k + 1) / timesteps, (code == -1).sum(1)
        temperature *= 1 - ratio
        most = int((num_tokens * noise_schedule(torch.tensor(ratio))).floor())
        masks = (masked - 1).clamp(max=most).clamp(min=1).minimum(masked)
        code = mask_by_confidence(drawn.token_ids, drawn.logprob, masks, temperature=temperature, step=k, **common)
        ids[:, places] = torch.where(code == -1, mask_token_id, code + codebook.start)
    return drawn.token_ids
