"""MMaDA (arXiv 2505.15809): `t2i_generate` of `MMadaModelLM` by Show-o's loop, its texts by LLaDA's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..scheduler import Generators
from ..schedules import mask_ratio
from .blocks import fill_blocks
from .showo import fill_image


def replacements(model: Any) -> dict[str, Any]:
    """The methods that draw images and texts, and a `generate`, which generate.py has as a function of the model."""
    return {
        "t2i_generate": partial(t2i_generate, model),
        "mmu_generate": partial(mmu_generate, model, False),
        "mmu_generate_fast": partial(mmu_generate, model, True),
        "generate": partial(generate, model),
    }


@torch.no_grad()
def t2i_generate(
    model: Any, input_ids: Tensor, uncond_input_ids: Tensor | None = None, attention_mask: Any = None,
    uncond_attention_mask: Any = None, temperature: float = 1.0, timesteps: int = 18, guidance_scale: float = 0,
    noise_schedule: Callable[[Tensor], Tensor] = mask_ratio, generator: Generators = None, config: Any = None,
    seq_len: int = 1024, mask_token_id: int = 126336, resolution: int = 512, codebook_size: int = 8192, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Draw images' ids (B, N) of the codebook as the original does; `fill_image` has the formulas."""
    if kwargs.get("uni_prompting") is None:
        raise ValueError("uni_prompting: expected the object that made input_ids, got None")
    first_id, masks = len(kwargs["uni_prompting"].text_tokenizer), attention_mask
    if uncond_input_ids is not None and guidance_scale > 0:
        masks = torch.cat([attention_mask, uncond_attention_mask])
    return fill_image(
        lambda ids: model(ids, attention_bias=_bias(masks)).logits, input_ids, uncond_input_ids, resolution + 1,
        seq_len, slice(first_id, first_id + codebook_size), mask_token_id, temperature, timesteps, guidance_scale,
        noise_schedule, generator,
    )  # fmt: skip


def generate(
    model: Any, prompt: Tensor, steps: int = 128, gen_length: int = 128, block_length: int = 128,
    temperature: float = 0.0, cfg_scale: float = 0.0, remasking: str = "low_confidence", mask_id: int = 126336,
    attention_mask: Tensor | None = None, *, eot_token: int | None = None,
) -> Tensor:  # fmt: skip
    """Answer prompts (B, L) as `generate(model, prompt, ...)` of generate.py does; `fill_blocks` has the formulas.

    attention_mask may be of the prompt alone, and holds with guidance too, where the original forgets it.
    """
    ids = pad(prompt, (0, gen_length), value=mask_id).to(model.device, torch.int64)
    bias = None
    if attention_mask is not None and (attention_mask == 0).any():
        bias = _bias(pad(attention_mask, (0, ids.shape[1] - attention_mask.shape[1]), value=1).to(ids.device))

    def logits_of(ids: Tensor) -> Any:
        return model(ids, attention_bias=bias if bias is None else bias.repeat(len(ids) // len(bias), 1, 1, 1)).logits

    return fill_blocks(
        logits_of, ids, prompt.shape[1], steps, gen_length, block_length, temperature, cfg_scale, remasking, mask_id,
        eot_token=eot_token,
    )  # fmt: skip


def mmu_generate(
    model: Any, fast: bool, idx: Tensor, input_embeddings: Any = None, max_new_tokens: int = 128, steps: int = 128,
    block_length: int = 128, temperature: float = 0.0, top_k: Any = None, eot_token: int | None = None,
    cfg_scale: float = 0.0, remasking: str = "low_confidence", mask_id: int = 126336,
    attention_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`generate` by other names; input_embeddings and top_k are not looked at, as in the originals.

    Only the fast one looks at eot_token, and ends a sample with the block that ends in it: there, all samples must.
    """
    return generate(
        model, idx, steps, max_new_tokens, block_length, temperature, cfg_scale, remasking, mask_id, attention_mask,
        eot_token=eot_token if fast else None,
    )  # fmt: skip


def _bias(attended: Tensor) -> Tensor:
    return (attended[:, None, :, None] != 0) & (attended[:, None, None, :] != 0)
