"""differential_sample on the device.

Bound by: instruction issue, two exponentials, Philox and 16-bit accesses per column. `sample_tokens` makes the plain
draw; then half a warp per row stands for the 16 lanes of the CPU's vectors and adds up what they add up, in their
order. So the sum of the softmax, the divergence and the weights have the CPU's bits, and with them history, selection
and tokens.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgt_kernels.draw import Draw
from mgt_kernels.triton.draws import (
    LAUNCH_OPTIONS,
    STREAM_TOKEN,
    WORD_WIDTH,
    block_of,
    exp_nonpositive,
    gumbel,
    log_f32,
    philox,
)
from mgt_kernels.triton.launch import ceil_div, launch
from mgt_kernels.triton.rows import (
    LOG2_E,
    NO_TOKEN,
    TILE_WIDTH,
    Counter,
    Rows,
    best_of,
    cap_of,
    in_layout_of,
    load_columns,
    load_scale,
    position_of,
    row_arguments,
    row_ptr,
    second_half_of,
    unless_greedy,
)
from mgt_kernels.triton.sample_tokens import sample_tokens
from mgt_kernels.triton.scalars import SCALARS, is_greedy, load_inverse_temperature, load_scalar
from mgt_kernels.triton.select import KNOWN_KEY, key_of_rank, load_keys, ordered_key, selection_settings

# lanes of a vector in the CPU's kernels
_LANES = tl.constexpr(16)
# the rest as in csrc/differential_sample/body.h
_LAST_CODE = tl.constexpr(65535)
_CODES_PER_NAT = tl.constexpr(2048.0)
_FAR_CODES_PER_NAT = tl.constexpr(16.0)
_FAR_OFFSET = tl.constexpr(49152.0 - 24.0 * 16.0)
_TWO_POW_23 = tl.constexpr(8388608.0)
_SAME_DISTRIBUTION = tl.constexpr(2.0**-11)
_LEAST_DIFFERENCE = tl.constexpr(1e-6)
_LEAST_WEIGHT = tl.constexpr(2.0**-100)
_LOWEST_LOG = tl.constexpr(-70.0)
_NEGLIGIBLE = tl.constexpr(28.0)
_NEGLIGIBLE_LOG = tl.constexpr(-40.0)
_LARGEST_GUMBEL = tl.constexpr(23.0)


class _Softmax(NamedTuple):
    """What turns a row's logits into p: log p = (logit - max) - log_sum."""

    max: tl.tensor
    log_sum: tl.tensor
    inverse_sum: tl.tensor


@triton.jit
def _encode(minus_log):
    near = tl.fma(minus_log, _CODES_PER_NAT, _TWO_POW_23)
    far = tl.fma(minus_log, _FAR_CODES_PER_NAT, _TWO_POW_23 + _FAR_OFFSET)
    return tl.minimum(tl.minimum(near, far), _TWO_POW_23 + _LAST_CODE).to(tl.int32, bitcast=True).to(tl.int16)


@triton.jit
def _load_log_q(history_ptr, mask):
    # nothing is what the largest code stands for
    code = tl.load(history_ptr, mask=mask, other=-1)
    value = (code.to(tl.int32) & _LAST_CODE).to(tl.float32)
    return tl.minimum(
        value * (-1.0 / _CODES_PER_NAT), tl.fma(value, -1.0 / _FAR_CODES_PER_NAT, _FAR_OFFSET / _FAR_CODES_PER_NAT)
    )


@triton.jit
def _weigh(logit, log_q, softmax, IS_PAPER: tl.constexpr):
    """Compute a token's weight and its term of the divergence."""
    shifted = tl.maximum(logit - softmax.max, _LOWEST_LOG)
    p = exp_nonpositive(shifted) * softmax.inverse_sum
    term = p * ((shifted - softmax.log_sum) - log_q)
    difference = p - exp_nonpositive(tl.maximum(log_q, _LOWEST_LOG))
    weight = tl.abs(difference) if IS_PAPER else tl.maximum(difference, _LEAST_DIFFERENCE)
    return tl.where(logit == float("-inf"), 0.0, weight), term


@triton.jit
def _add_words(x_0, x_1, x_2, x_3, base, num_tokens):
    # vectors past the row's last one do not count, what fills that up does
    x_1 = tl.where(base + WORD_WIDTH < num_tokens, x_1, 0.0)
    x_2 = tl.where(base + 2 * WORD_WIDTH < num_tokens, x_2, 0.0)
    x_3 = tl.where(base + 3 * WORD_WIDTH < num_tokens, x_3, 0.0)
    return (x_0 + x_1) + (x_2 + x_3)


@triton.jit
def _pairs(x, NUM: tl.constexpr):
    first, second = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, NUM // 2]), [0, 2, 1]))
    return first + second


@triton.jit
def _sum_of_lanes(x):
    # the CPU's tree; tl.sum leaves the order to the layout
    return _pairs(_pairs(_pairs(_pairs(x, 16), 8), 4), 2)


@triton.jit
def _add_softmax(
    rows, counter, first_column, row_max, lane_sum, lead, bad,
    HAS_NOISE: tl.constexpr,
):  # fmt: skip
    """Take a tile into the maximum of the row, the sums of the lanes and the first token with the maximum."""
    lane_max = tl.full(lane_sum.shape, float("-inf"), tl.float32)
    num_columns = tl.minimum(rows.num_tokens - first_column, WORD_WIDTH)
    for first_lane in range(0, num_columns, _LANES):
        logit_0, logit_1, logit_2, logit_3 = load_columns(
            rows, counter, first_column + first_lane, HAS_NOISE, True, _LANES
        )
        lane_max = tl.maximum(lane_max, tl.maximum(tl.maximum(logit_0, logit_1), tl.maximum(logit_2, logit_3)))
        bad |= (logit_0 != logit_0) | (logit_1 != logit_1) | (logit_2 != logit_2) | (logit_3 != logit_3)
    tile_max = tl.max(lane_max, axis=1, keep_dims=True)
    any_allowed = tile_max > float("-inf")
    rescale = tl.where(tile_max > row_max, exp_nonpositive(row_max - tile_max), 1.0)
    lead = tl.where(tile_max > row_max, NO_TOKEN, lead)
    row_max = tl.maximum(row_max, tile_max)
    negligible = row_max - _NEGLIGIBLE
    tile_sum = tl.zeros(lane_sum.shape, tl.float32)
    for first_lane in range(0, num_columns, _LANES):
        base = first_column + first_lane
        offs_token = base + tl.arange(0, _LANES)[None, :]
        logit_0, logit_1, logit_2, logit_3 = load_columns(rows, counter, base, HAS_NOISE, True, _LANES)
        largest = tl.maximum(tl.maximum(logit_0, logit_1), tl.maximum(logit_2, logit_3))
        matters = tl.max(largest, axis=1, keep_dims=True) >= negligible
        if tl.max(matters.to(tl.int32)) > 0:
            term = _add_words(
                exp_nonpositive(logit_0 - row_max), exp_nonpositive(logit_1 - row_max),
                exp_nonpositive(logit_2 - row_max), exp_nonpositive(logit_3 - row_max), base, rows.num_tokens,
            )  # fmt: skip
            tile_sum = tl.where(matters, tile_sum + term, tile_sum)
            lead = tl.minimum(lead, tl.where(logit_0 == row_max, offs_token, NO_TOKEN))
            lead = tl.minimum(lead, tl.where(logit_1 == row_max, offs_token + WORD_WIDTH, NO_TOKEN))
            lead = tl.minimum(lead, tl.where(logit_2 == row_max, offs_token + 2 * WORD_WIDTH, NO_TOKEN))
            lead = tl.minimum(lead, tl.where(logit_3 == row_max, offs_token + 3 * WORD_WIDTH, NO_TOKEN))
    lane_sum = tl.where(any_allowed, tl.fma(lane_sum, rescale, tile_sum), lane_sum)
    return row_max, lane_sum, lead, bad


@triton.jit
def _greedy_scale(score):
    return tl.where(score > 0.0, tl.div_rn(0.75, score), float("inf"))


@triton.jit
def _race_scale(rows, score, GREEDY: tl.constexpr):
    """Compute what makes a bound of a weight: words below weight * scale can win; if greedy, above 1/2 it can."""
    if GREEDY:
        return _greedy_scale(score)
    # the slack covers the rounding of the scores and the hardware's exponential
    scale = tl.exp2((1e-4 + 1e-6 * tl.abs(score) - score) * LOG2_E) * 4294967296.0
    if GREEDY is None:
        scale = tl.where(rows.is_greedy, _greedy_scale(score), scale)
    return scale


@triton.jit
def _compete(rows, weight, word, offs_token, best_score, best_weight, best_token, GREEDY: tl.constexpr):
    score = weight
    if not GREEDY:
        score = unless_greedy(rows, log_f32(weight) + gumbel(word), weight, GREEDY)
    better = (score > best_score) | ((score == best_score) & (offs_token < best_token))
    better = better & (weight >= _LEAST_WEIGHT)
    return (
        tl.where(better, score, best_score),
        tl.where(better, weight, best_weight),
        tl.where(better, offs_token, best_token),
    )


@triton.jit
def _lead_race(rows, counter, softmax, history_ptr, lead, has_history, IS_PAPER: tl.constexpr, GREEDY: tl.constexpr):
    """Let the token with the largest logit go first; the CPU does, and what it leaves out depends on it."""
    log_q = _load_log_q(history_ptr + lead, has_history & (lead < NO_TOKEN))
    weight, _ = _weigh(softmax.max, log_q, softmax, IS_PAPER)
    score = weight
    if not GREEDY:
        word_0, word_1, word_2, word_3 = philox(
            counter.seed, block_of(lead), counter.position, counter.step, STREAM_TOKEN
        )
        which = lead // WORD_WIDTH % 4
        word = tl.where(which < 2, tl.where(which == 0, word_0, word_1), tl.where(which == 2, word_2, word_3))
        score = unless_greedy(rows, log_f32(weight) + gumbel(word), weight, GREEDY)
    leads = has_history & (weight >= _LEAST_WEIGHT)
    return (
        tl.where(leads, score, float("-inf")),
        tl.where(leads, weight, 0.0),
        tl.where(leads, lead, NO_TOKEN),
    )


@triton.jit
def _store_code(history_ptr, logit, softmax, mask):
    tl.store(history_ptr, _encode(softmax.log_sum - (logit - softmax.max)), mask=mask)


@triton.jit
def _edit(history_ptr, offs_token, logit, softmax, good, selected, num_tokens):
    mask = good & (offs_token < num_tokens)
    weight, _ = _weigh(logit, _load_log_q(history_ptr + offs_token, mask & selected), softmax, False)
    # w <= 1 up to the rounding of p
    edited = tl.where(weight > 0.0, tl.maximum(0.0 - log_f32(weight), 0.0), float("inf"))
    plain = softmax.log_sum - (logit - softmax.max)
    tl.store(history_ptr + offs_token, _encode(tl.where(selected, edited, plain)), mask=mask)


@triton.jit
def _continues(history_seed_ptr, history_step_ptr, seed, step, sample):
    """Whether the history is the previous step's, and whether it is of the same seed."""
    return tl.load(history_step_ptr) == step - 1, tl.load(history_seed_ptr + sample) == seed


@triton.jit(do_not_specialize=["mask_token_id", *SCALARS])
def compare_kernel(
    divergence_ptr,
    keys_ptr,
    choice_ptr,
    choice_logprob_ptr,
    softmax_ptr,
    history_ptr,
    written_ptr,
    history_seed_ptr,
    history_step_ptr,
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
    MAY_FORBID: tl.constexpr,
    SCALE_PER_SAMPLE: tl.constexpr,
    IS_DUAL: tl.constexpr,
    SECOND_SCALE_PER_SAMPLE: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
    IS_PAPER: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    GREEDY: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """Compare rows with their histories, and draw from what differs."""
    num_groups = tl.cdiv(num_positions, BLOCK_POSITIONS)
    sample = (tl.program_id(0) // num_groups).to(tl.int64)
    offs_position = (tl.program_id(0) % num_groups) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)[:, None]
    inside = offs_position < num_positions
    offs_row = sample * num_positions + offs_position
    masked = inside & (tl.load(tokens_ptr + offs_row, mask=inside, other=0) == mask_token_id)
    wanted = masked if IS_PAPER else inside
    seed = tl.load(seed_ptr + sample)
    step = tl.load(step_ptr)
    reads = wanted
    if HAS_HISTORY:
        same_step, same_seed = _continues(history_seed_ptr, history_step_ptr, seed, step, sample)
        # raising would wait for the device: a step that does not continue the generation draws nothing
        reads = wanted & same_step & same_seed
        old_written = tl.load(written_ptr + offs_row, mask=inside, other=0) != 0
        has_history = reads & old_written
    counter = Counter(seed, position_of(first_position_ptr, sample, offs_position), step.to(tl.uint32))
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
        token_bias_ptr, stride_token, uncond_stride_token, reads, num_tokens, mask_token_id,
        load_scale(guidance_scale, sample, SCALE_PER_SAMPLE), cap, load_scalar(noise_scale, 0.0, float("nan")),
        inverse_temperature, is_greedy, None, MAY_FORBID, IS_DUAL, False,
    )  # fmt: skip
    history_ptr += offs_row * num_tokens
    end = tl.where(tl.max(reads.to(tl.int32)) > 0, num_tokens, 0)

    row_max = tl.full([BLOCK_POSITIONS, 1], float("-inf"), tl.float32)
    lane_sum = tl.zeros([BLOCK_POSITIONS, _LANES], tl.float32)
    lead = tl.full([BLOCK_POSITIONS, _LANES], NO_TOKEN, tl.int32)
    lane_bad = lead < 0
    for first_column in range(0, end, TILE_WIDTH):
        row_max, lane_sum, lead, lane_bad = _add_softmax(
            rows, counter, first_column, row_max, lane_sum, lead, lane_bad, HAS_NOISE
        )
    bad = tl.max(lane_bad.to(tl.int32), axis=1, keep_dims=True) > 0
    bad |= (row_max == float("inf")) | (row_max == float("-inf"))
    good = reads & ~bad
    row_sum = _sum_of_lanes(lane_sum)
    # a row that is not read has none
    row_sum = tl.where(good, row_sum, 1.0)
    row_max = tl.where(good, row_max, 0.0)
    softmax = _Softmax(row_max, log_f32(row_sum), tl.div_rn(1.0, row_sum))

    if HAS_HISTORY:
        has_history &= good
        draws = has_history & masked
        best_score, best_weight, best_token = _lead_race(
            rows, counter, softmax, history_ptr, tl.min(lead, axis=1, keep_dims=True), draws, IS_PAPER, GREEDY
        )
        lowest = best_score - _LARGEST_GUMBEL
        race_scale = _race_scale(rows, best_score, GREEDY)
        best_score = tl.broadcast_to(best_score, [BLOCK_POSITIONS, _LANES])
        best_weight = tl.broadcast_to(best_weight, [BLOCK_POSITIONS, _LANES])
        best_token = tl.broadcast_to(best_token, [BLOCK_POSITIONS, _LANES])
        divergence = tl.zeros([BLOCK_POSITIONS, _LANES], tl.float32)
        weight_sum = divergence
        excess = divergence
    for first_column in range(0, end, TILE_WIDTH):
        for first_lane in range(0, tl.minimum(num_tokens - first_column, WORD_WIDTH), _LANES):
            base = first_column + first_lane
            offs_0 = base + tl.arange(0, _LANES)[None, :]
            offs_1 = offs_0 + WORD_WIDTH
            offs_2 = offs_1 + WORD_WIDTH
            offs_3 = offs_2 + WORD_WIDTH
            logit_0, logit_1, logit_2, logit_3 = load_columns(rows, counter, base, HAS_NOISE, True, _LANES)
            if HAS_HISTORY:
                log_q_0 = _load_log_q(history_ptr + offs_0, has_history & (offs_0 < num_tokens))
                log_q_1 = _load_log_q(history_ptr + offs_1, has_history & (offs_1 < num_tokens))
                log_q_2 = _load_log_q(history_ptr + offs_2, has_history & (offs_2 < num_tokens))
                log_q_3 = _load_log_q(history_ptr + offs_3, has_history & (offs_3 < num_tokens))
            # what an aliased history becomes depends on the selection
            if softmax_ptr is None:
                _store_code(history_ptr + offs_0, logit_0, softmax, good & (offs_0 < num_tokens))
                _store_code(history_ptr + offs_1, logit_1, softmax, good & (offs_1 < num_tokens))
                _store_code(history_ptr + offs_2, logit_2, softmax, good & (offs_2 < num_tokens))
                _store_code(history_ptr + offs_3, logit_3, softmax, good & (offs_3 < num_tokens))
            if HAS_HISTORY:
                matters = has_history
                if IS_PAPER:
                    largest = tl.maximum(tl.maximum(logit_0, logit_1), tl.maximum(logit_2, logit_3)) - row_max
                    log_q = tl.maximum(tl.maximum(log_q_0, log_q_1), tl.maximum(log_q_2, log_q_3))
                    negligible = tl.full([BLOCK_POSITIONS, 1], _NEGLIGIBLE_LOG, tl.float32)
                    if not GREEDY:
                        negligible = unless_greedy(rows, tl.minimum(negligible, lowest), negligible, GREEDY)
                    matters &= tl.max(tl.maximum(largest, log_q), axis=1, keep_dims=True) >= negligible
                if tl.max(matters.to(tl.int32)) > 0:
                    weight_0, term_0 = _weigh(logit_0, log_q_0, softmax, IS_PAPER)
                    weight_1, term_1 = _weigh(logit_1, log_q_1, softmax, IS_PAPER)
                    weight_2, term_2 = _weigh(logit_2, log_q_2, softmax, IS_PAPER)
                    weight_3, term_3 = _weigh(logit_3, log_q_3, softmax, IS_PAPER)
                    term = _add_words(term_0, term_1, term_2, term_3, base, num_tokens)
                    divergence = tl.where(matters, divergence + term, divergence)
                    # Kahan's, as on the CPU
                    corrected = _add_words(weight_0, weight_1, weight_2, weight_3, base, num_tokens) - excess
                    total = weight_sum + corrected
                    excess = tl.where(matters, (total - weight_sum) - corrected, excess)
                    weight_sum = tl.where(matters, total, weight_sum)

                    scale = tl.where(matters & draws, race_scale, 0.0)
                    may_win = tl.maximum(tl.maximum(weight_0, weight_1), tl.maximum(weight_2, weight_3)) * scale > 0.5
                    if tl.max(may_win.to(tl.int32)) > 0:
                        word_0, word_1, word_2, word_3 = offs_0, offs_1, offs_2, offs_3
                        if not GREEDY:
                            word_0, word_1, word_2, word_3 = philox(
                                counter.seed, in_layout_of(block_of(offs_0), logit_0), counter.position, counter.step,
                                STREAM_TOKEN,
                            )  # fmt: skip
                            may_win_race = (
                                (word_0.to(tl.float32) < weight_0 * scale)
                                | (word_1.to(tl.float32) < weight_1 * scale)
                                | (word_2.to(tl.float32) < weight_2 * scale)
                                | (word_3.to(tl.float32) < weight_3 * scale)
                            )
                            may_win = unless_greedy(rows, may_win_race, may_win, GREEDY)
                        if tl.max(may_win.to(tl.int32)) > 0:
                            best_score, best_weight, best_token = _compete(
                                rows, weight_0, word_0, offs_0, best_score, best_weight, best_token, GREEDY
                            )
                            best_score, best_weight, best_token = _compete(
                                rows, weight_1, word_1, offs_1, best_score, best_weight, best_token, GREEDY
                            )
                            best_score, best_weight, best_token = _compete(
                                rows, weight_2, word_2, offs_2, best_score, best_weight, best_token, GREEDY
                            )
                            best_score, best_weight, best_token = _compete(
                                rows, weight_3, word_3, offs_3, best_score, best_weight, best_token, GREEDY
                            )
                            row_best = tl.max(best_score, axis=1, keep_dims=True)
                            lowest = row_best - _LARGEST_GUMBEL
                            race_scale = _race_scale(rows, row_best, GREEDY)

    row_divergence = tl.full([BLOCK_POSITIONS, 1], float("inf"), tl.float32)
    new_written = good
    if HAS_HISTORY:
        new_written = tl.where(same_step, good, old_written)
        row_divergence = tl.where(has_history, _sum_of_lanes(divergence), row_divergence)
        row_weight = _sum_of_lanes(weight_sum)
        _, best_weight, best_token = best_of(best_score, best_weight, best_token)
        different = draws
        if IS_PAPER:
            different &= row_weight >= _SAME_DISTRIBUTION
        tl.store(choice_ptr + offs_row, tl.where(different, best_token, -1), mask=inside)
        tl.store(choice_logprob_ptr + offs_row, log_f32(tl.div_rn(best_weight, row_weight)), mask=inside)
        tl.store(keys_ptr + offs_row, ordered_key(row_divergence).to(tl.int64), mask=inside)
    tl.store(written_ptr + offs_row, new_written.to(tl.uint8), mask=inside)
    row_divergence = tl.where(wanted & ~good, float("nan"), row_divergence)
    tl.store(divergence_ptr + offs_row, row_divergence, mask=inside)
    if softmax_ptr is not None:
        softmax_ptr += 3 * offs_row
        tl.store(softmax_ptr, tl.where(good, softmax.max, float("nan")), mask=inside)
        tl.store(softmax_ptr + 1, softmax.log_sum, mask=inside)
        tl.store(softmax_ptr + 2, softmax.inverse_sum, mask=inside)


@triton.jit(do_not_specialize=["mask_token_id", *SCALARS])
def select_kernel(
    token_ids_ptr,
    logprob_ptr,
    selected_ptr,
    keys_ptr,
    choice_ptr,
    choice_logprob_ptr,
    history_seed_ptr,
    history_step_ptr,
    tokens_ptr,
    seed_ptr,
    step_ptr,
    num_positions,
    mask_token_id,
    share: tl.float64,
    IS_PAPER: tl.constexpr,
    CHUNK_POSITIONS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """Select the positions of a sample that changed least, and give them what was drawn from the difference."""
    sample = tl.program_id(0).to(tl.int64)
    same_step, same_seed = _continues(
        history_seed_ptr, history_step_ptr, tl.load(seed_ptr + sample), tl.load(step_ptr), sample
    )
    continues = same_step & same_seed
    first_row = sample * num_positions
    keys_ptr += first_row
    num_ranked = num_positions
    if IS_PAPER:
        num_masked = tl.zeros([CHUNK_POSITIONS], tl.int32)
        for first in range(0, num_positions, CHUNK_POSITIONS):
            offs_position = first + tl.arange(0, CHUNK_POSITIONS)
            token = tl.load(tokens_ptr + first_row + offs_position, mask=offs_position < num_positions, other=0)
            num_masked += ((offs_position < num_positions) & (token == mask_token_id)).to(tl.int32)
        num_ranked = tl.sum(num_masked)
    wanted = share * num_ranked.to(tl.float64)
    if IS_PAPER:
        wanted += 0.5
    num_selected = wanted.to(tl.int32)
    # rows that are not ranked have the key of those without a history, which are drawn from p anyway
    held = load_keys(keys_ptr, 0, num_positions, BLOCK_POSITIONS)
    threshold, num_below = key_of_rank(num_selected, held, keys_ptr, num_positions, BLOCK_POSITIONS, IN_REGISTERS)

    # among ties the lower positions
    num_ties_left = num_selected - num_below
    for first in range(0, num_positions, CHUNK_POSITIONS):
        offs_position = first + tl.arange(0, CHUNK_POSITIONS)
        mask = offs_position < num_positions
        offs_row = first_row + offs_position
        key = load_keys(keys_ptr, first, num_positions, CHUNK_POSITIONS)
        tied = (key == threshold).to(tl.int32)
        selected = (key < threshold) | ((tied > 0) & (tl.cumsum(tied, axis=0) <= num_ties_left))
        num_ties_left -= tl.sum(tied)
        if selected_ptr is not None:
            tl.store(selected_ptr + offs_row, (selected & (key < KNOWN_KEY)).to(tl.uint8), mask=mask)
        choice = tl.load(choice_ptr + offs_row, mask=mask, other=-1)
        chosen = selected & (choice >= 0)
        logprob = tl.load(choice_logprob_ptr + offs_row, mask=chosen, other=0.0)
        lost = mask & ~continues & (tl.load(tokens_ptr + offs_row, mask=mask, other=0) == mask_token_id)
        token = tl.where(lost, mask_token_id, choice.to(tl.int64))
        tl.store(token_ids_ptr + offs_row, token, mask=chosen | lost)
        tl.store(logprob_ptr + offs_row, tl.where(lost, float("nan"), logprob), mask=chosen | lost)


@triton.jit(do_not_specialize=["mask_token_id", *SCALARS])
def edit_history_kernel(
    history_ptr,
    softmax_ptr,
    selected_ptr,
    logits_ptr,
    uncond_ptr,
    second_uncond_ptr,
    token_bias_ptr,
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
    MAY_FORBID: tl.constexpr,
    SCALE_PER_SAMPLE: tl.constexpr,
    IS_DUAL: tl.constexpr,
    SECOND_SCALE_PER_SAMPLE: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Write the new codes of an aliased history, which depend on the selection."""
    num_groups = tl.cdiv(num_positions, BLOCK_POSITIONS)
    sample = (tl.program_id(0) // num_groups).to(tl.int64)
    offs_position = (tl.program_id(0) % num_groups) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)[:, None]
    inside = offs_position < num_positions
    offs_row = sample * num_positions + offs_position
    softmax = _Softmax(
        tl.load(softmax_ptr + 3 * offs_row, mask=inside, other=float("nan")),
        tl.load(softmax_ptr + 3 * offs_row + 1, mask=inside, other=0.0),
        tl.load(softmax_ptr + 3 * offs_row + 2, mask=inside, other=0.0),
    )
    good = softmax.max == softmax.max
    selected = tl.load(selected_ptr + offs_row, mask=inside, other=0) != 0
    position = position_of(first_position_ptr, sample, offs_position)
    counter = Counter(tl.load(seed_ptr + sample), position, tl.load(step_ptr).to(tl.uint32))
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
        token_bias_ptr, stride_token, uncond_stride_token, good, num_tokens, mask_token_id,
        load_scale(guidance_scale, sample, SCALE_PER_SAMPLE), cap, load_scalar(noise_scale, 0.0, float("nan")),
        inverse_temperature, is_greedy, None, MAY_FORBID, IS_DUAL, False,
    )  # fmt: skip
    history_ptr += offs_row * num_tokens
    first_column = tl.program_id(1) * TILE_WIDTH
    for first_lane in range(0, WORD_WIDTH, BLOCK_COLUMNS):
        base = first_column + first_lane
        offs_token = base + tl.arange(0, BLOCK_COLUMNS)[None, :]
        logit_0, logit_1, logit_2, logit_3 = load_columns(rows, counter, base, HAS_NOISE, True, BLOCK_COLUMNS)
        _edit(history_ptr, offs_token, logit_0, softmax, good, selected, num_tokens)
        _edit(history_ptr, offs_token + WORD_WIDTH, logit_1, softmax, good, selected, num_tokens)
        _edit(history_ptr, offs_token + 2 * WORD_WIDTH, logit_2, softmax, good, selected, num_tokens)
        _edit(history_ptr, offs_token + 3 * WORD_WIDTH, logit_3, softmax, good, selected, num_tokens)


@triton.jit(do_not_specialize=SCALARS)
def advance_history_step_kernel(history_step_ptr, step_ptr, HAS_HISTORY: tl.constexpr):
    """Make the history that of this step."""
    step = tl.load(step_ptr)
    if HAS_HISTORY:
        # a step that does not continue the generation leaves its index as it is
        history_step = tl.load(history_step_ptr)
        step = tl.where(history_step == step - 1, step, history_step)
    tl.store(history_step_ptr, step)


# for occupancy ptxas would spill a few
MAX_REGISTERS = 128


def differential_sample(
    draw: Draw,
    history: Tensor,
    written: Tensor,
    history_step: Tensor,
    history_seed: Tensor,
    has_history: bool,
    share: float,
    variant: str,
    aliased_history: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels on checked arguments; history, written and history_step are contiguous and updated in place.

    Scalars may be tensors, as for `sample_tokens`.
    """
    history_seed = history_seed.contiguous()
    token_ids, logprob, _ = sample_tokens(draw, "masked", "", 0, 1.0, 0.0, "kept")
    divergence = torch.empty_like(logprob)
    arguments = row_arguments(draw)
    tokens, seed, step = arguments.tokens, arguments.seed, arguments.step
    if tokens.numel() == 0:
        history_step.copy_(step)
        return token_ids, logprob, divergence

    batch, num_positions, num_tokens = draw.logits.shape
    edits_history = aliased_history and has_history
    keys = choice = choice_logprob = softmax = selected = None
    if has_history:
        keys, choice = torch.empty_like(tokens), torch.empty_like(tokens, dtype=torch.int32)
        choice_logprob = torch.empty_like(logprob)
    if edits_history:
        softmax = torch.empty((tokens.numel(), 3), dtype=torch.float32, device=tokens.device)
        selected = torch.empty_like(tokens, dtype=torch.uint8)
    rows = (num_positions, num_tokens, *arguments.strides, *arguments.scalars)
    state = (history_seed, history_step)
    noisy, is_paper, token_major = arguments.has_noise, variant == "paper", arguments.token_major
    # 16 positions of 16 bits are a sector; fewer rows wait for each other's races less
    block_positions = 2 if token_major else 16
    with torch.accelerator.device_index(draw.logits.device.index):
        launch(
            compare_kernel, (batch * ceil_div(num_positions, block_positions),),
            divergence, keys, choice, choice_logprob, softmax, history, written.view(torch.uint8), *state,
            *arguments.tensors, *rows,
            **arguments.guidance, HAS_HISTORY=has_history, IS_PAPER=is_paper, HAS_NOISE=noisy,
            GREEDY=is_greedy(draw.temperature), BLOCK_POSITIONS=block_positions, num_warps=block_positions // 2,
            maxnreg=MAX_REGISTERS, **LAUNCH_OPTIONS,
        )  # fmt: skip
        if has_history:
            launch(
                select_kernel, (batch,),
                token_ids, logprob, selected, keys, choice, choice_logprob, *state, tokens, seed, step, num_positions,
                draw.mask_token_id, share, IS_PAPER=is_paper, **selection_settings(num_positions), **LAUNCH_OPTIONS,
            )  # fmt: skip
        if edits_history:
            block_positions, block_columns = (1, WORD_WIDTH.value) if token_major else (16, 32)
            num_tiles = ceil_div(num_tokens, TILE_WIDTH.value)
            launch(
                edit_history_kernel, (batch * ceil_div(num_positions, block_positions), num_tiles),
                history, softmax, selected, *arguments.tensors[:4], *arguments.tensors[5:], *rows,
                **arguments.guidance, HAS_NOISE=noisy, BLOCK_POSITIONS=block_positions, BLOCK_COLUMNS=block_columns,
                num_warps=4, **LAUNCH_OPTIONS,
            )  # fmt: skip
        launch(
            advance_history_step_kernel, (1,), history_step, step, HAS_HISTORY=has_history, num_warps=1,
            **LAUNCH_OPTIONS,
        )  # fmt: skip
    return token_ids, logprob, divergence
