"""commit_tokens on the device.

Bound by: latency. One program per sample finds how many positions the rule commits, by a bisection of the 32-bit keys
of the confidences whose counts, or sums of entropies, are taken over all positions; then it selects as
mask_by_confidence does. Up to 16,384 keys stay in registers; more wait, cached, in the output until the tokens
overwrite them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgt_kernels.cpu import COMMIT_RULES
from mgt_kernels.triton.draws import LAUNCH_OPTIONS, STREAM_CONFIDENCE, gumbel, philox
from mgt_kernels.triton.launch import launch
from mgt_kernels.triton.scalars import SCALARS, has_noise, load_scalar
from mgt_kernels.triton.select import (
    KNOWN_KEY,
    LARGEST_AS_IT_IS,
    count_below,
    key_of_rank,
    load_keys,
    ordered_key,
    selection_settings,
    value_of_key,
)

_THRESHOLD = tl.constexpr(COMMIT_RULES.index("threshold"))
_FACTOR = tl.constexpr(COMMIT_RULES.index("factor"))
_ENTROPY_BOUND = tl.constexpr(COMMIT_RULES.index("entropy_bound"))

# the least key that is not NaN's: that of -inf
_LEAST_KEY = tl.constexpr(0x007FFFFF)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
# an entropy is an integer here, so that sums are exact in any order
_ENTROPY_UNITS = tl.constexpr(2.0**36)
_MOST_ENTROPY = tl.constexpr(64.0)
_MOST_ENTROPY_BOUND = tl.constexpr(2.0**20)


@triton.jit
def _load_bound(scalar):
    if scalar.dtype.is_ptr():
        return tl.load(scalar).to(tl.float32)
    else:
        return scalar


@triton.jit
def _entropy_units(key, inverse_unit):
    """Compute the entropy that a key is of, and 64 nats of NaN, in units; 0 of a position that does not compete."""
    entropy = -value_of_key(key) * inverse_unit
    entropy = tl.where(entropy != entropy, _MOST_ENTROPY, tl.minimum(tl.maximum(entropy, 0.0), _MOST_ENTROPY))
    return tl.where(key < KNOWN_KEY, (entropy * _ENTROPY_UNITS).to(tl.int64), 0)


@triton.jit
def _entropy_from(
    candidate, inverse_unit, held, keys_ptr, num_positions, BLOCK_POSITIONS: tl.constexpr, IN_REGISTERS: tl.constexpr
):
    """Sum the entropies of the positions whose key is at least `candidate`."""
    total = tl.where(held >= candidate, _entropy_units(held, inverse_unit), 0)
    if not IN_REGISTERS:
        for first in range(BLOCK_POSITIONS, num_positions, BLOCK_POSITIONS):
            key = load_keys(keys_ptr, first, num_positions, BLOCK_POSITIONS)
            total += tl.where(key >= candidate, _entropy_units(key, inverse_unit), 0)
    return tl.sum(total)


@triton.jit
def _meets_factor(n, key, inverse_unit, factor):
    """Tell whether the first n, of which the last has this key, may be committed; NaN and no position at all may."""
    # two roundings, as on the CPU
    left_out = 1.0 - (value_of_key(key) * inverse_unit).to(tl.float64)
    return (n == 0) | ((key >= _LEAST_KEY) & ((n + 1).to(tl.float64) * left_out <= factor.to(tl.float64)))


@triton.jit
def _num_by_rule(
    value,
    inverse_unit,
    num_competing,
    held,
    keys_ptr,
    num_positions,
    RULE: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """Count the positions that the rule commits."""
    # in a tensor, what would be refused as a number: no confidence reaches it
    if RULE == _THRESHOLD:
        value = load_scalar(value, float("-inf"), _LARGEST)
    else:
        value = load_scalar(value, 0.0, -1.0)
    bound = (tl.minimum(value, _MOST_ENTROPY_BOUND) * _ENTROPY_UNITS).to(tl.int64)
    # the largest key from which on not all may be committed; 0, NaN's, is one
    failing = tl.full([], 0, tl.uint32)
    for bit in range(32):
        candidate = failing + (tl.full([], 0x80000000, tl.uint32) >> bit)
        if RULE == _ENTROPY_BOUND:
            passes = (
                _entropy_from(candidate, inverse_unit, held, keys_ptr, num_positions, BLOCK_POSITIONS, IN_REGISTERS)
                <= bound
            )
        elif RULE == _FACTOR:
            n = num_competing - count_below(candidate, held, keys_ptr, num_positions, BLOCK_POSITIONS, IN_REGISTERS)
            passes = _meets_factor(n, candidate, inverse_unit, value)
        else:
            passes = (candidate > KNOWN_KEY) | (value_of_key(candidate) * inverse_unit >= value)
        failing = tl.where(passes, failing, candidate)
    num_failing_or_below = count_below(failing + 1, held, keys_ptr, num_positions, BLOCK_POSITIONS, IN_REGISTERS)
    n = num_competing - num_failing_or_below
    num_below = count_below(failing, held, keys_ptr, num_positions, BLOCK_POSITIONS, IN_REGISTERS)
    num_failing = num_failing_or_below - num_below
    # of those that have the failing key some may pass
    if RULE == _FACTOR:
        num_passing = tl.full([], 0, tl.int32)
        for bit in range(31):
            candidate = num_passing + (tl.full([], 0x40000000, tl.int32) >> bit)
            passes = (candidate <= num_failing) & _meets_factor(n + candidate, failing, inverse_unit, value)
            num_passing = tl.where(passes, candidate, num_passing)
        n += num_passing
    if RULE == _ENTROPY_BOUND:
        left = bound - _entropy_from(
            failing + 1, inverse_unit, held, keys_ptr, num_positions, BLOCK_POSITIONS, IN_REGISTERS
        )
        of_one = tl.maximum(_entropy_units(failing, inverse_unit), 1)
        # the last one's entropy is free
        n += tl.minimum(left // of_one, num_failing).to(tl.int32) + 1
        num_nan = count_below(_LEAST_KEY, held, keys_ptr, num_positions, BLOCK_POSITIONS, IN_REGISTERS)
        n = tl.where(bound < 0, 0, tl.minimum(n, num_competing - num_nan))
    return n


@triton.jit(do_not_specialize=["mask_token_id", *SCALARS])
def commit_tokens_kernel(
    after_ptr,
    done_ptr,
    token_ids_ptr,
    score_ptr,
    tokens_ptr,
    count_ptr,
    seed_ptr,
    step_ptr,
    start_ptr,
    end_ptr,
    argmax_ptr,
    max_logprob_ptr,
    known_logprob_ptr,
    num_positions,
    mask_token_id,
    value,
    temperature,
    replace_above,
    mask_below,
    RULE: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    CHUNK_POSITIONS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """Decide for a sample which of its drawn tokens stay."""
    sample = tl.program_id(0).to(tl.int64)
    seed = tl.load(seed_ptr + sample)
    step = tl.load(step_ptr).to(tl.uint32)
    temperature = load_scalar(temperature, 0.0, 0.0)
    # as in mask_by_confidence: a sum that could overflow is divided by 32
    overflows = temperature > LARGEST_AS_IT_IS
    unit = tl.where(overflows, 2.0**-5, 1.0)
    inverse_unit = tl.where(overflows, 2.0**5, 1.0)
    start = tl.full([], 0, tl.int64)
    end = start + num_positions
    if start_ptr is not None:
        start = tl.load(start_ptr + sample)
        end = tl.load(end_ptr + sample)
    # a key waits in the slot of its token
    row = sample * num_positions
    keys_ptr = after_ptr + row

    for first in range(0, num_positions, CHUNK_POSITIONS):
        offs_position = first + tl.arange(0, CHUNK_POSITIONS)
        mask = offs_position < num_positions
        inside = mask & (offs_position >= start) & (offs_position < end)
        competes = inside & (tl.load(tokens_ptr + row + offs_position, mask=mask, other=0) == mask_token_id)
        confidence = tl.load(score_ptr + row + offs_position, mask=competes, other=0.0)
        if RULE == _ENTROPY_BOUND:
            confidence = -confidence
        # +inf is the key of those that do not compete
        confidence = tl.where(confidence > _LARGEST, _LARGEST, confidence)
        if HAS_NOISE:
            position = offs_position.to(tl.uint32)
            word, _, _, _ = philox(seed, tl.zeros_like(position), position, step, STREAM_CONFIDENCE)
            confidence = tl.fma(gumbel(word), temperature * unit, confidence * unit)
        key = tl.where(competes, ordered_key(confidence), KNOWN_KEY)
        tl.store(keys_ptr + offs_position, key.to(tl.int64), mask=mask)
    # the keys are read by other threads than wrote them
    tl.debug_barrier()

    held = load_keys(keys_ptr, 0, num_positions, BLOCK_POSITIONS)
    known = tl.full([], KNOWN_KEY, tl.uint32)
    num_competing = count_below(known, held, keys_ptr, num_positions, BLOCK_POSITIONS, IN_REGISTERS)
    num_committed = tl.maximum(tl.load(count_ptr + sample), 0)
    if RULE > 0:
        num_by_rule = _num_by_rule(
            value, inverse_unit, num_competing, held, keys_ptr, num_positions, RULE, BLOCK_POSITIONS, IN_REGISTERS
        )
        num_committed = tl.maximum(num_committed, num_by_rule.to(tl.int64))
    num_left = num_competing - tl.minimum(num_committed, num_competing.to(tl.int64)).to(tl.int32)
    threshold, num_below = key_of_rank(num_left, held, keys_ptr, num_positions, BLOCK_POSITIONS, IN_REGISTERS)
    # no key may be overwritten before all threads have read theirs
    tl.debug_barrier()

    # among ties the lower positions stay masked
    num_ties_left = num_left - num_below
    num_masked = tl.full([], 0, tl.int32)
    for first in range(0, num_positions, CHUNK_POSITIONS):
        offs_position = first + tl.arange(0, CHUNK_POSITIONS)
        mask = offs_position < num_positions
        inside = mask & (offs_position >= start) & (offs_position < end)
        key = load_keys(keys_ptr, first, num_positions, CHUNK_POSITIONS)
        tied = (key == threshold).to(tl.int32)
        stays = (key < threshold) | ((tied > 0) & (tl.cumsum(tied, axis=0) <= num_ties_left))
        num_ties_left -= tl.sum(tied)
        before = tl.load(tokens_ptr + row + offs_position, mask=mask, other=0)
        competes = inside & (before == mask_token_id)
        is_known = inside & (before != mask_token_id)
        after = before
        if known_logprob_ptr is not None:
            own = tl.load(known_logprob_ptr + row + offs_position, mask=is_known, other=0.0)
            after = tl.where(is_known & (own < _load_bound(mask_below)), mask_token_id, after)
        if argmax_ptr is not None:
            likeliest = tl.load(argmax_ptr + row + offs_position, mask=is_known, other=0)
            best = tl.load(max_logprob_ptr + row + offs_position, mask=is_known, other=0.0)
            after = tl.where(is_known & (likeliest != before) & (best > _load_bound(replace_above)), likeliest, after)
        token = tl.load(token_ids_ptr + row + offs_position, mask=competes, other=0)
        after = tl.where(competes, tl.where(stays, mask_token_id, token), after)
        num_masked += tl.sum((inside & (after == mask_token_id)).to(tl.int32))
        tl.store(keys_ptr + offs_position, after, mask=mask)
    tl.store(done_ptr + sample, (num_masked == 0).to(tl.uint8))


def commit_tokens(
    token_ids: Tensor,
    score: Tensor,
    tokens: Tensor,
    count: Tensor,
    seed: Tensor,
    step: Tensor,
    mask_token_id: int,
    rule: str,
    value: float | Tensor,
    temperature: float | Tensor,
    start: Tensor | None,
    end: Tensor | None,
    argmax: Tensor | None,
    max_logprob: Tensor | None,
    replace_above: float | Tensor,
    known_logprob: Tensor | None,
    mask_below: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Run the kernel on checked arguments; see `mgt_kernels.commit_tokens`.

    A number of the rule that would be refused, in a tensor, commits no more than count; a temperature counts as 0.
    """
    (batch, num_positions), device = tokens.shape, token_ids.device
    after = torch.empty(tokens.shape, dtype=torch.int64, device=device)
    if after.numel() == 0:
        return after, torch.ones(batch, dtype=torch.bool, device=device)
    done = torch.empty(batch, dtype=torch.bool, device=device)
    rows = [None if x is None else x.contiguous() for x in (argmax, max_logprob, known_logprob)]
    samples = [None if x is None else x.contiguous() for x in (count, seed, step, start, end)]
    with torch.accelerator.device_index(device.index):
        launch(
            commit_tokens_kernel, (batch,),
            after, done.view(torch.uint8), token_ids.contiguous(), score.contiguous(), tokens.contiguous(), *samples,
            *rows, num_positions, mask_token_id, value, temperature, replace_above, mask_below,
            RULE=COMMIT_RULES.index(rule), HAS_NOISE=has_noise(temperature), **selection_settings(num_positions),
            **LAUNCH_OPTIONS,
        )  # fmt: skip
    return after, done
