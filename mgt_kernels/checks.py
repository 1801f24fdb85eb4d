"""Checks of the ops' arguments: each names the argument, what was expected and what came."""

import functools
import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgt_kernels import cpu

BACKENDS = ("auto", "reference", *cpu.ISAS[1:], "triton")

_LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# all that fit into int64
_INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)
_FLOAT32_MAX = torch.finfo(torch.float32).max
# compute capabilities: the layers need tensor cores that multiply bfloat16
_SMALLEST_CAPABILITY = (7, 5)
_SMALLEST_CAPABILITY_OF = {"w4a8_linear": (8, 0), "w4a16_linear": (8, 0)}
# its inverse is still far from the largest float32
_SMALLEST_TEMPERATURE = 1e-30


def check_draw(
    logits: Tensor, tokens: Tensor, uncond_logits: Tensor | None, second_uncond_logits: Tensor | None
) -> None:
    """Check the tensors of every op that reads logits."""
    check_tensor("logits", logits, 3, _LOGITS_DTYPES)
    check_tensor("tokens", tokens, 2, (torch.int64,), logits.device)
    shape = logits.shape
    check_shape("tokens", tokens, shape[:2])
    if shape[2] < 1:
        raise ValueError(f"logits: expected at least one token in the last dimension, got shape {tuple(shape)}")
    halves = [logits]
    if uncond_logits is not None:
        halves.append(uncond_logits)
        check_tensor("uncond_logits", uncond_logits, 3, (logits.dtype,), logits.device)
        check_shape("uncond_logits", uncond_logits, shape)
    if second_uncond_logits is not None:
        if uncond_logits is None:
            raise ValueError("second_uncond_logits: expected None where uncond_logits is None, got a tensor")
        halves.append(second_uncond_logits)
        check_tensor("second_uncond_logits", second_uncond_logits, 3, (logits.dtype,), logits.device)
        check_shape("second_uncond_logits", second_uncond_logits, shape)
    check_strides(halves)


def check_tensor(
    name: str, value: Tensor, ndim: int, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None
) -> None:
    """Check type, layout, dtype, number of dimensions and, if it matters, device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {value.dtype}")
    check_layout(name, value)
    if value.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device} like the first argument, got {value.device}")


def check_layout(name: str, value: Tensor) -> None:
    """Check that a tensor is dense: neither sparse nor nested."""
    if value.is_nested or value.layout != torch.strided:
        layout = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: expected a dense tensor (layout torch.strided), got {layout}")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Check the sizes."""
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")


def check_strides(halves: Sequence[Tensor]) -> None:
    """Check that tokens, or else positions, lie side by side in memory, in all guidance halves alike."""
    _, num_positions, num_tokens = halves[0].shape
    # a dimension of size 1 is never stepped along, so any stride of it will do
    if num_tokens == 1 or all(half.stride(2) == 1 for half in halves):
        return
    if num_positions == 1 or all(half.stride(1) == 1 for half in halves) or halves[0].numel() == 0:
        return
    strides = " and ".join(str(half.stride()) for half in halves)
    raise ValueError(
        "logits and uncond_logits: expected unit stride over tokens (last dimension) or over positions (middle "
        f"dimension), the same for all, got strides {strides}; .contiguous() makes a copy that has it"
    )


def integer(name: str, value: Any) -> int:
    """Return an integer of any kind (int, NumPy's, a 0-dimensional array) as an int of 64 bits."""
    if type(value) is not int:
        if isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) in (torch.bool, np.bool_):
            raise TypeError(f"{name}: expected an integer, got a bool")
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name}: expected an integer, got {_kind(value)}") from None
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected a 64-bit signed integer, got {value}")
    return value


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Check that a name is one of those that there are."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {tuple(choices)}, got {value!r}")
    return value


def check_top_k(top_k: Any, num_tokens: int) -> int:
    """Return how many tokens a draw keeps; 0 for None, which keeps all."""
    if top_k is None:
        return 0
    top_k = integer("top_k", top_k)
    if not 1 <= top_k <= num_tokens:
        raise ValueError(f"top_k: expected None or a value within [1, {num_tokens}], the tokens, got {top_k}")
    return top_k


def check_top_p(value: float) -> None:
    """Check that a share of the probability is above 0, and not above 1."""
    if not 0 < value <= 1:
        raise ValueError(f"top_p: expected a number within (0, 1], got {value}")


def check_min_p(value: float) -> None:
    """Check that a share of the largest probability is at least 0, and below 1."""
    if not 0 <= value < 1:
        raise ValueError(f"min_p: expected a number within [0, 1), got {value}")


def check_softcap(value: float) -> None:
    """Check that a cap of the logits is above 0, with a finite inverse; inf caps nothing."""
    if not (_SMALLEST_TEMPERATURE <= value <= _FLOAT32_MAX or value == math.inf):
        raise ValueError(f"softcap: expected a finite number of at least {_SMALLEST_TEMPERATURE}, or None, got {value}")


def check_statistics(statistics: Sequence[str]) -> str:
    """Return the names of statistics, in one order, in one string."""
    if not statistics:
        return ""
    if isinstance(statistics, str) or any(name not in cpu.STATISTICS for name in statistics):
        raise ValueError(f"statistics: expected names out of {tuple(cpu.STATISTICS)}, got {statistics!r}")
    return ",".join(name for name in cpu.STATISTICS if name in statistics)


def token_bias(allowed: Tensor | None, logits: Tensor) -> Tensor | None:
    """Return what is added to every row of logits, (V,) float32 or None, for the tokens that are allowed."""
    if allowed is None:
        return None
    check_tensor("allowed", allowed, 1, (torch.bool, torch.float32), logits.device)
    check_shape("allowed", allowed, logits.shape[2:])
    if allowed.dtype == torch.float32:
        return allowed.contiguous()
    return torch.zeros(allowed.shape, dtype=torch.float32, device=allowed.device).masked_fill_(~allowed, -math.inf)


def number(name: str, value: Any, device: torch.device, batch: int | None = None) -> float | Tensor:
    """Return a number of any kind (Python's, NumPy's, a 0-dimensional array) as a float; a 0-dimensional tensor as is.

    Where a batch is given, a tensor of one number for each of its samples is taken too.
    To look at a tensor's value here might wait for its device: `check_range` checks it once it is known.
    """
    if type(value) is float:
        return value
    if isinstance(value, Tensor):
        check_layout(name, value)
        if value.ndim and value.shape != (batch,):
            wanted = "a number or a 0-dimensional tensor" + ("" if batch is None else f", or shape ({batch},)")
            raise ValueError(f"{name}: expected {wanted}, got shape {tuple(value.shape)}")
        if not (value.dtype.is_floating_point or value.dtype in _INTEGER_DTYPES):
            raise TypeError(f"{name}: expected a floating-point or integer dtype, got {value.dtype}")
        if value.device != device and value.device.type != "cpu":
            raise ValueError(f"{name}: expected device {device} like the first argument, or cpu, got {value.device}")
        return value if value.dtype.is_floating_point else value.double()
    is_array = isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "iuf"
    if isinstance(value, bool) or not (is_array or isinstance(value, numbers.Real)):
        raise TypeError(f"{name}: expected a number or a 0-dimensional tensor, got {_kind(value)}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def is_a(value: object, expected: type) -> bool:
    """Tell whether a value is of a class of ours."""
    # a notebook that imports the class's module again still holds values of before
    kind = type(value)
    return kind is expected or (kind.__module__, kind.__qualname__) == (expected.__module__, expected.__qualname__)


def _kind(value: object) -> str:
    shape = getattr(value, "shape", ())
    return f"{type(value).__name__} of shape {tuple(shape)}" if shape else type(value).__name__


def check_range(name: str, value: float, low: float) -> None:
    """Check that a number is finite, in float32 too, and at least `low`."""
    # the kernels compute in float32; comparisons, unlike math.isfinite, are traced by torch.compile
    if not (low <= value <= _FLOAT32_MAX and value >= -_FLOAT32_MAX):
        wanted = "a finite number" if low == -math.inf else f"a finite number >= {low:g}"
        raise ValueError(f"{name}: expected {wanted}, got {value}")


def check_guidance_scale(name: str, value: float) -> None:
    """Check that a guidance scale is finite."""
    check_range(name, value, -math.inf)


def check_noise_scale(value: float) -> None:
    """Check that a noise scale is finite and not negative."""
    check_range("noise_scale", value, 0)


def check_temperature(value: float) -> None:
    """Check that a temperature of the draw is 0 or has a finite inverse."""
    check_range("temperature", value, 0)
    if 0 < value < _SMALLEST_TEMPERATURE:
        raise ValueError(f"temperature: expected 0 or at least {_SMALLEST_TEMPERATURE}, got {value}")


def check_confidence_temperature(value: float) -> None:
    """Check that a temperature of the confidences is finite and not negative."""
    check_range("temperature", value, 0)


def check_bound(name: str, value: float) -> None:
    """Check that a number is finite, in float32 too, or an infinity, which nothing or everything is below."""
    if not (abs(value) <= _FLOAT32_MAX or abs(value) == math.inf):
        raise ValueError(f"{name}: expected a finite number or an infinity, got {value}")


def check_rule(rule: str, value: float) -> None:
    """Check the number that belongs to a rule of `commit_tokens`."""
    if rule != "count":
        check_range(rule, value, -math.inf if rule == "threshold" else 0)


def per_sample(name: str, value: Any, batch: int, device: torch.device) -> int | Tensor:
    """Return an integer of any kind as an int for all samples, and a tensor or array of one for each as (B,) int64."""
    if not isinstance(value, Tensor):
        if not (isinstance(value, np.ndarray) and value.ndim):
            return integer(name, value)
        value = torch.tensor(value, device=device)
    if value.dtype == torch.int64 and value.shape == (batch,) and value.device == device:
        check_layout(name, value)
        return value
    _check_integers(name, value, device)
    if value.ndim == 0:
        value = value.expand(batch)
    check_shape(name, value, (batch,))
    return value.to(device, torch.int64)


def check_first_position(first_position: Any, batch: int, device: torch.device) -> int | Tensor | None:
    """Return an integer of any kind as an int, one for each sample as (B,) int64, and 0 as None."""
    if type(first_position) is int and first_position == 0:
        return None
    return per_sample("first_position", first_position, batch, device)


def check_step(step: Any, device: torch.device) -> int | Tensor:
    """Return an integer of any kind as an int, and a 0-dimensional tensor as one of int64 on the device."""
    if not isinstance(step, Tensor):
        step = integer("step", step)
        check_step_range(step)
        return step
    if step.dtype == torch.int64 and step.ndim == 0 and step.device == device:
        check_layout("step", step)
        return step
    _check_integers("step", step, device)
    if step.ndim:
        raise ValueError(f"step: expected 0 dimensions, got shape {tuple(step.shape)}")
    # to look at its value here would wait for the device
    return step.to(device, torch.int64)


def _check_integers(name: str, value: Tensor, device: torch.device) -> None:
    if value.dtype not in _INTEGER_DTYPES:
        raise TypeError(f"{name}: expected an integer dtype that fits into torch.int64, got {value.dtype}")
    check_layout(name, value)
    if value.device != device and (value.ndim or value.device.type != "cpu"):
        raise ValueError(f"{name}: expected device {device} like the first argument, got {value.device}")


def check_step_range(step: int) -> None:
    """Check that a step fits the 32 bits of the counter."""
    if not 0 <= step < 2**32:
        raise ValueError(f"step: expected a value within [0, 2^32), got {step}")


def check_backend(backend: str, device: torch.device) -> str:
    """Check that the backend exists and runs on the device."""
    if backend == "auto" and device.type == "cpu":
        return backend
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "auto" and device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"backend: no kernels for device {device}; use backend='reference'")
    if backend in cpu.ISAS[1:] and device.type not in ("cpu", "meta"):
        raise RuntimeError(f"backend: {backend!r} runs on CPU tensors, got tensors on {device}")
    if backend == "triton" and device.type not in ("cuda", "meta"):
        raise RuntimeError(f"backend: 'triton' runs on CUDA tensors, got tensors on {device}")
    if torch.version.hip is not None and device.type == "cuda" and backend != "reference":
        raise RuntimeError(
            f"backend: {backend!r} asks for kernels for NVIDIA GPUs, and this PyTorch is built for AMD's (ROCm "
            f"{torch.version.hip}); use backend='reference'"
        )
    return backend


@functools.cache
def check_capability(op: str, device: torch.device) -> None:
    """Check that the op's kernels run on this GPU."""
    smallest = _SMALLEST_CAPABILITY_OF.get(op, _SMALLEST_CAPABILITY)
    found = torch.cuda.get_device_capability(device)
    if found < smallest:
        raise RuntimeError(
            f"{op}: expected a GPU of compute capability {smallest[0]}.{smallest[1]} or later, got {device}, "
            f"{torch.cuda.get_device_name(device)}, of {found[0]}.{found[1]}; use backend='reference'"
        )
