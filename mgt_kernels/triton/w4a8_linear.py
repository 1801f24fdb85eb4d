"""w4a8_linear on the device.

Bound by: the 8-bit tensor cores, for few rows by DRAM reads of the weights. The weights are the left factor, so that
they go from their nibbles to the tensor cores in registers: three instructions give eight signed bytes 16 (w_q - 8).
What that leaves, 16 (8 - zero_point) times a sum of activations, is where the sums of a group begin. The first kernel
quantizes the rows, once for all outputs, and adds them up by group. Where few rows and few outputs leave the GPU idle,
the groups are split among programs, which write down the sums of each; a third kernel adds them, in the order in which
a program that has all groups does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgt_kernels.packing import CHUNK, packed_bytes
from mgt_kernels.triton.draws import LAUNCH_OPTIONS
from mgt_kernels.triton.launch import ceil_div, laid_out, launch, next_power_of_2, splits_for

# inputs that one nibble of a run of bytes holds
_RUN = tl.constexpr(CHUNK // 2)
_CHUNK = tl.constexpr(CHUNK)
_SMALLEST_SCALE = tl.constexpr(2.0**-126)
_INFINITY = tl.constexpr(0x7F800000)
# 1.5 * 2^23, and its bits: an integer below 2^22 in magnitude added to them is added to the float
_ROUND = tl.constexpr(12582912.0)
_ROUND_BITS = tl.constexpr(0x4B400000)
# the largest group in which 16 |sum| <= 16 * 15 * 128 * group_size stays below 2^22
_GROUP_IN_FLOAT = tl.constexpr(128)


@triton.jit
def _load_groups(x_ptr, first, num_groups, num_inputs, GROUP_SIZE, BLOCK_GROUPS, BLOCK_INPUTS):
    group = first + tl.arange(0, BLOCK_GROUPS)[:, None]
    within = tl.arange(0, BLOCK_INPUTS)[None, :]
    inside = (within < GROUP_SIZE) & (group < num_groups)
    column = group * GROUP_SIZE + within
    x = tl.load(x_ptr + column, mask=inside & (column < num_inputs), other=0.0).to(tl.float32)
    return x, column, inside


@triton.jit
def quantize_rows_kernel(
    x_q_ptr,
    x_sum_ptr,
    row_scale_ptr,
    x_ptr,
    x_scale_ptr,
    stride_row,
    num_rows,
    num_inputs,
    num_groups,
    stride_group,
    plane_bytes,
    rows_per_scale,
    IS_STATIC: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """Quantize rows of activations, and add up their groups."""
    row = tl.program_id(0).to(tl.int64)
    # a row of the padding has no inputs and becomes zeros, which the next kernel multiplies too
    known = row < num_rows
    num_inputs = tl.where(known, num_inputs, 0)
    x_ptr += row * stride_row
    x_q_ptr += row * 2 * plane_bytes

    # the order of the bits is that of the magnitudes; NaN comes last
    largest = tl.zeros([BLOCK_GROUPS, BLOCK_INPUTS], tl.int32)
    for first in range(0, num_groups, BLOCK_GROUPS):
        x, _, _ = _load_groups(x_ptr, first, num_groups, num_inputs, GROUP_SIZE, BLOCK_GROUPS, BLOCK_INPUTS)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    largest = tl.max(tl.max(largest, axis=1), axis=0)
    if IS_STATIC:
        scale = tl.load(x_scale_ptr + row // rows_per_scale, mask=known, other=1.0)
    else:
        scale = tl.maximum(tl.div_rn(largest.to(tl.float32, bitcast=True), 127.0), _SMALLEST_SCALE)
    inverse = tl.div_rn(1.0, scale)
    # a device cannot raise: a row that holds NaN or inf becomes NaN
    tl.store(row_scale_ptr + row, tl.where(largest < _INFINITY, scale, float("nan")))

    for first in range(0, num_groups, BLOCK_GROUPS):
        x, column, inside = _load_groups(x_ptr, first, num_groups, num_inputs, GROUP_SIZE, BLOCK_GROUPS, BLOCK_INPUTS)
        # the addition rounds, halves to even, and leaves the integer in the low bits
        rounded = tl.minimum(tl.maximum(x * inverse, -128.0), 127.0) + _ROUND
        x_q = rounded.to(tl.int32, bitcast=True) - _ROUND_BITS
        # the inputs of the low nibbles are in one plane, those of the high ones in another
        run = column // _RUN
        offs = run // 2 * _RUN + run % 2 * plane_bytes + column % _RUN
        tl.store(x_q_ptr + offs, x_q.to(tl.int8), mask=inside)
        offs_group = first + tl.arange(0, BLOCK_GROUPS)
        x_sum = tl.sum(tl.where(inside, x_q, 0), axis=1)
        offs_sum = offs_group.to(tl.int64) * stride_group + row
        tl.store(x_sum_ptr + offs_sum, x_sum, mask=offs_group < num_groups)


@triton.jit
def _times_16(packed):
    """Compute 16 (w_q - 8) of the low and of the high nibbles, signed bytes."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low;
        shl.b32 low, $2, 4;
        lop3.b32 $0, low, 0xF0F0F0F0, 0x80808080, 0x6A;
        lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
        }""",
        "=&r,=r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _first_sums(x_sum_ptr, stride_group, zero_point_ptr, group, known, IN_FLOAT: tl.constexpr):
    x_sum = tl.load(x_sum_ptr + tl.cast(group, tl.int64) * stride_group)
    zero_point = tl.load(zero_point_ptr + group, mask=known, other=0).to(tl.int32)
    return ((8 - zero_point) * 16)[:, None] * x_sum[None, :] + (_ROUND_BITS if IN_FLOAT else 0)


@triton.jit
def _add_group(
    acc, sums, group_sum_ptr, stride_sums, inside, scale_ptr, group, known, IN_FLOAT, IS_SPLIT: tl.constexpr
):
    if IN_FLOAT:
        exact = tl.fma(sums.to(tl.float32, bitcast=True), 0.0625, -_ROUND / 16)
    else:
        exact = (sums >> 4).to(tl.float32)
    if IS_SPLIT:
        tl.store(group_sum_ptr + tl.cast(group, tl.int64) * stride_sums, exact, mask=inside & known)
    else:
        scale = tl.load(scale_ptr + group, mask=known, other=0.0).to(tl.float32)[:, None]
        acc = tl.fma(scale + tl.zeros_like(acc), exact, acc)
    return acc


@triton.jit
def _outputs_of(acc, row_scale, bias_ptr, output, HAS_BIAS: tl.constexpr):
    row_scale += tl.zeros_like(acc)
    if HAS_BIAS:
        y = tl.fma(acc, row_scale, tl.load(bias_ptr + output).to(tl.float32) + tl.zeros_like(acc))
    else:
        y = acc * row_scale
    return y


@triton.jit
def w4a8_linear_kernel(
    y_ptr,
    x_q_ptr,
    x_sum_ptr,
    row_scale_ptr,
    w_q_ptr,
    scale_ptr,
    zero_point_ptr,
    bias_ptr,
    num_rows,
    num_outputs,
    num_groups,
    num_row_blocks,
    split_groups,
    stride_group,
    row_bytes,
    plane_bytes,
    IS_SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Multiply a block of rows by a block of outputs' weights."""
    IN_FLOAT: tl.constexpr = GROUP_SIZE <= _GROUP_IN_FLOAT
    # in one dimension, which alone may be longer than 65,535
    offs_row = tl.program_id(0) % num_row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_output = tl.program_id(0) // num_row_blocks * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    offs_byte = tl.arange(0, BLOCK_BYTES)
    # rows past the end lie in the padding; of the outputs past it the last one is computed again, and not stored
    row = offs_row.to(tl.int64)
    output = tl.minimum(offs_output, num_outputs - 1).to(tl.int64)
    x_sum_ptr += row
    low_ptr = x_q_ptr + (row * (2 * plane_bytes))[None, :] + offs_byte[:, None]
    high_ptr = low_ptr + plane_bytes
    w_q_ptr += (output * row_bytes)[:, None] + offs_byte[None, :]
    scale_ptr += output * num_groups
    zero_point_ptr += output * num_groups
    inside = (offs_row < num_rows)[None, :] & (offs_output < num_outputs)[:, None]

    # y holds the sums of each group where the groups are split
    begin, end, stride_sums, group_sum_ptr = 0, num_groups, 0, y_ptr
    if IS_SPLIT:
        begin = tl.program_id(1) * split_groups
        end = tl.minimum(begin + split_groups, num_groups)
        stride_sums = tl.cast(num_rows, tl.int64) * num_outputs
        group_sum_ptr = y_ptr + (row * num_outputs)[None, :] + output[:, None]
    acc = tl.zeros([BLOCK_OUTPUTS, BLOCK_ROWS], tl.float32)
    if GROUP_SIZE % _CHUNK == 0:
        TILES: tl.constexpr = GROUP_SIZE // (2 * BLOCK_BYTES)
        for group in range(begin, end):
            sums = _first_sums(x_sum_ptr, stride_group, zero_point_ptr, group, True, IN_FLOAT)
            for tile in range(TILES):
                first = (group * TILES + tile) * BLOCK_BYTES
                packed = tl.load(w_q_ptr + first, mask=(first + offs_byte < row_bytes)[None, :], other=0)
                low, high = _times_16(packed)
                sums = tl.dot(low, tl.load(low_ptr + first), sums, out_dtype=tl.int32)
                sums = tl.dot(high, tl.load(high_ptr + first), sums, out_dtype=tl.int32)
            acc = _add_group(acc, sums, group_sum_ptr, stride_sums, inside, scale_ptr, group, True, IN_FLOAT, IS_SPLIT)
    elif GROUP_SIZE == _RUN:
        # the nibbles of a run of bytes belong to two groups, of which the last may not be there
        for group in range(begin, end, 2):
            first = group * (_RUN // 2)
            low, high = _times_16(tl.load(w_q_ptr + first))
            known = group + 1 < num_groups
            low_sums = _first_sums(x_sum_ptr, stride_group, zero_point_ptr, group, True, IN_FLOAT)
            high_sums = _first_sums(x_sum_ptr, stride_group, zero_point_ptr, group + 1, known, IN_FLOAT)
            low_sums = tl.dot(low, tl.load(low_ptr + first), low_sums, out_dtype=tl.int32)
            high_sums = tl.dot(high, tl.load(high_ptr + first), high_sums, out_dtype=tl.int32)
            acc = _add_group(
                acc, low_sums, group_sum_ptr, stride_sums, inside, scale_ptr, group, True, IN_FLOAT, IS_SPLIT
            )
            acc = _add_group(
                acc, high_sums, group_sum_ptr, stride_sums, inside, scale_ptr, group + 1, known, IN_FLOAT, IS_SPLIT
            )
    else:
        RUNS: tl.constexpr = GROUP_SIZE // _RUN
        for group in range(begin, end):
            sums = _first_sums(x_sum_ptr, stride_group, zero_point_ptr, group, True, IN_FLOAT)
            for run in range(group * RUNS, group * RUNS + RUNS):
                first = run // 2 * _RUN
                packed = tl.load(w_q_ptr + first, mask=(first + offs_byte < row_bytes)[None, :], other=0)
                low, high = _times_16(packed)
                is_high = run % 2 == 1
                x_q = tl.load(low_ptr + first + tl.where(is_high, plane_bytes, 0))
                sums = tl.dot(tl.where(is_high, high, low), x_q, sums, out_dtype=tl.int32)
            acc = _add_group(acc, sums, group_sum_ptr, stride_sums, inside, scale_ptr, group, True, IN_FLOAT, IS_SPLIT)

    if not IS_SPLIT:
        y = _outputs_of(acc, tl.load(row_scale_ptr + row)[None, :], bias_ptr, output[:, None], HAS_BIAS)
        tl.store(y_ptr + (row * num_outputs)[None, :] + output[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_groups_kernel(
    y_ptr,
    group_sum_ptr,
    row_scale_ptr,
    scale_ptr,
    bias_ptr,
    num_outputs,
    num_groups,
    stride_sums,
    HAS_BIAS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """Add up what the groups of inputs gave, in their order."""
    row = tl.program_id(1).to(tl.int64)
    offs_output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    # past the end the last one is computed again, and not stored
    output = tl.minimum(offs_output, num_outputs - 1).to(tl.int64)
    group_sum_ptr += row * num_outputs + output
    scale_ptr += output * num_groups
    acc = tl.zeros([BLOCK_OUTPUTS], tl.float32)
    for group in range(num_groups):
        acc = tl.fma(tl.load(scale_ptr + group).to(tl.float32), tl.load(group_sum_ptr), acc)
        group_sum_ptr += stride_sums
    y = _outputs_of(acc, tl.load(row_scale_ptr + row), bias_ptr, output, HAS_BIAS)
    y_ptr += row * num_outputs + output
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=offs_output < num_outputs)


def w4a8_linear(
    x: Tensor,
    w_q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    x_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Run the kernels on checked arguments; see `mgt_kernels.w4a8_linear`."""
    num_rows, num_inputs = x.shape
    num_outputs, num_groups = scale.shape
    x, w_q, scale, zero_point, x_scale, bias = laid_out(x, w_q, scale, zero_point, x_scale, bias)
    y = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    # a single group is no longer than the inputs, padded
    group_size = min(group_size, ceil_div(num_inputs, 2 * CHUNK) * 2 * CHUNK)
    # both nibbles of the last bytes have activations
    padded_groups = num_groups + (num_groups * group_size // _RUN.value) % 2
    plane_bytes = padded_groups * group_size // 2
    # few rows take many programs to load the weights. Sums are exact and added in the order of the groups, so that a
    # row's result depends neither on the tile nor on the split
    has_few_rows = num_rows <= 16
    block_outputs, block_rows, num_warps = (16, 16, 1) if has_few_rows else (128, 64, 4)
    num_row_blocks, num_output_blocks = ceil_div(num_rows, block_rows), ceil_div(num_outputs, block_outputs)
    padded_rows = num_row_blocks * block_rows
    # those of a step of the loop
    step_groups = 2 if group_size == _RUN.value else 1
    num_steps = ceil_div(num_groups, step_groups)
    num_splits = splits_for(num_output_blocks, num_steps) if has_few_rows else 1
    split_groups = ceil_div(num_steps, num_splits) * step_groups
    num_splits = ceil_div(num_groups, split_groups)
    x_q = torch.empty((padded_rows, 2 * plane_bytes), dtype=torch.int8, device=x.device)
    x_sum = torch.empty((padded_groups, padded_rows), dtype=torch.int32, device=x.device)
    row_scale = torch.empty((padded_rows,), dtype=torch.float32, device=x.device)
    target = y if num_splits == 1 else torch.empty((num_groups, *y.shape), dtype=torch.float32, device=x.device)
    block_inputs = next_power_of_2(group_size)
    block_groups = max(1024 // block_inputs, 1)
    block_bytes = next(n for n in (64, 32) if group_size % (2 * n) == 0 or n == 32)
    with torch.accelerator.device_index(x.device.index):
        launch(
            quantize_rows_kernel, (padded_rows,),
            x_q, x_sum, row_scale, x, x_scale, x.stride(0), num_rows, num_inputs, padded_groups, padded_rows,
            plane_bytes, 1 if x_scale is None else num_rows // len(x_scale),
            IS_STATIC=x_scale is not None, GROUP_SIZE=group_size, BLOCK_GROUPS=block_groups, BLOCK_INPUTS=block_inputs,
            num_warps=min(max(block_groups * block_inputs // 256, 1), 16), **LAUNCH_OPTIONS,
        )  # fmt: skip
        launch(
            w4a8_linear_kernel, (num_row_blocks * num_output_blocks, num_splits),
            target, x_q, x_sum, row_scale, w_q, scale, zero_point, bias, num_rows, num_outputs, num_groups,
            num_row_blocks, split_groups, padded_rows, packed_bytes(num_inputs), plane_bytes, IS_SPLIT=num_splits > 1,
            HAS_BIAS=bias is not None, GROUP_SIZE=group_size, BLOCK_OUTPUTS=block_outputs, BLOCK_ROWS=block_rows,
            BLOCK_BYTES=block_bytes, num_warps=num_warps, num_stages=3, **LAUNCH_OPTIONS,
        )  # fmt: skip
        if num_splits > 1:
            launch(
                add_groups_kernel, (ceil_div(num_outputs, 64), num_rows),
                y, target, row_scale, scale, bias, num_outputs, num_groups, y.numel(), HAS_BIAS=bias is not None,
                BLOCK_OUTPUTS=64, num_warps=1, **LAUNCH_OPTIONS,
            )  # fmt: skip
    return y
