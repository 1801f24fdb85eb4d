"""Scalars of a step: numbers that the host knows, or tensors that the kernels read, which a CUDA graph replays anew.

A kernel's argument is the number or a pointer to it. The compiler tells them apart, so a number costs no instruction.
What the host makes of a number a kernel makes of a tensor's value, with the same roundings.
"""

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

# the kernels' names for them and for what else is loaded alone: there, where a pointer points does not decide what is
# compiled, for a step of a schedule or the seed of one sample lies anywhere
SCALARS = (
    "guidance_scale", "second_guidance_scale", "softcap", "noise_scale", "inverse_temperature",
    "logit_inverse_temperature", "temperature", "top_k", "top_p", "min_p", "seed_ptr", "step_ptr",
    "first_position_ptr", "mask_len_ptr", "history_seed_ptr", "history_step_ptr", "count_ptr", "start_ptr", "end_ptr",
    "value", "replace_above", "mask_below",
)  # fmt: skip

# the smallest temperature but 0, and the smallest softcap, as the checks of the ops have them
_SMALLEST_TEMPERATURE = tl.constexpr(1e-30)
# float32 would round what is above to 1, which is refused
LARGEST_MIN_P = tl.constexpr(1 - 2.0**-24)


@triton.jit
def load_scalar(scalar, LOW: tl.constexpr, OTHER: tl.constexpr):
    """Return a number as it is, and of a pointer the value, or OTHER where it is not finite or below LOW."""
    if scalar.dtype.is_ptr():
        # wide enough for every dtype that a tensor may have, so that the only rounding is the host's
        value = tl.load(scalar).to(tl.float64)
        rounded = value.to(tl.float32)
        return tl.where((value >= LOW) & (tl.abs(rounded) < float("inf")), rounded, OTHER)
    else:
        return scalar


@triton.jit
def load_inverse_temperature(scalar):
    """Return the inverse of a temperature and whether that is 0, for which the inverse is 1.

    A number is the inverse already, and GREEDY says whether it is that of 0.
    """
    if scalar.dtype.is_ptr():
        value = tl.load(scalar).to(tl.float64)
        is_greedy = value == 0.0
        temperature = value.to(tl.float32)
        valid = (temperature >= _SMALLEST_TEMPERATURE) & (temperature < float("inf"))
        # NaN makes every logit NaN and so every row a bad one
        inverse = tl.where(valid, tl.div_rn(1.0, temperature), float("nan"))
        return tl.where(is_greedy, 1.0, inverse), is_greedy
    else:
        return scalar, scalar != scalar


@triton.jit
def load_softcap(scalar):
    """Return a softcap, and the magnitude that logits have to be below to be capped: those at +inf stay as they are."""
    if scalar.dtype.is_ptr():
        value = tl.load(scalar).to(tl.float64)
        rounded = value.to(tl.float32)
        valid = (value >= _SMALLEST_TEMPERATURE) & (rounded < float("inf"))
        # +inf caps nothing; NaN makes every logit NaN and so every row a bad one
        return tl.where(valid, rounded, float("nan")), tl.where(value == float("inf"), 0.0, float("inf"))
    else:
        return scalar, float("inf")


@triton.jit
def load_top_p(scalar):
    """Return a share of the probability, or NaN where what a pointer points to is not within (0, 1]."""
    if scalar.dtype.is_ptr():
        value = tl.load(scalar).to(tl.float64)
        return tl.where((value > 0.0) & (value <= 1.0), value.to(tl.float32), float("nan"))
    else:
        return scalar


@triton.jit
def load_min_p(scalar):
    """Return a share of the largest probability, or NaN where what a pointer points to is not within [0, 1)."""
    if scalar.dtype.is_ptr():
        value = tl.load(scalar).to(tl.float64)
        return tl.where((value >= 0.0) & (value < 1.0), tl.minimum(value.to(tl.float32), LARGEST_MIN_P), float("nan"))
    else:
        return scalar


def has_noise(scale: float | Tensor) -> bool:
    """Tell whether noise of this scale changes anything; that of a tensor may."""
    # smaller numbers are 0 in float32
    return isinstance(scale, Tensor) or scale > 2.0**-150


def may_be_negative(scale: float | Tensor) -> bool:
    """Tell whether a scale may be below 0."""
    return isinstance(scale, Tensor) or scale < 0


def is_per_sample(scale: float | Tensor) -> bool:
    """Tell whether a scale is a tensor (B,), of one for each sample."""
    return isinstance(scale, Tensor) and scale.ndim > 0


def is_greedy(temperature: float | Tensor) -> bool | None:
    """Tell whether a temperature is 0; None for a tensor, where the kernel decides."""
    return None if isinstance(temperature, Tensor) else temperature == 0


def inverse_of(temperature: float | Tensor) -> float | Tensor:
    """Return what `load_inverse_temperature` takes: the inverse of a number, or the tensor."""
    if isinstance(temperature, Tensor):
        return temperature
    if temperature in (0, 1):
        return 1.0
    # both roundings as in C: the temperature to float32, then its inverse
    return float(np.float32(1) / np.float32(temperature))
