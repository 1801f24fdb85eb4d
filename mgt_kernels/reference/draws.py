"""Random draws as functions of (seed, step, position, token id): Philox4x32-7 and what is made of its words."""

import math

import torch
from torch import Tensor

STREAM_TOKEN, STREAM_NOISE, STREAM_CONFIDENCE, STREAM_REMASK, STREAM_MERGE = range(5)
PHILOX_ROUNDS = 7
# column c takes word (c // 512) % 4 of block (c // 2048) * 512 + c % 512
WORD_WIDTH = 512

_MUL0, _MUL1 = 0xD2511F53, 0xCD9E8D57
_KEY0, _KEY1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def _mulhilo(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    # the product wraps in int64, its low and high halves do not
    product = a * m
    return (product >> 32) & _LOW, product & _LOW


def philox(seed: Tensor, block: Tensor, position: Tensor, step: int | Tensor, stream: int) -> tuple[Tensor, ...]:
    """Compute the four words of Philox4x32-7 for counters (block, position, step, stream) and 64-bit keys.

    Args:
        seed: int64, broadcastable; its two's complement halves are the key.
        block: int64 in [0, 2^32), broadcastable.
        position: int64 in [0, 2^32), broadcastable.
        step: in [0, 2^32), an int or a 0-dimensional int64 tensor.
        stream: 0 token Gumbel, 1 Gaussian logit noise, 2 confidence Gumbel, 3 re-masking at random, 4 token merging.

    Returns:
        Four int64 tensors with values in [0, 2^32).

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    seed, c0, c1 = torch.broadcast_tensors(seed, block, position)
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    # a sum, because a fill would wait for a step on a GPU
    c2, c3 = torch.zeros_like(c0) + step, torch.full_like(c0, stream)
    for _ in range(PHILOX_ROUNDS):
        hi0, lo0 = _mulhilo(c0, _MUL0)
        hi1, lo1 = _mulhilo(c2, _MUL1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ key0, lo1, hi0 ^ c3 ^ key1, lo0
        key0, key1 = (key0 + _KEY0) & _LOW, (key1 + _KEY1) & _LOW
    return c0, c1, c2, c3


def _column_words(
    seed: Tensor, num_positions: int, num_tokens: int, step: int, stream: int, first_position: int | Tensor
) -> Tensor:
    """All words of the blocks that the columns need: (4, B, N, num_blocks)."""
    full_tiles, rest = divmod(num_tokens, 4 * WORD_WIDTH)
    block = torch.arange(full_tiles * WORD_WIDTH + min(rest, WORD_WIDTH), dtype=torch.int64, device=seed.device)
    position = torch.arange(num_positions, dtype=torch.int64, device=seed.device)[:, None]
    position = position + (first_position[:, None, None] if isinstance(first_position, Tensor) else first_position)
    return torch.stack(philox(seed[:, None, None], block, position, step, stream))


def _to_columns(words: Tensor, num_tokens: int) -> Tensor:
    """Pick each column's own word: (4, B, N, num_blocks) to (B, N, V)."""
    c = torch.arange(num_tokens, dtype=torch.int64, device=words.device)
    return words[c // WORD_WIDTH % 4, :, :, c // (4 * WORD_WIDTH) * WORD_WIDTH + c % WORD_WIDTH].permute(1, 2, 0)


def _uniform(word: Tensor) -> Tensor:
    """w = (word + 1/2) 2^-32, exact in float64."""
    return (word.double() + 0.5) * 2.0**-32


def _gumbel(word: Tensor) -> Tensor:
    """g = -log(E), E = -log1p(-w)."""
    return -torch.log(-torch.log1p(-_uniform(word)))


def token_gumbel(
    seed: Tensor, num_positions: int, num_tokens: int, step: int, first_position: int | Tensor = 0
) -> Tensor:
    """Return the Gumbel(0, 1) noise that races the tokens: (B, N, V) float64."""
    words = _column_words(seed, num_positions, num_tokens, step, STREAM_TOKEN, first_position)
    return _gumbel(_to_columns(words, num_tokens))


def _position_gumbel(seed: Tensor, num_positions: int, step: int | Tensor, stream: int) -> Tensor:
    """Word 0 of block 0 of each position as Gumbel(0, 1) noise: (B, N) float64."""
    position = torch.arange(num_positions, dtype=torch.int64, device=seed.device)
    return _gumbel(philox(seed[:, None], torch.zeros_like(position), position, step, stream)[0])


def confidence_gumbel(seed: Tensor, num_positions: int, step: int) -> Tensor:
    """Return the Gumbel(0, 1) noise of the confidences: (B, N) float64, word 0 of block 0 of each position."""
    return _position_gumbel(seed, num_positions, step, STREAM_CONFIDENCE)


def remask_gumbel(seed: Tensor, num_positions: int, step: int | Tensor) -> Tensor:
    """Return the Gumbel(0, 1) noise by which `remask_tokens` chooses at random: (B, N) float64."""
    return _position_gumbel(seed, num_positions, step, STREAM_REMASK)


def merge_corner(seed: Tensor, num_cells: int, step: int | Tensor) -> Tensor:
    """Return which corner of each cell, in reading order, the others merge into: (B, num_cells) int64 in [0, 4)."""
    cell = torch.arange(num_cells, dtype=torch.int64, device=seed.device)
    return philox(seed[:, None], torch.zeros_like(cell), cell, step, STREAM_MERGE)[0] >> 30


def gaussian(seed: Tensor, num_positions: int, num_tokens: int, step: int, first_position: int | Tensor = 0) -> Tensor:
    """Return the N(0, 1) noise of the logits: (B, N, V) float64.

    Box-Muller on the words of a block: words (0, 1) make the values of columns 0 and 1, words (2, 3) those of 2 and 3,
    sqrt(-2 log w_a) cos(2 pi b / 2^32) and sqrt(-2 log w_a) sin(2 pi b / 2^32).
    """
    words = _column_words(seed, num_positions, num_tokens, step, STREAM_NOISE, first_position)
    radius = torch.sqrt(-2 * torch.log(_uniform(words[0::2])))
    angle = 2 * math.pi * words[1::2].double() * 2.0**-32
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return _to_columns(pairs.flatten(0, 1), num_tokens)
