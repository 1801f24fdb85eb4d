"""Put what `mgt evaluate whole_image` found into its page: `python -m mgt_benchmarks.whole_image FOLDER`."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from mgt_sampler.evaluation.intervals import Estimate
from mgt_sampler.evaluation.run import METRICS, NLL_METRICS, shown
from mgt_sampler.files import whole_file

from .tables import filled

DOCS = Path("docs")
PAGE = "whole_image"
FILES = ("results.csv", "nll.csv", "fronts.csv", "pareto.png", "grid.png")
COLUMNS = (
    *("model_flops", "transformer_seconds", "others_busy", "nll", "nll_lost", "accuracy", "frechet_distance"),
    "frechet_lost",
)
Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """The rows of a CSV file."""
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def estimate(value: str, half_width: str) -> Estimate:
    """What two cells say; an empty one is NaN."""
    numbers = [torch.tensor(float(text or "nan"), dtype=torch.float64) for text in (value, half_width)]
    return Estimate(numbers[0], numbers[1])


def blocks(folder: Path) -> dict[str, str]:
    """The tables of the page by their marks, from the CSV files of a folder."""
    results, nll, fronts = (read(folder / name) for name in FILES[:3])
    table = [["configuration", *(METRICS[name].label for name in COLUMNS)]]
    for row in results:
        cells = [shown(estimate(row[name], row[f"{name}_interval"]), METRICS[name]) for name in COLUMNS]
        table.append([row["name"], *cells])
    images = ", ".join(sorted({row["num_images"] for row in results}))
    shares = list(dict.fromkeys(row["masked"] for row in nll))
    metric = NLL_METRICS["share_nll_lost"]
    of_shares = [["configuration", *(f"{float(share):.0%} masked" for share in shares)]]
    for name in dict.fromkeys(row["name"] for row in nll):
        cells = [shown(estimate(r["nll_lost"], r["nll_lost_interval"]), metric) for r in nll if r["name"] == name]
        of_shares.append([name, *cells])
    of_fronts = [["quality", "cost", "configuration", "spent", "has"]]
    for row in fronts:
        quality, cost = METRICS[row["quality"]], METRICS[row["cost"]]
        spent, value = estimate(row["spent"], ""), estimate(row["value"], row["interval"])
        of_fronts.append([quality.label, cost.label, row["name"], shown(spent, cost), shown(value, quality)])
    return {
        "images": f"{images} images for each configuration.",
        "results": markdown(table, 1),
        "nll": markdown(of_shares, 1),
        "fronts": markdown(of_fronts, 3),
    }


def markdown(table: Sequence[Sequence[str]], num_left: int) -> str:
    """A Markdown table whose first columns are aligned to the left, the others to the right."""
    rule = ["---"] * num_left + ["---:"] * (len(table[0]) - num_left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (table[0], rule, *table[1:]))


def fill(folder: Path, docs: Path = DOCS) -> list[Path]:
    """Copy what the page shows and fill its tables; return the files that are written."""
    (docs / PAGE).mkdir(exist_ok=True)
    written = [docs / PAGE / name for name in FILES]
    for path in written:
        shutil.copyfile(folder / path.name, path)
    page = docs / f"{PAGE}.md"
    text = page.read_text(encoding="utf-8")
    for name, block in blocks(docs / PAGE).items():
        text = filled(text, name, block)
    with whole_file(page) as file:
        file.write(text.encode())
    return [*written, page]


def main(folder: Annotated[Path, typer.Argument(help="What `mgt evaluate whole_image --out` wrote.")]) -> None:
    """Fill docs/whole_image.md."""
    for path in fill(folder):
        print(path)


if __name__ == "__main__":
    typer.run(main)
