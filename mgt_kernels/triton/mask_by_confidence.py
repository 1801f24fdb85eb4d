"""mask_by_confidence on the device.

Bound by: latency. One program per sample bisects the 32-bit keys of the confidences for the one of rank mask_len, a
count per bit. Up to 16,384 keys stay in registers; more wait, cached, in the output until the tokens overwrite them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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
)


@triton.jit(do_not_specialize=["mask_token_id", *SCALARS])
def mask_by_confidence_kernel(
    masked_tokens_ptr,
    token_ids_ptr,
    logprob_ptr,
    mask_len_ptr,
    seed_ptr,
    step_ptr,
    num_positions,
    mask_token_id,
    temperature,
    HAS_NOISE: tl.constexpr,
    CHUNK_POSITIONS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """Mask the least confident positions of a sample."""
    sample = tl.program_id(0).to(tl.int64)
    seed = tl.load(seed_ptr + sample)
    step = tl.load(step_ptr).to(tl.uint32)
    temperature = load_scalar(temperature, 0.0, 0.0)
    unit = tl.where(temperature > LARGEST_AS_IT_IS, 2.0**-5, 1.0)
    # a key waits in the slot of its token
    keys_ptr = masked_tokens_ptr + sample * num_positions
    token_ids_ptr += sample * num_positions
    logprob_ptr += sample * num_positions

    for first in range(0, num_positions, CHUNK_POSITIONS):
        offs_position = first + tl.arange(0, CHUNK_POSITIONS)
        mask = offs_position < num_positions
        confidence = tl.load(logprob_ptr + offs_position, mask=mask, other=float("inf"))
        if HAS_NOISE:
            position = offs_position.to(tl.uint32)
            word, _, _, _ = philox(seed, tl.zeros_like(position), position, step, STREAM_CONFIDENCE)
            confidence = tl.fma(gumbel(word), temperature * unit, confidence * unit)
        tl.store(keys_ptr + offs_position, ordered_key(confidence).to(tl.int64), mask=mask)
    # the keys are read by other threads than wrote them
    tl.debug_barrier()

    held = load_keys(keys_ptr, 0, num_positions, BLOCK_POSITIONS)
    known = tl.full([], KNOWN_KEY, tl.uint32)
    num_masked = count_below(known, held, keys_ptr, num_positions, BLOCK_POSITIONS, IN_REGISTERS)
    mask_len = tl.minimum(tl.load(mask_len_ptr + sample), num_masked.to(tl.int64)).to(tl.int32)
    threshold, num_below = key_of_rank(mask_len, held, keys_ptr, num_positions, BLOCK_POSITIONS, IN_REGISTERS)
    # no key may be overwritten before all threads have read theirs
    tl.debug_barrier()

    # among ties the lower positions
    num_ties_left = mask_len - num_below
    for first in range(0, num_positions, CHUNK_POSITIONS):
        offs_position = first + tl.arange(0, CHUNK_POSITIONS)
        mask = offs_position < num_positions
        key = load_keys(keys_ptr, first, num_positions, CHUNK_POSITIONS)
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
    step: Tensor,
    mask_token_id: int,
    temperature: float | Tensor,
) -> Tensor:
    """Run the kernel on checked arguments; see `mgt_kernels.mask_by_confidence`.

    The temperature may be a tensor, as for `sample_tokens`; a value that would be refused as a number counts as 0.
    """
    batch, num_positions = token_ids.shape
    token_ids, logprob = token_ids.contiguous(), logprob.contiguous()
    mask_len, seed = mask_len.contiguous(), seed.contiguous()
    tokens = torch.empty_like(token_ids)
    if tokens.numel() == 0:
        return tokens
    with torch.accelerator.device_index(token_ids.device.index):
        launch(
            mask_by_confidence_kernel, (batch,),
            tokens, token_ids, logprob, mask_len, seed, step, num_positions, mask_token_id, temperature,
            HAS_NOISE=has_noise(temperature), **selection_settings(num_positions), **LAUNCH_OPTIONS,
        )  # fmt: skip
    return tokens
