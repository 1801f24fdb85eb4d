"""Static lower bounds: the least time that published figures of a GPU leave for the code of a kernel.

A bound knows how many instructions go to each pipe and how many bytes have to move. It knows nothing of latency, bank
conflicts, cache misses or waiting at barriers, and so says what a kernel cannot beat, not what it takes.

    python tests/gpu/roofline.py --markdown
    python tests/gpu/roofline.py --update docs/gpu.md
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path

import sass
from configurations import CONFIGURATIONS, Counted, compile_for
from gpus import GPUS, LANES, PARTITIONS, Gpu, Occupancy, occupancy
from sass import Pipe

# above this multiple of the memory (or tensor) time a case has to say why
MOST_WITHOUT_REASON = 1.5
# whose code the table in docs/gpu.md is of
TRITON = "3.9.0"
BEGIN, END = "<!-- roofline -->", "<!-- /roofline -->"
# the columns of the table; what else bounds a row is named by it
_COLUMNS = ("memory", "issue", "fma", "alu", "xu", "lsu", "uniform", "tensor")


@dataclass(frozen=True)
class Work:
    """What one warp issues from the beginning to the end of its program."""

    instructions: float
    pipes: dict[Pipe, float]
    lsu_words: float
    int8_macs: float
    half_macs: float


@dataclass(frozen=True)
class Row:
    name: str
    gpu: str
    # microseconds by what they are spent on: memory, issue, a pipe
    times: dict[str, float]
    occupancy: Occupancy
    reason: str

    @property
    def bound(self) -> str:
        return max(self.times, key=lambda name: self.times[name])

    @property
    def ratio(self) -> float:
        return self.times[self.bound] / max(self.times["memory"], self.times["tensor"])


def work_of(kernel: sass.Kernel, trips: tuple[int, ...]) -> Work:
    """Add the shortest way through the straight code up with those through the loops, as often as they run."""
    straight, bodies = sass.ways(kernel, {i for i, n in enumerate(trips) if n > 0})
    parts = [(1, straight), *((trips[i], body) for i, body in bodies.items())]
    pipes = {pipe: float(sum(n * part.pipes[pipe] for n, part in parts)) for pipe in Pipe}
    return Work(
        sum(n * part.instructions for n, part in parts), pipes, sum(n * part.lsu_words for n, part in parts),
        sum(n * part.int8_macs for n, part in parts), sum(n * part.half_macs for n, part in parts),
    )  # fmt: skip


def times(work: Work, num_ctas: int, num_warps: int, dram_bytes: int, gpu: Gpu) -> dict[str, float]:
    """Compute the microseconds that each resource needs at least, all others being free."""
    # some scheduler has at least its share of the warps, rounded up; and some multiprocessor of the CTAs
    warps = math.ceil(num_ctas * num_warps / (gpu.multiprocessors * PARTITIONS))
    warps_of_multiprocessor = math.ceil(num_ctas / gpu.multiprocessors) * num_warps

    def clocks(instructions: float, pipe: Pipe) -> float:
        return instructions * warps * LANES / (gpu.rates[pipe] / PARTITIONS)

    pipes = work.pipes
    tensor = work.int8_macs / gpu.int8_macs + work.half_macs / gpu.half_macs
    in_clocks = {
        "issue": work.instructions * warps,
        # integer multiply-adds go through the pipe of the floats, from 8.6 on through half of its lanes
        "fma": max(clocks(pipes[Pipe.FMA] + pipes[Pipe.IMAD], Pipe.FMA), clocks(pipes[Pipe.IMAD], Pipe.IMAD)),
        **{
            pipe.value: clocks(pipes[pipe], pipe)
            for pipe in (Pipe.HALF, Pipe.DOUBLE, Pipe.ALU, Pipe.XU, Pipe.REDUCE, Pipe.UNIFORM)
        },
        # one unit for the four schedulers
        "lsu": work.lsu_words * LANES / gpu.rates[Pipe.LSU] * warps_of_multiprocessor,
        "tensor": tensor * warps_of_multiprocessor,
    }
    microseconds = {name: n / gpu.clock_ghz / 1e3 for name, n in in_clocks.items()}
    return {"memory": dram_bytes / gpu.dram_gb_per_s / 1e3, **microseconds}


def row_of(counted: Counted, gpu: Gpu) -> Row:
    kernel = counted.kernel
    work = work_of(kernel, counted.trips)
    in_microseconds = times(work, counted.num_ctas, kernel.num_warps, counted.dram_bytes, gpu)
    return Row(counted.name, gpu.name, in_microseconds, occupancy(kernel, gpu.limits), counted.case.reason)


def rows() -> list[Row]:
    return [
        row_of(counted, gpu)
        for configuration in CONFIGURATIONS
        for number in range(len(configuration.cases))
        for gpu in GPUS
        for counted in compile_for(configuration, gpu.capability)[number : number + 1]
    ]


def check_reasons(rows: list[Row]) -> None:
    for row in rows:
        if row.ratio > MOST_WITHOUT_REASON and not row.reason:
            raise ValueError(
                f"{row.name}, {row.gpu}: the static lower bound is {row.ratio:.2f}x the memory time"
                f" ({row.bound}), and the case gives no reason"
            )


def markdown(rows: list[Row]) -> str:
    check_reasons(rows)
    head = ["kernel, configuration", "GPU", *_COLUMNS, "static lower bound", "x memory", "resident"]
    lines = [
        "Static lower bounds in microseconds, from machine code and published figures; no GPU was timed.",
        "",
        "| " + " | ".join(head) + " |",
        "|---|---|" + "---:|" * (len(head) - 2),
    ]
    for row in rows:
        occupied = f"{row.occupancy.ctas} CTAs, {row.occupancy.warps} warps"
        cells = [row.name, row.gpu, *(_microseconds(row.times[column]) for column in _COLUMNS)]
        cells += [f"{_microseconds(row.times[row.bound])} ({row.bound})", f"{row.ratio:.2f}", occupied]
        lines.append("| " + " | ".join(cells) + " |")
    reasons = {row.name: row.reason for row in rows if row.ratio > MOST_WITHOUT_REASON}
    lines += ["", f"Above {MOST_WITHOUT_REASON} x memory:", ""] if reasons else []
    lines += [f"- {name}: {reason}." for name, reason in reasons.items()]
    return "\n".join(lines)


def _microseconds(x: float) -> str:
    return f"{x:.3g}" if x < 100 else f"{x:.0f}"


def update(path: Path, table: str) -> None:
    """Replace what is between the two comments of a file."""
    text = path.read_text()
    if not re.search(f"{BEGIN}.*{END}", text, re.DOTALL):
        raise ValueError(f"{path}: expected {BEGIN} and, after it, {END}")
    before, rest = text.split(BEGIN, 1)
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Static lower bounds of the kernels' times.")
    parser.add_argument("--markdown", action="store_true", help="print the table")
    parser.add_argument("--update", type=Path, metavar="FILE", help=f"write it between {BEGIN} and {END} of FILE")
    options = parser.parse_args()
    table = markdown(rows())
    if options.update:
        update(options.update, table)
    if options.markdown or not options.update:
        print(table)


if __name__ == "__main__":
    main()
