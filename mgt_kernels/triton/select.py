"""What the kernels with a program per sample share: they select positions by the rank of a 32-bit key.

Up to 16,384 keys stay in registers; more are read again, cached, for each count.
"""

from typing import Any

import triton
import triton.language as tl

from mgt_kernels.triton.launch import next_power_of_2

# the key of +inf, which known positions have
KNOWN_KEY = tl.constexpr(0xFF800000)
# Of the temperature of confidences. Only known positions may have the key of +inf: where a sum could overflow, both of
# its terms are divided by 32, for |g| < 23. Up to 2^90 the noise is less than half a unit in the last place of the
# largest float.
LARGEST_AS_IT_IS = tl.constexpr(2.0**90)

# keys that the registers of a program hold
MAX_BLOCK = 16384


def selection_settings(num_positions: int) -> dict[str, Any]:
    """Return the constexprs and the warps of a kernel that selects among these positions of a sample."""
    block_positions = min(max(next_power_of_2(num_positions), 128), MAX_BLOCK)
    return settings_of_block(block_positions, block_positions >= num_positions)


def settings_of_block(block_positions: int, in_registers: bool) -> dict[str, Any]:
    """Return the settings for keys that are taken so many at a time, which may be all of them."""
    num_warps = min(max(block_positions // 256, 1), 16)
    return dict(
        CHUNK_POSITIONS=min(block_positions, 128 * num_warps), BLOCK_POSITIONS=block_positions,
        IN_REGISTERS=in_registers, num_warps=num_warps,
    )  # fmt: skip


@triton.jit
def ordered_key(confidence):
    """Compute the key of a float; NaN has the lowest."""
    # unsigned order of the keys = order of the floats; -0 and 0 are one confidence
    bits = tl.where(confidence == 0.0, 0.0, confidence).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, ~bits, bits ^ (-0x80000000)).to(tl.uint32, bitcast=True)
    # a row from which nothing could be drawn is still masked, and stays so before any other
    return tl.where(confidence != confidence, 0, key)


@triton.jit
def value_of_key(key):
    """Compute the float that a key is of."""
    bits = tl.where(key >= 0x80000000, key & 0x7FFFFFFF, ~key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def count_below(candidate, held, keys_ptr, num_positions, BLOCK_POSITIONS: tl.constexpr, IN_REGISTERS: tl.constexpr):
    """Count the keys below a candidate: those held, and those of the blocks after them."""
    below = (held < candidate).to(tl.int32)
    if not IN_REGISTERS:
        for first in range(BLOCK_POSITIONS, num_positions, BLOCK_POSITIONS):
            below += (load_keys(keys_ptr, first, num_positions, BLOCK_POSITIONS) < candidate).to(tl.int32)
    return tl.sum(below)


@triton.jit
def key_of_rank(rank, held, keys_ptr, num_positions, BLOCK_POSITIONS: tl.constexpr, IN_REGISTERS: tl.constexpr):
    """Find the largest threshold with fewer than `rank` keys below it, and how many these are."""
    threshold = tl.full([], 0, tl.uint32)
    num_below = tl.full([], 0, tl.int32)
    for bit in range(32):
        candidate = threshold + (tl.full([], 0x80000000, tl.uint32) >> bit)
        below = count_below(candidate, held, keys_ptr, num_positions, BLOCK_POSITIONS, IN_REGISTERS)
        accept = below < rank
        threshold = tl.where(accept, candidate, threshold)
        num_below = tl.where(accept, below, num_below)
    return threshold, num_below


@triton.jit
def load_keys(keys_ptr, first, num_positions, BLOCK_POSITIONS: tl.constexpr):
    """Load the keys of a block of positions."""
    offs_position = first + tl.arange(0, BLOCK_POSITIONS)
    # positions past the end count as known ones and so never below a key that matters
    return tl.load(keys_ptr + offs_position, mask=offs_position < num_positions, other=KNOWN_KEY).to(tl.uint32)
