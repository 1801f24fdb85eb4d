"""The results as one HTML file that needs no network: plots as SVG, the machine, every figure."""

import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from mgt_sampler.files import whole_file

from .report import COLUMNS, Row, cells
from .run import OURS

_UNITS = {"N": "positions", "V": "codes", "B": "samples", "masked share": "masked share of the positions", "M": "rows"}


def write_page(folder: Path, table: list[Row], machine: dict[str, str]) -> list[Path]:
    """Write report.html and its plots into a folder; needs matplotlib."""
    plots = {"ratios": _ratios(table), "roofline": _roofline(table)}
    titles = {"ratios": "How much longer the peers take", "roofline": "How close to the machine's limits"}
    curves = defaultdict(list)
    for row in table:
        if row["axis"] and row["median_ms"]:
            curves[row["axis"]].append(row)
    if curves:
        plots["curves"] = _curves(dict(curves))
        titles["curves"] = "How the cost grows"
    lines = [(cells(row), _kind(row)) for row in table]
    missed = sum(bool(row["missed"]) for row in table)
    warning = f"{missed} of the cases miss what they are held to; they are red below." if missed else ""
    headed = [(titles[name], plot) for name, plot in plots.items()]
    page = render("mgt bench", _INTRODUCTION, machine, warning, headed, COLUMNS, lines)
    return write_files(folder, {"report.html": page, **{f"{name}.svg": plot for name, plot in plots.items()}})


_INTRODUCTION = (
    "Every case was checked against its float64 oracle before it was timed. Ours, the peers and the machine's limits "
    "were timed in turns, round by round; figures are medians, ranges are quartiles of the rounds. Times hold for this "
    "machine at that hour; ratios and shares travel further."
)


def _kind(row: Row) -> str:
    kinds = {"ours": row["contestant"] == OURS, "missed": row["missed"], "skipped": row["skipped"]}
    return " ".join(kind for kind, is_so in kinds.items() if is_so)


def render(
    title: str,
    introduction: str,
    machine: Mapping[str, str],
    warning: str,
    plots: Sequence[tuple[str, str]],
    columns: Sequence[str],
    lines: Sequence[tuple[Sequence[str], str]],
) -> str:
    """Return a page: plots are SVG with a heading, lines are rows with a kind, of "ours", "missed" and "skipped"."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        title=title, introduction=introduction, machine=machine, warning=warning, plots=plots, columns=columns,
        lines=lines,
    )  # fmt: skip


def write_files(folder: Path, files: Mapping[str, str]) -> list[Path]:
    """Write files of these names, each whole or not at all; return their paths."""
    for name, text in files.items():
        with whole_file(folder / name) as file:
            file.write(text.encode())
    return [folder / name for name in files]


def svg(figure: Any) -> str:
    """Return a figure of matplotlib's as an element of a page."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    # text as text: searchable, and small
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def looks(names: list[str]) -> dict[str, tuple[str, str]]:
    """Return the colour and the marker of each contestant, the same in all plots; ours is blue."""
    others = [name for name in dict.fromkeys(names) if name != OURS]
    return {OURS: ("C0", "o")} | {name: (f"C{1 + i % 9}", "osD"[i // 9 % 3]) for i, name in enumerate(others)}


def _ratios(table: list[Row]) -> str:
    from matplotlib.figure import Figure

    shown = [row for row in table if row["ratio"] and not row["axis"]]
    cases = list(dict.fromkeys(row["case"] for row in shown))
    look = looks([row["contestant"] for row in table])
    figure = Figure(figsize=(10, 1 + 0.28 * len(cases)))
    axes = figure.subplots()
    labelled = set()
    for row in shown:
        median, low, high = (float(row[name]) for name in ("ratio", "ratio_q1", "ratio_q3"))
        name = row["contestant"]
        axes.errorbar(
            median, cases.index(row["case"]), xerr=[[max(0, median - low)], [max(0, high - median)]],
            color=look[name][0], fmt=look[name][1], label=None if name in labelled else name, capsize=2,
        )  # fmt: skip
        labelled.add(name)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_yticks(range(len(cases)), cases)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlabel("time over ours, median and quartiles of the rounds; right of 1 we are faster")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return svg(figure)


def _roofline(table: list[Row]) -> str:
    from matplotlib.figure import Figure

    shown = [row for row in table if row["contestant"] == OURS and not row["axis"]]
    figure = Figure(figsize=(10, 1 + 0.28 * len(shown)))
    axes = figure.subplots()
    values = [float(row["roofline_share"]) for row in shown]
    bounds = [[float(row[f"roofline_share_{which}"]) for row in shown] for which in ("q1", "q3")]
    errors = [[abs(a - b) for a, b in zip(values, bound, strict=True)] for bound in bounds]
    axes.barh(range(len(shown)), values, xerr=errors, color="C0", capsize=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [row["case"] for row in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("time at the bandwidth, or arithmetic peak, of the same rounds over ours; above 1: out of a cache")
    axes.grid(axis="x", alpha=0.3)
    return svg(figure)


def _curves(curves: dict[str, list[Row]]) -> str:
    from matplotlib.figure import Figure

    num_columns = min(2, len(curves))
    num_rows = math.ceil(len(curves) / num_columns)
    figure = Figure(figsize=(5.6 * num_columns, 4 * num_rows))
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    look = looks([row["contestant"] for rows in curves.values() for row in rows])
    for axes, (axis, rows) in zip(grid.flat, curves.items(), strict=False):
        names = dict.fromkeys(row["contestant"] for row in rows)
        for name in names:
            points = sorted(
                (float(row["at"]), *(float(row[key]) for key in ("median_ms", "q1_ms", "q3_ms")))
                for row in rows
                if row["contestant"] == name
            )
            at, median, low, high = zip(*points, strict=True)
            colour, marker = look[name]
            axes.plot(at, median, marker=marker, color=colour, label=name)
            axes.fill_between(at, low, high, color=colour, alpha=0.2)
            if name == OURS:
                proportional = [median[-1] * x / at[-1] for x in at]
                axes.plot(at, proportional, ":", color="black", linewidth=0.8, label="proportional")
        axes.set_xscale("log", base=2 if axis != "masked share" else 10)
        axes.set_yscale("log")
        for ax in (axes.xaxis, axes.yaxis):
            ax.set_major_formatter(lambda x, _: f"{x:g}")
        fixed = " ".join(part for part in rows[0]["shape"].split() if not part.startswith(f"{axis}="))
        axes.set_title(f"{rows[0]['op']}, {rows[0]['variant']}, {fixed}", fontsize=10)
        axes.set_xlabel(_UNITS[axis])
        axes.set_ylabel("ms")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    for axes in list(grid.flat)[len(curves) :]:
        axes.remove()
    figure.tight_layout()
    return svg(figure)
