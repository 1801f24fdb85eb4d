"""mask_by_confidence on the device.

Bound by: latency. One program per sample bisects the 32-bit keys of the confidences for the one of rank
mask_len, a counting pass per bit over keys that wait, cached, in the output until the tokens overwrite them.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from mgt_kernels.triton.draws import LAUNCH_OPTIONS, STREAM_CONFIDENCE, gumbel, philox

# of +inf, the known positions
_KNOWN_KEY = tl.constexpr(0xFF800000)


@triton.jit
def _ordered_key(confidence):
    # unsigned order of the keys = order of the floats; -0 and 0 are one confidence
    bits = tl.where(confidence == 0.0, 0.0, confidence).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, ~bits, bits ^ (-0x80000000)).to(tl.uint32, bitcast=True).to(tl.int64)
    # a row from which nothing could be drawn is still masked, and stays so before any other
    return tl.where(confidence != confidence, 0, key)


@triton.jit(do_not_specialize=["step", "mask_token_id"])
def _mask_by_confidence_kernel(
    masked_tokens_ptr,
    token_ids_ptr,
    logprob_ptr,
    mask_len_ptr,
    seed_ptr,
    num_positions,
    step,
    mask_token_id,
    temperature,
    HAS_NOISE: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    seed = tl.load(seed_ptr + sample)
    keys_ptr = masked_tokens_ptr + sample * num_positions
    token_ids_ptr += sample * num_positions
    logprob_ptr += sample * num_positions
    offs_block = tl.arange(0, BLOCK_POSITIONS)

    num_masked = tl.zeros([BLOCK_POSITIONS], tl.int32)
    for first in range(0, num_positions, BLOCK_POSITIONS):
        offs_position = first + offs_block
        mask = offs_position < num_positions
        confidence = tl.load(logprob_ptr + offs_position, mask=mask, other=float("inf"))
        if HAS_NOISE:
            position = offs_position.to(tl.uint32)
            word, _, _, _ = philox(seed, tl.zeros_like(position), position, step, STREAM_CONFIDENCE)
            confidence = tl.fma(gumbel(word), temperature, confidence)
        key = _ordered_key(confidence)
        num_masked += (key < _KNOWN_KEY).to(tl.int32)
        tl.store(keys_ptr + offs_position, key, mask=mask)
    # the keys are read back by other threads than wrote them
    tl.debug_barrier()

    mask_len = tl.minimum(tl.load(mask_len_ptr + sample), tl.sum(num_masked).to(tl.int64))
    # the largest threshold with fewer than mask_len keys below it is the key of rank mask_len
    threshold = tl.full([], 0, tl.int64)
    num_below = tl.full([], 0, tl.int64)
    for bit in range(32):
        candidate = threshold + (tl.full([], 0x80000000, tl.int64) >> bit)
        lane_below = tl.zeros([BLOCK_POSITIONS], tl.int32)
        for first in range(0, num_positions, BLOCK_POSITIONS):
            offs_position = first + offs_block
            key = tl.load(keys_ptr + offs_position, mask=offs_position < num_positions, other=_KNOWN_KEY)
            lane_below += (key < candidate).to(tl.int32)
        below = tl.sum(lane_below).to(tl.int64)
        # positions past the end count as known ones and so never below a key that matters
        accept = below < mask_len
        threshold = tl.where(accept, candidate, threshold)
        num_below = tl.where(accept, below, num_below)

    # among ties the lower positions
    num_ties_left = mask_len - num_below
    for first in range(0, num_positions, BLOCK_POSITIONS):
        offs_position = first + offs_block
        mask = offs_position < num_positions
        key = tl.load(keys_ptr + offs_position, mask=mask, other=_KNOWN_KEY)
        tied = (key == threshold).to(tl.int32)
        chosen = (key < threshold) | ((tied > 0) & (tl.cumsum(tied, axis=0) <= num_ties_left))
        num_ties_left -= tl.sum(tied)
        token = tl.load(token_ids_ptr + offs_position, mask=mask, other=0)
        tl.store(keys_ptr + offs_position, tl.where(chosen, mask_token_id, token), mask=mask)


def mask_by_confidence(
    token_ids: Tensor,
    logprob: Tensor,
    mask_len: Tensor,
    seed: Tensor,
    step: int,
    mask_token_id: int,
    temperature: float,
) -> Tensor:
    """Run the kernel on checked arguments; see `mgt_kernels.mask_by_confidence`."""
    batch, num_positions = token_ids.shape
    token_ids, logprob = token_ids.contiguous(), logprob.contiguous()
    mask_len, seed = mask_len.contiguous(), seed.contiguous()
    tokens = torch.empty_like(token_ids)
    if tokens.numel() == 0:
        return tokens
    block_positions = min(max(triton.next_power_of_2(num_positions), 128), 4096)
    with torch.accelerator.device_index(token_ids.device.index):
        _mask_by_confidence_kernel[(batch,)](
            tokens, token_ids, logprob, mask_len, seed, num_positions, step, mask_token_id, temperature,
            HAS_NOISE=bool(np.float32(temperature) != 0), BLOCK_POSITIONS=block_positions, num_warps=8,
            **LAUNCH_OPTIONS,
        )  # fmt: skip
    return tokens
