"""Put what a run wrote into the pages: `python -m mgt_benchmarks.tables FOLDER`, as `make tables` does.

FOLDER holds the results of `mgt bench` on the samplers' cases, and in llada2.md what
tests/consumers/llada2/before_and_after.py printed.
"""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from mgt_sampler.files import whole_file

from . import report

DOCS = Path("docs")
# beside which the pages of these results lie
RESULTS = Path("benchmarks") / "samplers.csv"
# those of them whose peers are schedulers and samplers of a framework
FRAMEWORKS = ("diffusers", "transformers")


def between(text: str, name: str) -> str:
    """Return what stands between the marks of a name; ValueError where a page lacks them."""
    _, found, rest = text.partition(f"<!-- {name} -->")
    inside, ended, _ = rest.partition(f"<!-- /{name} -->")
    if not found or not ended:
        raise ValueError(f"expected <!-- {name} --> and <!-- /{name} --> in the page")
    return inside.strip()


def filled(text: str, name: str, block: str) -> str:
    """Return the page with another block between the marks of a name."""
    between(text, name)
    head, mark, rest = text.partition(f"<!-- {name} -->")
    return f"{head}{mark}\n{block.strip()}\n{rest[rest.index(f'<!-- /{name} -->') :]}"


def ratios(table: list[report.Row], page: str) -> str:
    """Return the table that a page shows of the results."""
    if page == "frameworks":
        steps = [row for row in table if row["op"] == "draw and commit"]
        table = [row for row in steps if row["contestant"] in (report.OURS, *FRAMEWORKS)]
    return report.markdown(table)


def fill(folder: Path, docs: Path = DOCS) -> list[Path]:
    """Fill the tables of the pages; return the files that are written."""
    table = report.read_csv(folder / "results.csv")
    facts = json.loads((folder / "results.json").read_text(encoding="utf-8"))["machine_info"]
    line = f"`{', '.join(f'{name} {value}' for name, value in facts.items())}`"
    written = [docs / RESULTS]
    shutil.copyfile(folder / "results.csv", docs / RESULTS)
    for page in ("benchmarks", "frameworks"):
        path = docs / f"{page}.md"
        text = filled(path.read_text(encoding="utf-8"), "samplers", f"{line}\n\n{ratios(table, page)}")
        llada2 = folder / "llada2.md"
        if page == "frameworks" and llada2.exists():
            facts_line, _, rows = llada2.read_text(encoding="utf-8").strip().partition("\n\n")
            text = filled(text, "llada2", f"`{facts_line}`\n\n{rows}")
        with whole_file(path) as file:
            file.write(text.encode())
        written.append(path)
    return written


def main(folder: Annotated[Path, typer.Argument(help="What `mgt bench --out` wrote.")]) -> None:
    """Fill the tables of docs/benchmarks.md and docs/frameworks.md."""
    for path in fill(folder):
        print(path)


if __name__ == "__main__":
    typer.run(main)
