"""Draws that are made of several of our ops, for more than one client."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mgt_kernels import commit_tokens, sample_tokens
from mgt_kernels.ops import Sampled


def at_random(ids: Tensor, *, mask_token_id: int, **rule: Any) -> Tensor:
    """The mask where a masked position becomes known, and another number everywhere else, which nothing reads.

    By a rule of `commit_tokens` on scores that are all 0, with noise of temperature 1.
    """
    other = torch.full_like(ids, mask_token_id + 1)
    after, _ = commit_tokens(
        other, torch.zeros(ids.shape, device=ids.device), ids, temperature=1.0, mask_token_id=mask_token_id, **rule
    )
    return torch.where((ids == mask_token_id) & (after != mask_token_id), mask_token_id, other)


def sample_and_score(
    logits: Tensor, ids: Tensor, *, temperature: float, among: Tensor | None = None, **draw: Any
) -> tuple[Tensor, Tensor]:
    """The drawn tokens, and their log-probability at temperature 1, `among` what is allowed there; known ones +inf."""
    drawn = sample_tokens(logits, ids, temperature=temperature, statistics=("logit",), **draw)
    if among is None and temperature in (0, 1):
        return drawn.token_ids, drawn.logprob
    draw |= {"temperature": 0.0, "statistics": ("logsumexp",)} | ({} if among is None else {"allowed": among})
    whole = sample_tokens(logits, ids, **draw)
    assert drawn.logit is not None and whole.logsumexp is not None
    return drawn.token_ids, torch.where(drawn.logprob == math.inf, math.inf, drawn.logit - whole.logsumexp)


def sample_within(
    logits: Tensor, ids: Tensor, *, top_k: int | None, top_p: float | None, statistics: tuple[str, ...], **draw: Any
) -> Sampled:
    """`sample_tokens` of those tokens that top_k and top_p keep of all, each by itself.

    That op has top_p of what top_k leaves. Each of the two keeps the likeliest, so that what both keep is what the one
    keeps that keeps less: of two draws, the one with the smaller sum.
    """
    limits: list[dict[str, Any]] = []
    if top_k is not None and top_k < logits.shape[-1]:
        limits.append({"top_k": top_k})
    if top_p is not None and top_p < 1:
        limits.append({"top_p": top_p})
    if len(limits) < 2:
        return sample_tokens(logits, ids, statistics=statistics, **draw, **(limits[0] if limits else {}))
    one, other = (sample_tokens(logits, ids, statistics=("logsumexp", *statistics), **draw, **each) for each in limits)
    found: list[Any] = list(zip(one, other, strict=True))
    less = one.logsumexp <= other.logsumexp  # type: ignore[operator]
    return Sampled(*(None if a is None else torch.where(less, a, b) for a, b in found))  # type: ignore[arg-type]
