"""Orders of the positions: scores of a rule, higher is sooner, that do not look at what was drawn.

Beside these a rule's score may be the name of a statistic, such as "margin" or "entropy", or any function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mgt_kernels import sample_tokens
from mgt_kernels.ops import Sampled

from .arguments import integer
from .state import State

# of the draws that choose an order: no generation has as many steps
_STEP_OF_ORDERS = 2**32 - 1
# more than any Gumbel noise of temperature 1 in float32, so that it orders within a group alone
_GROUP = 100.0


def random_order(sampled: Sampled, state: State) -> Tensor:
    """Equal scores, which a temperature of 1 of the selection turns into a random order: the exact reference.

    One token a step in random order draws from the model's own distribution.
    """
    return torch.zeros_like(sampled.logprob)


@dataclass(frozen=True)
class FixedOrder:
    """A given order, the same for all samples.

    Attributes:
        positions: the N positions, the first to be known first.
    """

    positions: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that each position is there once."""
        object.__setattr__(self, "positions", tuple(int(position) for position in self.positions))
        if sorted(self.positions) != list(range(len(self.positions))):
            raise ValueError(f"positions: expected each of 0 to N - 1 once, got {len(self.positions)} of them")

    def __call__(self, sampled: Sampled, state: State) -> Tensor:
        """Minus the rank of each position, (B, N)."""
        if len(self.positions) != state.tokens.shape[1]:
            raise ValueError(f"positions: expected {state.tokens.shape[1]} of them, got {len(self.positions)}")
        return -_ranks(self.positions).to(sampled.logprob).expand_as(sampled.logprob)


@dataclass(frozen=True)
class HaltonOrder:
    """The order in which the Halton sequence of bases 2 and 3 visits the cells of a grid (arXiv 2503.17076).

    Attributes:
        grid: (H, W) with H W = N; None: the square.
        roll: start at a place of the sequence that is a function of the sample's seed, and go round; False: at its
            start, all samples alike.
    """

    grid: Sequence[int] | None = None
    roll: bool = True

    def __post_init__(self) -> None:
        """Make the grid a value."""
        object.__setattr__(self, "grid", frozen_grid(self.grid))

    def __call__(self, sampled: Sampled, state: State) -> Tensor:
        """Minus the rank of each position, (B, N)."""
        num_positions = state.tokens.shape[1]
        ranks = _ranks(halton_positions(*grid_of(self.grid, num_positions))).to(sampled.logprob)
        if not self.roll:
            return -ranks.expand_as(sampled.logprob)
        start = _integers(state, num_positions)[:, None].to(ranks)
        return -((ranks - start) % num_positions)


@dataclass(frozen=True)
class CheckerboardOrder:
    """One colour of the checkerboard first, then the other, each in random order with a selection of temperature 1.

    Which is first is a function of the sample's seed. Generation, then reconstruction (arXiv 2510.17171).

    Attributes:
        grid: (H, W) with H W = N; None: the square.
    """

    grid: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Make the grid a value."""
        object.__setattr__(self, "grid", frozen_grid(self.grid))

    def __call__(self, sampled: Sampled, state: State) -> Tensor:
        """The colour's share of the score, (B, N)."""
        _, width = grid_of(self.grid, state.tokens.shape[1])
        at = torch.arange(state.tokens.shape[1], device=state.tokens.device)
        colour = (at // width + at % width + _integers(state, 2)[:, None]) % 2
        return _GROUP * colour.to(sampled.logprob)


@lru_cache
def halton_positions(height: int, width: int) -> tuple[int, ...]:
    """The cells of a grid, by number y W + x, in the order in which the Halton sequence first visits them: all of them.

    Point n = 1, 2, ... is (floor(H r_2(n)), floor(W r_3(n))), r_b the digits of n in base b, mirrored at the point.
    """

    def mirrored(n: int, base: int) -> float:
        value, scale = 0.0, 1.0
        while n:
            scale /= base
            value += scale * (n % base)
            n //= base
        return value

    found: dict[int, None] = {}
    n = 0
    while len(found) < height * width:
        n += 1
        found[int(mirrored(n, 2) * height) * width + int(mirrored(n, 3) * width)] = None
    return tuple(found)


def frozen_grid(grid: Sequence[int] | None) -> tuple[int, int] | None:
    """Height and width as a tuple.

    Raises:
        ValueError: they are not two.
    """
    if grid is None:
        return None
    if len(grid) != 2:
        raise ValueError(f"grid: expected (H, W), got {grid!r}")
    return integer("grid", grid[0]), integer("grid", grid[1])


def grid_of(grid: Sequence[int] | None, num_positions: int) -> tuple[int, int]:
    """Height and width of the tokens of an image: what is given, or the square.

    Raises:
        ValueError: it has another number of cells than there are positions.
    """
    side = math.isqrt(num_positions)
    height, width = (side, side) if grid is None else grid
    if height * width != num_positions:
        raise ValueError(f"grid: expected (H, W) with {num_positions} cells, got {height} x {width}")
    return height, width


def _integers(state: State, end: int) -> Tensor:
    """A number of 0 to end - 1 for each sample, a function of its seed alone: int64 (B,)."""
    tokens = torch.full_like(state.tokens[:, :1], end)
    logits = torch.zeros((len(tokens), 1, end), dtype=torch.float32, device=tokens.device)
    arguments = {**state.draw_arguments, "mask_token_id": end, "step": _STEP_OF_ORDERS}
    return sample_tokens(logits, tokens, **arguments).token_ids[:, 0]


@lru_cache
def _ranks(positions: tuple[int, ...]) -> Tensor:
    return torch.tensor(positions, device="cpu").argsort()
