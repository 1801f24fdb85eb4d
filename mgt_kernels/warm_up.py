"""Compiling and loading, before the first step, what a generation on CUDA will launch."""

from collections.abc import Callable, Hashable, Sequence
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mgt_kernels.ops import DifferentialState, differential_sample, mask_by_confidence, sample_tokens

Values: TypeAlias = float | Tensor | Sequence[float | Tensor]


@torch.no_grad()
def warm_up(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask_token_id: int,
    uncond_logits: Tensor | None = None,
    guidance_scale: Values = 1.0,
    second_uncond_logits: Tensor | None = None,
    second_guidance_scale: float | Tensor = 1.0,
    guidance: str = "nested",
    softcap: float | Tensor | None = None,
    noise_scale: Values = 0.0,
    temperature: Values = 1.0,
    confidence_temperature: Values = (1.0, 0.0),
    first_position: int | Tensor = 0,
    allowed: Tensor | None = None,
    top_k: int | None = None,
    top_p: Values = 1.0,
    min_p: Values = 0.0,
    logprob_of: str = "kept",
    rows: str = "masked",
    statistics: Sequence[str] = (),
    variant: str | None = None,
    aliased_history: bool = False,
) -> None:
    """Run the ops of a step once in every variant that a generation meets, so that no later step compiles or loads one.

    On CUDA a kernel is compiled when a variant of it is first launched, which takes seconds, and loaded, which the
    capture of a CUDA graph forbids. A variant depends on the dtype, shape, strides and alignment of the logits, on
    which unguided halves there are, on whether guidance may be negative, on whether noise and temperatures are 0, on
    which of top_k, top_p and min_p keep less than all, on which scalars are tensors, and on what a draw is asked for
    and told besides; it does not depend on the number of samples, the seeds, the step and the values themselves. So
    give logits and tokens as the model and the loop make them, and of each scalar all values that the generation will
    take, or some that stand for them: `noise_scale=(1.0, 0.0)` for noise that ends early.

    The results are thrown away, and nothing that is given is written to. Where the guidance scale passes 0 or 1,
    which spare the loop one of the halves, the steps with one half are run too. `remask_tokens` draws
    at temperature 0 without noise, and masks at confidence temperature 0. On the CPU nothing is compiled.

    Args:
        logits: (B, N, V), as for `sample_tokens`; the values matter as little as B.
        tokens: (B, N) int64.
        mask_token_id: marks masked positions.
        uncond_logits: (B, N, V) of the same dtype and device, or None for no guidance.
        guidance_scale: a number or a 0-dimensional tensor, or several, as noise_scale, the temperatures, top_p and
            min_p.
        second_uncond_logits, second_guidance_scale, guidance, softcap: as for `sample_tokens`.
        noise_scale: of the logits.
        temperature: of the draw of a token.
        confidence_temperature: of `mask_by_confidence`.
        first_position, allowed: as for `sample_tokens`.
        top_k, top_p, min_p, logprob_of, rows, statistics: as for `sample_tokens`; not of generations by
            `differential_sample`.
        variant: "paper" or "official", for generations by `differential_sample`; None for `sample_tokens`.
        aliased_history: as for `differential_sample`.

    Raises:
        TypeError, ValueError, RuntimeError: as the ops raise them.
    """
    guidance_scales, noise_scales, temperatures, confidence_temperatures, top_ps, min_ps = (
        [given] if isinstance(given, Tensor) or not isinstance(given, Sequence) else list(given)
        for given in (guidance_scale, noise_scale, temperature, confidence_temperature, top_p, min_p)
    )
    guided: list[tuple[Tensor | None, float | Tensor]] = [
        (uncond_logits, scale) for scale in _kinds(guidance_scales, lambda x: x < 0)
    ]
    if uncond_logits is not None and any(not isinstance(x, Tensor) and x in (0, 1) for x in guidance_scales):
        guided.append((None, 1.0))
    seed = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    mask_len = torch.zeros_like(seed)
    # differential_sample draws from all tokens
    truncations = [(1.0, 0.0)] if variant else product(_kinds(top_ps, _is_one), _kinds(min_ps, _is_zero))
    for (uncond, scale), noise, draw_temperature, (share, least) in product(
        guided, _kinds(noise_scales, _is_zero), _kinds(temperatures, _is_zero), list(truncations)
    ):
        options: dict[str, Any] = dict(
            mask_token_id=mask_token_id, seed=seed, uncond_logits=uncond, guidance_scale=scale, noise_scale=noise,
            second_uncond_logits=None if uncond is None else second_uncond_logits,
            second_guidance_scale=second_guidance_scale, guidance=guidance, softcap=softcap,
            temperature=draw_temperature, first_position=first_position, allowed=allowed,
        )  # fmt: skip
        if variant is None:
            sample_tokens(
                logits, tokens, step=0, rows=rows, statistics=statistics, top_k=top_k, top_p=share, min_p=least,
                logprob_of=logprob_of, **options,
            )  # fmt: skip
            continue
        state: DifferentialState | None = None
        for step in range(2):
            *_, state = differential_sample(
                logits, tokens, state, step=step, variant=variant, aliased_history=aliased_history, **options
            )
    logprob = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
    for masking_temperature in _kinds(confidence_temperatures, _is_zero):
        mask_by_confidence(
            tokens, logprob, mask_len, mask_token_id=mask_token_id, temperature=masking_temperature, seed=seed, step=0
        )


def _is_zero(value: float) -> bool:
    # as float32, which is what the kernels get
    return value <= 2.0**-150


def _is_one(value: float) -> bool:
    # as float32 too
    return value >= 1 - 2.0**-25


def _kinds(values: Sequence[float | Tensor], kind: Callable[[float], bool]) -> list[float | Tensor]:
    """Return one value of each kind: a tensor of each dtype, and numbers for which `kind` differs."""
    found: dict[Hashable, float | Tensor] = {}
    for value in values:
        found.setdefault(value.dtype if isinstance(value, Tensor) else kind(value), value)
    return list(found.values())
