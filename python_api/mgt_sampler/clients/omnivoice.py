"""OmniVoice, text to speech (PyPI omnivoice): guidance, draw and confidence in one read of both halves."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mgt_kernels import sample_tokens


def replacements(model: Any) -> dict[str, Any]:
    """The method that makes tokens and scores of logits; masking, penalty and noise stay the model's own."""
    return {"_predict_tokens_with_scoring": partial(predict_tokens_with_scoring, model)}


def predict_tokens_with_scoring(
    model: Any, c_logits: Tensor, u_logits: Tensor, gen_config: Any
) -> tuple[Tensor, Tensor]:
    """The tokens and their scores, each (1, C, T), of logits (1, C, T, V) of both halves; s the guidance scale::

        l      = u + (1 + s) (c - u)                          c where s = 0
        token  = argmax l, or where class_temperature t > 0 drawn from the largest tenth of softmax(l / t)
        score  = max l - log sum exp(l)                       of all tokens but the mask; of all tokens

    as the original has it: the mask is never drawn, but counts in the sum. Draws take a seed from PyTorch's generator.
    """
    mask_token_id, scale = model.config.audio_mask_id, 1.0 + gen_config.guidance_scale
    logits, uncond_logits = c_logits[0], None if scale == 1.0 else u_logits[0]
    masks = torch.full(logits.shape[:2], mask_token_id, device=logits.device)
    draw: dict[str, Any] = {
        "uncond_logits": uncond_logits,
        "guidance_scale": scale,
        "mask_token_id": mask_token_id,
        "step": 0,
    }
    best = sample_tokens(
        logits, masks, temperature=0.0, seed=0, statistics=("argmax", "max_logprob", "logsumexp"), **draw
    )
    assert best.argmax is not None and best.max_logprob is not None and best.logsumexp is not None
    of_mask = logits[..., mask_token_id].float()
    if uncond_logits is not None:
        of_mask = torch.lerp(uncond_logits[..., mask_token_id].float(), of_mask, scale)
    scores = best.max_logprob + best.logsumexp - torch.logaddexp(best.logsumexp, of_mask)
    token_ids = best.argmax
    if gen_config.class_temperature > 0:
        # all codebooks are samples here, and must not get the same noise
        seeds = torch.randint(2**63 - 1, (len(logits),), device=logits.device)
        top_k = math.ceil(0.1 * logits.shape[-1])
        token_ids = sample_tokens(
            logits, masks, temperature=gen_config.class_temperature, top_k=top_k, seed=seeds, **draw
        ).token_ids
    return token_ids[None], scores[None]
