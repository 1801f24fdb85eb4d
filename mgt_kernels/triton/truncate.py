"""What a truncated draw keeps of each row: the tokens whose logit is at least a bound, found exactly as on the CPU.

Bound by: instruction issue. A pass finds the largest logit. Each further one weighs every token, by 1 for top_k and by
exp(l - max) in whole units of 2^-31 for top_p, and adds up what lies above six keys, so that the interval of keys that
holds the bound shrinks at least sevenfold, until one key is left: twelve passes at most for each of top_k and top_p,
seven where logits are of 16 bits, some eight or nine where they are not. Sums of integers do not depend on their order,
so the bound has the CPU's bits. A program takes a row (16 rows where positions are contiguous), which after the first
pass comes from the caches.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgt_kernels.triton.draws import LAUNCH_OPTIONS, WORD_WIDTH, exp_nonpositive, log_f32
from mgt_kernels.triton.launch import ceil_div, launch
from mgt_kernels.triton.rows import (
    TILE_WIDTH,
    Counter,
    RowArguments,
    Rows,
    cap_of,
    is_read,
    load_columns,
    load_scale,
    position_of,
    row_ptr,
    second_half_of,
)
from mgt_kernels.triton.scalars import (
    LARGEST_MIN_P,
    SCALARS,
    load_inverse_temperature,
    load_min_p,
    load_scalar,
    load_top_p,
)
from mgt_kernels.triton.select import ordered_key, value_of_key

# the key of the least finite float
_LEAST_FINITE_KEY = tl.constexpr(0x00800000)
# as in csrc/elementary.h
_LN2 = tl.constexpr(0.693147182464599609375)
_TWO_POW_31 = tl.constexpr(2147483648.0)
# what lies further below the largest logit weighs nothing: 2^31 exp(-22.2) < 1/2
_WEIGHTLESS = tl.constexpr(22.25)


class _Masses(NamedTuple):
    """Weights of the keys from each pivot on; the pivots cut the interval into seven."""

    from_1: tl.tensor
    from_2: tl.tensor
    from_3: tl.tensor
    from_4: tl.tensor
    from_5: tl.tensor
    from_6: tl.tensor


class _Interval(NamedTuple):
    """Keys among which the bound is, a step between pivots, and the least and the largest key that a row has there."""

    low: tl.tensor
    high: tl.tensor
    step: tl.tensor
    least: tl.tensor
    largest: tl.tensor


@triton.jit
def _add_from(mass, key, weight, pivot):
    return mass + tl.where(key >= pivot, weight, 0)


@triton.jit
def _weight_of(logit, row_max):
    """Compute exp(l - max) in units of 2^-31, to the nearest."""
    return tl.fma(exp_nonpositive(logit - row_max), _TWO_POW_31, 0.5).to(tl.uint32).to(tl.int64)


@triton.jit
def _weigh(logit, row_max, masses, interval, WEIGHTED: tl.constexpr):
    """Add a token to the masses, and take its key into the interval."""
    key = ordered_key(logit)
    low, high, step = interval.low, interval.high, interval.step
    weight = tl.full([], 1, tl.int32)
    if WEIGHTED:
        weight = _weight_of(logit, row_max)
    masses = _Masses(
        _add_from(masses.from_1, key, weight, low + step),
        _add_from(masses.from_2, key, weight, low + 2 * step),
        _add_from(masses.from_3, key, weight, low + 3 * step),
        _add_from(masses.from_4, key, weight, low + 4 * step),
        _add_from(masses.from_5, key, weight, low + 5 * step),
        _add_from(masses.from_6, key, weight, low + 6 * step),
    )
    least = tl.minimum(interval.least, tl.where(key >= low, key, 0xFFFFFFFF))
    largest = tl.maximum(interval.largest, tl.where(key <= high, key, 0))
    return masses, _Interval(low, high, step, least, largest)


@triton.jit
def _shrink(interval, mass, pivot, target):
    """Leave of the interval what lies from a pivot on, if that is enough, else what lies below; pivots rise."""
    sum = tl.sum(mass, axis=1, keep_dims=True)
    enough = sum >= target
    low = tl.where(enough, pivot, interval.low)
    high = tl.where(enough, interval.high, tl.minimum(interval.high, pivot - 1))
    return _Interval(low, high, interval.step, interval.least, interval.largest)


@triton.jit
def _share_of(
    rows, counter, end, row_max, low, share,
    HAS_NOISE: tl.constexpr, BLOCK_POSITIONS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute a share, rounded up, of the weights of the keys from low on."""
    total = tl.zeros([BLOCK_POSITIONS, BLOCK_COLUMNS], tl.int64)
    for first_column in range(0, end, TILE_WIDTH):
        for first_lane in range(0, WORD_WIDTH, BLOCK_COLUMNS):
            logit_0, logit_1, logit_2, logit_3 = load_columns(
                rows, counter, first_column + first_lane, HAS_NOISE, True, BLOCK_COLUMNS
            )
            total = _add_from(total, ordered_key(logit_0), _weight_of(logit_0, row_max), low)
            total = _add_from(total, ordered_key(logit_1), _weight_of(logit_1, row_max), low)
            total = _add_from(total, ordered_key(logit_2), _weight_of(logit_2, row_max), low)
            total = _add_from(total, ordered_key(logit_3), _weight_of(logit_3, row_max), low)
    wanted = share.to(tl.float64) * tl.sum(total, axis=1, keep_dims=True).to(tl.float64)
    rounded = wanted.to(tl.int64)
    return tl.maximum(rounded + (rounded.to(tl.float64) < wanted).to(tl.int64), 1)


@triton.jit
def _border(
    rows, counter, end, row_max, low, high, target, searching,
    WEIGHTED: tl.constexpr, HAS_NOISE: tl.constexpr, BLOCK_POSITIONS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Find the largest key such that the weights of the keys from it on reach the target, or the least if none does."""
    kind: tl.constexpr = tl.int64 if WEIGHTED else tl.int32
    searching &= low < high
    while tl.max(searching.to(tl.int32)) > 0:
        # the last pivot lies less than seven past the interval, where there is nothing, and no key overflows there
        step = (high - low) // 7 + 1
        none = tl.zeros([BLOCK_POSITIONS, BLOCK_COLUMNS], kind)
        masses = _Masses(none, none, none, none, none, none)
        no_key = tl.zeros([BLOCK_POSITIONS, BLOCK_COLUMNS], tl.uint32)
        interval = _Interval(low, high, step, no_key + 0xFFFFFFFF, no_key)
        for first_column in range(0, end, TILE_WIDTH):
            for first_lane in range(0, WORD_WIDTH, BLOCK_COLUMNS):
                logit_0, logit_1, logit_2, logit_3 = load_columns(
                    rows, counter, first_column + first_lane, HAS_NOISE, True, BLOCK_COLUMNS
                )
                masses, interval = _weigh(logit_0, row_max, masses, interval, WEIGHTED)
                masses, interval = _weigh(logit_1, row_max, masses, interval, WEIGHTED)
                masses, interval = _weigh(logit_2, row_max, masses, interval, WEIGHTED)
                masses, interval = _weigh(logit_3, row_max, masses, interval, WEIGHTED)
        interval = _shrink(interval, masses.from_1, low + step, target)
        interval = _shrink(interval, masses.from_2, low + 2 * step, target)
        interval = _shrink(interval, masses.from_3, low + 3 * step, target)
        interval = _shrink(interval, masses.from_4, low + 4 * step, target)
        interval = _shrink(interval, masses.from_5, low + 5 * step, target)
        interval = _shrink(interval, masses.from_6, low + 6 * step, target)
        least = tl.min(interval.least, axis=1, keep_dims=True)
        largest = tl.max(interval.largest, axis=1, keep_dims=True)
        low = tl.where(searching, tl.maximum(interval.low, least), low)
        high = tl.where(searching, tl.minimum(interval.high, largest), high)
        searching &= low < high
    return low


@triton.jit(do_not_specialize=["mask_token_id", *SCALARS])
def kept_from_kernel(
    kept_from_ptr,
    logits_ptr,
    uncond_ptr,
    second_uncond_ptr,
    token_bias_ptr,
    tokens_ptr,
    seed_ptr,
    first_position_ptr,
    step_ptr,
    num_positions,
    num_tokens,
    stride_sample,
    stride_position,
    stride_token,
    uncond_stride_sample,
    uncond_stride_position,
    uncond_stride_token,
    second_stride_sample,
    second_stride_position,
    second_stride_token,
    mask_token_id,
    guidance_scale,
    second_guidance_scale,
    softcap,
    noise_scale,
    inverse_temperature,
    top_k,
    top_p,
    min_p,
    MAY_FORBID: tl.constexpr,
    SCALE_PER_SAMPLE: tl.constexpr,
    IS_DUAL: tl.constexpr,
    SECOND_SCALE_PER_SAMPLE: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    READS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Find the smallest logit that a draw keeps of each row."""
    num_groups = tl.cdiv(num_positions, BLOCK_POSITIONS)
    sample = (tl.program_id(0) // num_groups).to(tl.int64)
    offs_position = (tl.program_id(0) % num_groups) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)[:, None]
    inside = offs_position < num_positions
    offs_row = sample * num_positions + offs_position
    token = tl.load(tokens_ptr + offs_row, mask=inside, other=0)
    read = inside & is_read(token, mask_token_id, READS)
    position = position_of(first_position_ptr, sample, offs_position)
    counter = Counter(tl.load(seed_ptr + sample), position, tl.load(step_ptr).to(tl.uint32))
    load_mask = inside
    if BLOCK_POSITIONS == 1:
        load_mask = None
    inverse_temperature, is_greedy = load_inverse_temperature(inverse_temperature)
    uncond_row_ptr = uncond_ptr
    if uncond_ptr is not None:
        uncond_row_ptr = row_ptr(uncond_ptr, sample, offs_position, uncond_stride_sample, uncond_stride_position)
    second = None
    if second_uncond_ptr is not None:
        second = second_half_of(
            second_uncond_ptr, sample, offs_position, second_stride_sample, second_stride_position,
            second_stride_token, second_guidance_scale, SECOND_SCALE_PER_SAMPLE, IS_DUAL,
        )  # fmt: skip
    cap = None
    if softcap is not None:
        cap = cap_of(softcap)
    rows = Rows(
        row_ptr(logits_ptr, sample, offs_position, stride_sample, stride_position), uncond_row_ptr, second,
        token_bias_ptr, stride_token, uncond_stride_token, load_mask, num_tokens, mask_token_id,
        load_scale(guidance_scale, sample, SCALE_PER_SAMPLE), cap, load_scalar(noise_scale, 0.0, float("nan")),
        inverse_temperature, is_greedy, None, MAY_FORBID, IS_DUAL, False,
    )  # fmt: skip
    # a group of which nothing is read is as good as empty
    end = tl.where(tl.max(read.to(tl.int32)) > 0, num_tokens, 0)

    lane_max = tl.full([BLOCK_POSITIONS, BLOCK_COLUMNS], float("-inf"), tl.float32)
    for first_column in range(0, end, TILE_WIDTH):
        for first_lane in range(0, WORD_WIDTH, BLOCK_COLUMNS):
            logit_0, logit_1, logit_2, logit_3 = load_columns(
                rows, counter, first_column + first_lane, HAS_NOISE, True, BLOCK_COLUMNS
            )
            lane_max = tl.maximum(lane_max, tl.maximum(tl.maximum(logit_0, logit_1), tl.maximum(logit_2, logit_3)))
    row_max = tl.max(lane_max, axis=1, keep_dims=True)

    # the others have no bound, and the draw finds out that they are bad
    searching = read & (row_max > float("-inf")) & (row_max < float("inf"))
    low = tl.full([BLOCK_POSITIONS, 1], _LEAST_FINITE_KEY, tl.uint32)
    high = ordered_key(row_max)
    refused = row_max != row_max
    if top_k is not None:
        low = _border(
            rows, counter, end, row_max, low, high, top_k, searching, False, HAS_NOISE, BLOCK_POSITIONS, BLOCK_COLUMNS
        )
    if top_p is not None:
        share = load_top_p(top_p)
        refused |= share != share
        narrows = searching & (share < 1.0)
        first = tl.maximum(low, ordered_key(row_max - _WEIGHTLESS))
        target = _share_of(rows, counter, end, row_max, first, share, HAS_NOISE, BLOCK_POSITIONS, BLOCK_COLUMNS)
        found = _border(
            rows, counter, end, row_max, first, high, target, narrows, True, HAS_NOISE, BLOCK_POSITIONS, BLOCK_COLUMNS
        )
        low = tl.where(narrows, found, low)
    kept_from = value_of_key(low)
    if min_p is not None:
        share = load_min_p(min_p)
        refused |= share != share
        # log_f32 takes no denormals
        tiny = share < 2.0**-126
        log_share = log_f32(tl.where(tiny, share * 2.0**24, share)) - tl.where(tiny, 24.0 * _LN2, 0.0)
        kept_from = tl.where(share > 0.0, tl.maximum(kept_from, row_max + log_share), kept_from)
    # in a tensor, what would be refused as a number: nothing is kept, and the row is a bad one
    tl.store(kept_from_ptr + offs_row, tl.where(refused, float("inf"), kept_from), mask=inside)


# what lies above it is 1 in float32, and below it 0
_NO_TOP_P, _NO_MIN_P = 1 - 2.0**-25, 2.0**-150


def kept_from(
    arguments: RowArguments, rows: str, top_k: int, top_p: float | Tensor, min_p: float | Tensor
) -> Tensor | None:
    """Return the smallest logit that a draw keeps of each row that is read, (B, N) float32; None where it keeps all."""
    batch, num_positions, num_tokens = arguments.logits.shape
    k = top_k if 0 < top_k < num_tokens else None
    p = top_p if isinstance(top_p, Tensor) or top_p < _NO_TOP_P else None
    least = min_p if isinstance(min_p, Tensor) else min(min_p, LARGEST_MIN_P.value) if min_p > _NO_MIN_P else None
    if k is None and p is None and least is None:
        return None
    bounds = torch.empty_like(arguments.tokens, dtype=torch.float32)
    block_positions, block_columns = (1, WORD_WIDTH.value) if arguments.token_major else (16, 32)
    launch(
        kept_from_kernel, (batch * ceil_div(num_positions, block_positions),),
        bounds, *arguments.tensors, num_positions, num_tokens, *arguments.strides,
        *arguments.scalars, k, p, least, **arguments.guidance, HAS_NOISE=arguments.has_noise, READS=rows,
        BLOCK_POSITIONS=block_positions, BLOCK_COLUMNS=block_columns, num_warps=8, **LAUNCH_OPTIONS,
    )  # fmt: skip
    return bounds
