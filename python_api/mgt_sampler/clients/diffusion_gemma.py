"""DiffusionGemma (transformers): a step of its canvas is one read of the logits, one commit, and new noise."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mgt_kernels import commit_tokens, sample_tokens

_SEEDS = "_mgt_seeds"


def replacements(model: Any) -> dict[str, Any]:
    """The step of `generate`; encoder, cache, logits processors and the ends of texts stay the model's own."""
    return {"_denoising_step": partial(denoising_step, model)}


def denoising_step(
    model: Any, decoder_forward: Any, current_canvas: Tensor, argmax_canvas: Tensor, input_ids: Tensor,
    decoder_position_ids: Tensor, self_conditioning_logits: Tensor | None, mask_mapping: Any, cache: Any,
    finished_denoising: Tensor, cur_step: int, sampler: Any, logits_processor: Any, diffusion_stopping_criteria: Any,
    **model_kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Take a step as the original does, with l the processed logits of each position and H the entropy of softmax(l)::

        drawn  ~ softmax(l);  drawn tokens stay, least H first, while sum H - max H <= entropy_bound
        others ~ uniform over the vocabulary

    The original works the entropy out twice, from copies in float32, and draws from PyTorch's generator; here a seed is
    taken from it for each sample and text, and a draw is a function of that, the step and the position.
    """
    step = torch.tensor(cur_step, device=current_canvas.device, dtype=torch.int32)
    raw = decoder_forward(
        decoder_input_ids=current_canvas, self_conditioning_logits=self_conditioning_logits, cache=cache,
        decoder_attention_mask=mask_mapping, decoder_position_ids=decoder_position_ids, **model_kwargs,
    ).logits  # fmt: skip
    logits = logits_processor(input_ids, raw, cur_step=step)
    vocab_size, seeds = sampler.vocab_size, vars(sampler).get(_SEEDS)
    if seeds is None:
        seeds = torch.randint(2**63 - 1, (len(logits),), device=logits.device)
        setattr(sampler, _SEEDS, seeds)
    # the step counts down to 1 on every canvas, and the canvas has its place in the text
    place = int(decoder_position_ids.flatten()[0])
    common: dict[str, Any] = {"mask_token_id": vocab_size, "seed": seeds, "step": cur_step}
    masks = torch.full_like(current_canvas, vocab_size)
    drawn = sample_tokens(logits, masks, first_position=place, statistics=("argmax", "entropy"), **common)
    assert drawn.argmax is not None and drawn.entropy is not None
    bound = float(sampler.entropy_bound)
    accepted, _ = commit_tokens(drawn.token_ids, drawn.entropy, masks, entropy_bound=bound, **common)
    following = torch.where(accepted == vocab_size, _uniform(seeds, place, cur_step, masks, vocab_size), accepted)
    best = drawn.argmax
    if diffusion_stopping_criteria is not None:
        if finished_denoising.any():
            assert self_conditioning_logits is not None
            best = torch.where(finished_denoising[:, None], argmax_canvas, best)
            following = torch.where(finished_denoising[:, None], current_canvas, following)
            logits = torch.where(finished_denoising[:, None, None], self_conditioning_logits, logits)
        finished_denoising |= _stops(diffusion_stopping_criteria, best, logits, drawn.entropy)
    return following, best, logits.to(model.model.decoder.embed_tokens.weight.dtype), finished_denoising


def _uniform(seeds: Tensor, place: int, step: int, like: Tensor, vocab_size: int) -> Tensor:
    """Tokens at random, a function of the sample's seed, the canvas and the step."""
    rows = []
    for seed in seeds.tolist():
        generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + place * 0x85EBCA77 + step) % 2**63)
        rows.append(torch.randint(vocab_size, like.shape[1:], generator=generator))
    return torch.stack(rows).to(like.device)


def _stops(criteria: Any, best: Tensor, logits: Tensor, entropy: Tensor) -> Tensor:
    """Which samples are done, with the entropy that is known; other criteria than transformers' own are called."""
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as theirs

    if type(criteria) is not theirs.StableAndConfidentStoppingCriteria:
        return criteria(best, logits)  # type: ignore[no-any-return]
    # a criterion that any entropy meets, so that the original keeps its history and tells what is stable
    confident = entropy.mean(-1) < criteria.confidence_threshold
    threshold, criteria.confidence_threshold = criteria.confidence_threshold, torch.inf
    try:
        stable: Tensor = criteria(best, logits[..., :1])  # type: ignore[arg-type]
    finally:
        criteria.confidence_threshold = threshold
    return stable & confident
