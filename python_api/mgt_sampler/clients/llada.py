"""LLaDA (arXiv 2502.09992): the loop of its generate.py, as a method of the model `LLaDAModelLM`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .blocks import fill_blocks

# of its tokenizer: the end of a text, and the end of a turn
_EOS, _EOT = 126081, 126348


def replacements(model: Any) -> dict[str, Any]:
    """A `generate`; the one that the class inherits is autoregressive, which this model is not."""
    return {"generate": partial(generate, model)}


@torch.no_grad()
def generate(
    model: Any,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
) -> Tensor:
    """Answer prompts (B, L) as `generate(model, prompt, ...)` of its generate.py does: the ids (B, L + gen_length).

    `fill_blocks` has the formulas. Guidance needs no attention_mask, the confidence is not rounded to the model's
    dtype, and confidence_eos_eot_inf keeps EOS back at every temperature, not at 0 alone.
    """
    ids = torch.cat([prompt, prompt.new_full((len(prompt), gen_length), mask_id)], 1).to(model.device, torch.int64)
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(prompt), gen_length)], 1).to(ids.device)

    def logits_of(ids: Tensor) -> Any:
        mask = attention_mask if attention_mask is None else attention_mask.repeat(len(ids) // len(attention_mask), 1)
        return model(ids, attention_mask=mask).logits

    return fill_blocks(
        logits_of,
        ids,
        prompt.shape[1],
        steps,
        gen_length,
        block_length,
        temperature,
        cfg_scale,
        remasking,
        mask_id,
        never=[_EOS] if logits_eos_inf else [],
        last=[_EOS, _EOT] if confidence_eos_eot_inf else [],
    )
