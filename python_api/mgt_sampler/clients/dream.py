"""Dream (arXiv 2508.15487): the loop inside `diffusion_generate` of `DreamModel`, on our draw and commit."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from mgt_kernels import commit_tokens
from mgt_kernels.ops import Sampled

from ..scheduler import draw_seeds
from .draws import at_random, sample_within

# what the confidence of each `alg` is made of, besides the probability
_STATISTICS = {
    "origin": (), "maskgit_plus": (), "confidence_threshold": (), "topk_margin": ("margin",), "entropy": ("entropy",),
}  # fmt: skip


def replacements(model: Any) -> dict[str, Any]:
    """The method that holds the loop; what prepares its arguments stays the model's own."""
    if "_sample" in vars(model):
        raise TypeError("obj._sample: expected that of its class, got one that was set on the object")
    return {"_sample": partial(sample, model)}


@torch.no_grad()
def sample(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, generation_config: Any,
    generation_tokens_hook_func: Callable[..., Any], generation_logits_hook_func: Callable[..., Any],
    threshold: float = 0.9,
) -> Any:  # fmt: skip
    """Fill input_ids up to max_length as the original does, in T steps, with l the logits of the position before::

        token       ~ softmax(l / t), of the fewer of top_p and top_k;   argmax l where the temperature t is 0
        confidence  = c + alg_temp g, g ~ Gumbel;  c its probability, or by `alg` the margin or -entropy
        reveals     = floor(m (1 - s_(k+1) / s_k)),  s_k = 1 - (1 - eps) k / T;   all in the last step

    m are a sample's own masked positions, where the original takes the batch's mean, and may mask what is known. The
    mask is never drawn. "origin" reveals each position with that probability; "confidence_threshold", of Fast-dLLM, the
    best and what reaches the threshold, of m / T and of what earlier steps left. Seeds are from PyTorch's generator.
    """
    config = generation_config
    alg, steps, mask_id = config.alg, config.steps, config.mask_token_id
    if mask_id is None:
        raise ValueError("mask_token_id: expected the mask's id, got None")
    if alg not in _STATISTICS:
        raise ValueError(f"alg: expected one of {', '.join(_STATISTICS)}, got {alg!r}")
    ids = pad(input_ids, (0, config.max_length - input_ids.shape[1]), value=mask_id)
    places, attended = None, cast(Any, "full")
    if attention_mask is not None and (attention_mask == 0).any():
        ones = pad(attention_mask, (0, ids.shape[1] - attention_mask.shape[1]), value=1) != 0
        places, attended = (ones.cumsum(1) - 1).masked_fill(~ones, 1), ones[:, None, None, :] & ones[:, None, :, None]
    common: dict[str, Any] = {"mask_token_id": mask_id, "seed": draw_seeds(len(ids), None, ids.device)}
    ids, history, k = generation_tokens_hook_func(None, ids, None), [], 0
    share = (ids == mask_id).sum(1)
    if steps < 1 or (alg == "confidence_threshold" and (share % steps).any()):
        raise ValueError(f"steps: expected a divisor of the masked positions of each sample, got {steps}")
    owed, times = torch.zeros_like(share), torch.linspace(1, config.eps, steps + 1)
    while k < steps or (owed.minimum((ids == mask_id).sum(1)) > 0).any():
        logits = model(ids, attended, places).logits
        logits = generation_logits_hook_func(k, ids, torch.cat([logits[:, :1], logits[:, :-1]], 1))
        masked, asked, common["step"] = (ids == mask_id).sum(1), ids, k
        revealed = 1 - times[k + 1] / times[k] if k < steps - 1 else 1.0
        if alg == "origin":
            # the noise of a position is above the bound with this probability
            bound = None if k == steps - 1 else -math.log(-math.log1p(-revealed))
            asked = at_random(ids, count=masked if bound is None else 0, threshold=bound, **common)
        drawn = sample_within(
            logits, asked, top_k=config.top_k, top_p=config.top_p, temperature=config.temperature,
            statistics=_STATISTICS[alg], **common,
        )  # fmt: skip
        score, noise, count = _confidence(drawn), config.alg_temp or 0.0, (masked * revealed).long()
        if alg == "confidence_threshold":
            owed = owed + (share // steps if k < steps else 0)
            sure = ((score >= threshold) & (ids == mask_id)).sum(1)
            noise, count = 0.0, sure.clamp(min=1).minimum(owed).minimum(masked)
            owed = owed - count
        if alg == "origin":
            ids = torch.where(asked == mask_id, drawn.token_ids, ids)
        else:
            ids, _ = commit_tokens(drawn.token_ids, score, ids, count=count, temperature=noise, **common)
        ids, k = generation_tokens_hook_func(k, ids, logits), k + 1
        if config.output_history:
            history.append(ids.clone())
    if not config.return_dict_in_generate:
        return ids
    output = sys.modules[type(model)._sample.__module__].DreamModelOutput
    return output(sequences=ids, history=history if config.output_history else None)


def _confidence(drawn: Sampled) -> Tensor:
    if drawn.margin is not None:
        return drawn.margin
    return drawn.logprob.exp() if drawn.entropy is None else -drawn.entropy
