"""`mgt bench`: run the cases, print and write what was measured, compare two runs."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from mgt_sampler.files import make_folder, write_csv

from . import comparison, instructions, machine, report
from .case import AbsentError, Case
from .cases import Scale, cases_of
from .run import Result, time_case
from .steps import gpu_absent


def select(scale: Scale = "standard", only: Sequence[str] = (), threads: int | None = None) -> list[Case]:
    """Return the cases of a scale whose names contain every text of `only`; ValueError where there are none.

    Of a text with parts between "|", one is enough.
    """
    threads = threads or torch.get_num_threads()

    def matches(name: str) -> bool:
        return all(any(part in name for part in text.split("|")) for text in only)

    selected = [case for case in cases_of(scale, threads) if matches(case.setting.name)]
    if not selected:
        raise ValueError(f"only: expected a part of a case's name, as `mgt bench --list` prints them, got {list(only)}")
    return selected


def bench(
    *,
    scale: Scale = "standard",
    only: Sequence[str] = (),
    threads: int | None = None,
    rounds: int | None = None,
    out: Path | None = None,
    markdown: bool = False,
    progress: bool = True,
) -> list[str]:
    """Run cases, print and write what was measured; return the names of those that miss what they are held to."""
    selected = select(scale, only, threads)
    rounds = rounds or (3 if scale == "quick" else 7)
    if out is not None:
        make_folder("out", out)
    counts, reason = {}, ""
    try:
        counts = instructions.in_use() if scale == "quick" else instructions.count()[1]
    except AbsentError as absent:
        reason = f"instructions are not counted: {absent}"
    facts = machine.describe() | {"rounds": str(rounds)}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if reason:
        print(reason)
    if scale == "full" and gpu_absent():
        print(f"backend triton skipped: {gpu_absent()}")
    results: list[Result] = []
    table: list[report.Row] = []
    for case in tqdm(selected, unit="case", disable=not progress):
        result = time_case(case, rounds)
        results.append(result)
        table += report.rows(result, counts.get(instructions.key(case.setting)))
        if out is not None:
            # what an interrupted run leaves
            write_csv(out / "results.csv", report.FIELDS, table)
    if markdown:
        print(report.markdown(table))
    else:
        report.print_table(table)
    if out is not None:
        write(out, table, results, facts)
    return [result.case.setting.name for result in results if result.missed]


def write(out: Path, table: list[report.Row], results: list[Result], facts: dict[str, str]) -> None:
    """Write results.csv, results.json, report.html and its plots into a folder."""
    from .page import write_page

    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "results.csv", report.FIELDS, table)
    report.write_json(out / "results.json", results, facts)
    for path in (out / "results.csv", out / "results.json", *write_page(out, table, facts)):
        print(path)


def compare(old: Path, new: Path) -> None:
    """Print what moved between two runs; each is a folder that `bench` wrote, or its results.csv."""
    tables = [report.read_csv(path / "results.csv" if path.is_dir() else path) for path in (old, new)]
    comparison.print_comparison(comparison.compare(*tables))
