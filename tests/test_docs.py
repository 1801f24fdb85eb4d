"""The tables of the pages are those of the runs whose CSV files lie beside their plots."""

import csv
import re
from pathlib import Path

import pytest
import torch

from mgt_benchmarks import clients, report, tables, whole_image
from mgt_benchmarks.cases import cases_of, sampler_cases
from mgt_benchmarks.client_cases import client_cases
from mgt_sampler import presets, samplers
from mgt_sampler.evaluation.configurations import load_configurations
from mgt_sampler.evaluation.intervals import Estimate
from mgt_sampler.evaluation.run import METRICS, shown

DOCS = Path(__file__).parent.parent / "docs"


def cell(row, name):
    value, half_width = (
        torch.tensor(float(row[key] or "nan"), dtype=torch.float64) for key in (name, f"{name}_interval")
    )
    return shown(Estimate(value, half_width), METRICS[name])


@pytest.mark.parametrize("page", ["techniques", "quantization", "samplers"])
def test_the_tables_are_those_of_the_run(page):
    with (DOCS / page / "results.csv").open(encoding="utf-8") as file:
        results = {row["name"]: row for row in csv.DictReader(file)}
    labels = {metric.label: name for name, metric in METRICS.items()}
    seen, columns = set(), []
    for line in (DOCS / f"{page}.md").read_text(encoding="utf-8").splitlines():
        cells = [part.strip() for part in line.strip("|").split("|")]
        if cells[0] == "configuration":
            columns = [labels[label] for label in cells[1:]]
        elif not line.startswith("|"):
            columns = []
        elif columns and cells[0] in results:
            assert cells[1:] == [cell(results[cells[0]], name) for name in columns], line
            seen.add(cells[0])
    shipped = {configuration.name for configuration in load_configurations(page)}
    # of the samplers, the page says which were run
    assert seen == set(results) <= shipped and (page == "samplers" or seen == shipped)
    assert {row["num_images"] for row in results.values()} == {"2000"}


def meissonic_cells(row):
    return [
        row["variant"],
        *(f"{float(row[name]):.2f}" for name in ("seconds", "times_fp32", "times_bf16")),
        *(f"{float(row[name]) / 1e6:.0f}" for name in ("weight_bytes", "peak_bytes")),
        *(f"{float(row[name]):.2f}" for name in ("weights_of_bf16", "peak_of_bf16")),
        row["missed"],
    ]


def peer_cells(row):
    return [row[name] for name in ("library", "inputs", "outputs", "group", "GOP/s", "x float32", "error")]


@pytest.mark.parametrize(
    "name, head, cells", [("meissonic", "variant", meissonic_cells), ("peers", "library", peer_cells)]
)
def test_the_tables_of_the_layers_are_those_of_the_benchmarks(name, head, cells):
    with (DOCS / "quantization" / f"{name}.csv").open(encoding="utf-8") as file:
        expected = [cells(row) for row in csv.DictReader(file)]
    lines = (DOCS / "quantization.md").read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"| {head} |")) + 2
    shown_rows = [[part.strip() for part in line[1:-1].split("|")] for line in lines[first : first + len(expected)]]
    assert shown_rows == expected


def test_the_readmes_table_is_of_the_suite():
    table = report.read_csv(DOCS / "benchmarks" / "results.csv")
    expected = report.markdown([row for row in table if "Meissonic" in row["case"]])
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    shown_table = text.split("<!-- benchmarks -->")[1].split("<!-- /benchmarks -->")[0]
    assert shown_table.partition("\n\n")[2].strip() == expected
    # one run has all of it: every case of today's suite, but for what depends on the processor
    assert {row["case"] for row in table} >= {
        case.setting.name for case in cases_of("standard", 2) if case.setting.backend == "auto"
    }


@pytest.mark.parametrize("page", ["benchmarks", "frameworks"])
def test_the_tables_of_samplers_are_of_the_suite(page):
    shown_table = tables.between((DOCS / f"{page}.md").read_text(encoding="utf-8"), "samplers")
    if not (DOCS / tables.RESULTS).exists():
        assert shown_table == ""
        return
    table = report.read_csv(DOCS / tables.RESULTS)
    assert shown_table.partition("\n\n")[2].strip() == tables.ratios(table, page)
    assert {row["case"] for row in table} >= {case.setting.name for case in sampler_cases(2)}


def test_the_table_of_clients_is_of_its_run():
    shown_table = tables.between((DOCS / "frameworks.md").read_text(encoding="utf-8"), "clients")
    if not (DOCS / clients.RESULTS).exists():
        assert shown_table == ""
        return
    table = report.read_csv(DOCS / clients.RESULTS)
    assert shown_table.partition("\n\n")[2].strip() == clients.markdown(table)
    assert {row["case"] for row in table} == {case.setting.name for case in client_cases(2)}
    assert not any(row["skipped"] for row in table)


def test_the_page_of_whole_images_is_of_its_run():
    text = (DOCS / "whole_image.md").read_text(encoding="utf-8")
    folder = DOCS / "whole_image"
    for name, block in {**whole_image.blocks(folder), **whole_image.blocks_of_times(folder)}.items():
        assert tables.between(text, name) == block, name
    rows = whole_image.read(DOCS / "whole_image" / "results.csv")
    assert [row["name"] for row in rows] == [c.name for c in load_configurations("whole_image")]
    assert len({row["num_images"] for row in rows}) == 1


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_what_a_page_shows_is_there(page):
    for part in page.read_text(encoding="utf-8").split("](")[1:]:
        target = part.split(")")[0]
        assert target.startswith("http") or (page.parent / target.split("#")[0]).exists(), target


def test_the_code_of_the_page_of_samplers_runs():
    text = (DOCS / "samplers.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(code, "samplers.md", "exec"), names)
    assert names["output"].images.shape == (1, 1, 28, 28)


def test_the_page_of_samplers_names_what_there_is():
    text = (DOCS / "samplers.md").read_text(encoding="utf-8")
    for name in samplers.SAMPLERS:
        assert f"`{name}`" in text, name
    for name in presets.PRESETS:
        assert name.upper().replace("-", "_") in text, name
