"""Token merging: which tokens of a grid are alike, their means, and back; checked here and handed to a backend."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mgt_kernels import cpu, reference
from mgt_kernels.checks import (
    check_backend,
    check_range,
    check_shape,
    check_step,
    check_step_range,
    check_tensor,
    integer,
    is_a,
    number,
    per_sample,
)
from mgt_kernels.registration import register

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# a 2 x 2 cell keeps one of its four tokens
MAX_RATIO = 0.75


class Match(NamedTuple):
    """Which tokens are merged, as `match_tokens` returns it.

    Attributes:
        row: int64 (B, N), the row that each token has among the merged ones: the kept tokens' are 0, 1, ... in reading
            order, and a merged token has its destination's.
        members: int64 (B, N), the tokens of row 0, those of row 1, ..., each row's in reading order.
        starts: int64 (B, N + 1), where each row's begin in members; N from the last row on.
        num_rows: M, of `merge_tokens`: the same for all samples by a ratio; by a threshold the most that a sample has.
    """

    row: Tensor
    members: Tensor
    starts: Tensor
    num_rows: int

    @property
    def sizes(self) -> Tensor:
        """How many tokens each row is the mean of, int64 (B, M); 0 where a sample has fewer rows."""
        return self.starts[:, 1 : self.num_rows + 1] - self.starts[:, : self.num_rows]


def match_tokens(
    x: Tensor,
    grid: tuple[int, int],
    *,
    ratio: float | None = None,
    threshold: float | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    backend: str = "auto",
) -> Match:
    r"""Find the tokens of a grid that are most like another one: bipartite soft matching in 2 x 2 cells.

    One token of each cell is a destination, the other three are sources::

        corner      = word >> 30, word a random function of (seed, step, cell)      0 (top left) without a seed
        cosine_s    = max_d  x_s . x_d / (|x_s| |x_d|)        over all destinations; among ties the lowest position
        merged      = the floor(ratio N) sources with the largest cosine            among ties the lower position first
                      or all with cosine >= threshold

    A merged source joins the destination that it is most like. Sums are float32, in the order of the channels, so all
    CPU instruction sets give the same match. Where two cosines differ by less than their rounding, a GPU may give
    another. The cosine of a token to its copy may round to less than 1, and it is 0 for a token whose squares add up to
    0 in float32. A sample's match depends on nothing but the sample.

    Args:
        x: (B, N, C) float32, bfloat16 or float16, finite, with squares that float32 can sum: the tokens of a grid in
            reading order. Unit stride over channels is read in place, other layouts are copied.
        grid: (height, width), both even, N = height width.
        ratio: of the tokens that are merged, in [0, 0.75]. Either it or threshold is given.
        threshold: the smallest cosine that is merged, in [-1, 1]. How many that is waits for the device.
        seed: (B,), or one integer, with which all samples get the same corners; None: the top left ones.
        step: index of the decoding step, within [0, 2^32); an integer or a 0-dimensional tensor.
        backend: "auto" (CPU: the best instruction set, or MGT_ISA; CUDA: Triton), or one of "reference", "scalar",
            "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx", "triton".

    Returns:
        The match.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape, device or range is wrong, both or neither of ratio and threshold are given, or a token
            holds NaN or inf or has a sum of squares beyond float32 (the message names it; on CUDA, where raising would
            wait for the device, such a token is like none and merges last).
        RuntimeError: if the backend asked for is not available.

    Source: token merging for fast Stable Diffusion (arXiv 2303.17604); TomeMGT (arXiv 2411.10781).
    """
    check_tensor("x", x, 3, _DTYPES)
    batch, num_tokens, num_channels = x.shape
    height, width = check_grid(grid, num_tokens)
    if num_channels < 1:
        raise ValueError(f"x: expected at least one channel, got shape {tuple(x.shape)}")
    if (ratio is None) == (threshold is None):
        given = "neither" if ratio is None else "both"
        raise ValueError(f"ratio, threshold: expected one of them, got {given}")
    num_merged, bound = -1, 0.0
    if ratio is not None:
        num_merged = int(check_ratio(ratio) * num_tokens)
    else:
        bound = _number("threshold", threshold)
        if not -1 <= bound <= 1:
            raise ValueError(f"threshold: expected a number within [-1, 1], got {bound}")
    row, members, starts, num_rows = _call_match_tokens(
        _channels_last(x), height, width, num_merged, bound,
        None if seed is None else per_sample("seed", seed, batch, x.device), check_step(step, x.device),
        check_backend(backend, x.device),
    )  # fmt: skip
    if num_merged >= 0:
        return Match(row, members, starts, num_tokens - num_merged)
    return Match(row, members, starts, int(num_rows.max()) if batch else 0)


def merge_tokens(x: Tensor, match: Match, *, backend: str = "auto") -> Tensor:
    r"""Average the tokens that a match puts together.

    With R_m the tokens n of a sample with row[n] = m::

        y[m] = (sum_{n in R_m} x[n]) / |R_m|              float32, n in reading order; 0 where R_m is empty

    A row of one token is that token, to the bit.

    Args:
        x: (B, N, C) float32, bfloat16 or float16: the tokens, or anything else that belongs to them, such as a rotary
            table, (N, C) expanded to the batch. Unit stride over channels is read in place, other layouts are copied.
        match: of as many samples and tokens.
        backend: as for `match_tokens`.

    Returns:
        (B, M, C) of the dtype of x, M = match.num_rows.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape or device is wrong, or the match is none that `match_tokens` returns.
        RuntimeError: if the backend asked for is not available.

    Source: token merging, arXiv 2210.09461.
    """
    check_tensor("x", x, 3, _DTYPES)
    _check_match(match, x.shape[0], x.device)
    num_tokens = match.row.shape[1]
    if x.shape[1] != num_tokens:
        raise ValueError(f"x: expected {num_tokens} tokens, as the match has, got shape {tuple(x.shape)}")
    merged: Tensor = _call_merge_tokens(
        _channels_last(x), match.row, match.members, match.starts, match.num_rows, check_backend(backend, x.device)
    )
    return merged


def unmerge_tokens(x: Tensor, match: Match, *, backend: str = "auto") -> Tensor:
    r"""Give every token the row of the one that it was merged into: y[n] = x[row[n]].

    Args:
        x: (B, M, C) float32, bfloat16 or float16, M = match.num_rows. Unit stride over channels is read in place.
        match: of as many samples.
        backend: as for `match_tokens`.

    Returns:
        (B, N, C) of the dtype of x. At ratio 0, unmerge_tokens(merge_tokens(x)) is x.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape or device is wrong, or the match is none that `match_tokens` returns.
        RuntimeError: if the backend asked for is not available.

    Source: token merging for fast Stable Diffusion, arXiv 2303.17604.
    """
    check_tensor("x", x, 3, _DTYPES)
    _check_match(match, x.shape[0], x.device)
    if x.shape[1] != match.num_rows:
        raise ValueError(f"x: expected {match.num_rows} rows, as the match has, got shape {tuple(x.shape)}")
    unmerged: Tensor = _call_unmerge_tokens(_channels_last(x), match.row, check_backend(backend, x.device))
    return unmerged


def check_ratio(ratio: object, name: str = "ratio") -> float:
    """Return the share of tokens to merge, checked."""
    value = _number(name, ratio)
    if not 0 <= value <= MAX_RATIO:
        raise ValueError(f"{name}: expected a number within [0, {MAX_RATIO}], got {value}")
    return value


def check_grid(grid: tuple[int, int], num_tokens: int) -> tuple[int, int]:
    """Return the sides of a grid of so many tokens, checked."""
    if not isinstance(grid, (tuple, list, torch.Size)) or len(grid) != 2:
        raise TypeError(f"grid: expected (height, width), got {grid!r}")
    height, width = (integer("grid", side) for side in grid)
    if height < 2 or width < 2 or height % 2 or width % 2:
        raise ValueError(f"grid: expected even sides, which 2 x 2 cells tile, got ({height}, {width})")
    if height * width != num_tokens:
        raise ValueError(f"grid: expected sides whose product is the {num_tokens} tokens of x, got ({height}, {width})")
    return height, width


def _number(name: str, value: object) -> float:
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a number, got a tensor; it decides on sizes")
    try:
        plain = number(name, value, torch.device("cpu"))
    except TypeError:
        # of numbers elsewhere, a tensor is one
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}") from None
    assert not isinstance(plain, Tensor)
    check_range(name, plain, -math.inf)
    return plain


def _check_match(match: Match, batch: int, device: torch.device) -> None:
    if not is_a(match, Match):
        raise TypeError(f"match: expected a Match, as match_tokens returns it, got {type(match).__name__}")
    check_tensor("match.row", match.row, 2, (torch.int64,), device)
    num_tokens = match.row.shape[1]
    check_shape("match.row", match.row, (batch, num_tokens))
    check_tensor("match.members", match.members, 2, (torch.int64,), device)
    check_shape("match.members", match.members, (batch, num_tokens))
    check_tensor("match.starts", match.starts, 2, (torch.int64,), device)
    check_shape("match.starts", match.starts, (batch, num_tokens + 1))
    num_rows = integer("match.num_rows", match.num_rows)
    if not (0 < num_rows <= num_tokens or (num_rows == 0 and batch == 0)):
        raise ValueError(f"match.num_rows: expected a value within [1, {num_tokens}], the tokens, got {num_rows}")


def _channels_last(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _reference_match_tokens(
    x: Tensor,
    height: int,
    width: int,
    num_merged: int,
    threshold: float,
    seed: Tensor | None,
    step: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.device.type == "cpu":
        token = cpu.first_index(~x.float().square().sum(-1).isfinite())
        if token >= 0:
            raise cpu.bad_token_state(token, x.shape[1])
    batch = x.shape[0]
    seeds = torch.zeros(batch, dtype=torch.int64, device=x.device)
    if seed is not None:
        seeds = seeds + seed
    # the kernels compare in float32
    bound = float(torch.tensor(threshold, dtype=torch.float32, device="cpu"))
    return reference.match_tokens(x, height, width, num_merged, bound, seeds, step, seed is not None)


def _reference_merge_tokens(
    x: Tensor, row: Tensor, members: Tensor, starts: Tensor, num_rows: int, backend: str
) -> Tensor:
    num_tokens = x.shape[1]
    begins, ends = starts[:, :num_rows], starts[:, 1 : num_rows + 1]
    if x.device.type == "cpu":
        is_listed = (starts[:, 0] == 0) & (starts[:, num_rows] == num_tokens) & (begins <= ends).all(-1)
        is_listed &= ((members >= 0) & (members < num_tokens)).all(-1)
        bad = cpu.first_index(~is_listed)
        if bad >= 0:
            raise cpu.bad_match(bad)
    if x.numel() == 0:
        return x.new_zeros(len(x), num_rows, x.shape[2])
    # by what the kernels read: each row's tokens one after the other
    listed = reference.unmerge_tokens(x, members)
    place = torch.arange(num_tokens, device=x.device).repeat(len(x), 1)
    row = torch.searchsorted(ends.contiguous(), place, right=True)
    mean = reference.merge_tokens(listed, row, num_rows).to(x.dtype)
    # a row of one token is that token, which float64 need not keep: -0, and the bits of NaN
    bits, copied = (y.view(torch.int32 if x.dtype == torch.float32 else torch.int16) for y in (mean, listed))
    sample, single = (ends - begins == 1).nonzero(as_tuple=True)
    bits[sample, single] = copied[sample, begins[sample, single]]
    return mean


def _reference_unmerge_tokens(x: Tensor, row: Tensor, backend: str) -> Tensor:
    if x.device.type == "cpu":
        bad = cpu.first_index(((row < 0) | (row >= x.shape[1])).any(-1))
        if bad >= 0:
            raise cpu.bad_match(bad)
    return reference.unmerge_tokens(x, row)


def _fake_match_tokens(x, *_):  # type: ignore[no-untyped-def]
    batch, num_tokens, _channels = x.shape
    shapes = (batch, num_tokens), (batch, num_tokens), (batch, num_tokens + 1), (batch,)
    return tuple(x.new_empty(shape, dtype=torch.int64) for shape in shapes)


def _fake_merge_tokens(x, row, members, starts, num_rows, *_):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], num_rows, x.shape[2])


def _fake_unmerge_tokens(x, row, *_):  # type: ignore[no-untyped-def]
    return x.new_empty(*row.shape, x.shape[2])


_call_match_tokens = register(
    "match_tokens",
    _reference_match_tokens,
    _fake_match_tokens,
    cpu.match_tokens,
    per_sample=("seed",),
    numbers={"step": check_step_range},
)
_call_merge_tokens = register("merge_tokens", _reference_merge_tokens, _fake_merge_tokens, cpu.merge_tokens)
_call_unmerge_tokens = register("unmerge_tokens", _reference_unmerge_tokens, _fake_unmerge_tokens, cpu.unmerge_tokens)
