"""The assertions that kernels are held to."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mgt_kernels import reference
from mgt_kernels.reference.sample_tokens import row_statistics


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


def assert_statistics(
    drawn: Mapping[str, Tensor | None],
    chain: Tensor,
    logits: Tensor,
    tokens: Tensor,
    rows: str,
    *,
    slack: float = 0.0,
    **args: Any,
) -> None:
    """Statistics of `sample_tokens` are as exact as what PyTorch makes of the fp32 logits of its own chain.

    `args` are the other arguments of the oracle, `slack` what else is allowed. A draw or an argmax of nearly equal
    logits may differ from float64's.
    """
    outputs, bad_row = reference.sample_tokens(logits, tokens, rows=rows, **args)
    assert bad_row == -1
    tempered, _ = reference.perturbed_logits(logits, **args)
    own = tokens.clamp(0, logits.shape[-1] - 1)[..., None]
    # of all rows, so that what the chain does worst counts
    naive, truths = row_statistics(chain), row_statistics(tempered)
    naive["known_logprob"] = chain.log_softmax(-1).gather(-1, own)[..., 0]
    truths["known_logprob"] = tempered.log_softmax(-1).gather(-1, own)[..., 0]
    # the noise itself is fp32, some units in the last place of 6.8
    slack += 4e-6 if args.get("noise_scale") else 0.0
    read = outputs["max_logprob"] != torch.inf
    for name in truths:
        value = drawn.get(name)
        if value is None:
            continue
        if name == "argmax":
            index = value.clamp(0, logits.shape[-1] - 1)[..., None]
            gap = tempered.amax(-1) - tempered.gather(-1, index)[..., 0]
            assert (gap[read] <= 1e-5 * tempered[tempered.isfinite()].abs().amax().clamp(min=1)).all()
            assert torch.equal(value[~read], tokens[~read])
            continue
        truth = outputs[name]
        finite = truth.isfinite()
        assert torch.equal(truth[~finite].float(), value[~finite]), name
        assert value[finite].isfinite().all(), name
        if finite.any():
            allowed = float((naive[name] - truths[name]).abs().nan_to_num(posinf=0.0).amax()) + slack
            assert_no_worse_than_naive(value[finite], truth[finite], truth[finite] + allowed)
