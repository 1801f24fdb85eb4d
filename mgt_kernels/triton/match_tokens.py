"""match_tokens on the device.

Bound by: the 16-bit tensor cores; of float32 by the fused multiply-adds, one for each source, destination and channel,
in the order of the channels as on the CPU. Four kernels: the norms of the tokens, and the destinations in rising order;
each source's most similar destination, in which a product never leaves the registers; a program per sample that selects
which sources merge, as mask_by_confidence selects; and the members of the rows.

A source's best destination so far is one integer, of its product and its place among the destinations, whose maximum
the programs of the second kernel take in any order. No sum of floats depends on how the work is divided.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgt_kernels.triton.draws import LAUNCH_OPTIONS, STREAM_MERGE, philox
from mgt_kernels.triton.launch import ceil_div, launch, next_power_of_2
from mgt_kernels.triton.scalars import SCALARS
from mgt_kernels.triton.select import key_of_rank, load_keys, ordered_key, selection_settings

# past every place among the destinations
_NO_PLACE = tl.constexpr(2**31 - 1)
# that of a destination: above those of all sources, of which -inf has 0xFF800000
_DESTINATION_KEY = tl.constexpr(0xFFFFFFFF)

# what a program takes at a time
_MEASURED = 16
_LISTED = 32
_LISTED_AGAINST = 128


@triton.jit
def _position(cell, corner, width):
    """Compute the position of a corner of a cell."""
    cells_per_row = width // 2
    row = cell // cells_per_row
    return (2 * row + corner // 2) * width + 2 * (cell - row * cells_per_row) + corner % 2


@triton.jit
def _signed_order(x):
    """Compute an integer whose order is that of the floats; -0 and 0 are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _corners(cell, seed, step, HAS_SEED: tl.constexpr):
    """Compute which corners of some cells are destinations."""
    if HAS_SEED:
        position = cell.to(tl.uint32)
        word, _, _, _ = philox(seed, tl.zeros_like(position), position, step, STREAM_MERGE)
        return (word >> 30).to(tl.int32)
    return tl.zeros_like(cell)


@triton.jit
def _list_destinations(to_ptr, corner_ptr, seed, step, row, width, HAS_SEED: tl.constexpr, BLOCK: tl.constexpr):
    """List the destinations of a row of cells in rising order: those of its upper line, and then the lower line's."""
    num_cells = width // 2
    first_cell = row * num_cells
    num_upper = tl.full([], 0, tl.int32)
    for first in range(0, num_cells, BLOCK):
        i = first + tl.arange(0, BLOCK)
        corner = _corners(first_cell + i, seed, step, HAS_SEED)
        num_upper += tl.sum(((i < num_cells) & (corner < 2)).to(tl.int32))
    num_listed = tl.full([], 0, tl.int32)
    for first in range(0, num_cells, BLOCK):
        i = first + tl.arange(0, BLOCK)
        mask = i < num_cells
        corner = _corners(first_cell + i, seed, step, HAS_SEED)
        is_upper = (mask & (corner < 2)).to(tl.int32)
        before = num_listed + tl.cumsum(is_upper, axis=0) - is_upper
        num_listed += tl.sum(is_upper)
        place = tl.where(corner < 2, before, num_upper + i - before)
        tl.store(to_ptr + first_cell + place, _position(first_cell + i, corner, width), mask=mask)
        tl.store(corner_ptr + first_cell + i, corner, mask=mask)


@triton.jit
def measure_tokens_kernel(
    inverse_ptr,
    best_ptr,
    num_joined_ptr,
    to_ptr,
    corner_ptr,
    x_ptr,
    seed_ptr,
    step_ptr,
    stride_sample,
    stride_token,
    num_tokens,
    width,
    num_channels,
    num_blocks,
    num_programs,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Compute 1 / norm of a block of tokens, or list the destinations of a row of cells."""
    sample = (tl.program_id(0) // num_programs).to(tl.int64)
    block = tl.program_id(0) % num_programs
    if block < num_blocks:
        token = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        is_token = token < num_tokens
        token_ptr = x_ptr + sample * stride_sample + (token.to(tl.int64) * stride_token)[:, None]
        squares = tl.zeros([BLOCK_TOKENS, BLOCK_CHANNELS], tl.float32)
        for first in range(0, num_channels, BLOCK_CHANNELS):
            channel = first + tl.arange(0, BLOCK_CHANNELS)
            mask = is_token[:, None] & (channel < num_channels)[None, :]
            x = tl.load(token_ptr + channel[None, :], mask=mask, other=0.0).to(tl.float32)
            squares = tl.fma(x, x, squares)
        total = tl.sum(squares, axis=1)
        # 0 where the norm is, NaN without a finite sum
        inverse = tl.where(total > 0.0, tl.div_rn(1.0, tl.sqrt_rn(total)), 0.0)
        inverse = tl.where(total < float("inf"), inverse, float("nan"))
        offs = sample * num_tokens + token
        tl.store(inverse_ptr + offs, inverse, mask=is_token)
        # where the other kernels begin
        tl.store(best_ptr + offs, tl.full([BLOCK_TOKENS], -(2**63), tl.int64), mask=is_token)
        tl.store(num_joined_ptr + offs, tl.zeros([BLOCK_TOKENS], tl.int32), mask=is_token)
    else:
        HAS_SEED: tl.constexpr = seed_ptr is not None
        seed, step = tl.full([], 0, tl.int64), tl.full([], 0, tl.uint32)
        if HAS_SEED:
            seed = tl.load(seed_ptr + sample)
            step = tl.load(step_ptr).to(tl.uint32)
        of_sample = sample * (num_tokens // 4)
        _list_destinations(
            to_ptr + of_sample, corner_ptr + of_sample, seed, step, block - num_blocks, width, HAS_SEED, 128
        )


@triton.jit
def match_sources_kernel(
    best_ptr,
    x_ptr,
    inverse_ptr,
    to_ptr,
    corner_ptr,
    stride_sample,
    stride_token,
    num_tokens,
    width,
    num_channels,
    num_source_blocks,
    num_destination_blocks,
    BLOCK_SOURCES: tl.constexpr,
    BLOCK_DESTINATIONS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Find the most similar of a block of destinations for each of a block of sources."""
    # in one dimension, which alone may be longer than 65,535
    block = tl.program_id(0) // num_source_blocks
    sample = (block // num_destination_blocks).to(tl.int64)
    num_cells = num_tokens // 4
    x_ptr += sample * stride_sample
    inverse_ptr += sample * num_tokens

    # three of a cell one after the other; past the end the last one again
    source = tl.program_id(0) % num_source_blocks * BLOCK_SOURCES + tl.arange(0, BLOCK_SOURCES)
    inside = source < 3 * num_cells
    source = tl.minimum(source, 3 * num_cells - 1)
    cell = source // 3
    corner = (tl.load(corner_ptr + sample * num_cells + cell) + 1 + source % 3) % 4
    position = _position(cell, corner, width)
    # past the end the last one again, at a later place
    place = block % num_destination_blocks * BLOCK_DESTINATIONS + tl.arange(0, BLOCK_DESTINATIONS)
    to = tl.load(to_ptr + sample * num_cells + tl.minimum(place, num_cells - 1))

    source_ptr = x_ptr + (position.to(tl.int64) * stride_token)[:, None]
    to_ptr = x_ptr + (to.to(tl.int64) * stride_token)[None, :]
    offs_channel = tl.arange(0, BLOCK_CHANNELS)
    product = tl.zeros([BLOCK_SOURCES, BLOCK_DESTINATIONS], tl.float32)
    for first in range(0, num_channels, BLOCK_CHANNELS):
        channel = first + offs_channel
        is_channel = channel < num_channels
        x = tl.load(source_ptr + channel[None, :], mask=is_channel[None, :], other=0.0)
        y = tl.load(to_ptr + channel[:, None], mask=is_channel[:, None], other=0.0)
        product = tl.dot(x, y, product, input_precision="ieee")
    # of NaN and a number the maximum is the number: what has no norm is like none
    score = tl.maximum(product * tl.load(inverse_ptr + to)[None, :], float("-inf"))
    best = tl.max(score, axis=1)
    # among ties the lowest position
    nearest = tl.min(tl.where(score == best[:, None], place[None, :], _NO_PLACE), axis=1)
    key = (_signed_order(best).to(tl.int64) << 32) | (_NO_PLACE - nearest).to(tl.int64)
    tl.atomic_max(best_ptr + sample * num_tokens + position, key, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["num_merged", "threshold", *SCALARS])
def select_merged_kernel(
    row_ptr,
    starts_ptr,
    num_rows_ptr,
    num_joined_ptr,
    best_ptr,
    inverse_ptr,
    to_ptr,
    corner_ptr,
    num_tokens,
    width,
    num_merged,
    threshold,
    BY_THRESHOLD: tl.constexpr,
    CHUNK_POSITIONS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """Select which sources of a sample merge, and number the rows."""
    sample = tl.program_id(0).to(tl.int64)
    # a key waits, below its destination, in the slot of its row
    row_ptr += sample * num_tokens
    starts_ptr += sample * (num_tokens + 1)
    num_joined_ptr += sample * num_tokens
    best_ptr += sample * num_tokens
    inverse_ptr += sample * num_tokens
    to_ptr += sample * (num_tokens // 4)
    corner_ptr += sample * (num_tokens // 4)

    for first in range(0, num_tokens, CHUNK_POSITIONS):
        position = first + tl.arange(0, CHUNK_POSITIONS)
        mask = position < num_tokens
        y = position // width
        x = position - y * width
        corner = tl.load(corner_ptr + y // 2 * (width // 2) + x // 2, mask=mask, other=0)
        is_source = corner != y % 2 * 2 + x % 2
        best = tl.load(best_ptr + position, mask=mask, other=0)
        bits = (best >> 32).to(tl.int32)
        score = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
        cosine = score * tl.load(inverse_ptr + position, mask=mask, other=0.0)
        # without a norm it is like none, and the first destination as good as any
        has_norm = cosine == cosine
        cosine = tl.where(has_norm, cosine, float("-inf"))
        # the smaller the key, the larger the cosine
        key = tl.where(is_source, ordered_key(cosine) ^ 0xFFFFFFFF, _DESTINATION_KEY)
        place = tl.where(has_norm, _NO_PLACE - (best & 0xFFFFFFFF), 0)
        nearest = tl.load(to_ptr + place, mask=mask & is_source, other=0).to(tl.int64)
        tl.store(row_ptr + position, (nearest << 32) | key.to(tl.int64), mask=mask)
    # the keys are read by other threads than wrote them
    tl.debug_barrier()

    if BY_THRESHOLD:
        largest = (ordered_key(threshold) ^ 0xFFFFFFFF) + 1
        num_ties_left = tl.full([], 0, tl.int32)
    else:
        held = load_keys(row_ptr, 0, num_tokens, BLOCK_POSITIONS)
        largest, num_below = key_of_rank(num_merged, held, row_ptr, num_tokens, BLOCK_POSITIONS, IN_REGISTERS)
        num_ties_left = num_merged - num_below
        # no key may be overwritten before all threads have read theirs
        tl.debug_barrier()

    # kept tokens get their rows, merged ones -1 - the position of their destination
    num_kept = tl.full([], 0, tl.int32)
    for first in range(0, num_tokens, CHUNK_POSITIONS):
        position = first + tl.arange(0, CHUNK_POSITIONS)
        mask = position < num_tokens
        slot = tl.load(row_ptr + position, mask=mask, other=_DESTINATION_KEY)
        key = slot.to(tl.uint32)
        tied = ((key == largest) & (key != _DESTINATION_KEY)).to(tl.int32)
        merges = (key < largest) | ((tied > 0) & (tl.cumsum(tied, axis=0) <= num_ties_left))
        num_ties_left -= tl.sum(tied)
        kept = (mask & (merges == 0)).to(tl.int32)
        row = num_kept + tl.cumsum(kept, axis=0) - 1
        num_kept += tl.sum(kept)
        nearest = slot >> 32
        tl.store(row_ptr + position, tl.where(merges, -1 - nearest, row.to(tl.int64)), mask=mask)
        # a sum of integers, the same in any order
        tl.atomic_add(num_joined_ptr + nearest, 1, mask=mask & merges, sem="relaxed")
    tl.debug_barrier()

    num_listed = tl.full([], 0, tl.int32)
    for first in range(0, num_tokens, CHUNK_POSITIONS):
        position = first + tl.arange(0, CHUNK_POSITIONS)
        mask = position < num_tokens
        row = tl.load(row_ptr + position, mask=mask, other=0)
        merged = mask & (row < 0)
        # of those that are kept, which nobody changes
        joined = tl.load(row_ptr - 1 - row, mask=merged, other=0)
        tl.store(row_ptr + position, joined, mask=merged)
        kept = mask & (row >= 0)
        size = tl.where(kept, tl.load(num_joined_ptr + position, mask=kept, other=0) + 1, 0)
        end = num_listed + tl.cumsum(size, axis=0)
        num_listed += tl.sum(size)
        tl.store(starts_ptr + row, (end - size).to(tl.int64), mask=kept)
        last = tl.full([CHUNK_POSITIONS], 0, tl.int64) + num_tokens
        tl.store(starts_ptr + position + 1, last, mask=mask & (position + 1 >= num_kept))
    tl.store(num_rows_ptr + sample, num_kept.to(tl.int64))


@triton.jit
def list_members_kernel(
    members_ptr, row_ptr, starts_ptr, num_tokens, num_blocks, BLOCK_TOKENS: tl.constexpr, BLOCK_OTHERS: tl.constexpr
):
    """Put a block of tokens to their places: after the tokens of their row that lie before them."""
    sample = (tl.program_id(0) // num_blocks).to(tl.int64)
    first = tl.program_id(0) % num_blocks * BLOCK_TOKENS
    row_ptr += sample * num_tokens
    token = first + tl.arange(0, BLOCK_TOKENS)
    mask = token < num_tokens
    row = tl.load(row_ptr + token, mask=mask, other=0)
    num_before = tl.zeros([BLOCK_TOKENS, BLOCK_OTHERS], tl.int32)
    last = first // BLOCK_OTHERS * BLOCK_OTHERS
    for first_other in range(0, last, BLOCK_OTHERS):
        of_others = tl.load(row_ptr + first_other + tl.arange(0, BLOCK_OTHERS))
        num_before += (of_others.to(tl.int32)[None, :] == row.to(tl.int32)[:, None]).to(tl.int32)
    # the block's own are among these
    other = last + tl.arange(0, BLOCK_OTHERS)
    of_others = tl.load(row_ptr + other, mask=other < num_tokens, other=-1)
    same = of_others.to(tl.int32)[None, :] == row.to(tl.int32)[:, None]
    num_before += (same & (other[None, :] < token[:, None])).to(tl.int32)
    start = tl.load(starts_ptr + sample * (num_tokens + 1) + row, mask=mask, other=0)
    place = start + tl.sum(num_before, axis=1)
    tl.store(members_ptr + sample * num_tokens + place, token.to(tl.int64), mask=mask)


def match_tokens(
    x: Tensor, height: int, width: int, num_merged: int, threshold: float, seed: Tensor | None, step: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the kernels on checked arguments; see `mgt_kernels.match_tokens`."""
    (batch, num_tokens, num_channels), device = x.shape, x.device
    row, members = torch.empty((2, batch, num_tokens), dtype=torch.int64, device=device)
    starts = torch.empty((batch, num_tokens + 1), dtype=torch.int64, device=device)
    num_rows = torch.empty(batch, dtype=torch.int64, device=device)
    if batch == 0:
        return row, members, starts, num_rows
    inverse = torch.empty((batch, num_tokens), dtype=torch.float32, device=device)
    best = torch.empty((batch, num_tokens), dtype=torch.int64, device=device)
    num_joined = torch.empty((batch, num_tokens), dtype=torch.int32, device=device)
    num_cells = num_tokens // 4
    to, corner = torch.empty((2, batch, num_cells), dtype=torch.int32, device=device)
    strides = x.stride(0), x.stride(1)

    num_measured, num_listed = ceil_div(num_tokens, _MEASURED), ceil_div(num_tokens, _LISTED)
    num_programs = num_measured + height // 2
    block_sources, block_destinations, block_channels = _blocks(x.dtype, num_cells)
    num_source_blocks, num_destination_blocks = (
        ceil_div(3 * num_cells, block_sources), ceil_div(num_cells, block_destinations)
    )  # fmt: skip
    with torch.accelerator.device_index(device.index):
        launch(
            measure_tokens_kernel, (batch * num_programs,),
            inverse, best, num_joined, to, corner, x, None if seed is None else seed.contiguous(), step, *strides,
            num_tokens, width, num_channels, num_measured, num_programs, BLOCK_TOKENS=_MEASURED,
            BLOCK_CHANNELS=min(max(next_power_of_2(num_channels), 32), 128), num_warps=4, **LAUNCH_OPTIONS,
        )  # fmt: skip
        launch(
            match_sources_kernel, (batch * num_destination_blocks * num_source_blocks,),
            best, x, inverse, to, corner, *strides, num_tokens, width, num_channels, num_source_blocks,
            num_destination_blocks, BLOCK_SOURCES=block_sources, BLOCK_DESTINATIONS=block_destinations,
            BLOCK_CHANNELS=block_channels, num_warps=4, num_stages=3, **LAUNCH_OPTIONS,
        )  # fmt: skip
        launch(
            select_merged_kernel, (batch,),
            row, starts, num_rows, num_joined, best, inverse, to, corner, num_tokens, width, num_merged, threshold,
            BY_THRESHOLD=num_merged < 0, **selection_settings(num_tokens), **LAUNCH_OPTIONS,
        )  # fmt: skip
        launch(
            list_members_kernel, (batch * num_listed,),
            members, row, starts, num_tokens, num_listed, BLOCK_TOKENS=_LISTED, BLOCK_OTHERS=_LISTED_AGAINST,
            num_warps=4, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return row, members, starts, num_rows


def _blocks(dtype: torch.dtype, num_destinations: int) -> tuple[int, int, int]:
    """Return the sources, destinations and channels that a program multiplies at a time."""
    if dtype == torch.float32:
        # of 64 sources, Triton 3.6 gives the product to tcgen05 on sm_100, which rounds to tf32 whatever is asked for
        return 32, 128, 16
    return 64, 128 if num_destinations > 64 else 64, 64
