"""Checks of the ops' arguments: each names the argument, what was expected and what came."""

import math

import torch
from torch import Tensor

from mgt_kernels import cpu

BACKENDS = ("auto", "reference", *cpu.ISAS[1:], "triton")

_LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT32_MAX = torch.finfo(torch.float32).max
# its inverse is still far from the largest float32
_SMALLEST_TEMPERATURE = 1e-30


def check_draw(
    logits: Tensor,
    tokens: Tensor,
    uncond_logits: Tensor | None,
    guidance_scale: float,
    noise_scale: float,
    temperature: float,
) -> None:
    """Check what every op that reads logits takes."""
    check_tensor("logits", logits, 3, _LOGITS_DTYPES)
    check_tensor("tokens", tokens, 2, (torch.int64,), logits.device)
    batch, num_positions, num_tokens = logits.shape
    check_shape("tokens", tokens, (batch, num_positions))
    if num_tokens < 1:
        raise ValueError(f"logits: expected at least one token in the last dimension, got shape {tuple(logits.shape)}")
    if uncond_logits is not None:
        check_tensor("uncond_logits", uncond_logits, 3, (logits.dtype,), logits.device)
        check_shape("uncond_logits", uncond_logits, tuple(logits.shape))
    check_strides(logits, uncond_logits)
    check_range("guidance_scale", guidance_scale, -math.inf)
    check_range("noise_scale", noise_scale, 0)
    check_temperature(temperature)


def check_tensor(
    name: str, value: Tensor, ndim: int, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None
) -> None:
    """Check type, dtype, number of dimensions and, if it matters, device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {value.dtype}")
    if value.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device} like the first argument, got {value.device}")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Check the sizes."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")


def check_strides(logits: Tensor, uncond_logits: Tensor | None) -> None:
    """Check that tokens, or else positions, lie side by side in memory, in both halves alike."""
    halves = [logits] if uncond_logits is None else [logits, uncond_logits]
    # a dimension of size 1 is never stepped along, so any stride of it will do
    by_token = all(half.shape[2] == 1 or half.stride(2) == 1 for half in halves)
    by_position = all(half.shape[1] == 1 or half.stride(1) == 1 for half in halves)
    if not (by_token or by_position or logits.numel() == 0):
        strides = " and ".join(str(tuple(half.stride())) for half in halves)
        raise ValueError(
            "logits and uncond_logits: expected unit stride over tokens (last dimension) or over positions (middle "
            f"dimension), the same for both, got strides {strides}"
        )


def check_range(name: str, value: float, low: float) -> None:
    """Check that a number is finite, in float32 too, and at least `low`."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    # the kernels compute in float32; comparisons, unlike math.isfinite, are traced by torch.compile
    if not (low <= value <= _FLOAT32_MAX and value >= -_FLOAT32_MAX):
        wanted = "a finite number" if low == -math.inf else f"a finite number >= {low:g}"
        raise ValueError(f"{name}: expected {wanted}, got {value}")


def check_temperature(temperature: float) -> None:
    """Check that a temperature is 0 or has a finite inverse."""
    check_range("temperature", temperature, 0)
    if 0 < temperature < _SMALLEST_TEMPERATURE:
        raise ValueError(f"temperature: expected 0 or at least {_SMALLEST_TEMPERATURE}, got {temperature}")


def per_sample(name: str, value: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """Return an int for all samples, or one for each, as (B,) int64."""
    if isinstance(value, int):
        return torch.full((batch,), value, dtype=torch.int64, device=device)
    check_tensor(name, value, 1, (torch.int64,), device)
    check_shape(name, value, (batch,))
    return value


def check_seed(seed: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """Return the seeds as (B,) int64."""
    if isinstance(seed, int) and not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected a 64-bit signed integer, got {seed}")
    return per_sample("seed", seed, batch, device)


def check_step(step: int | Tensor, device: torch.device) -> Tensor:
    """Return the step as a 0-dimensional int64 tensor."""
    if isinstance(step, Tensor):
        check_tensor("step", step, 0, (torch.int64,), device)
        # to look at its value here would wait for the device
        return step
    if not isinstance(step, int):
        raise TypeError(f"step: expected an int or a tensor, got {type(step).__name__}")
    check_step_range(step)
    return torch.full((), step, dtype=torch.int64, device=device)


def check_step_range(step: int) -> None:
    """Check that a step fits the 32 bits of the counter."""
    if not 0 <= step < 2**32:
        raise ValueError(f"step: expected a value within [0, 2^32), got {step}")


def step_value(step: Tensor) -> int:
    """Return the step as an int; waits for its device."""
    value = int(step)
    check_step_range(value)
    return value


def check_backend(backend: str, device: torch.device) -> str:
    """Check that the backend exists and runs on the device."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "auto" and device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"backend: no kernels for device {device}; use backend='reference'")
    if backend in cpu.ISAS[1:] and device.type not in ("cpu", "meta"):
        raise RuntimeError(f"backend: {backend!r} runs on CPU tensors, got tensors on {device}")
    if backend == "triton" and device.type not in ("cuda", "meta"):
        raise RuntimeError(f"backend: 'triton' runs on CUDA tensors, got tensors on {device}")
    return backend
