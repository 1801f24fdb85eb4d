"""What the kernels that read logits share: rows of them on their way from memory into registers.

Guidance, softcap, what is allowed, noise, temperature and what a truncated draw leaves out: csrc/rows.h once more,
operation for operation, so that every logit has the CPU's bits. What a call does not ask for is None, or a constexpr
that says so, and not in the machine code.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgt_kernels.draw import Draw
from mgt_kernels.triton.draws import STREAM_NOISE, WORD_WIDTH, block_of, exp_nonpositive, gaussian_pair, philox
from mgt_kernels.triton.scalars import (
    has_noise,
    inverse_of,
    is_per_sample,
    load_scalar,
    load_softcap,
    may_be_negative,
)

LOG2_E = tl.constexpr(1.4426950408889634)
# columns that share a run of Philox blocks
TILE_WIDTH = tl.constexpr(2048)
# larger than any token id
NO_TOKEN = tl.constexpr(2**30)


class SecondHalf(NamedTuple):
    """The second unguided half; of guidance "dual" the scale less 1."""

    ptr: tl.tensor
    stride_token: tl.tensor
    scale: tl.tensor


class Cap(NamedTuple):
    """A softcap; a magnitude that is not below `below` stays as it is."""

    softcap: tl.tensor
    two_over_softcap: tl.tensor
    below: tl.tensor


class Rows(NamedTuple):
    """What a logit is made of; pointers to the first token, everything but the scalars per position."""

    logits_ptr: tl.tensor
    uncond_ptr: tl.tensor | None
    second: SecondHalf | None
    # the same for every position
    token_bias_ptr: tl.tensor | None
    stride_token: tl.tensor
    uncond_stride_token: tl.tensor
    inside: tl.tensor
    num_tokens: tl.tensor
    mask_token_id: tl.tensor
    guidance_scale: tl.tensor
    cap: Cap | None
    noise_scale: tl.tensor
    inverse_temperature: tl.tensor
    # has a meaning where GREEDY is None: the temperature is in device memory
    is_greedy: tl.tensor
    # what a truncated draw leaves out lies below
    kept_from: tl.tensor | None
    # a guidance scale that may be below 0 would make -inf, a forbidden token, of a conditional logit of +inf
    may_forbid: tl.constexpr
    # whether guidance is "dual", not "nested"
    is_dual: tl.constexpr
    # whether what is left out counts as forbidden, or only does not race
    forbids_rest: tl.constexpr


class Counter(NamedTuple):
    """What a draw is a function of, but for the column."""

    seed: tl.tensor
    position: tl.tensor
    step: tl.tensor


@triton.jit
def position_of(first_position_ptr, sample, offs_position):
    """Compute the places in the sequence, of which draws are functions."""
    position = offs_position.to(tl.uint32)
    if first_position_ptr is not None:
        position += tl.load(first_position_ptr + sample).to(tl.uint32)
    return position


@triton.jit
def row_ptr(ptr, sample, offs_position, stride_sample, stride_position):
    """Point to the first token of each position."""
    return ptr + sample * stride_sample + offs_position.to(tl.int64) * stride_position


@triton.jit
def load_scale(scale, sample, PER_SAMPLE: tl.constexpr):
    """Return a guidance scale, of all samples or of one."""
    if PER_SAMPLE:
        scale += sample
    return load_scalar(scale, float("-inf"), float("nan"))


@triton.jit
def second_half_of(
    ptr, sample, offs_position, stride_sample, stride_position, stride_token, scale,
    PER_SAMPLE: tl.constexpr, IS_DUAL: tl.constexpr,
):  # fmt: skip
    """Return the second unguided half of some positions."""
    scale = load_scale(scale, sample, PER_SAMPLE)
    if IS_DUAL:
        scale = scale - 1.0
    return SecondHalf(row_ptr(ptr, sample, offs_position, stride_sample, stride_position), stride_token, scale)


@triton.jit
def cap_of(softcap):
    """Return a softcap."""
    softcap, below = load_softcap(softcap)
    return Cap(softcap, tl.div_rn(2.0, softcap), below)


@triton.jit
def _load_logits(ptr, stride_token, offs_token, mask):
    other = None if mask is None else float("-inf")
    return tl.load(ptr + offs_token.to(tl.int64) * stride_token, mask=mask, other=other).to(tl.float32)


@triton.jit
def _cap(cap, logit):
    """Compute c tanh(l / c), infinities left as they are: -inf still forbids, +inf is still an error."""
    sign = logit.to(tl.uint32, bitcast=True) & 0x80000000
    magnitude = tl.abs(logit)
    twice = magnitude * cap.two_over_softcap
    x = twice * 0.5
    exp = exp_nonpositive(0.0 - twice)
    far = cap.softcap * tl.div_rn(1.0 - exp, 1.0 + exp)
    # tanh(x) / x = 1 + x^2 p(x^2) for x in [0, 0.6], where 1 - exp has lost its digits
    x2 = x * x
    p = tl.fma(x2, -0.005895157810300589, 0.020795971155166626)
    p = tl.fma(p, x2, -0.053783830255270004)
    p = tl.fma(p, x2, 0.13331924378871918)
    p = tl.fma(p, x2, -0.33333298563957214)
    near = tl.fma(magnitude, x2 * p, magnitude)
    capped = tl.where(x < 0.6, near, far)
    capped = (capped.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return tl.where(magnitude < cap.below, capped, logit)


@triton.jit
def _load_half(rows, ptr, stride_token, offs_token, mask):
    logit = _load_logits(ptr, stride_token, offs_token, mask)
    if rows.cap is not None:
        logit = _cap(rows.cap, logit)
    return logit


@triton.jit
def load_guided(rows, offs_token, mask):
    """Load logits after guidance and softcap, with what is allowed."""
    logit = _load_half(rows, rows.logits_ptr, rows.stride_token, offs_token, mask)
    if rows.uncond_ptr is not None:
        uncond = _load_half(rows, rows.uncond_ptr, rows.uncond_stride_token, offs_token, mask)
        # -inf in any half forbids the token, whatever guidance would make of it
        forbidden = (logit == float("-inf")) | (uncond == float("-inf"))
        guided = tl.fma(logit - uncond, rows.guidance_scale, uncond)
        if rows.second is not None:
            second = _load_half(rows, rows.second.ptr, rows.second.stride_token, offs_token, mask)
            forbidden |= second == float("-inf")
            if rows.is_dual:
                guided = tl.fma(logit - second, rows.second.scale, guided)
            else:
                guided = tl.fma(guided - second, rows.second.scale, second)
            # +inf in any half stays an error
            largest = tl.maximum(tl.maximum(logit, uncond), second)
            guided = tl.where(largest == float("inf"), largest, guided)
        elif rows.may_forbid:
            guided = tl.where(logit == float("inf"), logit, guided)
        logit = tl.where(forbidden, float("-inf"), guided)
    if rows.token_bias_ptr is not None:
        bias = tl.load(rows.token_bias_ptr + offs_token, mask=mask, other=None if mask is None else 0.0)
        logit = tl.where(bias == float("-inf"), bias, logit + bias)
    return logit


@triton.jit
def in_layout_of(x, loaded):
    """Have draws computed in the layout of what is loaded, not exchanged with it through shared memory."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,f", [x, loaded], dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def finish_logit(rows, logit, offs_lane, base):
    """Compute l of what guidance and noise made; temperatures 0 and 1 come as 1, a product that changes no bit."""
    logit = tl.where(offs_lane == rows.mask_token_id - base, float("-inf"), logit * rows.inverse_temperature)
    if rows.kept_from is not None:
        if rows.forbids_rest:
            logit = truncated(rows, logit)
    return logit


@triton.jit
def truncated(rows, logit):
    """Forbid what a truncated draw leaves out; NaN and +inf stay."""
    return tl.where(logit < rows.kept_from, float("-inf"), logit)


@triton.jit
def racing(rows, logit):
    """Return the logits that race for the draw."""
    if rows.kept_from is not None:
        if not rows.forbids_rest:
            logit = truncated(rows, logit)
    return logit


@triton.jit
def load_columns(rows, counter, base, HAS_NOISE: tl.constexpr, IS_TAIL: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Load the four columns of each Philox block."""
    offs_lane = tl.arange(0, BLOCK_COLUMNS)[None, :]
    offs_token = base + offs_lane
    offs_1 = offs_token + WORD_WIDTH
    offs_2 = offs_1 + WORD_WIDTH
    offs_3 = offs_2 + WORD_WIDTH
    mask_0, mask_1, mask_2, mask_3 = rows.inside, rows.inside, rows.inside, rows.inside
    if IS_TAIL:
        mask_0 = offs_token < rows.num_tokens
        mask_1 = offs_1 < rows.num_tokens
        mask_2 = offs_2 < rows.num_tokens
        mask_3 = offs_3 < rows.num_tokens
        if rows.inside is not None:
            mask_0, mask_1, mask_2, mask_3 = (
                mask_0 & rows.inside,
                mask_1 & rows.inside,
                mask_2 & rows.inside,
                mask_3 & rows.inside,
            )
    logit_0 = load_guided(rows, offs_token, mask_0)
    logit_1 = load_guided(rows, offs_1, mask_1)
    logit_2 = load_guided(rows, offs_2, mask_2)
    logit_3 = load_guided(rows, offs_3, mask_3)
    if HAS_NOISE:
        word_0, word_1, word_2, word_3 = philox(
            counter.seed,
            in_layout_of(block_of(base) + offs_lane.to(tl.uint32), logit_0),
            counter.position,
            counter.step,
            STREAM_NOISE,
        )
        noise_0, noise_1 = gaussian_pair(word_0, word_1)
        noise_2, noise_3 = gaussian_pair(word_2, word_3)
        logit_0 = tl.fma(noise_0, rows.noise_scale, logit_0)
        logit_1 = tl.fma(noise_1, rows.noise_scale, logit_1)
        logit_2 = tl.fma(noise_2, rows.noise_scale, logit_2)
        logit_3 = tl.fma(noise_3, rows.noise_scale, logit_3)
    return (
        finish_logit(rows, logit_0, offs_lane, base),
        finish_logit(rows, logit_1, offs_lane, base + WORD_WIDTH),
        finish_logit(rows, logit_2, offs_lane, base + 2 * WORD_WIDTH),
        finish_logit(rows, logit_3, offs_lane, base + 3 * WORD_WIDTH),
    )


@triton.jit
def unless_greedy(rows, drawn, greedy, GREEDY: tl.constexpr):
    """Return what a draw takes, or what an argmax takes where a temperature in device memory is 0."""
    if GREEDY is None:
        return tl.where(rows.is_greedy, greedy, drawn)
    return drawn


@triton.jit
def best_of(score, logit, token):
    """Reduce the columns to the one with the best score, the lowest token among ties."""
    best_score = tl.max(score, axis=1, keep_dims=True)
    best_token = tl.min(tl.where(score == best_score, token, NO_TOKEN), axis=1, keep_dims=True)
    best_logit = tl.max(tl.where(token == best_token, logit, float("-inf")), axis=1, keep_dims=True)
    return best_score, best_logit, best_token


@triton.jit
def is_read(token, mask_token_id, READS: tl.constexpr):
    """Tell whether a position's logits are read."""
    masked = token == mask_token_id
    if READS == "masked":
        return masked
    if READS == "known":
        return not masked
    return masked | (not masked)


Strides = tuple[int, ...] | tuple[None, ...]


@functools.cache
def is_token_major(shape: torch.Size, *strides: Strides) -> bool:
    """Tell whether tokens lie side by side; otherwise positions do, which then share every sector that is read."""
    _, num_positions, num_tokens = shape
    return num_positions == 1 or num_tokens == 1 or all(half[2] in (0, 1, None) for half in strides)


class RowArguments(NamedTuple):
    """What the kernels that read logits take of a draw, in their order."""

    logits: Tensor
    uncond_logits: Tensor | None
    second_uncond_logits: Tensor | None
    token_bias: Tensor | None
    tokens: Tensor
    seed: Tensor
    first_position: Tensor | None
    step: Tensor
    # of the three halves
    strides: tuple[int | None, ...]
    # mask_token_id, guidance_scale, second_guidance_scale, softcap, noise_scale, inverse_temperature
    scalars: tuple[Any, ...]
    # the constexprs that are the kernels' in common
    guidance: dict[str, Any]
    has_noise: bool
    token_major: bool

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors but scalars, the step the last."""
        return self[:8]


_NO_STRIDES = (None, None, None)


def row_arguments(draw: Draw) -> RowArguments:
    """Return what the kernels take of a draw; tensors other than logits become contiguous."""
    logits, uncond, second = draw.logits, draw.uncond_logits, draw.second_uncond_logits
    strides = logits.stride()
    # numbers where there is no half, as ever: the launchers in C pass them
    uncond_strides = (0, 0, 0) if uncond is None else uncond.stride()
    second_strides: Strides = _NO_STRIDES if second is None else second.stride()
    guidance_scale, second_scale = _scale_of(draw.guidance_scale), None
    if second is not None:
        second_scale = _scale_of(draw.second_guidance_scale)
    # on CUDA it is a tensor
    step: Any = draw.step
    softcap = draw.softcap if isinstance(draw.softcap, Tensor) or draw.softcap < math.inf else None
    return RowArguments(
        logits, uncond, second, draw.token_bias, draw.tokens.contiguous(), draw.seed.contiguous(),
        None if draw.first_position is None else draw.first_position.contiguous(), step,
        strides=(*strides, *uncond_strides, *second_strides),
        scalars=(
            draw.mask_token_id, guidance_scale, second_scale, softcap, draw.noise_scale, inverse_of(draw.temperature)
        ),
        guidance=dict(
            MAY_FORBID=uncond is not None and may_be_negative(guidance_scale),
            SCALE_PER_SAMPLE=is_per_sample(guidance_scale), IS_DUAL=second is not None and draw.guidance == "dual",
            SECOND_SCALE_PER_SAMPLE=second_scale is not None and is_per_sample(second_scale),
        ),
        has_noise=has_noise(draw.noise_scale),
        token_major=is_token_major(logits.shape, strides, uncond_strides, second_strides),
    )  # fmt: skip


def _scale_of(scale: float | Tensor) -> float | Tensor:
    # one for each sample is read at the sample's place
    return scale.contiguous() if isinstance(scale, Tensor) and scale.ndim else scale
