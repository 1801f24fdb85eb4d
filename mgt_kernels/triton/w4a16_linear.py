"""w4a16_linear on the device.

Bound by: the 16-bit tensor cores, for few rows by DRAM reads of the weights. The weights are the left factor and become
bfloat16 in registers, in some four instructions each: a nibble is put below the bits of 2^23, which makes it a float.

Where a row's result may depend on how many rows there are, few rows that leave the GPU idle are multiplied by several
programs, each with a part of the inputs, whose sums a second kernel adds in order; and where there are so many that the
instructions that widen the weights, again for every 128 rows, take longer than writing the weights down in bfloat16
once, that is done, and PyTorch's product (cuBLAS) does the rest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgt_kernels.packing import CHUNK, packed_bytes
from mgt_kernels.triton.draws import LAUNCH_OPTIONS
from mgt_kernels.triton.launch import ceil_div, laid_out, launch, splits_for

# inputs that one nibble of a run of bytes holds
_RUN = tl.constexpr(CHUNK // 2)
_TWO_POW_23 = tl.constexpr(8388608.0)


@triton.constexpr_function
def _is_sm_90():
    return tl.target_info.cuda_capability_geq(9, 0) and not tl.target_info.cuda_capability_geq(10, 0)


# By compute capability, the rows from which on it is faster to dequantize first. Computed, not measured, for groups of
# 128, from the instructions n of the kernel's loop and the GPUs' published figures, in clocks of a multiprocessor. For
# 128 x 128 outputs and 128 inputs the tensor cores take t, in the kernel and in cuBLAS; the kernel's instructions take
# i = 8 warps * n / 4 schedulers, of which half is taken to run beside the tensor cores. So the kernel loses
# max(t, i) + min(t, i) / 2 - t for 128 rows; dequantizing takes (0.52 + 2) bytes * 128 * 128 at the bandwidth of DRAM.
#
#                     n     t     i   lost   bytes per clock           dequantizing   rows
#     80  A100       818  2048  1636   818   2039 / (108 * 1.41)=13.4          3080    480
#     86  A10        810  4096  1620   810    600 / ( 72 * 1.70)= 4.9          8430   1330
#     89  RTX 4090   810  8192  1620   810   1008 / (128 * 2.52)= 3.1         13200   2090
#     90  H100       463  1024   926   463   3350 / (132 * 1.98)=12.8          3220    890
#    100  B200       410   512   820   564   8000 / (148 * 1.85)=29.2          1410    320
#
# Rounded up to a multiple of 256, for the second launch is not in it. Elsewhere the kernel serves all rows. The figures
# are of NVIDIA's data sheets, as in tests/gpu/gpus.py; n is that of Triton 3.9, and on an A10 taken to be sm_89's.
_DEQUANTIZED_FROM = {80: 512, 86: 1536, 89: 2304, 90: 1024, 100: 512}


def dequantized_from(capability: int) -> int | None:
    """Return how many rows dequantized weights take at least, by the capability, 10 major + minor; None: no number."""
    return _DEQUANTIZED_FROM.get(capability)


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
def _load_weights(w_q_ptr, scale_ptr, zero_point_ptr, first, inside, num_groups, GROUP_SIZE: tl.constexpr):
    """Load the weights of a tile of bytes, the low and the high nibbles; the bytes of either are of one group."""
    low, high = _plus_two_pow_23(tl.load(w_q_ptr + first, mask=inside, other=0))
    scale, zero_point = _load_group(scale_ptr, zero_point_ptr, 2 * first // GROUP_SIZE, True)
    low = ((low - zero_point) * scale).to(tl.bfloat16)
    if GROUP_SIZE % (2 * _RUN) != 0:
        # the high nibbles may belong to the next group, which may not be there
        group = (2 * first + _RUN) // GROUP_SIZE
        scale, zero_point = _load_group(scale_ptr, zero_point_ptr, group, group < num_groups)
    high = ((high - zero_point) * scale).to(tl.bfloat16)
    return low, high


@triton.jit
def _load_activations(x_ptr, column, num_inputs):
    return tl.load(x_ptr + column[:, None], mask=(column < num_inputs)[:, None], other=0.0)


@triton.jit
def _outputs_of(acc, bias_ptr, output, HAS_BIAS: tl.constexpr):
    # a device cannot raise: where the row held NaN or inf every sum does, and becomes NaN
    y = tl.where(tl.abs(acc) < float("inf"), acc, float("nan"))
    if HAS_BIAS:
        y += tl.load(bias_ptr + output).to(tl.float32)
    return y


@triton.jit
def w4a16_linear_kernel(
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
    num_row_blocks,
    row_bytes,
    split_bytes,
    IS_SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Multiply a block of rows by a block of outputs' weights."""
    IS_WGMMA: tl.constexpr = BLOCK_ROWS > 16 and _is_sm_90()
    # in one dimension, which alone may be longer than 65,535
    offs_row = tl.program_id(0) % num_row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_output = tl.program_id(0) // num_row_blocks * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    offs_byte = tl.arange(0, BLOCK_BYTES)
    offs_low = offs_byte // _RUN * (2 * _RUN) + offs_byte % _RUN
    # past the end the last one is computed again, and not stored
    row = tl.minimum(offs_row, num_rows - 1).to(tl.int64)
    output = tl.minimum(offs_output, num_outputs - 1).to(tl.int64)
    x_ptr += (row * stride_row)[None, :]
    w_q_ptr += (output * row_bytes)[:, None] + offs_byte[None, :]
    scale_ptr += output * num_groups
    zero_point_ptr += output * num_groups

    begin, end = 0, row_bytes
    if IS_SPLIT:
        begin = tl.program_id(1) * split_bytes
        end = tl.minimum(begin + split_bytes, row_bytes)
    acc = tl.zeros([BLOCK_OUTPUTS, BLOCK_ROWS], tl.float32)
    for first in range(begin, end, BLOCK_BYTES):
        inside = (first + offs_byte < row_bytes)[None, :]
        low, high = _load_weights(w_q_ptr, scale_ptr, zero_point_ptr, first, inside, num_groups, GROUP_SIZE)
        column = 2 * first + offs_low
        acc = tl.dot(low, _load_activations(x_ptr, column, num_inputs), acc)
        acc = tl.dot(high, _load_activations(x_ptr, column + _RUN, num_inputs), acc)
        if IS_WGMMA:
            # a use of the sums: waited for in a later iteration, they are moved before they are waited for, and ptxas
            # then has every product wait for the one before it (C7514, C7515)
            acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=True, pack=1)

    inside = (offs_row < num_rows)[None, :] & (offs_output < num_outputs)[:, None]
    y_ptr += (row * num_outputs)[None, :] + output[:, None]
    if IS_SPLIT:
        tl.store(y_ptr + tl.program_id(1).to(tl.int64) * num_rows * num_outputs, acc, mask=inside)
    else:
        y = _outputs_of(acc, bias_ptr, output[:, None], HAS_BIAS)
        tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_splits_kernel(
    y_ptr, sum_ptr, bias_ptr, num_outputs, stride_split, NUM_SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Add up what the parts of the inputs gave."""
    row = tl.program_id(1).to(tl.int64)
    output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    inside = output < num_outputs
    offs = row * num_outputs + output
    acc = tl.zeros([BLOCK_OUTPUTS], tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        acc += tl.load(sum_ptr + offs + split * stride_split, mask=inside, other=0.0)
    # past the end the last bias is read, and not stored
    y = _outputs_of(acc, bias_ptr, tl.minimum(output, num_outputs - 1), HAS_BIAS)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_kernel(
    weight_ptr, w_q_ptr, scale_ptr, zero_point_ptr, num_outputs, num_groups, row_bytes, num_byte_blocks,
    GROUP_SIZE: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """Make weights bfloat16."""
    first = tl.program_id(0) % num_byte_blocks * BLOCK_BYTES
    offs_output = tl.program_id(0) // num_byte_blocks * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    offs_byte = tl.arange(0, BLOCK_BYTES)
    offs_low = offs_byte // _RUN * (2 * _RUN) + offs_byte % _RUN
    output = tl.minimum(offs_output, num_outputs - 1).to(tl.int64)
    inside = (offs_output < num_outputs)[:, None] & (first + offs_byte < row_bytes)[None, :]
    low, high = _load_weights(
        w_q_ptr + (output * row_bytes)[:, None] + offs_byte[None, :], scale_ptr + output * num_groups,
        zero_point_ptr + output * num_groups, first, inside, num_groups, GROUP_SIZE,
    )  # fmt: skip
    # a row of weights has room for both nibbles of all its bytes
    weight_ptr += (output * (2 * row_bytes) + 2 * first)[:, None] + offs_low[None, :]
    tl.store(weight_ptr, low, mask=inside)
    tl.store(weight_ptr + _RUN, high, mask=inside)


def w4a16_linear(
    x: Tensor,
    w_q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    bias: Tensor | None,
    batch_invariant: bool = True,
) -> Tensor:
    """Run the kernels on checked arguments; see `mgt_kernels.w4a16_linear`."""
    num_rows, num_inputs = x.shape
    num_outputs, num_groups = scale.shape
    x, w_q, scale, zero_point, bias = laid_out(x, w_q, scale, zero_point, bias)
    if num_rows == 0:
        return torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    # once for all programs
    rounded = x.to(torch.bfloat16)
    row_bytes = packed_bytes(num_inputs)
    # bytes whose low nibbles, and whose high ones, belong to one group
    block_bytes = CHUNK if group_size % (2 * CHUNK) == 0 else CHUNK // 2
    with torch.accelerator.device_index(x.device.index):
        # where it is not asked for, the capability is not looked up, which takes microseconds
        limit = None if batch_invariant else dequantized_from(triton.runtime.driver.active.get_current_target().arch)
        if limit is not None and num_rows >= limit:
            weight = torch.empty((num_outputs, 2 * row_bytes), dtype=torch.bfloat16, device=x.device)
            num_byte_blocks = ceil_div(row_bytes, block_bytes)
            launch(
                dequantize_kernel, (num_byte_blocks * ceil_div(num_outputs, 64),),
                weight, w_q, scale, zero_point, num_outputs, num_groups, row_bytes, num_byte_blocks,
                GROUP_SIZE=group_size, BLOCK_OUTPUTS=64, BLOCK_BYTES=block_bytes, num_warps=4, **LAUNCH_OPTIONS,
            )  # fmt: skip
            return _multiply(rounded, weight[:, :num_inputs].T, bias, x.dtype)
        y = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
        # few rows take many programs to load the weights
        has_few_rows = num_rows <= 16
        block_outputs, block_rows, num_warps = (16, 16, 1) if has_few_rows else (128, 128, 8)
        num_row_blocks, num_output_blocks = ceil_div(num_rows, block_rows), ceil_div(num_outputs, block_outputs)
        num_steps = ceil_div(row_bytes, block_bytes)
        num_splits = splits_for(num_output_blocks, num_steps) if has_few_rows and not batch_invariant else 1
        split_steps = ceil_div(num_steps, num_splits)
        num_splits = ceil_div(num_steps, split_steps)
        target = y if num_splits == 1 else torch.empty((num_splits, *y.shape), dtype=torch.float32, device=x.device)
        launch(
            w4a16_linear_kernel, (num_row_blocks * num_output_blocks, num_splits),
            target, rounded, w_q, scale, zero_point, bias, rounded.stride(0), num_rows, num_outputs, num_inputs,
            num_groups, num_row_blocks, row_bytes, split_steps * block_bytes, IS_SPLIT=num_splits > 1,
            HAS_BIAS=bias is not None, GROUP_SIZE=group_size, BLOCK_OUTPUTS=block_outputs, BLOCK_ROWS=block_rows,
            BLOCK_BYTES=block_bytes, num_warps=num_warps, num_stages=3, **LAUNCH_OPTIONS,
        )  # fmt: skip
        if num_splits > 1:
            launch(
                add_splits_kernel, (ceil_div(num_outputs, 64), num_rows),
                y, target, bias, num_outputs, y.numel(), NUM_SPLITS=num_splits, HAS_BIAS=bias is not None,
                BLOCK_OUTPUTS=64, num_warps=1, **LAUNCH_OPTIONS,
            )  # fmt: skip
    return y


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x @ weight + bias of bfloat16 factors, rounded to dtype once."""
    if dtype == torch.bfloat16 and (bias is None or bias.dtype == dtype):
        return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
    y = torch.mm(x, weight, out_dtype=torch.float32)
    return (y if bias is None else y + bias).to(dtype)
