"""sample_tokens on the device.

Bound by: instruction issue. Philox and the two logarithms of every Gumbel draw outweigh the read of both
guidance halves several times over. A program keeps maximum, sum and best score per lane, so that tiles need
no exchange between threads.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from mgt_kernels.triton.draws import (
    LAUNCH_OPTIONS,
    STREAM_NOISE,
    STREAM_TOKEN,
    WORD_WIDTH,
    gaussian_pair,
    gumbel,
    log_f32,
    philox,
)

_LOG2_E = tl.constexpr(1.4426950408889634)
# larger than any token id
_NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _load_half(row_ptr, offs_token, stride_token, mask):
    return tl.load(row_ptr + offs_token.to(tl.int64) * stride_token, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _load_guided(
    logits_row_ptr,
    uncond_row_ptr,
    offs_token,
    stride_token,
    uncond_stride_token,
    num_tokens,
    inside,
    guidance_scale,
):
    mask = inside & (offs_token < num_tokens)
    logit = _load_half(logits_row_ptr, offs_token, stride_token, mask)
    if uncond_row_ptr is not None:
        uncond = _load_half(uncond_row_ptr, offs_token, uncond_stride_token, mask)
        # -inf in either half forbids the token, whatever guidance would make of it
        forbidden = (logit == float("-inf")) | (uncond == float("-inf"))
        logit = tl.where(forbidden, float("-inf"), tl.fma(logit - uncond, guidance_scale, uncond))
    return logit


@triton.jit
def _finish_logit(logit, offs_token, inverse_temperature, mask_token_id):
    # after guidance and noise; temperatures 0 and 1 come as 1, a product that changes no bit
    return tl.where(offs_token == mask_token_id, float("-inf"), logit * inverse_temperature)


@triton.jit
def _compete(logit, word, offs_token, best_score, best_logit, best_token, GREEDY: tl.constexpr):
    score = logit
    if not GREEDY:
        score = logit + gumbel(word)
    # a lane meets its columns in order: among ties the lowest stays
    better = score > best_score
    return (
        tl.where(better, score, best_score),
        tl.where(better, logit, best_logit),
        tl.where(better, offs_token, best_token),
    )


@triton.jit(do_not_specialize=["step", "mask_token_id"])
def _sample_tokens_kernel(
    token_ids_ptr,
    logprob_ptr,
    logits_ptr,
    uncond_ptr,
    tokens_ptr,
    seed_ptr,
    num_positions,
    num_tokens,
    stride_sample,
    stride_position,
    stride_token,
    uncond_stride_sample,
    uncond_stride_position,
    uncond_stride_token,
    step,
    mask_token_id,
    guidance_scale,
    noise_scale,
    inverse_temperature,
    HAS_NOISE: tl.constexpr,
    GREEDY: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    num_groups = tl.cdiv(num_positions, BLOCK_POSITIONS)
    sample = (tl.program_id(0) // num_groups).to(tl.int64)
    offs_position = (tl.program_id(0) % num_groups) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    inside = offs_position < num_positions
    offs_row = sample * num_positions + offs_position
    token = tl.load(tokens_ptr + offs_row, mask=inside, other=0)
    masked = inside & (token == mask_token_id)
    seed = tl.load(seed_ptr + sample)

    position = offs_position.to(tl.uint32)[:, None]
    # known positions of a group are read along: a mask that differs between lanes would undo vector loads
    inside_rows = inside[:, None]
    offs_position_64 = offs_position.to(tl.int64)[:, None]
    logits_row_ptr = logits_ptr + sample * stride_sample + offs_position_64 * stride_position
    uncond_row_ptr = uncond_ptr
    if uncond_ptr is not None:
        uncond_row_ptr = uncond_ptr + sample * uncond_stride_sample + offs_position_64 * uncond_stride_position

    # per lane; sum is relative to exp(max)
    lane_max = tl.full([BLOCK_POSITIONS, BLOCK_COLUMNS], float("-inf"), tl.float32)
    lane_sum = tl.zeros([BLOCK_POSITIONS, BLOCK_COLUMNS], tl.float32)
    best_score = lane_max
    best_logit = lane_max
    best_token = tl.full([BLOCK_POSITIONS, BLOCK_COLUMNS], _NO_TOKEN, tl.int32)

    # a group without a masked position is as good as empty
    end = tl.where(tl.max(masked.to(tl.int32), axis=0) > 0, num_tokens, 0)
    for first_column in range(0, end, 4 * WORD_WIDTH):
        for first_lane in range(0, WORD_WIDTH, BLOCK_COLUMNS):
            offs_lane = first_lane + tl.arange(0, BLOCK_COLUMNS)[None, :]
            block = (first_column // 4 + offs_lane).to(tl.uint32)
            offs_0 = first_column + offs_lane
            offs_1 = offs_0 + WORD_WIDTH
            offs_2 = offs_1 + WORD_WIDTH
            offs_3 = offs_2 + WORD_WIDTH
            logit_0 = _load_guided(
                logits_row_ptr, uncond_row_ptr, offs_0, stride_token, uncond_stride_token, num_tokens,
                inside_rows, guidance_scale,
            )  # fmt: skip
            logit_1 = _load_guided(
                logits_row_ptr, uncond_row_ptr, offs_1, stride_token, uncond_stride_token, num_tokens,
                inside_rows, guidance_scale,
            )  # fmt: skip
            logit_2 = _load_guided(
                logits_row_ptr, uncond_row_ptr, offs_2, stride_token, uncond_stride_token, num_tokens,
                inside_rows, guidance_scale,
            )  # fmt: skip
            logit_3 = _load_guided(
                logits_row_ptr, uncond_row_ptr, offs_3, stride_token, uncond_stride_token, num_tokens,
                inside_rows, guidance_scale,
            )  # fmt: skip
            if HAS_NOISE:
                word_0, word_1, word_2, word_3 = philox(seed, block, position, step, STREAM_NOISE)
                noise_0, noise_1 = gaussian_pair(word_0, word_1)
                noise_2, noise_3 = gaussian_pair(word_2, word_3)
                logit_0 = tl.fma(noise_0, noise_scale, logit_0)
                logit_1 = tl.fma(noise_1, noise_scale, logit_1)
                logit_2 = tl.fma(noise_2, noise_scale, logit_2)
                logit_3 = tl.fma(noise_3, noise_scale, logit_3)
            logit_0 = _finish_logit(logit_0, offs_0, inverse_temperature, mask_token_id)
            logit_1 = _finish_logit(logit_1, offs_1, inverse_temperature, mask_token_id)
            logit_2 = _finish_logit(logit_2, offs_2, inverse_temperature, mask_token_id)
            logit_3 = _finish_logit(logit_3, offs_3, inverse_temperature, mask_token_id)

            # NaN and +inf turn the sum to NaN, and it stays so
            new_max = tl.maximum(tl.maximum(logit_0, logit_1), tl.maximum(logit_2, logit_3))
            new_max = tl.maximum(lane_max, new_max)
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            lane_sum *= tl.exp2((lane_max - shift) * _LOG2_E)
            lane_sum += tl.exp2((logit_0 - shift) * _LOG2_E) + tl.exp2((logit_1 - shift) * _LOG2_E)
            lane_sum += tl.exp2((logit_2 - shift) * _LOG2_E) + tl.exp2((logit_3 - shift) * _LOG2_E)
            lane_max = new_max

            if GREEDY:
                word_0, word_1, word_2, word_3 = block, block, block, block
            else:
                word_0, word_1, word_2, word_3 = philox(seed, block, position, step, STREAM_TOKEN)
            best_score, best_logit, best_token = _compete(
                logit_0, word_0, offs_0, best_score, best_logit, best_token, GREEDY
            )
            best_score, best_logit, best_token = _compete(
                logit_1, word_1, offs_1, best_score, best_logit, best_token, GREEDY
            )
            best_score, best_logit, best_token = _compete(
                logit_2, word_2, offs_2, best_score, best_logit, best_token, GREEDY
            )
            best_score, best_logit, best_token = _compete(
                logit_3, word_3, offs_3, best_score, best_logit, best_token, GREEDY
            )

    row_score = tl.max(best_score, axis=1)
    row_token = tl.min(tl.where(best_score == row_score[:, None], best_token, _NO_TOKEN), axis=1)
    row_logit = tl.max(tl.where(best_token == row_token[:, None], best_logit, float("-inf")), axis=1)
    row_max = tl.max(lane_max, axis=1)
    row_sum = tl.sum(lane_sum * tl.exp2((lane_max - row_max[:, None]) * _LOG2_E), axis=1)
    logprob = (row_logit - row_max) - log_f32(row_sum)
    # raising would wait for the device: a row from which nothing can be drawn stays masked and says NaN
    bad = (row_sum != row_sum) | (row_max == float("inf")) | (row_token == _NO_TOKEN)
    drawn = tl.where(bad, token, row_token.to(tl.int64))
    logprob = tl.where(bad, float("nan"), logprob)
    tl.store(token_ids_ptr + offs_row, tl.where(masked, drawn, token), mask=inside)
    tl.store(logprob_ptr + offs_row, tl.where(masked, logprob, float("inf")), mask=inside)


def sample_tokens(
    logits: Tensor,
    tokens: Tensor,
    seed: Tensor,
    step: int,
    mask_token_id: int,
    uncond_logits: Tensor | None,
    guidance_scale: float,
    noise_scale: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Run the kernel on checked arguments; see `mgt_kernels.sample_tokens`."""
    batch, num_positions, num_tokens = logits.shape
    tokens, seed = tokens.contiguous(), seed.contiguous()
    token_ids = torch.empty_like(tokens)
    logprob = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device)
    if tokens.numel() == 0:
        return token_ids, logprob

    halves = [logits] if uncond_logits is None else [logits, uncond_logits]
    # with unit stride over positions, neighbouring positions share every sector that is read
    token_major = num_positions == 1 or all(num_tokens == 1 or half.stride(2) == 1 for half in halves)
    block_positions, block_columns = (1, WORD_WIDTH.value) if token_major else (16, 32)
    # both roundings as in C: the temperature to float32, then its inverse
    tau = np.float32(temperature)
    inverse_temperature = 1.0 if tau == 0 else float(np.float32(1) / tau)
    with torch.accelerator.device_index(logits.device.index):
        _sample_tokens_kernel[(batch * triton.cdiv(num_positions, block_positions),)](
            token_ids, logprob, logits, uncond_logits, tokens, seed, num_positions, num_tokens,
            *logits.stride(), *((0, 0, 0) if uncond_logits is None else uncond_logits.stride()),
            step, mask_token_id, guidance_scale, noise_scale, inverse_temperature,
            HAS_NOISE=bool(np.float32(noise_scale) != 0), GREEDY=bool(tau == 0),
            BLOCK_POSITIONS=block_positions, BLOCK_COLUMNS=block_columns, num_warps=4, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return token_ids, logprob
