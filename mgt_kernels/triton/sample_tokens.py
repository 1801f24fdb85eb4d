"""sample_tokens on the device.

Bound by: DRAM reads of both guidance halves and, close behind, instruction issue, most of it Philox. The loop evaluates
no Gumbel noise: per column it keeps an upper bound of the score, one hardware logarithm of a lower bound of the race's
exponential variate. Only the token with the largest bound gets its exact score, the CPU's to the bit; a row in which
another bound reaches that score is read again, every score of it exact.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgt_kernels.cpu import STATISTICS
from mgt_kernels.draw import Draw
from mgt_kernels.triton.draws import (
    LAUNCH_OPTIONS,
    STREAM_NOISE,
    STREAM_TOKEN,
    WORD_WIDTH,
    block_of,
    exponential_below,
    gaussian_pair,
    gumbel,
    log2_approx,
    log_f32,
    philox,
)
from mgt_kernels.triton.launch import ceil_div, launch, next_power_of_2
from mgt_kernels.triton.rows import (
    LOG2_E,
    NO_TOKEN,
    TILE_WIDTH,
    Counter,
    Rows,
    best_of,
    cap_of,
    finish_logit,
    in_layout_of,
    is_read,
    load_columns,
    load_guided,
    load_scale,
    position_of,
    racing,
    row_arguments,
    row_ptr,
    second_half_of,
    unless_greedy,
)
from mgt_kernels.triton.scalars import SCALARS, is_greedy, load_inverse_temperature, load_scalar
from mgt_kernels.triton.truncate import kept_from

_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _racing(rows, logit_0, logit_1, logit_2, logit_3):
    return racing(rows, logit_0), racing(rows, logit_1), racing(rows, logit_2), racing(rows, logit_3)


@triton.jit
def _lead(rows, logit, word, base, best, second, leader, GREEDY: tl.constexpr):
    bound = logit
    if not GREEDY:
        bound = unless_greedy(rows, tl.fma(log2_approx(exponential_below(word)), -_LN2, logit), logit, GREEDY)
    # in order, so that the lowest of ties stays
    leader = tl.where(bound > best, base, leader)
    second = tl.maximum(second, tl.minimum(bound, best))
    return tl.maximum(best, bound), second, leader


class _Statistics(NamedTuple):
    """What statistics need per lane: sums of exp(l - max) (l - max), the two largest logits, and where the first is."""

    moment: tl.tensor
    first: tl.tensor
    second: tl.tensor
    # the token but for the lane
    argmax: tl.tensor


# exponents of 2 below this count as this: what they are multiplied by stays finite, and the product as good as 0
_LOWEST_SHIFT = tl.constexpr(-126.0)
# as in csrc/sample_tokens/body.h
_LEAST_ENTROPY = tl.constexpr(2.0**-80)


@triton.jit
def _shift(logit, max):
    return tl.maximum(logit - max, _LOWEST_SHIFT)


@triton.jit
def _rank(logit, base, statistics):
    # in order, so that the lowest of ties stays
    return _Statistics(
        statistics.moment,
        tl.maximum(statistics.first, logit),
        tl.maximum(statistics.second, tl.minimum(statistics.first, logit)),
        tl.where(logit > statistics.first, base, statistics.argmax),
    )


@triton.jit
def _take_statistics(logit_0, logit_1, logit_2, logit_3, base, lane_max, lane_sum, new_max, statistics):
    """Take the four columns of each Philox block into the statistics; lane_sum is relative to exp(lane_max) still."""
    drop = _shift(lane_max, new_max)
    moment = (statistics.moment + lane_sum * drop) * tl.exp2(drop * LOG2_E)
    shift_0, shift_1 = _shift(logit_0, new_max), _shift(logit_1, new_max)
    shift_2, shift_3 = _shift(logit_2, new_max), _shift(logit_3, new_max)
    moment += shift_0 * tl.exp2(shift_0 * LOG2_E) + shift_1 * tl.exp2(shift_1 * LOG2_E)
    moment += shift_2 * tl.exp2(shift_2 * LOG2_E) + shift_3 * tl.exp2(shift_3 * LOG2_E)
    statistics = _Statistics(moment, statistics.first, statistics.second, statistics.argmax)
    statistics = _rank(logit_0, base, statistics)
    statistics = _rank(logit_1, base + WORD_WIDTH, statistics)
    statistics = _rank(logit_2, base + 2 * WORD_WIDTH, statistics)
    return _rank(logit_3, base + 3 * WORD_WIDTH, statistics)


@triton.jit
def _statistics_of(statistics, lane_max, lane_sum, row_max, offs_token):
    """Reduce the columns; offs_token is the token of each one's first."""
    drop = _shift(lane_max, row_max)
    moment = tl.sum((statistics.moment + lane_sum * drop) * tl.exp2(drop * LOG2_E), axis=1, keep_dims=True)
    first = tl.max(statistics.first, axis=1, keep_dims=True)
    argmax = tl.min(tl.where(statistics.first == first, offs_token, NO_TOKEN), axis=1, keep_dims=True)
    rest = tl.where(offs_token == argmax, statistics.second, statistics.first)
    return _Statistics(moment, first, tl.max(rest, axis=1, keep_dims=True), argmax)


@triton.jit
def _consume_columns(
    rows, counter, base, lane_max, lane_sum, best, second, leader, statistics,
    HAS_NOISE: tl.constexpr, GREEDY: tl.constexpr, HAS_STATISTICS: tl.constexpr, IS_TAIL: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    logit_0, logit_1, logit_2, logit_3 = load_columns(rows, counter, base, HAS_NOISE, IS_TAIL, BLOCK_COLUMNS)
    # NaN and +inf turn the sum to NaN, and it stays so
    new_max = tl.maximum(tl.maximum(logit_0, logit_1), tl.maximum(logit_2, logit_3))
    new_max = tl.maximum(lane_max, new_max)
    if HAS_STATISTICS:
        statistics = _take_statistics(logit_0, logit_1, logit_2, logit_3, base, lane_max, lane_sum, new_max, statistics)
    lane_sum *= tl.exp2((lane_max - new_max) * LOG2_E)
    lane_sum += tl.exp2((logit_0 - new_max) * LOG2_E) + tl.exp2((logit_1 - new_max) * LOG2_E)
    lane_sum += tl.exp2((logit_2 - new_max) * LOG2_E) + tl.exp2((logit_3 - new_max) * LOG2_E)
    logit_0, logit_1, logit_2, logit_3 = _racing(rows, logit_0, logit_1, logit_2, logit_3)
    block = in_layout_of(block_of(base) + tl.arange(0, BLOCK_COLUMNS)[None, :].to(tl.uint32), logit_0)
    if GREEDY:
        word_0, word_1, word_2, word_3 = block, block, block, block
    else:
        word_0, word_1, word_2, word_3 = philox(counter.seed, block, counter.position, counter.step, STREAM_TOKEN)
    # leader is the token but for the lane, and so the same for all lanes
    best, second, leader = _lead(rows, logit_0, word_0, base, best, second, leader, GREEDY)
    best, second, leader = _lead(rows, logit_1, word_1, base + WORD_WIDTH, best, second, leader, GREEDY)
    best, second, leader = _lead(rows, logit_2, word_2, base + 2 * WORD_WIDTH, best, second, leader, GREEDY)
    best, second, leader = _lead(rows, logit_3, word_3, base + 3 * WORD_WIDTH, best, second, leader, GREEDY)
    return new_max, lane_sum, best, second, leader, statistics


@triton.jit
def _exact_logit(rows, counter, offs_token, HAS_NOISE: tl.constexpr):
    """Compute the logit of one token per position, the CPU's to the bit."""
    which = offs_token // WORD_WIDTH % 4
    logit = load_guided(rows, offs_token, offs_token < rows.num_tokens)
    if HAS_NOISE:
        word_0, word_1, word_2, word_3 = philox(
            counter.seed, block_of(offs_token), counter.position, counter.step, STREAM_NOISE
        )
        even, odd = gaussian_pair(tl.where(which < 2, word_0, word_2), tl.where(which < 2, word_1, word_3))
        logit = tl.fma(tl.where(which % 2 == 0, even, odd), rows.noise_scale, logit)
    return finish_logit(rows, logit, offs_token, 0)


@triton.jit
def _exact_score(rows, counter, offs_token, HAS_NOISE: tl.constexpr, GREEDY: tl.constexpr):
    """Compute the score of one token per position, the CPU's to the bit."""
    which = offs_token // WORD_WIDTH % 4
    logit = _exact_logit(rows, counter, offs_token, HAS_NOISE)
    score = logit
    if not GREEDY:
        word_0, word_1, word_2, word_3 = philox(
            counter.seed, block_of(offs_token), counter.position, counter.step, STREAM_TOKEN
        )
        word = tl.where(which < 2, tl.where(which == 0, word_0, word_1), tl.where(which == 2, word_2, word_3))
        score = unless_greedy(rows, logit + gumbel(word), logit, GREEDY)
    return score, logit


@triton.jit
def _compete(logit, word, offs_token, best_score, best_logit, best_token):
    score = logit + gumbel(word)
    better = score > best_score
    return (
        tl.where(better, score, best_score),
        tl.where(better, logit, best_logit),
        tl.where(better, offs_token, best_token),
    )


@triton.jit
def _exact_race(
    rows, counter, first, end,
    HAS_NOISE: tl.constexpr, BLOCK_POSITIONS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute every score of columns first to end; return the best of each position, its logit and token."""
    best_score = tl.full([BLOCK_POSITIONS, BLOCK_COLUMNS], float("-inf"), tl.float32)
    best_logit = best_score
    best_token = tl.full([BLOCK_POSITIONS, BLOCK_COLUMNS], NO_TOKEN, tl.int32)
    for first_column in range(first, end, TILE_WIDTH):
        for first_lane in range(0, WORD_WIDTH, BLOCK_COLUMNS):
            base = first_column + first_lane
            offs_0 = base + tl.arange(0, BLOCK_COLUMNS)[None, :]
            logit_0, logit_1, logit_2, logit_3 = load_columns(rows, counter, base, HAS_NOISE, True, BLOCK_COLUMNS)
            logit_0, logit_1, logit_2, logit_3 = _racing(rows, logit_0, logit_1, logit_2, logit_3)
            word_0, word_1, word_2, word_3 = philox(
                counter.seed, in_layout_of(block_of(offs_0), logit_0), counter.position, counter.step, STREAM_TOKEN
            )
            best_score, best_logit, best_token = _compete(logit_0, word_0, offs_0, best_score, best_logit, best_token)
            best_score, best_logit, best_token = _compete(
                logit_1, word_1, offs_0 + WORD_WIDTH, best_score, best_logit, best_token
            )
            best_score, best_logit, best_token = _compete(
                logit_2, word_2, offs_0 + 2 * WORD_WIDTH, best_score, best_logit, best_token
            )
            best_score, best_logit, best_token = _compete(
                logit_3, word_3, offs_0 + 3 * WORD_WIDTH, best_score, best_logit, best_token
            )
    return best_of(best_score, best_logit, best_token)


@triton.jit
def _sum_of(lane_max, lane_sum):
    """Reduce the columns to one maximum and the sum relative to its exponential."""
    row_max = tl.max(lane_max, axis=1, keep_dims=True)
    return row_max, tl.sum(lane_sum * tl.exp2((lane_max - row_max) * LOG2_E), axis=1, keep_dims=True)


class _Outputs(NamedTuple):
    """Where what is asked for goes, None what is not."""

    token_ids_ptr: tl.tensor
    logprob_ptr: tl.tensor
    argmax_ptr: tl.tensor | None
    max_logprob_ptr: tl.tensor | None
    margin_ptr: tl.tensor | None
    entropy_ptr: tl.tensor | None
    logsumexp_ptr: tl.tensor | None
    known_logprob_ptr: tl.tensor | None
    logit_ptr: tl.tensor | None


@triton.jit
def _store_statistic(ptr, offs_row, inside, wanted, bad, value):
    value = tl.where(bad, float("nan"), value)
    tl.store(ptr + offs_row, tl.where(wanted, value, float("inf")), mask=inside)


@triton.jit
def _store_rows(
    outputs, offs_row, inside, read, token, masked, row_max, row_sum, logit, drawn, statistics, known_logit,
    inverse_temperature,
):  # fmt: skip
    log_sum = log_f32(row_sum)
    drawn_now = read & masked
    # raising would wait for the device: a row from which nothing can be drawn stays masked and says NaN
    bad = (row_sum != row_sum) | (drawn >= NO_TOKEN)
    drawn = tl.where(bad, token, drawn.to(tl.int64))
    tl.store(outputs.token_ids_ptr + offs_row, tl.where(drawn_now, drawn, token), mask=inside)
    _store_statistic(outputs.logprob_ptr, offs_row, inside, drawn_now, bad, (logit - row_max) - log_sum)
    if outputs.logit_ptr is not None:
        _store_statistic(outputs.logit_ptr, offs_row, inside, drawn_now, bad, tl.div_rn(logit, inverse_temperature))
    if outputs.known_logprob_ptr is not None:
        known = (known_logit - row_max) - log_sum
        _store_statistic(outputs.known_logprob_ptr, offs_row, inside, read & (not masked), bad, known)
    if outputs.argmax_ptr is not None:
        argmax = tl.where(read & (not bad), statistics.argmax.to(tl.int64), token)
        tl.store(outputs.argmax_ptr + offs_row, argmax, mask=inside)
    if outputs.max_logprob_ptr is not None:
        _store_statistic(outputs.max_logprob_ptr, offs_row, inside, read, bad, -log_sum)
    if outputs.margin_ptr is not None:
        rest = tl.exp2(_shift(statistics.second, row_max) * LOG2_E)
        _store_statistic(outputs.margin_ptr, offs_row, inside, read, bad, tl.div_rn(1.0 - rest, row_sum))
    if outputs.entropy_ptr is not None:
        entropy = log_sum - tl.div_rn(statistics.moment, row_sum)
        entropy = tl.where(entropy > _LEAST_ENTROPY, entropy, 0.0)
        _store_statistic(outputs.entropy_ptr, offs_row, inside, read, bad, entropy)
    if outputs.logsumexp_ptr is not None:
        _store_statistic(outputs.logsumexp_ptr, offs_row, inside, read, bad, row_max + log_sum)


# of a position whose row is split, what each part leaves for the whole; the last five for statistics alone
_NUM_PARTIALS, _NUM_PARTIALS_WITH_STATISTICS = 5, 10


@triton.jit(do_not_specialize=["mask_token_id", *SCALARS])
def sample_tokens_kernel(
    token_ids_ptr,
    logprob_ptr,
    argmax_ptr,
    max_logprob_ptr,
    margin_ptr,
    entropy_ptr,
    logsumexp_ptr,
    known_logprob_ptr,
    logit_ptr,
    partials_ptr,
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
    columns_per_split,
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
    MAY_FORBID: tl.constexpr,
    SCALE_PER_SAMPLE: tl.constexpr,
    IS_DUAL: tl.constexpr,
    SECOND_SCALE_PER_SAMPLE: tl.constexpr,
    FORBIDS_REST: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    GREEDY: tl.constexpr,
    READS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Draw the tokens of some positions, from their rows or from a part of each."""
    HAS_STATISTICS: tl.constexpr = not (argmax_ptr is None and margin_ptr is None and entropy_ptr is None)
    num_groups = tl.cdiv(num_positions, BLOCK_POSITIONS)
    sample = (tl.program_id(0) // num_groups).to(tl.int64)
    offs_position = (tl.program_id(0) % num_groups) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)[:, None]
    inside = offs_position < num_positions
    offs_row = sample * num_positions + offs_position
    token = tl.load(tokens_ptr + offs_row, mask=inside, other=0)
    masked = token == mask_token_id
    read = inside & is_read(token, mask_token_id, READS)
    position = position_of(first_position_ptr, sample, offs_position)
    counter = Counter(tl.load(seed_ptr + sample), position, tl.load(step_ptr).to(tl.uint32))
    # what is not read of a group is read along: a mask that differs between lanes would undo vector loads
    load_mask = inside
    if BLOCK_POSITIONS == 1:
        load_mask = None
    bound = kept_from_ptr
    if kept_from_ptr is not None:
        bound = tl.load(kept_from_ptr + offs_row, mask=inside, other=0.0)
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
        inverse_temperature, is_greedy, bound, MAY_FORBID, IS_DUAL, FORBIDS_REST,
    )  # fmt: skip
    outputs = _Outputs(
        token_ids_ptr, logprob_ptr, argmax_ptr, max_logprob_ptr, margin_ptr, entropy_ptr, logsumexp_ptr,
        known_logprob_ptr, logit_ptr,
    )  # fmt: skip

    # per lane; sum is relative to exp(max)
    lane_max = tl.full([BLOCK_POSITIONS, BLOCK_COLUMNS], _LOWEST, tl.float32)
    lane_sum = tl.zeros([BLOCK_POSITIONS, BLOCK_COLUMNS], tl.float32)
    best = tl.full([BLOCK_POSITIONS, BLOCK_COLUMNS], float("-inf"), tl.float32)
    second = best
    leader = tl.full([BLOCK_POSITIONS, BLOCK_COLUMNS], NO_TOKEN, tl.int32)
    statistics = _Statistics(lane_sum, best, best, leader)

    first = tl.program_id(1) * columns_per_split
    # a group of which nothing is read is as good as empty
    any_read = tl.max(read.to(tl.int32)) > 0
    end = tl.where(any_read, tl.minimum(first + columns_per_split, num_tokens), first)
    first_of_tail = first + (end - first) // TILE_WIDTH * TILE_WIDTH
    for first_column in range(first, first_of_tail, TILE_WIDTH):
        for first_lane in range(0, WORD_WIDTH, BLOCK_COLUMNS):
            lane_max, lane_sum, best, second, leader, statistics = _consume_columns(
                rows, counter, first_column + first_lane, lane_max, lane_sum, best, second, leader, statistics,
                HAS_NOISE, GREEDY, HAS_STATISTICS, False, BLOCK_COLUMNS,
            )  # fmt: skip
    if first_of_tail < end:
        for first_lane in range(0, WORD_WIDTH, BLOCK_COLUMNS):
            lane_max, lane_sum, best, second, leader, statistics = _consume_columns(
                rows, counter, first_of_tail + first_lane, lane_max, lane_sum, best, second, leader, statistics,
                HAS_NOISE, GREEDY, HAS_STATISTICS, True, BLOCK_COLUMNS,
            )  # fmt: skip

    row_max, row_sum = _sum_of(lane_max, lane_sum)
    offs_lane = tl.arange(0, BLOCK_COLUMNS)[None, :]
    offs_token = leader + offs_lane
    row_best = tl.max(best, axis=1, keep_dims=True)
    drawn = tl.min(tl.where(best == row_best, offs_token, NO_TOKEN), axis=1, keep_dims=True)
    score, logit = _exact_score(rows, counter, drawn, HAS_NOISE, GREEDY)
    if not GREEDY:
        rival = tl.max(tl.where(offs_token == drawn, second, best), axis=1, keep_dims=True)
        slack = 1e-4 + 1e-6 * tl.abs(score)
        contested = masked & read & (rival >= score - slack) & (drawn < NO_TOKEN)
        if GREEDY is None:
            contested &= not rows.is_greedy
        if tl.max(contested.to(tl.int32)) > 0:
            score, logit, drawn = _exact_race(rows, counter, first, end, HAS_NOISE, BLOCK_POSITIONS, BLOCK_COLUMNS)
    of_row = _Statistics(row_sum, row_max, row_max, drawn)
    if HAS_STATISTICS:
        of_row = _statistics_of(statistics, lane_max, lane_sum, row_max, statistics.argmax + offs_lane)
    known_logit = row_max
    if known_logprob_ptr is not None:
        # the token of a known position; what is not one has no logit
        known_token = tl.where(masked | (token < 0) | (token >= num_tokens), num_tokens, token).to(tl.int32)
        known_logit = _exact_logit(rows, counter, known_token, HAS_NOISE)

    if partials_ptr is None:
        _store_rows(
            outputs, offs_row, inside, read, token, masked, row_max, row_sum, logit, drawn, of_row, known_logit,
            inverse_temperature,
        )  # fmt: skip
    else:
        num_splits = tl.num_programs(1)
        num_rows = (tl.num_programs(0) // num_groups).to(tl.int64) * num_positions
        field = num_rows * num_splits
        partials_ptr += offs_row * num_splits + tl.program_id(1)
        tl.store(partials_ptr, row_max, mask=inside)
        tl.store(partials_ptr + field, row_sum, mask=inside)
        tl.store(partials_ptr + 2 * field, score, mask=inside)
        tl.store(partials_ptr + 3 * field, logit, mask=inside)
        tl.store(partials_ptr + 4 * field, drawn.to(tl.float32, bitcast=True), mask=inside)
        if HAS_STATISTICS:
            tl.store(partials_ptr + 5 * field, of_row.moment, mask=inside)
            tl.store(partials_ptr + 6 * field, of_row.first, mask=inside)
            tl.store(partials_ptr + 7 * field, of_row.second, mask=inside)
            tl.store(partials_ptr + 8 * field, of_row.argmax.to(tl.float32, bitcast=True), mask=inside)
        if known_logprob_ptr is not None:
            tl.store(partials_ptr + 9 * field, known_logit, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "mask_token_id", *SCALARS])
def combine_splits_kernel(
    token_ids_ptr,
    logprob_ptr,
    argmax_ptr,
    max_logprob_ptr,
    margin_ptr,
    entropy_ptr,
    logsumexp_ptr,
    known_logprob_ptr,
    logit_ptr,
    partials_ptr,
    tokens_ptr,
    num_rows,
    num_splits,
    mask_token_id,
    logit_inverse_temperature,
    READS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Draw the tokens of rows from what their parts left."""
    HAS_STATISTICS: tl.constexpr = not (argmax_ptr is None and margin_ptr is None and entropy_ptr is None)
    offs_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    inside = offs_row < num_rows
    token = tl.load(tokens_ptr + offs_row, mask=inside, other=0)
    masked = token == mask_token_id
    read = inside & is_read(token, mask_token_id, READS)
    offs_split = tl.arange(0, BLOCK_SPLITS)[None, :]
    mask = read & (offs_split < num_splits)
    partials_ptr += offs_row * num_splits + offs_split
    field = num_rows.to(tl.int64) * num_splits
    split_max = tl.load(partials_ptr, mask=mask, other=_LOWEST)
    split_sum = tl.load(partials_ptr + field, mask=mask, other=0.0)
    score = tl.load(partials_ptr + 2 * field, mask=mask, other=float("-inf"))
    logit = tl.load(partials_ptr + 3 * field, mask=mask, other=float("-inf"))
    drawn = tl.load(partials_ptr + 4 * field, mask=mask, other=0.0).to(tl.int32, bitcast=True)
    row_max, row_sum = _sum_of(split_max, split_sum)
    _, logit, drawn = best_of(score, logit, tl.where(mask, drawn, NO_TOKEN))
    of_row = _Statistics(row_sum, row_max, row_max, drawn)
    if HAS_STATISTICS:
        argmax = tl.load(partials_ptr + 8 * field, mask=mask, other=0.0).to(tl.int32, bitcast=True)
        of_split = _Statistics(
            tl.load(partials_ptr + 5 * field, mask=mask, other=0.0),
            tl.load(partials_ptr + 6 * field, mask=mask, other=float("-inf")),
            tl.load(partials_ptr + 7 * field, mask=mask, other=float("-inf")),
            tl.where(mask, argmax, NO_TOKEN),
        )
        of_row = _statistics_of(of_split, split_max, split_sum, row_max, of_split.argmax)
    known_logit = row_max
    if known_logprob_ptr is not None:
        # every part has it
        known_logit = tl.load(partials_ptr + 9 * field, mask=mask, other=float("-inf"))
        known_logit = tl.max(known_logit, axis=1, keep_dims=True)
    outputs = _Outputs(
        token_ids_ptr, logprob_ptr, argmax_ptr, max_logprob_ptr, margin_ptr, entropy_ptr, logsumexp_ptr,
        known_logprob_ptr, logit_ptr,
    )  # fmt: skip
    if logit_ptr is not None:
        logit_inverse_temperature, _ = load_inverse_temperature(logit_inverse_temperature)
    _store_rows(
        outputs, offs_row, inside, read, token, masked, row_max, row_sum, logit, drawn, of_row, known_logit,
        logit_inverse_temperature,
    )  # fmt: skip


# programs that keep a large device busy; of the shape of one sample, so that a result does not depend on the batch
_FEW_ROWS = 2048
# what combine_splits_kernel holds in registers, 32 rows at a time
MAX_SPLITS = 64


@functools.cache
def _tiles_per_split(num_positions: int, num_tokens: int) -> int:
    num_tiles = ceil_div(num_tokens, TILE_WIDTH.value)
    return ceil_div(num_tiles, min(ceil_div(_FEW_ROWS, num_positions), MAX_SPLITS))


def sample_tokens(
    draw: Draw,
    rows: str,
    statistics: str,
    top_k: int,
    top_p: float | Tensor,
    min_p: float | Tensor,
    logprob_of: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Run the kernels on checked arguments; see `mgt_kernels.sample_tokens`.

    A scalar may be a 0-dimensional tensor on the device: float64, float32, bfloat16 or float16. The kernel reads it;
    a value that would be refused as a number makes every row a bad one.
    """
    logits = draw.logits
    batch, num_positions, num_tokens = logits.shape
    arguments = row_arguments(draw)
    tokens = arguments.tokens
    token_ids, logprob = torch.empty_like(tokens), torch.empty_like(tokens, dtype=torch.float32)
    asked = {name: torch.empty_like(tokens, dtype=STATISTICS[name]) for name in statistics.split(",") if name}
    num_rows = batch * num_positions
    if num_rows == 0:
        return token_ids, logprob, list(asked.values())

    if num_tokens > NO_TOKEN.value:
        raise ValueError(f"logits: expected at most 2^30 tokens on CUDA, got shape {tuple(logits.shape)}")
    token_major, noisy = arguments.token_major, arguments.has_noise
    block_positions, block_columns = (1, WORD_WIDTH.value) if token_major else (16, 32)
    # eight columns of a word per thread are 16 bytes in 16 bits; with noise they would spill
    num_warps = 2 if token_major and logits.dtype != torch.float32 and not noisy and not asked else 4
    # left to itself ptxas spills a few registers for occupancy that the long loop body does not need
    max_registers = 168
    columns_per_split = _tiles_per_split(num_positions, num_tokens) * TILE_WIDTH.value
    num_splits = ceil_div(num_tokens, columns_per_split)
    partials = None
    if num_splits > 1:
        num_partials = _NUM_PARTIALS if not asked else _NUM_PARTIALS_WITH_STATISTICS
        partials = logprob.new_empty((num_partials, num_rows, num_splits))
    outputs = (token_ids, logprob, *[asked.get(name) for name in STATISTICS])
    with torch.accelerator.device_index(logits.device.index):
        bounds = kept_from(arguments, rows, top_k, top_p, min_p)
        launch(
            sample_tokens_kernel, (batch * ceil_div(num_positions, block_positions), num_splits),
            *outputs, partials, bounds, *arguments.tensors, num_positions, num_tokens,
            columns_per_split, *arguments.strides, *arguments.scalars,
            **arguments.guidance, FORBIDS_REST=bounds is not None and logprob_of == "kept", HAS_NOISE=noisy,
            # nothing is drawn of known positions
            GREEDY=rows == "known" or is_greedy(draw.temperature), READS=rows, BLOCK_POSITIONS=block_positions,
            BLOCK_COLUMNS=block_columns, num_warps=num_warps, maxnreg=max_registers, **LAUNCH_OPTIONS,
        )  # fmt: skip
        if partials is not None:
            launch(
                combine_splits_kernel, (ceil_div(num_rows, 32),),
                *outputs, partials, tokens, num_rows, num_splits, draw.mask_token_id, arguments.scalars[-1],
                READS=rows, BLOCK_ROWS=32, BLOCK_SPLITS=next_power_of_2(num_splits), num_warps=4, **LAUNCH_OPTIONS,
            )  # fmt: skip
    return token_ids, logprob, list(asked.values())
