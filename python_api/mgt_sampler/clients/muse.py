"""`MaskGit` of muse-maskgit-pytorch, the base model of Muse (arXiv 2301.00704): its `generate`, on our draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mgt_kernels import sample_tokens


def replacements(model: Any) -> dict[str, Any]:
    """The whole of `generate`: guidance, draw and score of a step are two reads of both halves' logits."""
    return {"generate": partial(generate, model)}


@torch.no_grad()
def generate(
    model: Any,
    texts: Sequence[str],
    negative_texts: Sequence[str] | None = None,
    cond_images: Tensor | None = None,
    fmap_size: int | None = None,
    temperature: float = 1.0,
    topk_filter_thres: float = 0.9,
    can_remask_prev_masked: bool = False,
    force_not_use_token_critic: bool = False,
    timesteps: int = 18,
    cond_scale: float = 3,
    critic_noise_scale: float = 1,
) -> Tensor:
    """Draw images of texts, as the original does; a sample's seed is taken from PyTorch's generator.

    Step k of T masks the max(1, floor(N gamma(k / (T - 1)))) positions of the highest scores, and draws them::

        token  ~ softmax(l / t),  of the largest 1 - topk_filter_thres of l,    t = temperature (T - 1 - k) / T
        score  = 1 - softmax(l)[token]                                          or the token critic's

    `negative_texts`, with which the original fails, take the place of the unconditional half.
    """
    if can_remask_prev_masked and not model.no_mask_token_prob > 0:
        raise ValueError("can_remask_prev_masked: expected a model that was trained with no_mask_token_prob above 0")
    if cond_images is None and model.resize_image_for_cond_image:
        raise ValueError("cond_images: expected images for a model of super resolution, got None")
    was_training = model.training
    model.eval()
    try:
        transformer, mask_id = model.transformer, model.mask_id
        device = next(model.parameters()).device
        side = model.vae.get_encoded_fmap_size(model.image_size) if fmap_size is None else fmap_size
        ids = torch.full((len(texts), side * side), mask_id, device=device)
        scores = torch.zeros(ids.shape, device=device)
        seeds = torch.randint(2**63 - 1, (len(texts),)).to(device)
        common: dict[str, Any] = {"mask_token_id": mask_id, "seed": seeds, "guidance_scale": float(cond_scale)}
        inputs: dict[str, Any] = {"text_embeds": transformer.encode_text(texts)}
        if cond_images is not None and model.resize_image_for_cond_image:
            inputs["conditioning_token_ids"] = model.cond_vae.encode(cond_images)[1]
        if negative_texts is None:
            others = {**inputs, "cond_drop_prob": 1.0}
        else:
            others = {**inputs, "cond_drop_prob": 0.0, "text_embeds": transformer.encode_text(negative_texts)}
        embed = None
        for k, time in enumerate(tqdm(torch.linspace(0, 1, timesteps, device=device))):
            masked_share = model.noise_schedule(time)
            most = scores.topk(max(int(masked_share * ids.shape[1]), 1), dim=-1).indices
            ids = ids.scatter(1, most, mask_id)
            inputs["self_cond_embed"] = others["self_cond_embed"] = embed if model.self_cond else None
            logits, embed = transformer(ids, cond_drop_prob=0.0, return_embed=True, **inputs)
            uncond = None if cond_scale == 1 else transformer(ids, **others)
            left = (timesteps - 1 - k) / timesteps
            # known tokens get a score only where they may be masked again
            asked = torch.full_like(ids, mask_id) if can_remask_prev_masked else ids
            drawn = sample_tokens(
                logits, asked, uncond_logits=uncond, step=k, temperature=temperature * left, statistics=("logit",),
                top_k=math.ceil((1 - topk_filter_thres) * logits.shape[-1]), **common,
            )  # fmt: skip
            was_masked = ids == mask_id
            ids = torch.where(was_masked, drawn.token_ids, ids)
            if model.token_critic is not None and not force_not_use_token_critic:
                inputs.pop("self_cond_embed")
                noise = (torch.rand(ids.shape, device=device) - 0.5) * critic_noise_scale * left
                scores = (
                    model.token_critic.forward_with_cond_scale(ids, cond_scale=cond_scale, **inputs)[..., 0] + noise
                )
                continue
            whole = sample_tokens(
                logits, asked, uncond_logits=uncond, step=k, temperature=0.0, statistics=("logsumexp",), **common
            )
            assert drawn.logit is not None and whole.logsumexp is not None
            scores = 1 - (drawn.logit - whole.logsumexp).exp()
            if not can_remask_prev_masked:
                scores = scores.where(was_masked, -1e5)
        return model.vae.decode_from_ids(ids.view(-1, side, side))  # type: ignore[no-any-return]
    finally:
        model.train(was_training)
