"""merge_tokens and unmerge_tokens on the device.

Bound by: memory. Every token is read once, every row written once. A program makes a block of rows, some of their
channels; among the rows of a block the one with the most tokens decides how long it takes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgt_kernels.triton.draws import LAUNCH_OPTIONS
from mgt_kernels.triton.launch import ceil_div, launch, next_power_of_2

# of a program: two vectors for each of its threads
_BLOCK_BYTES = 4096


@triton.jit
def _block_of(num_rows, num_channels, num_row_blocks, num_channel_blocks, BLOCK_ROWS, BLOCK_CHANNELS):
    """Return a program's sample, rows and channels, and whether these are there."""
    # in one dimension, which alone may be longer than 65,535
    block = tl.program_id(0) // num_channel_blocks
    sample = (block // num_row_blocks).to(tl.int64)
    row = block % num_row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.program_id(0) % num_channel_blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    return sample, row, channel, row < num_rows, channel < num_channels


@triton.jit
def merge_tokens_kernel(
    y_ptr,
    x_ptr,
    members_ptr,
    starts_ptr,
    stride_sample,
    stride_token,
    num_tokens,
    num_rows,
    num_channels,
    num_row_blocks,
    num_channel_blocks,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Average the tokens of a block of rows."""
    sample, row, channel, is_row, is_channel = _block_of(
        num_rows, num_channels, num_row_blocks, num_channel_blocks, BLOCK_ROWS, BLOCK_CHANNELS
    )
    starts_ptr += sample * (num_tokens + 1) + row
    members_ptr += sample * num_tokens
    x_ptr += sample * stride_sample
    # what no match says reads nothing outside of x
    start = tl.maximum(tl.load(starts_ptr, mask=is_row, other=0), 0)
    end = tl.minimum(tl.load(starts_ptr + 1, mask=is_row, other=0), num_tokens)
    size = tl.maximum(end - start, 0).to(tl.int32)

    first = _load_member(x_ptr, members_ptr, start, size > 0, channel, is_channel, stride_token, num_tokens)
    total = first.to(tl.float32)
    for k in range(1, tl.max(size)):
        x = _load_member(x_ptr, members_ptr, start + k, k < size, channel, is_channel, stride_token, num_tokens)
        # a row that has no more stays as it is, a -0 as well
        total = tl.where((k < size)[:, None], total + x.to(tl.float32), total)
    mean = tl.div_rn(total, tl.maximum(size, 1).to(tl.float32)[:, None])
    # one token is copied, since even NaN has bits to keep
    y = tl.where((size > 1)[:, None], mean.to(first.dtype), first)
    y_ptr += ((sample * num_rows + row) * num_channels)[:, None] + channel[None, :]
    tl.store(y_ptr, y, mask=is_row[:, None] & is_channel[None, :])


@triton.jit
def _load_member(x_ptr, members_ptr, place, is_there, channel, is_channel, stride_token, num_tokens):
    token = tl.load(members_ptr + place, mask=is_there, other=0)
    token = tl.minimum(tl.maximum(token, 0), num_tokens - 1)
    return tl.load(
        x_ptr + (token * stride_token)[:, None] + channel[None, :],
        mask=is_there[:, None] & is_channel[None, :],
        other=0.0,
    )


@triton.jit
def unmerge_tokens_kernel(
    y_ptr,
    x_ptr,
    row_ptr,
    stride_sample,
    stride_row,
    num_tokens,
    num_rows,
    num_channels,
    num_token_blocks,
    num_channel_blocks,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Copy to a block of tokens the rows that they were merged into."""
    sample, token, channel, is_token, is_channel = _block_of(
        num_tokens, num_channels, num_token_blocks, num_channel_blocks, BLOCK_ROWS, BLOCK_CHANNELS
    )
    row = tl.load(row_ptr + sample * num_tokens + token, mask=is_token, other=0)
    # what no match says reads nothing outside of x
    row = tl.minimum(tl.maximum(row, 0), num_rows - 1)
    mask = is_token[:, None] & is_channel[None, :]
    x_ptr += sample * stride_sample
    x = tl.load(x_ptr + (row * stride_row)[:, None] + channel[None, :], mask=mask)
    tl.store(y_ptr + ((sample * num_tokens + token) * num_channels)[:, None] + channel[None, :], x, mask=mask)


def _blocks(num_rows: int, num_channels: int, dtype: torch.dtype) -> tuple[int, int, dict[str, Any]]:
    """Return how many blocks of rows and of channels there are, and the settings of the kernels."""
    block_channels = min(max(next_power_of_2(num_channels), 32), 256)
    block_rows = _BLOCK_BYTES // dtype.itemsize // block_channels
    settings = dict(BLOCK_ROWS=block_rows, BLOCK_CHANNELS=block_channels, num_warps=4, **LAUNCH_OPTIONS)
    return ceil_div(num_rows, block_rows), ceil_div(num_channels, block_channels), settings


def merge_tokens(x: Tensor, row: Tensor, members: Tensor, starts: Tensor, num_rows: int) -> Tensor:
    """Run the kernel on checked arguments; see `mgt_kernels.merge_tokens`."""
    batch, num_tokens, num_channels = x.shape
    y = torch.empty((batch, num_rows, num_channels), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    num_row_blocks, num_channel_blocks, settings = _blocks(num_rows, num_channels, x.dtype)
    with torch.accelerator.device_index(x.device.index):
        launch(
            merge_tokens_kernel, (batch * num_row_blocks * num_channel_blocks,),
            y, x, members.contiguous(), starts.contiguous(), x.stride(0), x.stride(1), num_tokens, num_rows,
            num_channels, num_row_blocks, num_channel_blocks, **settings,
        )  # fmt: skip
    return y


def unmerge_tokens(x: Tensor, row: Tensor) -> Tensor:
    """Run the kernel on checked arguments; see `mgt_kernels.unmerge_tokens`."""
    batch, num_tokens = row.shape
    _, num_rows, num_channels = x.shape
    y = torch.empty((batch, num_tokens, num_channels), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    num_token_blocks, num_channel_blocks, settings = _blocks(num_tokens, num_channels, x.dtype)
    with torch.accelerator.device_index(x.device.index):
        launch(
            unmerge_tokens_kernel, (batch * num_token_blocks * num_channel_blocks,),
            y, x, row.contiguous(), x.stride(0), x.stride(1), num_tokens, num_rows, num_channels, num_token_blocks,
            num_channel_blocks, **settings,
        )  # fmt: skip
    return y
