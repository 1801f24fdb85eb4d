"""What `mgt_sampler.accelerate` gains: `python -m mgt_benchmarks.clients`, as `make clients-table` does.

Times other packages' own calls before it and after it, in turns. The cases are a list of their own in
`mgt_benchmarks.client_cases`, not among those of `mgt bench`: they are timed again without the tables of that.
"""

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
import typer

from mgt_sampler.files import check_writable, whole_file, write_csv

from . import machine, report, tables
from .case import AbsentError, Case
from .client_cases import PACKAGES, client_cases
from .report import Row, short
from .run import OURS, time_case

COLUMNS = (
    "client",
    "what is timed",
    "shape",
    "dtype",
    "before, ms",
    "after, ms",
    "ratio",
    "quartiles",
    "target",
    "met",
)
# in docs
RESULTS = Path("benchmarks") / "clients.csv"


def time_cases(cases: Iterable[Case], rounds: int) -> list[Row]:
    """Return the rows of the cases; of one whose package is absent, a row with the reason."""
    table = []
    for case in cases:
        try:
            table += report.rows(time_case(case, rounds))
        except AbsentError as reason:
            table.append(report.of_case(case) | {"contestant": PACKAGES[case.setting.op], "skipped": str(reason)})
    return table


def markdown(table: list[Row]) -> str:
    """Return a Markdown table with a line for each case."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- |" + " --- |" * (len(COLUMNS) - 1)]
    cases: dict[str, dict[str, Row]] = {}
    for row in table:
        cases.setdefault(row["case"], {})[row["contestant"]] = row
    for contestants in cases.values():
        ours = contestants.pop(OURS, None)
        ((package, theirs),) = contestants.items()
        cells = [f"{theirs['op']} of {package}", theirs["variant"], f"{theirs['model']}, {theirs['shape']}"]
        cells.append(theirs["dtype"])
        if ours is None:
            cells += [f"absent: {theirs['skipped']}", *[""] * (len(COLUMNS) - len(cells) - 1)]
        else:
            target = ours["target"].removesuffix(f"x {package}")
            met = "" if not target else "no" if ours["missed"] else "yes"
            quartiles = f"{short(theirs['ratio_q1'])} to {short(theirs['ratio_q3'])}"
            cells += [short(theirs["median_ms"]), short(ours["median_ms"]), short(theirs["ratio"]), quartiles]
            cells += [target, met]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def facts_of(rounds: int) -> str:
    """Return a line of what the figures hold for: the machine, and the packages that were found."""
    facts = machine.describe() | {"rounds": str(rounds)}
    for package in dict.fromkeys(PACKAGES.values()):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return f"`{', '.join(f'{name} {value}' for name, value in facts.items())}`"


def main(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A CSV file, with the columns of mgt bench.")] = None,
    page: Annotated[Path | None, typer.Option(help="A page whose table between the marks is filled.")] = None,
    quick: Annotated[bool, typer.Option(help="Small shapes, to see that all of it runs.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Of both sides; PyTorch's own number by default.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="7 by default, 2 with --quick.")] = None,
) -> None:
    """Time other packages' own calls before `accelerate` and after it; print a Markdown table."""
    if quick and page is not None:
        raise typer.BadParameter("expected without --quick: small shapes say nothing", param_hint="--page")
    try:
        if out is not None:
            check_writable("--out", out)
        if page is not None:
            tables.between(page.read_text(encoding="utf-8"), "clients")
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    rounds = rounds or (2 if quick else 7)
    table = time_cases(client_cases(threads or torch.get_num_threads(), small=quick), rounds)
    # the folder of the packages is found when the cases are prepared
    block = f"{facts_of(rounds)}\n\n{markdown(table)}"
    print(block)
    if out is not None:
        write_csv(out, report.FIELDS, table)
    if page is not None:
        text = tables.filled(page.read_text(encoding="utf-8"), "clients", block)
        with whole_file(page) as file:
            file.write(text.encode())


if __name__ == "__main__":
    typer.run(main)
