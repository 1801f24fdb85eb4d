"""Put what was found of whole images into their page: `python -m mgt_benchmarks.whole_image FOLDER`.

FOLDER is what `mgt evaluate whole_image --out` wrote, or docs/whole_image, where its files lie already. The files of
`mgt_benchmarks.image` and `mgt_benchmarks.merging` lie in docs/whole_image.
"""

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


def blocks_of_times(folder: Path) -> dict[str, str]:
    """The tables of what is saved, from the CSV files that `mgt_benchmarks.image` and `.merging` wrote."""
    files = [folder / name for name in ("image.csv", "merging.csv")]
    if not all(path.is_file() for path in files):
        return {}
    image, merging = map(read, files)
    table = [["variant", "s / image", "x PyTorch fp32", "x PyTorch bf16", "PFLOP", "weights of bf16", "peak of bf16"]]
    for row in image:
        figures = {
            "seconds": 0,
            "times_fp32": 2,
            "times_bf16": 2,
            "petaflop": 3,
            "weights_of_bf16": 2,
            "peak_of_bf16": 2,
        }
        table.append([row["variant"], *(f"{float(row[name]):,.{digits}f}" for name, digits in figures.items())])
    tail = {row["variant"]: float(row["tail_seconds"]) for row in image}
    stock, plain, folded = (tail[name] for name in ("PyTorch fp32", "+ kernels", "+ folded head"))
    costs = [
        ["merged", "match", "merge", "put apart", "x tomesd", "saved, fp32", "cost of it", "saved, W4A8", "cost of it"]
    ]
    for row in merging:
        times = [f"{float(row[name]):.1f}" for name in ("match_ms", "merge_ms", "unmerge_ms", "times_tomesd")]
        saved = [
            text
            for kind in ("fp32", "w4a8")
            for text in (f"{float(row[f'saved_{kind}_ms']):.0f}", f"{float(row[f'cost_of_saved_{kind}']):.1%}")
        ]
        costs.append([row["ratio"], *times, *saved])
    return {
        "image": markdown(table, 1),
        "head": f"{stock:.2f} s at a masked share of 0.64 with PyTorch's step, {plain:.2f} s with the kernels, and "
        f"{folded:.2f} s folded, {folded / plain:.2f} of the kernels' without",
        "merging": markdown(costs, 1),
    }


def markdown(table: Sequence[Sequence[str]], num_left: int) -> str:
    """A Markdown table whose first columns are aligned to the left, the others to the right."""
    rule = ["---"] * num_left + ["---:"] * (len(table[0]) - num_left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (table[0], rule, *table[1:]))


def fill(folder: Path, docs: Path = DOCS) -> list[Path]:
    """Copy what the page shows and fill its tables; return the files that are written."""
    (docs / PAGE).mkdir(exist_ok=True)
    written = [docs / PAGE / name for name in FILES]
    for path in written if folder.resolve() != (docs / PAGE).resolve() else ():
        shutil.copyfile(folder / path.name, path)
    page = docs / f"{PAGE}.md"
    text = page.read_text(encoding="utf-8")
    for name, block in {**blocks(docs / PAGE), **blocks_of_times(docs / PAGE)}.items():
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
