"""`python -m benchmarks`: time every case against its peers."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

import mgt_kernels
from benchmarks import report, run
from benchmarks.cases import builders


def main(
    only: Annotated[str, typer.Option(help="Run cases whose name contains this text.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds per case.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads, for us and for the peers.")] = 2,
    csv: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    markdown: Annotated[bool, typer.Option(help="Print a Markdown table (ratios only).")] = False,
) -> None:
    """Time every case against its peers; exit with status 1 where a target is missed."""
    torch.set_num_threads(threads)
    info = mgt_kernels.info()
    selected = [(name, build) for name, build in builders().items() if only in name]
    if not selected:
        raise typer.BadParameter(f"no case has {only!r} in its name", param_hint="--only")
    before = run.read_bandwidth(rounds)
    results = []
    for name, build in tqdm(selected, unit="case"):
        results.append(run.time_case(build(name), rounds))
    bandwidth = max(before, run.read_bandwidth(rounds))
    print(f"isa {info['isa']}, {threads} threads, torch {info['torch']}, DRAM read {bandwidth / 1e9:.1f} GB/s")
    table = report.rows(results, bandwidth)
    report.print_table(table, markdown)
    if csv is not None:
        report.write_csv(csv, table)
    if any(row["met"] == "NO" for row in table):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
