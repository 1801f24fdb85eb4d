"""The two assertions that kernels are held to."""

import torch
from torch import Tensor


def assert_ids_by_margin(token_ids: Tensor, scores: Tensor, masked: Tensor, margin: float = 1e-5) -> None:
    """Every drawn id has the best float64 score, or one that misses it by less than the rounding of fp32 scores.

    `margin` is relative to the largest score in magnitude, at least 1: some 80 units in the last place.
    """
    best = scores.amax(-1)
    drawn = scores.gather(-1, token_ids.clamp(0, scores.shape[-1] - 1)[..., None])[..., 0]
    scale = best.abs().clamp(min=1)
    short = ((best - drawn) / scale)[masked]
    assert (token_ids[masked] < scores.shape[-1]).all() and (token_ids[masked] >= 0).all()
    assert not (short > margin).any(), f"{int((short > margin).sum())} ids miss the best score, worst by {short.max()}"


def assert_no_worse_than_naive(actual: Tensor, truth: Tensor, naive: Tensor) -> None:
    """max |actual - truth| <= max |naive - truth| + tiny: as exact as PyTorch's own chain in the same dtype.

    tiny is two units in the last place of the largest value.
    """
    tiny = 2 * torch.finfo(torch.float32).eps * float(truth.abs().amax().clamp(min=1))
    error, allowed = (actual.double() - truth).abs().amax(), (naive.double() - truth).abs().amax()
    assert error <= allowed + tiny, f"error {error:.3g} exceeds the naive chain's {allowed:.3g} + {tiny:.3g}"
