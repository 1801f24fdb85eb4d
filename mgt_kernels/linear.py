"""The int4 linear layers: arguments are checked here, once, and handed to the backend asked for."""

import math

import torch
from torch import Tensor

from mgt_kernels import cpu, reference
from mgt_kernels.checks import check_backend, check_layout, check_range, check_shape, check_tensor, is_a, number
from mgt_kernels.packing import PackedInt4
from mgt_kernels.registration import register

_DTYPES = (torch.float32, torch.bfloat16)
_BIAS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# its inverse is finite
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def w4a8_linear(
    x: Tensor,
    weight: PackedInt4,
    x_scale: float | Tensor | None = None,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    r"""Multiply by a 4-bit matrix in 8-bit integers: activations are quantized on the way in.

    With w_q, zero_point, scale and groups g as in `PackedInt4`, for each row m of x and output n::

        x_q[m, k]  = clamp(round(x[m, k] * (1 / x_scale[m])), -128, 127)           halves to even, in float32
        sum[m, g]  = sum_{k in g} x_q[m, k] (w_q[n, k] - zero_point[n, g])         exact in 32 bits
        y[m, n]    = x_scale[m] * sum_g scale[n, g] sum[m, g] + bias[n]            fused float32, g in order

    A row's result depends on nothing but the row: not on the batch, threads, or the instruction set.

    Args:
        x: (..., K) float32 or bfloat16, finite.
        weight: (N, K), from `quantize_int4`, on the device of x.
        x_scale: the scales of the quantized activations, positive. A number of any kind or a 0-dimensional tensor, or
            (S,) float32 where S divides the number M of rows: each of S equal, consecutive runs of rows has its own; so
            S = 1 is a scale for the tensor, S = 2 one for each guidance half, S = M one for each row. None:
            max_k |x[m, k]| / 127 of each row as it comes.
        bias: (N,) float32, bfloat16 or float16, or None.
        backend: "auto" (CPU: the best instruction set, or MGT_ISA; CUDA: Triton), or one of "reference", "scalar",
            "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx", "triton"; `mgt_kernels.kernel_isa` says which
            kernel a CPU instruction set gets.

    Returns:
        y (..., N) of the dtype of x.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape, device or range is wrong, or a row of x holds NaN or inf (the message names it; on CUDA,
            where raising would wait for the device, such a row of y is NaN, and scales go unchecked).
        RuntimeError: if the backend asked for is not available.

    Source: W4A8 of secondary calibration quantization, arXiv 2411.10781.
    """
    rows, bias = _check_linear(x, weight, bias)
    num_rows = rows.shape[0]
    if x_scale is not None:
        if not isinstance(x_scale, Tensor) or x_scale.ndim == 0:
            x_scale = number("x_scale", x_scale, x.device)
        if isinstance(x_scale, Tensor):
            x_scale = x_scale.to(x.device, torch.float32).reshape(1) if x_scale.ndim == 0 else x_scale
        else:
            check_range("x_scale", x_scale, _SMALLEST_SCALE)
            x_scale = torch.full((1,), x_scale, dtype=torch.float32, device=x.device)
        check_tensor("x_scale", x_scale, 1, (torch.float32,), x.device)
        if not len(x_scale) or num_rows % len(x_scale):
            raise ValueError(f"x_scale: expected as many values as divide the {num_rows} rows of x, got {len(x_scale)}")
    y = _call_w4a8_linear(
        rows, weight.w_q, weight.scale, weight.zero_point, weight.group_size, x_scale, bias,
        check_backend(backend, x.device),
    )  # fmt: skip
    return y if x.ndim == 2 else y.view(*x.shape[:-1], weight.shape[0])


def w4a16_linear(
    x: Tensor, weight: PackedInt4, bias: Tensor | None = None, *, batch_invariant: bool = True, backend: str = "auto"
) -> Tensor:
    r"""Multiply by a 4-bit matrix in bfloat16, accumulating in float32.

    With w_q, zero_point, scale and groups g as in `PackedInt4`, for each row m of x and output n::

        y[m, n] = sum_k bfloat16(x[m, k]) bfloat16((w_q[n, k] - zero_point[n, g]) scale[n, g]) + bias[n]

    Both operands are rounded on every backend, so all compute the same but for the order and rounding of the float32
    sums. On one instruction set, and on one CUDA device, a row's sums are added in an order that depends on nothing but
    K and the group size. With batch_invariant=False a CUDA device may choose it by the number M of rows, too::

        M <= 16, few outputs, many inputs    parts of K by several programs, their sums added in order
        M from a limit of the device on      the weights become bfloat16 in memory once, torch.mm multiplies

    The limit is 512 to 2,304 rows by the device's compute capability; it is computed from counts of instructions, not
    measured. torch.mm adds as PyTorch's own layers do: in an order that cuBLAS chooses, for bfloat16 results in parts
    that are bfloat16 where torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is on.

    Args:
        x: (..., K) float32 or bfloat16, finite, below 3.39e38.
        weight: (N, K), from `quantize_int4`, on the device of x.
        bias: (N,) float32, bfloat16 or float16, or None. In the dtype of x it takes torch.mm no pass of its own.
        batch_invariant: whether a row's result must not depend on how many rows there are. On a CPU it never does.
        backend: as for `w4a8_linear`.

    Returns:
        y (..., N) of the dtype of x.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape or device is wrong, or a row of x holds NaN or inf, or rounds to inf (the message names
            it; on CUDA, where raising would wait for the device, such a row of y is NaN, and so is a sum that
            overflows; from torch.mm either may be infinite, too).
        RuntimeError: if the backend asked for is not available.

    Source: W4A16 of secondary calibration quantization, arXiv 2411.10781.
    """
    rows, bias = _check_linear(x, weight, bias)
    if not isinstance(batch_invariant, bool):
        raise TypeError(f"batch_invariant: expected a bool, got {type(batch_invariant).__name__}")
    y = _call_w4a16_linear(
        rows, weight.w_q, weight.scale, weight.zero_point, weight.group_size, bias, batch_invariant,
        check_backend(backend, x.device),
    )  # fmt: skip
    return y if x.ndim == 2 else y.view(*x.shape[:-1], weight.shape[0])


def _check_linear(x: Tensor, weight: PackedInt4, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if not is_a(weight, PackedInt4):
        raise TypeError(f"weight: expected a PackedInt4, as quantize_int4 returns it, got {type(weight).__name__}")
    check_layout("x", x)
    if x.ndim < 1:
        raise ValueError("x: expected at least one dimension, got a scalar")
    num_outputs, num_inputs = weight.shape
    if x.shape[-1] != num_inputs:
        raise ValueError(f"x: expected {num_inputs} inputs in the last dimension, got shape {tuple(x.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight: expected device {x.device} like x, got {weight.device}")
    rows = cpu.rows_apart(x if x.ndim == 2 else x.reshape(-1, num_inputs))
    check_tensor("x", rows, 2, _DTYPES)
    if bias is not None:
        check_tensor("bias", bias, 1, _BIAS_DTYPES, x.device)
        check_shape("bias", bias, (num_outputs,))
        bias = bias.contiguous()
    return rows, bias


def _reference_w4a8_linear(
    x: Tensor,
    w_q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    x_scale: Tensor | None,
    bias: Tensor | None,
    backend: str,
) -> Tensor:
    if x.device.type == "cpu":
        if x_scale is not None:
            check_scales(x_scale)
        _check_rows(x, x.float())
    num_rows = x.shape[0]
    if x_scale is None:
        row_scale = reference.dynamic_scale(x)
    else:
        row_scale = x_scale.repeat_interleave(num_rows // len(x_scale))[:, None]
    weight = PackedInt4(w_q, scale, zero_point, (len(w_q), x.shape[1]), group_size)
    return reference.w4a8_linear(x, weight, row_scale, bias).to(x.dtype).contiguous()


def _reference_w4a16_linear(
    x: Tensor,
    w_q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    bias: Tensor | None,
    batch_invariant: bool,
    backend: str,
) -> Tensor:
    if x.device.type == "cpu":
        _check_rows(x, x.bfloat16())
    weight = PackedInt4(w_q, scale, zero_point, (len(w_q), x.shape[1]), group_size)
    return reference.w4a16_linear(x, weight, bias).to(x.dtype).contiguous()


def _check_rows(x: Tensor, rounded: Tensor) -> None:
    row = cpu.first_index((~rounded.isfinite()).any(-1))
    if row >= 0:
        raise cpu.bad_activations(row)


def check_scales(x_scale: Tensor) -> None:
    """Check the values of activation scales; waits for their device."""
    index = cpu.first_index(~((x_scale >= _SMALLEST_SCALE) & (x_scale < math.inf)))
    if index >= 0:
        raise ValueError(
            f"x_scale: value {index} is {float(x_scale[index])}; expected a positive, finite, normal number"
        )


def _fake_linear(x, w_q, *_):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], w_q.shape[0])


def _cpu_w4a8_linear(x, w_q, scale, zero_point, group_size, x_scale, bias, isa):  # type: ignore[no-untyped-def]
    if x_scale is not None:
        check_scales(x_scale)
    return cpu.int4_linear(True, x, w_q, scale, zero_point, group_size, x_scale, bias, isa)


def _cpu_w4a16_linear(  # type: ignore[no-untyped-def]
    x, w_q, scale, zero_point, group_size, bias, batch_invariant, isa
):
    return cpu.int4_linear(False, x, w_q, scale, zero_point, group_size, None, bias, isa)


_call_w4a8_linear = register("w4a8_linear", _reference_w4a8_linear, _fake_linear, _cpu_w4a8_linear)
_call_w4a16_linear = register("w4a16_linear", _reference_w4a16_linear, _fake_linear, _cpu_w4a16_linear)
