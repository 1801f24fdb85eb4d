"""The oracle of differential_sample in float64."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mgt_kernels import cpu
from mgt_kernels.reference.sample_tokens import logits_and_noise

# a history code stands for -log q: 2^-11 nats apart below 24 nats, 2^-4 above, and the last also for q = 0
_NEAR_STEP, _FAR_STEP, _FAR_NATS, _FAR_CODE, _LAST_CODE = 2.0**-11, 2.0**-4, 24.0, 49152, 65535
# sum |p - q| below this is what rounding the history can make of p = q
SAME_DISTRIBUTION = 2.0**-11
LEAST_DIFFERENCE = 1e-6


class Difference(NamedTuple):
    """What a step is chosen and drawn from; (B, N, V) float64, divergence (B, N)."""

    tempered: Tensor  # l
    gumbel: Tensor  # g, 0 at temperature 0
    log_p: Tensor
    log_q: Tensor
    weights: Tensor
    divergence: Tensor


def encode_history(log_q: Tensor) -> Tensor:
    """Return the 16-bit codes, as int16, of log q <= 0 in nats."""
    nats = -log_q.double()
    near = (nats / _NEAR_STEP).round()
    far = (_FAR_CODE + (nats - _FAR_NATS) / _FAR_STEP).round()
    code = torch.where(nats < _FAR_NATS, near, far).clamp(0, _LAST_CODE).long()
    return torch.where(code > 32767, code - 65536, code).to(torch.int16)


def decode_history(history: Tensor) -> Tensor:
    """Return log q, float64 nats, of the 16-bit codes in `history` (int16): at least -1047.9375."""
    code = (history.long() & 0xFFFF).double()
    return -torch.where(code < _FAR_CODE, code * _NEAR_STEP, _FAR_NATS + (code - _FAR_CODE) * _FAR_STEP)


def difference(
    logits: Tensor,
    history: Tensor,
    written: Tensor,
    *,
    variant: str,
    **options: Any,
) -> Difference:
    """Compare every row with its history; where there is none, w = p and the divergence is +inf.

    Args:
        options: of `logits_and_noise`.
    """
    tempered, gumbel = logits_and_noise(logits, **options)
    log_p = tempered.log_softmax(-1)
    log_q = decode_history(history)
    p, q = log_p.exp(), log_q.exp()
    divergence = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    weights = (p - q).abs() if variant == "paper" else (p - q).clamp(min=LEAST_DIFFERENCE)
    weights = weights.masked_fill(tempered == -torch.inf, 0.0)
    # p = q as far as the history can tell
    same = ~written
    if variant == "paper":
        same = same | (weights.sum(-1) < SAME_DISTRIBUTION)
    weights = torch.where(same[..., None], p, weights)
    return Difference(tempered, gumbel, log_p, log_q, weights, divergence.masked_fill(~written, torch.inf))


def select_rows(divergence: Tensor, masked: Tensor, *, share: float, variant: str) -> Tensor:
    """Return which rows (B, N) are among the share with the smallest divergence; ties: the lower position."""
    ranked = masked if variant == "paper" else torch.ones_like(masked)
    wanted = share * ranked.sum(-1).double()
    num_selected = (wanted + 0.5).floor() if variant == "paper" else wanted.floor()
    # what takes no part comes last, behind rows without history
    order = divergence.masked_fill(~ranked, torch.inf).argsort(dim=-1, stable=True)
    order = order.gather(-1, (~ranked).gather(-1, order).long().argsort(dim=-1, stable=True))
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], dtype=torch.int64, device=order.device).expand_as(order)
    )
    return rank < num_selected[:, None]


def differential_sample(
    logits: Tensor,
    tokens: Tensor,
    history: Tensor,
    written: Tensor,
    *,
    mask_token_id: int,
    share: float,
    variant: str,
    aliased_history: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """Return (token_ids, logprob, divergence, new history, new written, first bad row or -1).

    history (B, N, V) int16 and written (B, N) bool are only read; see `mgt_kernels.differential_sample`.

    Args:
        options: the others of `logits_and_noise`.
    """
    now = difference(logits, history, written, variant=variant, mask_token_id=mask_token_id, **options)
    masked = tokens == mask_token_id
    read = masked if variant == "paper" else torch.ones_like(masked)
    bad = (now.tempered.isnan() | (now.tempered == torch.inf)).any(-1) | (now.tempered == -torch.inf).all(-1)
    divergence = now.divergence.masked_fill(~read, torch.inf)
    selected = select_rows(divergence, masked, share=share, variant=variant)
    log_w = now.weights.log() - now.weights.sum(-1, keepdim=True).log()
    # without history, and where p = q, the plain draw
    plain = ~selected | (now.weights == now.log_p.exp()).all(-1)
    chances = torch.where(plain[..., None], now.log_p, log_w)
    # l + g rather than log p + g: the rounding of the plain draw is that of sample_tokens
    drawn = (torch.where(plain[..., None], now.tempered, log_w) + now.gumbel).argmax(-1)
    logprob = chances.gather(-1, drawn[..., None])[..., 0]
    stored = torch.where((selected & written & aliased_history)[..., None], now.weights.log(), now.log_p)
    return (
        torch.where(masked, drawn, tokens),
        torch.where(masked, logprob, torch.inf),
        divergence,
        torch.where(read[..., None], encode_history(stored), history),
        read,
        cpu.first_index(bad & read),
    )
