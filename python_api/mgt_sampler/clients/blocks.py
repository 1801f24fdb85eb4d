"""LLaDA's loop, block after block, which MMaDA has too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mgt_kernels import commit_tokens, sample_tokens

from ..scheduler import draw_seeds
from .draws import at_random, sample_and_score


@torch.no_grad()
def fill_blocks(
    logits_of: Callable[[Tensor], Any], ids: Tensor, start: int, steps: int, length: int, block_length: int,
    temperature: float, cfg_scale: float, remasking: str, mask_id: int, *, never: Sequence[int] = (),
    last: Sequence[int] = (), eot_token: int | None = None,
) -> Tensor:  # fmt: skip
    """Fill the masked positions of ids (B, N), in blocks from `start` on, with S = steps / blocks steps for each.

    Of a block with m masked positions at its begin, step i makes m // S + (i < m mod S) positions known, the most
    confident of all that are masked up to the block's end; t the temperature, s = cfg_scale::

        l           = u + (s + 1) (c - u),      u with all masked that is known at first;  c where s = 0
        token       ~ softmax(l / t),           argmax l where t = 0;  of all tokens but the mask and `never`
        confidence  = softmax(l)[token],        of all tokens but these and `last`, which are kept back

    or, with remasking "random", they are chosen at random. A sample ends with the block whose last token is eot_token,
    and what is left stays masked. Its seed is taken from PyTorch's generator.
    """
    if not 0 < block_length <= length or length % block_length:
        raise ValueError(f"block_length: expected a divisor of the {length} new tokens, got {block_length}")
    blocks = length // block_length
    if steps < 1 or steps % blocks:
        raise ValueError(f"steps: expected a multiple of the {blocks} blocks, got {steps}")
    if remasking not in ("low_confidence", "random"):
        raise ValueError(f"remasking: expected low_confidence or random, got {remasking!r}")
    ids, known, per_block, guided = ids.clone(), ids != mask_id, steps // blocks, cfg_scale > 0
    runs = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    common: dict[str, Any] = {"mask_token_id": mask_id, "seed": draw_seeds(len(ids), None, ids.device)}
    for step in range(steps):
        end, i = start + (step // per_block + 1) * block_length, step % per_block
        if i == 0:
            if step > 0 and eot_token is not None:
                runs &= ids[:, end - block_length - 1] != eot_token
                if not runs.any():
                    break
            masked = (ids[:, end - block_length : end] == mask_id).sum(1) * runs
        logits = logits_of(torch.cat([ids, ids.masked_fill(known, mask_id)]) if guided else ids)[:, :end]
        count, here = masked // per_block + (masked % per_block > i), ids[:, :end]
        common["step"] = step
        draw = {"uncond_logits": logits[len(ids) :] if guided else None, "guidance_scale": cfg_scale + 1.0, **common}
        draw |= {"temperature": temperature, "allowed": _allowed(logits, never)}
        if remasking == "random":
            asked = at_random(here, count=count, **common)
            tokens = sample_tokens(logits[: len(ids)], asked, **draw).token_ids
            ids[:, :end] = torch.where(asked == mask_id, tokens, here)
            continue
        among = _allowed(logits, [*never, *last]) if last else None
        tokens, score = sample_and_score(logits[: len(ids)], here, among=among, **draw)
        score = score.masked_fill(torch.isin(tokens, tokens.new_tensor(last)), -math.inf)
        ids[:, :end], _ = commit_tokens(tokens, score, here, count=count, **common)
    return ids


def _allowed(logits: Tensor, without: Sequence[int]) -> Tensor | None:
    if not without:
        return None
    allowed = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    allowed[list(without)] = False
    return allowed
