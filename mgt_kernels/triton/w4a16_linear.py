"""w4a16_linear on the device.

Bound by: the 16-bit tensor cores, for few rows by DRAM reads of the weights. The weights are the left factor and become
bfloat16 in registers, in some four instructions each: a nibble is put below the bits of 2^23, which makes it a float.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgt_kernels.packing import CHUNK, packed_bytes
from mgt_kernels.triton.draws import LAUNCH_OPTIONS
from mgt_kernels.triton.launch import ceil_div, laid_out

# inputs that one nibble of a run of bytes holds
_RUN = tl.constexpr(CHUNK // 2)
_TWO_POW_23 = tl.constexpr(8388608.0)


@triton.jit
def _plus_two_pow_23(packed):
    """Compute 2^23 + w_q of the low and of the high nibbles, float32."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low, high;
        and.b32 low, $8, 0x0F0F0F0F;
        shr.u32 high, $8, 4;
        and.b32 high, high, 0x0F0F0F0F;
        prmt.b32 $0, low, 0x4B000000, 0x7440;
        prmt.b32 $1, low, 0x4B000000, 0x7441;
        prmt.b32 $2, low, 0x4B000000, 0x7442;
        prmt.b32 $3, low, 0x4B000000, 0x7443;
        prmt.b32 $4, high, 0x4B000000, 0x7440;
        prmt.b32 $5, high, 0x4B000000, 0x7441;
        prmt.b32 $6, high, 0x4B000000, 0x7442;
        prmt.b32 $7, high, 0x4B000000, 0x7443;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [packed], dtype=(tl.float32, tl.float32), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _load_group(scale_ptr, zero_point_ptr, group, known):
    scale = tl.load(scale_ptr + group, mask=known, other=0.0).to(tl.float32)
    zero_point = tl.load(zero_point_ptr + group, mask=known, other=0).to(tl.float32) + _TWO_POW_23
    return scale[:, None], zero_point[:, None]


@triton.jit
def _load_activations(x_ptr, column, num_inputs):
    return tl.load(x_ptr + column[:, None], mask=(column < num_inputs)[:, None], other=0.0)


@triton.jit
def _w4a16_linear_kernel(
    y_ptr,
    x_ptr,
    w_q_ptr,
    scale_ptr,
    zero_point_ptr,
    bias_ptr,
    stride_row,
    num_rows,
    num_outputs,
    num_inputs,
    num_groups,
    row_bytes,
    HAS_BIAS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    offs_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_output = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    offs_byte = tl.arange(0, BLOCK_BYTES)
    offs_low = offs_byte // _RUN * (2 * _RUN) + offs_byte % _RUN
    # past the end the last one is computed again, and not stored
    row = tl.minimum(offs_row, num_rows - 1).to(tl.int64)
    output = tl.minimum(offs_output, num_outputs - 1).to(tl.int64)
    x_ptr += (row * stride_row)[None, :]
    w_q_ptr += (output * row_bytes)[:, None] + offs_byte[None, :]
    scale_ptr += output * num_groups
    zero_point_ptr += output * num_groups

    acc = tl.zeros([BLOCK_OUTPUTS, BLOCK_ROWS], tl.float32)
    for first in range(0, row_bytes, BLOCK_BYTES):
        packed = tl.load(w_q_ptr + first, mask=(first + offs_byte < row_bytes)[None, :], other=0)
        low, high = _plus_two_pow_23(packed)
        scale, zero_point = _load_group(scale_ptr, zero_point_ptr, 2 * first // GROUP_SIZE, True)
        low = ((low - zero_point) * scale).to(tl.bfloat16)
        if GROUP_SIZE % (2 * _RUN) != 0:
            # the high nibbles may belong to the next group, which may not be there
            group = (2 * first + _RUN) // GROUP_SIZE
            scale, zero_point = _load_group(scale_ptr, zero_point_ptr, group, group < num_groups)
        high = ((high - zero_point) * scale).to(tl.bfloat16)
        column = 2 * first + offs_low
        acc = tl.dot(low, _load_activations(x_ptr, column, num_inputs), acc)
        acc = tl.dot(high, _load_activations(x_ptr, column + _RUN, num_inputs), acc)

    # a device cannot raise: where the row held NaN or inf every sum does, and becomes NaN
    y = tl.where(tl.abs(acc) < float("inf"), acc, float("nan"))
    if HAS_BIAS:
        y += tl.load(bias_ptr + output)[:, None]
    inside = (offs_row < num_rows)[None, :] & (offs_output < num_outputs)[:, None]
    tl.store(y_ptr + (row * num_outputs)[None, :] + output[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)


def w4a16_linear(
    x: Tensor, w_q: Tensor, scale: Tensor, zero_point: Tensor, group_size: int, bias: Tensor | None
) -> Tensor:
    """Run the kernel on checked arguments; see `mgt_kernels.w4a16_linear`."""
    num_rows, num_inputs = x.shape
    num_outputs, num_groups = scale.shape
    x, w_q, scale, zero_point, bias = laid_out(x, w_q, scale, zero_point, bias)
    y = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    # once for all programs
    rounded = x.to(torch.bfloat16)
    # few rows take many programs to load the weights
    block_outputs, block_rows, num_warps = (16, 16, 1) if num_rows <= 16 else (128, 128, 8)
    # bytes whose low nibbles, and whose high ones, belong to one group
    block_bytes = CHUNK if group_size % (2 * CHUNK) == 0 else CHUNK // 2
    with torch.accelerator.device_index(x.device.index):
        _w4a16_linear_kernel[(ceil_div(num_rows, block_rows), ceil_div(num_outputs, block_outputs))](
            y, rounded, w_q, scale, zero_point, bias, rounded.stride(0), num_rows, num_outputs, num_inputs, num_groups,
            packed_bytes(num_inputs), HAS_BIAS=bias is not None, GROUP_SIZE=group_size, BLOCK_OUTPUTS=block_outputs,
            BLOCK_ROWS=block_rows, BLOCK_BYTES=block_bytes, num_warps=num_warps, num_stages=3, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return y
