"""The tables of docs/techniques.md are those of the run whose CSV files lie beside its plots."""

import csv
from pathlib import Path

import pytest
import torch

from mgt_sampler.evaluation.configurations import load_configurations
from mgt_sampler.evaluation.intervals import Estimate
from mgt_sampler.evaluation.run import METRICS, shown

DOCS = Path(__file__).parent.parent / "docs"


def cell(row, name):
    value, half_width = (
        torch.tensor(float(row[key] or "nan"), dtype=torch.float64) for key in (name, f"{name}_interval")
    )
    return shown(Estimate(value, half_width), METRICS[name])


def test_the_tables_are_those_of_the_run():
    with (DOCS / "techniques" / "results.csv").open(encoding="utf-8") as file:
        results = {row["name"]: row for row in csv.DictReader(file)}
    labels = {metric.label: name for name, metric in METRICS.items()}
    seen, columns = set(), []
    for line in (DOCS / "techniques.md").read_text(encoding="utf-8").splitlines():
        cells = [part.strip() for part in line.strip("|").split("|")]
        if cells[0] == "configuration":
            columns = [labels[label] for label in cells[1:]]
        elif line.startswith("| ") and cells[0] in results:
            assert cells[1:] == [cell(results[cells[0]], name) for name in columns], line
            seen.add(cells[0])
    assert seen == set(results) == {configuration.name for configuration in load_configurations("techniques")}
    assert {row["num_images"] for row in results.values()} == {"2000"}


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_what_a_page_shows_is_there(page):
    for part in page.read_text(encoding="utf-8").split("](")[1:]:
        target = part.split(")")[0]
        assert target.startswith("http") or (page.parent / target.split("#")[0]).exists(), target
