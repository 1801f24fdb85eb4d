"""A mask schedule made for a model: from how much its predictions gain by what is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mgt_kernels import sample_tokens

from .arguments import integer
from .sampling import sample_seeds
from .schedules import check_num_inference_steps

if TYPE_CHECKING:
    from .models import MaskedModel


def calibrate_schedule(
    model: MaskedModel,
    tokens: Tensor,
    num_inference_steps: int,
    *,
    labels: Tensor | None = None,
    num_levels: int = 24,
    batch_size: int = 50,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """The mask schedule that loses least of a model's knowledge in T steps.

        ratios = calibrate_schedule(model, model.encode(images), 8, labels=labels)
        generate(model, labels=[3], num_inference_steps=8, mask_schedule=ratios)

    Tokens of one step are drawn without knowing of each other. With H(a) the mean negative log-likelihood of a masked
    token where a are known, a step that goes from a to b known ones loses the sum of H(a) - H(i) over i = a .. b - 1;
    the T steps with the smallest sum are found exactly, by dynamic programming (arXiv 2510.25544).

    Args:
        model: what predicts; see `generate`.
        tokens: int64 (M, N), of real images, no position masked.
        num_inference_steps: T, at least 1.
        labels: (M, ...), the condition of each; None: unconditional.
        num_levels: numbers of known tokens, from 0 to N - 1, at which H is measured; between them it is a line.
        batch_size: images at once.
        seed: of which tokens are masked.
        progress: show a progress bar.

    Returns:
        T ratios, the mask schedule of `generate`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
    """
    num_inference_steps = check_num_inference_steps(num_inference_steps)
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.ndim != 2 or len(tokens) == 0:
        raise TypeError(f"tokens: expected int64 (M, N) with M at least 1, got {getattr(tokens, 'shape', tokens)}")
    if integer("num_levels", num_levels) < 2:
        raise ValueError(f"num_levels: expected at least 2, got {num_levels}")
    size = tokens.shape[1]
    levels = sorted({round(x) for x in np.linspace(0, size - 1, num_levels).tolist()})
    found = [
        masked_nll(model, tokens, known, labels=labels, batch_size=batch_size, seed=seed)
        for known in tqdm(levels, desc="calibrating", disable=not progress)
    ]
    return best_ratios(np.interp(np.arange(size), levels, found).tolist(), num_inference_steps)


def masked_nll(
    model: MaskedModel,
    tokens: Tensor,
    num_known: int,
    *,
    labels: Tensor | None = None,
    batch_size: int = 50,
    seed: int = 0,
) -> float:
    """Mean negative log-likelihood in nats of masked tokens where `num_known` others, at random, are known."""
    nll = masked_nll_of_samples(model, tokens, num_known, labels=labels, batch_size=batch_size, seed=seed)
    return float(nll.mean())


@torch.no_grad()
def masked_nll_of_samples(
    model: MaskedModel,
    tokens: Tensor,
    num_known: int,
    *,
    labels: Tensor | None = None,
    batch_size: int = 50,
    seed: int = 0,
) -> Tensor:
    """What `masked_nll` is the mean of, one for each sample: float64 (M,), on the CPU."""
    size = tokens.shape[1]
    nll = [torch.zeros(0, dtype=torch.float64, device="cpu")]
    seeds = sample_seeds(seed, len(tokens)).to(tokens.device)
    for i in range(0, len(tokens), batch_size):
        part = tokens[i : i + batch_size]
        generators = [torch.Generator().manual_seed(int(s) % 2**63) for s in seeds[i : i + batch_size]]
        orders = torch.stack([torch.randperm(size, generator=generator) for generator in generators])
        masked = orders.to(tokens.device) >= num_known
        condition = None if labels is None else labels[i : i + batch_size]
        logits = model.predict_logits(part.masked_fill(masked, model.mask_token_id), condition)
        found = sample_tokens(
            logits.contiguous(),
            part,
            mask_token_id=model.mask_token_id,
            # nothing is drawn
            seed=0,
            step=0,
            rows="known",
            statistics=("known_logprob",),
        ).known_logprob
        assert found is not None
        nll.append(-(found * masked).double().sum(1).cpu() / (size - num_known))
    return torch.cat(nll)


def best_ratios(nll: Sequence[float], num_inference_steps: int) -> list[float]:
    """The T ratios that lose least of a profile H(a), a = 0 .. N - 1, which is made to fall.

    Returns:
        Ratios of which floor(N ratio) is exactly what stays masked, the last 0.

    Raises:
        ValueError: there are more steps than positions.
    """
    profile = np.minimum.accumulate(np.asarray(nll, np.float64))
    size, steps = len(profile), num_inference_steps
    if steps > size:
        raise ValueError(f"num_inference_steps: expected at most the {size} positions, got {steps}")
    summed = np.concatenate([[0.0], np.cumsum(profile)])
    # of t steps that make b tokens known
    loss = np.full((steps + 1, size + 1), np.inf)
    before = np.zeros((steps + 1, size + 1), np.int64)
    loss[0, 0] = 0.0
    for t in range(1, steps + 1):
        for b in range(t, size + 1):
            a = np.arange(t - 1, b)
            candidates = loss[t - 1, a] + (b - a) * profile[a] - (summed[b] - summed[a])
            best = int(candidates.argmin())
            loss[t, b], before[t, b] = candidates[best], a[best]
    known = [size]
    for t in range(steps, 1, -1):
        known.append(int(before[t, known[-1]]))
    # half a token more, so that no rounding makes it one less
    return [(size - b + 0.5) / size if b < size else 0.0 for b in reversed(known)]
