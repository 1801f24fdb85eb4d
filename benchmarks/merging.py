"""`python -m mgt_benchmarks.merging`: what matching, merging and putting apart cost, and what they save.

Two samples of 1,024 tokens of 1,024 channels, a quarter to three quarters of them merged. The peer is tomesd, the
published code of token merging for Stable Diffusion, whose maps are of the same kind; pip install tomesd. What is saved
is the time of the image's stream in one of Meissonic's blocks, attention and MLP, at all tokens less at those that are
left. All are timed in turns, round by round; figures are medians.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mgt_kernels
from mgt_kernels import Match, match_tokens, merge_tokens, unmerge_tokens
from mgt_sampler.files import check_writable, write_csv

from .case import Call, in_turn
from .meissonic import DoubleBlock, Sizes, linear_maker

BATCH, SIDE, CHANNELS = 2, 32, 1024
RATIOS = (0.25, 0.5, 0.75)
# of what they save, at most; times tomesd, at least; both at a ratio of 0.5
COST_TARGET, SPEED_TARGET = 0.05, 5.0


@dataclass(frozen=True)
class Row:
    """A ratio's medians in milliseconds."""

    ratio: float
    match_ms: float
    merge_ms: float
    unmerge_ms: float
    tomesd_match_ms: float
    tomesd_merge_ms: float
    tomesd_unmerge_ms: float
    times_tomesd: float
    saved_fp32_ms: float
    saved_w4a8_ms: float
    cost_of_saved_fp32: float
    cost_of_saved_w4a8: float
    missed: str


def tomesd_calls(x: Tensor, ratio: float) -> dict[str, Callable[[], object]]:
    """The peer's three calls; none where it is not installed."""
    try:
        from tomesd.merge import bipartite_soft_matching_random2d
    except ImportError:
        return {}
    generator = torch.Generator().manual_seed(0)

    def match() -> Any:
        return bipartite_soft_matching_random2d(x, SIDE, SIDE, 2, 2, int(ratio * SIDE**2), generator=generator)

    merge, unmerge = match()
    merged = merge(x)
    return {"tomesd match": match, "tomesd merge": lambda: merge(x), "tomesd unmerge": lambda: unmerge(merged)}


def block_calls(ratio: float) -> dict[str, Callable[[], object]]:
    """A block with two streams, with all of the image's tokens and with those that are left."""
    sizes, calls = Sizes(), {}
    num_left = SIDE**2 - int(ratio * SIDE**2)
    for arithmetic in ("fp32", "w4a8"):
        block = DoubleBlock(sizes, linear_maker(arithmetic))
        text, condition = torch.randn(BATCH, sizes.num_text_tokens, CHANNELS), torch.randn(BATCH, CHANNELS)
        for name, count in (("all", SIDE**2), ("left", num_left)):
            calls[f"{arithmetic} {name}"] = _called(block, torch.randn(BATCH, count, CHANNELS), text, condition)
    return calls


def _called(block: nn.Module, *inputs: Tensor) -> Callable[[], object]:
    return lambda: block(*inputs)


def check(x: Tensor, match: Match, merged: Tensor) -> None:
    """Compare a mean and its way back with float64, before anything is timed."""
    expected = mgt_kernels.reference.merge_tokens(x, match.row, match.num_rows)
    torch.testing.assert_close(merged.double(), expected, atol=1e-6, rtol=1e-6)


def measure(ratio: float, rounds: int) -> Row:
    """Time one ratio."""
    x = torch.randn(BATCH, SIDE**2, CHANNELS, generator=torch.Generator().manual_seed(0))
    match = match_tokens(x, (SIDE, SIDE), ratio=ratio, seed=0)
    merged = merge_tokens(x, match)
    check(x, match, merged)
    calls: dict[str, Callable[[], object]] = {
        "match": lambda: match_tokens(x, (SIDE, SIDE), ratio=ratio, seed=0),
        "merge": lambda: merge_tokens(x, match),
        "unmerge": lambda: unmerge_tokens(merged, match),
        **tomesd_calls(x, ratio),
        **block_calls(ratio),
    }
    contestants = {name: Call(call) for name, call in calls.items()}
    for contestant in contestants.values():
        contestant.seconds()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name, contestant in in_turn(contestants, turn):
            times[name].append(1e3 * contestant.seconds())
    ms = {name: statistics.median(values) for name, values in times.items()}
    ours = [ms[name] for name in ("match", "merge", "unmerge")]
    theirs = [ms.get(f"tomesd {name}", float("nan")) for name in ("match", "merge", "unmerge")]
    # tokens are merged before attention and before the MLP, and put apart after each
    cost = ours[0] + 2 * (ours[1] + ours[2])
    saved = {arithmetic: ms[f"{arithmetic} all"] - ms[f"{arithmetic} left"] for arithmetic in ("fp32", "w4a8")}
    times_tomesd = sum(theirs) / sum(ours)
    missed = []
    if ratio == 0.5:
        missed += [f"cost <= {COST_TARGET:.0%} of what fp32 saves"] if cost > COST_TARGET * saved["fp32"] else []
        missed += [f">= {SPEED_TARGET:g}x tomesd"] if times_tomesd < SPEED_TARGET else []
    return Row(
        ratio=ratio,
        match_ms=ours[0],
        merge_ms=ours[1],
        unmerge_ms=ours[2],
        tomesd_match_ms=theirs[0],
        tomesd_merge_ms=theirs[1],
        tomesd_unmerge_ms=theirs[2],
        times_tomesd=times_tomesd,
        saved_fp32_ms=saved["fp32"],
        saved_w4a8_ms=saved["w4a8"],
        cost_of_saved_fp32=cost / saved["fp32"],
        cost_of_saved_w4a8=cost / saved["w4a8"],
        missed=", ".join(missed),
    )


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the results to this file.")] = None,
) -> None:
    """Time token merging beside what it saves; exit with status 1 where a target is missed."""
    if csv_file is not None:
        try:
            check_writable("--csv", csv_file)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    torch.set_num_threads(threads)
    table = []
    with torch.inference_mode():
        for ratio in RATIOS:
            print(f"ratio {ratio}", file=sys.stderr, flush=True)
            table.append(measure(ratio, rounds))
    info = mgt_kernels.info()
    print(f"isa {info['isa']}, {threads} threads, {rounds} rounds, torch {info['torch']}; milliseconds")
    shown = Table(
        "ratio", "match", "merge", "unmerge", "x tomesd", "a block saves, fp32", "cost of it", "w4a8", "cost of it",
        "missed",
    )  # fmt: skip
    for r in table:
        shown.add_row(
            f"{r.ratio}", f"{r.match_ms:.2f}", f"{r.merge_ms:.2f}", f"{r.unmerge_ms:.2f}", f"{r.times_tomesd:.1f}",
            f"{r.saved_fp32_ms:.0f}", f"{r.cost_of_saved_fp32:.1%}", f"{r.saved_w4a8_ms:.0f}",
            f"{r.cost_of_saved_w4a8:.1%}", r.missed,
        )  # fmt: skip
    Console(width=130).print(shown)
    if csv_file is not None:
        write_csv(csv_file, list(asdict(table[0])), map(asdict, table))
    if any(r.missed for r in table):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
