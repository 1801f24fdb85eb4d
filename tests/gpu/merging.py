"""The cases of match_tokens, merge_tokens and unmerge_tokens; cases.py puts them among its own."""

from collections.abc import Callable

import torch
from torch import Tensor

from mgt_kernels import reference
from mgt_kernels.reference.match_tokens import destinations, similarities
from mgt_kernels.registration import CALLS

Outputs = tuple[Tensor, ...]
# the fields of a `cases.Case`
Fields = tuple[str, str, Callable[[], tuple], Callable[..., Outputs], Callable[[tuple, Outputs, Outputs], None]]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_SEEDS = (5, -(2**63) + 7, 2**63 - 1)


def match_case(
    name: str,
    grid: tuple[int, int],
    num_channels: int,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    ratio: float | None = None,
    threshold: float = 0.0,
    seeded: bool = True,
    edit: Callable[[Tensor], Tensor] = lambda x: x,
    is_exact: bool = False,
) -> Fields:
    """Make a case of normally distributed tokens, which `edit` may change.

    is_exact: whether all cosines are floats, so that ties are ties.
    """
    height, width = grid
    num_tokens = height * width
    num_merged = -1 if ratio is None else int(ratio * num_tokens)

    def make_arguments() -> tuple:
        generator = torch.Generator().manual_seed(num_tokens + num_channels)
        x = edit(torch.randn(batch, num_tokens, num_channels, generator=generator)).to(dtype)
        seed = torch.tensor(_SEEDS[:batch]) if seeded else None
        return x, height, width, num_merged, threshold, seed, torch.tensor(3)

    return "match_tokens", name, make_arguments, expected_match, check_exact if is_exact else check_match


def expected_match(
    x: Tensor, height: int, width: int, num_merged: int, threshold: float, seed: Tensor | None, step: Tensor
) -> Outputs:
    """Return the match in float64; a token without a finite sum of squares is like none."""
    seeds = torch.zeros(len(x), dtype=torch.int64) if seed is None else seed
    is_bad = ~x.float().square().sum(-1).isfinite()
    if not is_bad.any():
        bound = float(torch.tensor(threshold, dtype=torch.float32))
        return reference.match_tokens(x, height, width, num_merged, bound, seeds, int(step), seed is not None)
    merged, nearest = [], []
    for sample, bad in enumerate(is_bad):
        to = destinations(height, width, seeds[sample : sample + 1], int(step), seed is not None)[0].sort().values
        # without those that are bad the others meet the same ones
        good = to[~bad[to]]
        cosine, destination = torch.full(bad.shape, -torch.inf, dtype=torch.float64), to[:1].expand_as(bad)
        if len(good):
            alike, most_like = similarities(x[sample : sample + 1].nan_to_num(0, 0, 0), good[None])
            cosine, destination = torch.where(bad, cosine, alike[0]), torch.where(bad, destination, most_like[0])
        is_source = torch.ones_like(bad).index_fill_(0, to, False)
        if num_merged < 0:
            chosen = is_source & (cosine >= threshold)
        else:
            # destinations last, after what is like none
            order = cosine.clamp(min=-2).masked_fill(~is_source, -3).argsort(descending=True, stable=True)
            chosen = torch.zeros_like(is_source).index_fill_(0, order[:num_merged], True)
        merged.append(chosen)
        nearest.append(destination)
    return match_of(torch.stack(merged), torch.stack(nearest))


def match_of(merged: Tensor, nearest: Tensor) -> Outputs:
    """Return the match in which these tokens are merged into those."""
    kept_row = (~merged).long().cumsum(-1) - 1
    row = torch.where(merged, kept_row.gather(1, nearest), kept_row)
    return row, *listed(row), (~merged).sum(-1)


def listed(row: Tensor) -> Outputs:
    """Return the members and the starts that belong to the rows."""
    sizes = torch.zeros_like(row).scatter_add_(1, row, torch.ones_like(row))
    return row.argsort(dim=-1, stable=True), torch.cat([row.new_zeros(len(row), 1), sizes.cumsum(-1)], dim=1)


def check_exact(arguments: tuple, expected: Outputs, outputs: Outputs) -> None:
    """The match is the reference's."""
    for name, ours, theirs in zip(("row", "members", "starts", "num_rows"), outputs, expected, strict=True):
        assert torch.equal(ours, theirs), f"{name}: {int((ours != theirs).sum())} differ"


def check_match(arguments: tuple, expected: Outputs, outputs: Outputs) -> None:
    """The match is the reference's, or what differs is as alike in float64 as float32 can tell."""
    x, height, width, num_merged, threshold, seed, step = arguments
    is_bad = ~x.float().square().sum(-1).isfinite()
    if is_bad.any() or all(torch.equal(ours, theirs) for ours, theirs in zip(outputs, expected, strict=True)):
        check_exact(arguments, expected, outputs)
        return
    seeds = torch.zeros(len(x), dtype=torch.int64) if seed is None else seed
    to = destinations(height, width, seeds, int(step), seed is not None).sort(-1).values
    is_source = torch.ones(x.shape[:2], dtype=torch.bool).scatter_(1, to, False)
    # each row has one destination at most, which the sources that share the row are merged into
    row = outputs[0]
    of_row = torch.full_like(row, -1).scatter_(1, row.gather(1, to), to)
    nearest = of_row.gather(1, row)
    merged = is_source & (nearest >= 0)
    check_exact(arguments, match_of(merged, nearest.clamp(min=0)), outputs)
    # a sum of as many terms, each added with an error of a unit in the last place, and the norms
    rounding = (x.shape[-1] + 8) * 2.0**-23
    best, _ = similarities(x, to)
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    taken = (unit * unit.gather(1, nearest.clamp(min=0)[..., None].expand_as(unit))).sum(-1)
    assert (taken[merged] >= best[merged] - rounding).all(), "a source joins what it is not most like"
    for of_sample, chosen, others in zip(best, merged, is_source & ~merged, strict=True):
        if num_merged >= 0:
            assert int(chosen.sum()) == num_merged
            bound = of_sample[chosen | others].sort(descending=True).values[max(num_merged - 1, 0)]
        else:
            bound = torch.tensor(threshold, dtype=torch.float64)
        assert (of_sample[chosen] >= bound - rounding).all(), "a source merges that is less alike than another"
        assert (of_sample[others] <= bound + rounding).all(), "a source is kept that is more alike than another"


def few_kinds(x: Tensor) -> Tensor:
    """Return tokens with one channel of 1 or -1 each, so that cosines are -1, 0 or 1, and many of them."""
    channel = x.abs().argmax(-1, keepdim=True) % 5
    return torch.zeros_like(x).scatter_(-1, channel, x[..., :1].sign())


def bad_tokens(x: Tensor) -> Tensor:
    """Make some tokens NaN, inf or too large to be squared, and some 0."""
    x = x.clone()
    x[0, ::7, 1] = torch.nan
    x[0, 3::16, 2] = torch.inf
    x[-1, 5::9] = -torch.inf
    # the top left corners of a line of cells
    x[-1, : x.shape[1] // 4 : 2, 0] = torch.nan
    x[:, 10:12] = 0
    return x


def too_large(x: Tensor) -> Tensor:
    """Make the squares of some tokens, finite themselves, overflow."""
    x = x.clone()
    x[:, ::5] *= 1e19
    x[:, 1::5] *= 1e-15
    x[:, 2::5] *= 1e15
    return x


def rows_apart(x: Tensor) -> Tensor:
    """Return the tokens with others between them, and the samples with a gap."""
    batch, num_tokens, num_channels = x.shape
    wide = torch.full((batch, num_tokens + 3, 2 * num_channels), 9.0, dtype=x.dtype)
    wide[:, 3:, :num_channels] = x
    return wide[:, 3:, :num_channels]


def a_match(batch: int, num_tokens: int, num_rows: int) -> Outputs:
    """Return row, members and starts in which rows have from none to many tokens."""
    generator = torch.Generator().manual_seed(num_tokens)
    row = (torch.rand(batch, num_tokens, generator=generator) ** 2 * (num_rows - 1)).long()
    row[0, : num_tokens // 3] = num_rows // 2
    return row, *listed(row)


def special_tokens(x: Tensor) -> Tensor:
    """Put a NaN with bits of its own, -0 and inf among them."""
    x = x.clone()
    x[:, ::5] = -0.0
    x[:, 4::11] = torch.inf
    bits = x.view(torch.int32 if x.dtype == FP32 else torch.int16)
    bits[:, 2::13] = 0x7FC12345 if x.dtype == FP32 else 0x7FC5
    return x


def on_cpu(op: str) -> Callable[..., Outputs]:
    """Return the op on the best instruction set of the CPU."""
    return lambda *arguments: (CALLS[op](*arguments, "auto"),)


def check_bits(arguments: tuple, expected: Outputs, outputs: Outputs) -> None:
    """The rows have the CPU's bits; of a mean, NaN has none of its own."""
    (ours,), (theirs,) = outputs, expected
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    bits = torch.int32 if ours.dtype == FP32 else torch.int16
    same = ours.view(bits) == theirs.view(bits)
    if len(arguments) > 2:
        # what merge_tokens averages
        starts, num_rows = arguments[3], arguments[4]
        is_mean = (starts[:, 1 : num_rows + 1] - starts[:, :num_rows] > 1)[..., None]
        same |= is_mean & ours.isnan() & theirs.isnan()
    assert same.all(), f"{int((~same).sum())} values differ"


def merge_case(
    name: str,
    num_tokens: int,
    num_rows: int,
    num_channels: int,
    dtype: torch.dtype,
    *,
    batch: int = 3,
    edit: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[Fields]:
    """Make a case of merge_tokens and one of unmerge_tokens."""

    def tokens(count: int) -> Tensor:
        generator = torch.Generator().manual_seed(count + num_channels)
        return edit(torch.randn(batch, count, num_channels, generator=generator).to(dtype))

    def make_merged() -> tuple:
        return tokens(num_tokens), *a_match(batch, num_tokens, num_rows), num_rows

    def make_unmerged() -> tuple:
        return tokens(num_rows), a_match(batch, num_tokens, num_rows)[0]

    return [
        ("merge_tokens", f"merge {name}", make_merged, on_cpu("merge_tokens"), check_bits),
        ("unmerge_tokens", f"unmerge {name}", make_unmerged, on_cpu("unmerge_tokens"), check_bits),
    ]


MERGING: list[Fields] = [
    match_case("match bf16, batch 3", (8, 12), 100, BF16, batch=3, ratio=0.5),
    match_case("match bf16, two blocks of destinations", (24, 22), 200, BF16, ratio=0.5),
    match_case("match fp16, no seed, all sources", (16, 16), 64, FP16, ratio=0.75, seeded=False),
    match_case("match fp16, a line of cells, threshold -1", (2, 34), 16, FP16, threshold=-1.0),
    match_case("match fp32, threshold", (6, 10), 37, FP32, batch=3, threshold=0.3),
    match_case("match fp32, two blocks of destinations", (24, 22), 48, FP32, ratio=0.3),
    match_case("match bf16, threshold no one reaches, rows apart", (10, 8), 40, BF16, threshold=1.0, edit=rows_apart),
    match_case("match fp32, nothing merges, one channel", (4, 4), 1, FP32, batch=2, ratio=0.0),
    match_case("match fp32, one sample for all", (8, 8), 24, FP32, batch=3, ratio=0.5,
               edit=lambda x: x[:1].expand_as(x)),
    *[
        match_case(f"match {name}, ties{', no seed' * (not seeded)}", (12, 20), 16, dtype, batch=3, ratio=ratio,
                   threshold=threshold, seeded=seeded, edit=few_kinds, is_exact=True)
        for name, dtype, ratio, threshold, seeded in (
            ("bf16", BF16, 0.4, 0.0, True), ("fp32", FP32, 0.7, 0.0, True), ("fp16", FP16, None, 1.0, False),
        )
    ],
    match_case("match bf16, bad tokens", (8, 12), 48, BF16, batch=3, ratio=0.5, edit=bad_tokens),
    match_case("match fp16, bad tokens, threshold -1", (8, 12), 48, FP16, batch=2, threshold=-1.0, edit=bad_tokens),
    match_case("match fp32, bad tokens, all sources", (8, 12), 20, FP32, batch=2, ratio=0.75, seeded=False,
               edit=bad_tokens),
    match_case("match fp32, squares that overflow", (8, 8), 32, FP32, batch=2, ratio=0.5, edit=too_large),
    match_case("match fp32, bad alone", (4, 4), 8, FP32, ratio=0.5, edit=lambda x: x * torch.nan),
    *merge_case("bf16", 70, 41, 256, BF16),
    *merge_case("fp16, odd", 33, 20, 100, FP16, edit=special_tokens),
    *merge_case("fp32, two blocks of channels", 40, 40, 300, FP32, edit=special_tokens),
    *merge_case("bf16, rows apart", 65, 30, 35, BF16, edit=rows_apart),
    *merge_case("fp32, a table for all samples", 48, 17, 64, FP32, edit=lambda x: x[:1].expand_as(x)),
    *merge_case("bf16, one channel, apart", 9, 5, 1, BF16, edit=lambda x: torch.stack([x, x], -1)[..., 0]),
]  # fmt: skip
