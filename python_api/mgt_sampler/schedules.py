"""Schedules: how many tokens stay masked after each step, and any scalar that changes from step to step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import lru_cache
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from .arguments import integer, kind, number

if TYPE_CHECKING:
    from .state import State

MaskSchedule: TypeAlias = str | Sequence[float] | Tensor
ValueSchedule: TypeAlias = float | str | Sequence[float] | Tensor | Callable[[int, int], float | Tensor]

MASK_SCHEDULES = (
    "cosine, linear, powP (such as pow0.6), square, cubic, root, arccos, log, exp, sigmoid, or one ratio per step"
)
VALUE_SCHEDULES = (
    "a number, (start, end), one value per step, a function of (k, T), SHAPE:AMPLITUDE with the shapes constant, "
    "linear, cosine, abs_cos and powP (such as abs_cos:2), interval:SCALE:START:END or power_cosine:SCALE:POWER"
)

# the kernels compute in float32
_FLOAT32_MAX = torch.finfo(torch.float32).max
_POWERS = {"linear": 1.0, "square": 2.0, "cubic": 3.0, "root": 0.5}


def mask_ratio(r: Tensor, schedule: str = "cosine", *, num_positions: int = 256, name: str = "mask_schedule") -> Tensor:
    """Share of the tokens that is masked at progress r: gamma(r), which falls from 1 to 0.

    ========  ===================================  =======================================
    cosine    cos(pi r / 2)                        MaskGIT (arXiv 2202.04200), aMUSEd
    powP      1 - r^P                              MaskGIT; P = 0.6: arXiv 2411.10781
    linear    1 - r                                pow1; MaskGIT calls it uniform
    square    1 - r^2                              pow2
    cubic     1 - r^3                              pow3
    root      1 - r^0.5                            pow0.5
    arccos    2 / pi acos(r)                       TiTok (arXiv 2406.07550)
    log       -log2(r) / log2(N)                   MaskGIT
    exp       1 - 2^(-log2(N) (1 - r))             MaskGIT
    sigmoid   (S(3) - S(6 r - 3)) / (S(3) - S(-3))  open-muse; S the logistic function
    ========  ===================================  =======================================

    Args:
        r: float32, any shape, in (0, 1]: the progress, (k + 1) / T after step k of T.
        schedule: a name of the table.
        num_positions: N, the tokens of an image; log and exp need it.
        name: the argument that an error names.

    Returns:
        float32 ratios of r's shape, in [0, 1].

    Raises:
        ValueError: schedule is not in the table.
    """
    power = _power(schedule)
    if power is not None:
        gamma = 1 - r**power
    elif schedule == "cosine":
        gamma = torch.cos(r * math.pi / 2)
    elif schedule == "arccos":
        gamma = torch.acos(r) * (2 / math.pi)
    elif schedule == "log":
        gamma = -torch.log2(r) / math.log2(max(num_positions, 2))
    elif schedule == "exp":
        gamma = 1 - torch.exp2(-math.log2(max(num_positions, 2)) * (1 - r))
    elif schedule == "sigmoid":
        low, high = 1 / (1 + math.exp(3)), 1 / (1 + math.exp(-3))
        gamma = (high - torch.sigmoid(6 * r - 3)) / (high - low)
    else:
        raise ValueError(f"{name}: expected {MASK_SCHEDULES}, got {schedule!r}")
    return gamma.clamp(0.0, 1.0)


def mask_ratios(
    schedule: MaskSchedule, num_inference_steps: int, num_positions: int, *, name: str = "mask_schedule"
) -> list[float]:
    """The mask ratio after each step of a run, gamma((k + 1) / T).

    Worked out in float32 on the CPU, as the published samplers do: floor(N cos(pi / 3)) is N / 2 - 1 there.

    Args:
        schedule: a name that `mask_ratio` knows, or T ratios in [0, 1].
        num_inference_steps: T, at least 1.
        num_positions: N, the tokens of an image.
        name: the argument that an error names.

    Returns:
        T floats, each exactly a float32.

    Raises:
        TypeError: schedule is no name and no array, or num_inference_steps no int.
        ValueError: unknown name, wrong number of ratios, or a ratio outside [0, 1].
    """
    num_inference_steps = check_num_inference_steps(num_inference_steps)
    if isinstance(schedule, str):
        r = torch.arange(1, num_inference_steps + 1, dtype=torch.float32, device="cpu") / num_inference_steps
        ratios: list[float] = mask_ratio(r, schedule, num_positions=num_positions, name=name).tolist()
        return ratios
    given = _floats(name, schedule, MASK_SCHEDULES)
    if len(given) != num_inference_steps:
        raise ValueError(f"{name}: expected {num_inference_steps} ratios, one per step, got {len(given)}")
    _check_ratios(name, given)
    ratios = torch.tensor(given, dtype=torch.float32, device="cpu").tolist()
    return ratios


def checked_mask_schedule(schedule: MaskSchedule, *, name: str = "mask_schedule") -> str | list[float]:
    """Check a mask schedule before the number of steps is known, and return it as a name or a list of floats.

    Raises:
        TypeError: schedule is no name and no array.
        ValueError: unknown name, no ratio, or a ratio outside [0, 1].
    """
    if isinstance(schedule, str):
        mask_ratios(schedule, 1, 2, name=name)
        return str(schedule)
    given = _floats(name, schedule, MASK_SCHEDULES)
    if not given:
        raise ValueError(f"{name}: expected {MASK_SCHEDULES}, got no ratio")
    _check_ratios(name, given)
    return given


def mask_len(num_masked: Tensor, ratio: float | Tensor, num_positions: int | Tensor) -> Tensor:
    """How many tokens of each sample stay masked after a step that is not the last.

        m = max(1, min(M - 1, floor(N ratio)))      and 0 where M = 0

    so every step reveals at least one token while two are masked, and the last one waits for the last step.

    Args:
        num_masked: M, int64 (B,), the masked tokens of each sample before the step.
        ratio: share of N that should stay masked: exactly a float32, or a float32 tensor (B,) or ().
        num_positions: N, or float32 (B,) where it differs between samples.

    Returns:
        int64 (B,), on num_masked's device; nothing waits for that device.
    """
    if isinstance(ratio, Tensor):
        ratio = ratio.to(num_masked.device, torch.float32)
    else:
        # a fill, where torch.tensor would be a copy that waits for the device
        ratio = num_masked.new_full((), ratio, dtype=torch.float32)
    wanted = torch.floor(ratio * num_positions).long()
    return torch.minimum(wanted, num_masked - 1).clamp(min=1).minimum(num_masked)


def mask_lens(schedule: MaskSchedule, num_inference_steps: int, num_positions: int) -> list[int]:
    """Masked tokens left after each of T steps of a sample that starts with all N masked; the last is 0.

    `mask_lens("cosine", 6, 256)` is `[247, 221, 181, 127, 66, 0]`.
    """
    num_positions = integer("num_positions", num_positions)
    masked = torch.tensor([num_positions], dtype=torch.int64, device="cpu")
    counts = []
    for ratio in mask_ratios(schedule, num_inference_steps, num_positions)[:-1]:
        masked = mask_len(masked, ratio, num_positions)
        counts.append(int(masked))
    return [*counts, 0]


def schedule_values(
    value: ValueSchedule, num_inference_steps: int, *, name: str = "value", minimum: float = -math.inf
) -> list[float]:
    """One float for every step, for guidance scale, temperatures and noise scale alike.

    With t = k / (T - 1), the progress of step k (0 where T = 1):

    ===================  ==============================================================
    number               the same at every step
    (start, end)         start + (end - start) t
    T values             these values
    function             what it returns for (k, T)
    "constant:a"         a
    "linear:a"           a (1 - t)
    "cosine:a"           a cos(pi t / 2)
    "powP:a"             a (1 - t^P)
    "abs_cos:a"          a |cos(pi t)|, the noise of arXiv 2411.10781 with a = 2:
                         a at both ends, 0 in the middle
    "interval:a:x:y"     a where x <= k / T < y, 1 elsewhere: guidance for a part of
                         the steps (arXiv 2404.07724)
    "power_cosine:a:P"   1 + (a - 1) (1 - cos(pi (k / T)^P)) / 2, guidance that grows
                         from 1 (TiTok, arXiv 2406.07550)
    ===================  ==============================================================

    Args:
        value: a row of the table; sequences may be lists, tuples, arrays or tensors.
        num_inference_steps: T, at least 1.
        name: the argument that an error names.
        minimum: the smallest value allowed.

    Returns:
        T floats, finite in float32 too.

    Raises:
        TypeError: value is none of these, or num_inference_steps no int.
        ValueError: unknown shape, wrong number of values, or a value that is not finite or below the minimum.
    """
    num_inference_steps = check_num_inference_steps(num_inference_steps)
    if hasattr(value, "tolist"):
        value = value.tolist()
    progress = [k / max(num_inference_steps - 1, 1) for k in range(num_inference_steps)]
    if isinstance(value, str):
        shape, _, numbers = value.partition(":")
        of_shape = [_number_in(name, value, text) for text in numbers.split(":")]
        shares = [k / num_inference_steps for k in range(num_inference_steps)]
        if shape == "interval" and len(of_shape) == 3:
            amplitude, start, end = of_shape
            values = [amplitude if start <= share < end else 1.0 for share in shares]
        elif shape == "power_cosine" and len(of_shape) == 2:
            amplitude, power = of_shape
            values = [1 + (amplitude - 1) * (1 - math.cos(math.pi * share**power)) / 2 for share in shares]
        elif len(of_shape) == 1:
            values = [of_shape[0] * _shape(name, shape, t) for t in progress]
        else:
            raise ValueError(f"{name}: expected {VALUE_SCHEDULES}, got {value!r}")
    elif callable(value):
        values = [number(name, value(k, num_inference_steps), VALUE_SCHEDULES) for k in range(num_inference_steps)]
    elif isinstance(value, Real):
        values = [number(name, value, VALUE_SCHEDULES)] * num_inference_steps
    else:
        values = _floats(name, value, VALUE_SCHEDULES)
        if len(values) == 2:
            start, end = values
            values = [start + (end - start) * t for t in progress]
        elif len(values) != num_inference_steps:
            raise ValueError(
                f"{name}: expected (start, end) or {num_inference_steps} values, one per step, got {len(values)} values"
            )
    for k, v in enumerate(values):
        if not abs(v) <= _FLOAT32_MAX or v < minimum:
            bound = "a finite number" if minimum == -math.inf else f"a finite number of at least {minimum:g}"
            raise ValueError(f"{name}: expected {bound} at every step, got {v} at step {k}")
    return values


def checked_values(
    value: ValueSchedule, *, name: str = "value", minimum: float = -math.inf
) -> float | str | list[float]:
    """Check a schedule of values before the number of steps is known, and return it in Python's own types.

    Raises:
        TypeError, ValueError: as `schedule_values`, but for the number of values.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str):
        schedule_values(value, 1, name=name, minimum=minimum)
        return str(value)
    if isinstance(value, Real):
        return schedule_values(number(name, value, VALUE_SCHEDULES), 1, name=name, minimum=minimum)[0]
    given = _floats(name, value, VALUE_SCHEDULES)
    schedule_values(given, len(given) or 1, name=name, minimum=minimum)
    return given


def frozen_values(name: str, value: ValueSchedule, minimum: float | None = None) -> ValueSchedule:
    """Check a schedule of values before the number of steps is known, and return it in a form that can't be changed."""
    if callable(value):
        return value
    if type(value) is float and abs(value) <= _FLOAT32_MAX and (minimum is None or value >= minimum):
        # what follows takes longer, and rules are made in the middle of loops
        return value
    checked = checked_values(value, name=name, minimum=-math.inf if minimum is None else minimum)
    return tuple(checked) if isinstance(checked, list) else checked


def value_at(name: str, value: ValueSchedule, state: State) -> Any:
    """What a schedule of `frozen_values` has for the next step of a generation."""
    if isinstance(value, float):
        return value
    if callable(value):
        return value(state.step, state.num_inference_steps)
    return _values_of_steps(name, value, state.num_inference_steps)[state.step]  # type: ignore[arg-type]


def ratio_at(schedule: MaskSchedule | Callable[[int, int], float], state: State) -> float:
    """The mask ratio after the next step of a generation."""
    if callable(schedule):
        return schedule(state.step, state.num_inference_steps)
    of_steps = _ratios_of_steps(schedule, state.num_inference_steps, state.tokens.shape[1])  # type: ignore[arg-type]
    return of_steps[state.step]


@lru_cache
def _values_of_steps(name: str, value: str | tuple[float, ...], num_inference_steps: int) -> tuple[float, ...]:
    return tuple(schedule_values(value, num_inference_steps, name=name))


@lru_cache
def _ratios_of_steps(
    schedule: str | tuple[float, ...], num_inference_steps: int, num_positions: int
) -> tuple[float, ...]:
    return tuple(mask_ratios(schedule, num_inference_steps, num_positions))


def check_num_inference_steps(num_inference_steps: int) -> int:
    """Return T, if it is an int of at least 1."""
    num_inference_steps = integer("num_inference_steps", num_inference_steps)
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps: expected at least 1, got {num_inference_steps}")
    return num_inference_steps


def _check_ratios(name: str, ratios: Sequence[float]) -> None:
    if not all(0 <= ratio <= 1 for ratio in ratios):
        raise ValueError(f"{name}: expected ratios in [0, 1], got {ratios}")


def _power(schedule: str) -> float | None:
    """P of powP and its other names; None for every other name."""
    if schedule in _POWERS:
        return _POWERS[schedule]
    match = re.fullmatch(r"pow(\d+\.?\d*|\.\d+)", schedule)
    power = float(match[1]) if match else 0.0
    return power if power > 0 else None


def _shape(name: str, shape: str, t: float) -> float:
    power = _power(shape)
    if power is not None:
        return 1 - math.pow(t, power)
    if shape == "constant":
        return 1.0
    if shape == "cosine":
        return math.cos(math.pi * t / 2)
    if shape == "abs_cos":
        return abs(math.cos(math.pi * t))
    raise ValueError(f"{name}: expected {VALUE_SCHEDULES}, got the shape {shape!r}")


def _number_in(name: str, value: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}: expected {VALUE_SCHEDULES}, got {value!r}") from None


def _floats(name: str, value: object, expected: str) -> list[float]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Iterable) or isinstance(value, (bytes, Mapping, Set)):
        raise TypeError(f"{name}: expected {expected}, got {kind(value)}")
    return [number(name, v, expected) for v in value]
