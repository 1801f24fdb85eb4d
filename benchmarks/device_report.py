"""What tests/gpu/device.sh wrote, as tables and as a page: `python -m mgt_benchmarks.device_report results.jsonl`.

The file may end anywhere, also within a line. What was begun and has no result, and what was not begun, is named.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Line = dict[str, Any]

# of the timetable, in its order
PARTS = (
    "build", "environment", "precompile", "ceilings", "timings", "correctness", "repeats", "sanitizer", "exported",
    "second ptxas",
)  # fmt: skip
COLUMNS = (
    "workload", "contestant", "us", "quartiles", "host us", "x first", "rate", "share of the ceiling", "timed",
)  # fmt: skip
# whose bytes per second other figures are held to
COPY = "copy"
_REHEARSED = "Rehearsed without a GPU: nothing here was measured."


@dataclass
class Results:
    """The latest line of every item, in the order in which they came."""

    items: dict[tuple[str, str], Line] = field(default_factory=dict)
    # the names that a part was to go through, and whether it came to its end
    names: dict[str, list[str]] = field(default_factory=dict)
    ended: dict[str, bool] = field(default_factory=dict)
    # what became of a part that could not begin
    unavailable: dict[str, Line] = field(default_factory=dict)
    num_unreadable: int = 0

    @property
    def rehearsed(self) -> bool:
        """Whether any line is of a rehearsal."""
        return any(line.get("rehearsed") for line in (*self.items.values(), *self.unavailable.values()))

    @property
    def environment(self) -> dict[str, str]:
        """What is known of the machine."""
        facts = {name: line for (part, name), line in self.items.items() if part == "environment"}
        return {name: str(line.get("value", f"{line['status']}: {line.get('why')}")) for name, line in facts.items()}

    def of(self, part: str) -> list[Line]:
        """Return the lines of a part's items."""
        return [line for (of, _), line in self.items.items() if of == part]

    def missing(self, part: str) -> list[str]:
        """Return the items of a part that was begun which have no result."""
        return [name for name in self.names.get(part, []) if (part, name) not in self.items]

    def state(self, part: str) -> str:
        """Return how far a part came, in words."""
        if part in self.unavailable:
            return f"{self.unavailable[part]['status']}: {self.unavailable[part].get('why')}"
        if part not in self.names:
            return "not begun"
        return "ended" if self.ended.get(part) else "cut off"


def read(path: Path) -> Results:
    """Read the lines that are whole; ValueError where there is none."""
    results = Results()
    num_lines = 0
    for text in path.read_bytes().splitlines():
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            part, name, status = line["part"], line["name"], line["status"]
        except (ValueError, KeyError, TypeError):
            results.num_unreadable += 1
            continue
        num_lines += 1
        if name:
            results.items[part, name] = line
        elif status == "begun":
            results.names[part], results.ended[part] = line["names"], False
            results.unavailable.pop(part, None)
        elif status == "ended":
            results.ended[part] = True
        else:
            results.unavailable[part] = line
    if not num_lines:
        raise ValueError(f"{path}: expected lines that tests/gpu/device.sh wrote, got none")
    return results


def ceilings(results: Results) -> dict[str, float]:
    """Return bytes or operations per second of the ceilings that were measured."""
    return {line["name"]: rate(line) for line in results.of("ceilings") if "us" in line}


def rate(line: Line) -> float:
    """Return operations per second, of what has none bytes per second."""
    return (line["operations"] or line["bytes"]) / line["us"] * 1e6


def share(line: Line, limits: Mapping[str, float]) -> float | None:
    """Return the least time that the ceilings leave for the bytes and operations of a line, over its time."""
    if COPY not in limits or (line["operations"] and line["arithmetic"] not in limits):
        return None
    least = line["bytes"] / limits[COPY]
    if line["operations"]:
        least = max(least, line["operations"] / limits[line["arithmetic"]])
    return least / line["us"] * 1e6


def by_workload(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Return the timed lines of each workload, ours first."""
    grouped: dict[str, list[Line]] = {}
    for line in lines:
        if "us" in line:
            grouped.setdefault(line["workload"], []).append(line)
    return grouped


def rows(results: Results) -> list[list[str]]:
    """Return the cells of COLUMNS for everything that was timed."""
    limits = ceilings(results)
    found = []
    for group in by_workload([*results.of("ceilings"), *results.of("timings")]).values():
        for line in group:
            of_ceiling = share(line, limits)
            speed = rate(line)
            found.append(
                [
                    line["workload"], line["contestant"], short(line["us"]),
                    f"{short(line['us_low'])} to {short(line['us_high'])}", short(line["host_us"]),
                    short(line["us"] / group[0]["us"]),
                    f"{short(speed / 1e12)} {_unit(line)}" if line["operations"] else f"{speed / 1e9:.0f} GB/s",
                    "" if of_ceiling is None else f"{of_ceiling:.2f}", line["how"],
                ]
            )  # fmt: skip
    return found


def _unit(line: Line) -> str:
    return "TOP/s" if line["arithmetic"].startswith("int") else "TFLOP/s"


def short(number: float) -> str:
    """Three digits are what the noise leaves."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def warnings(results: Results) -> list[str]:
    """Return, a sentence each, what a reader must know before the figures."""
    found = [_REHEARSED] if results.rehearsed else []
    if results.num_unreadable:
        found.append(f"{results.num_unreadable} lines of the file could not be read.")
    bad = [line for line in results.items.values() if line["status"] not in ("ok", "absent")]
    if bad:
        found.append(f"{len(bad)} items failed, crashed or timed out.")
    unfinished = [part for part in PARTS if results.state(part) != "ended" or results.missing(part)]
    if unfinished:
        found.append(f"Not complete: {', '.join(unfinished)}.")
    return found


def notes(results: Results) -> list[tuple[str, str, str]]:
    """Return part, item and what became of it, for all that is not as it should be: no result, or none that is ok."""
    found = []
    for part in PARTS:
        if results.state(part) not in ("ended", "cut off"):
            found.append((part, "", results.state(part)))
        for line in results.of(part):
            if line["status"] != "ok":
                found.append((part, line["name"], f"{line['status']}: {line.get('why', '')}"))
        found += [(part, name, "missing: no result was written") for name in results.missing(part)]
    return found


def parts(results: Results) -> list[list[str]]:
    """Return, for each part, how many items came to what, and how far it came."""
    found = []
    for part in PARTS:
        counts = Counter(line["status"] for line in results.of(part))
        numbers = [counts["ok"], counts["failed"] + counts["crashed"] + counts["timed out"], counts["absent"]]
        found.append([part, *map(str, numbers), str(len(results.missing(part))), results.state(part)])
    return found


def text(results: Results) -> str:
    """Return everything as Markdown."""
    blocks = warnings(results)
    blocks.append(_table(("machine", ""), [list(fact) for fact in results.environment.items()]))
    blocks.append(_table(("part", "ok", "failed", "absent", "missing", "state"), parts(results)))
    if rows(results):
        blocks.append(_table(COLUMNS, rows(results)))
    remarks = notes(results)
    if remarks:
        blocks.append(_table(("part", "item", "what became of it"), [list(remark) for remark in remarks]))
    return "\n\n".join(blocks)


def _table(columns: Iterable[str], lines: Iterable[list[str]]) -> str:
    columns = list(columns)
    cells = [columns, ["---"] * len(columns), *lines]
    # what a program said may hold line ends and bars
    return "\n".join(f"| {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in line)} |" for line in cells)


def write_page(results: Results, folder: Path) -> list[Path]:
    """Write device.html and its plots; ImportError without jinja2, matplotlib and rich, which the page is made with."""
    from .page import render, write_files

    plots = {}
    if results.of("timings"):
        limits = ceilings(results)
        timed = by_workload(results.of("timings"))
        if COPY in limits:
            plots["device_memory"] = ("How close to a copy's bytes per second", _memory(timed, limits))
            plots["device_roofline"] = ("The int4 layers below the ceilings", _roofline(timed, limits))
        plots["device_rows"] = ("The int4 layers over the rows", _over_rows(timed))
        plots = {name: plot for name, plot in plots.items() if plot[1]}
    machine = results.environment | {
        f"part {row[0]}": f"{row[1]} ok, {row[2]} failed, {row[5]}" for row in parts(results)
    }
    lines = [(cells, "ours" if cells[5] == "1" else "") for cells in rows(results)]
    for part, name, what in notes(results):
        kind = "skipped" if what.startswith(("absent", "not begun")) else "missed"
        lines.append(([part, name, what, *[""] * (len(COLUMNS) - 3)], kind))
    introduction = (
        "One run of tests/gpu/device.sh on one GPU. A time is the median over replays of a CUDA graph, by events, with "
        "inputs that take turns so that the L2 does not hold them; what waits for the device was timed as called. "
        "Ceilings were measured in the same run; a share is the time that they leave over the time taken."
    )
    page = render(
        "mgt-kernels on a GPU", introduction, machine, " ".join(warnings(results)), list(plots.values()), COLUMNS, lines
    )
    return write_files(folder, {"device.html": page, **{f"{name}.svg": plot for name, (_, plot) in plots.items()}})


def _memory(timed: Mapping[str, list[Line]], limits: Mapping[str, float]) -> str:
    from matplotlib.figure import Figure

    from .page import looks, svg

    shown = {name: group for name, group in timed.items() if not group[0]["operations"]}
    if not shown:
        return ""
    look = looks([line["contestant"] for group in shown.values() for line in group])
    figure = Figure(figsize=(10, 1.5 + 0.28 * len(shown)))
    axes = figure.subplots()
    labelled = set()
    for position, group in enumerate(shown.values()):
        for line in group:
            name = line["contestant"]
            colour, marker = look[name]
            label = None if name in labelled else name
            axes.plot(rate(line) / 1e9, position, marker, color=colour, label=label)
            labelled.add(name)
    for name, style in ((COPY, "-"), ("read", ":")):
        if name in limits:
            axes.axvline(limits[name] / 1e9, color="black", linewidth=0.8, linestyle=style, label=f"{name}, measured")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_yticks(range(len(shown)), list(shown))
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("bytes that have to move over the time taken, GB/s")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return svg(figure)


def _roofline(timed: Mapping[str, list[Line]], limits: Mapping[str, float]) -> str:
    from matplotlib.figure import Figure

    from .page import looks, svg

    shown = [line for group in timed.values() for line in group if line["operations"]]
    if not shown:
        return ""
    look = looks([line["contestant"] for line in shown])
    figure = Figure(figsize=(10, 5))
    axes = figure.subplots()
    intensities = [line["operations"] / line["bytes"] for line in shown]
    first, last = min(intensities) / 1.5, max(intensities) * 1.5
    for name in dict.fromkeys(line["contestant"] for line in shown):
        of_name = [line for line in shown if line["contestant"] == name]
        colour, marker = look[name]
        at = [line["operations"] / line["bytes"] for line in of_name]
        axes.plot(at, [rate(line) / 1e12 for line in of_name], marker, color=colour, label=name)
    for number, name in enumerate(sorted({line["arithmetic"] for line in shown} & limits.keys())):
        corner = min(max(limits[name] / limits[COPY], first), last)
        roof = [min(limits[name], limits[COPY] * x) / 1e12 for x in (first, corner, last)]
        style = ("-", "--", ":")[number % 3]
        axes.plot((first, corner, last), roof, style, color="black", linewidth=0.8, label=f"{name}, measured")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlabel("operations per byte that has to move")
    axes.set_ylabel("TFLOP/s or TOP/s")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return svg(figure)


def _over_rows(timed: Mapping[str, list[Line]]) -> str:
    from matplotlib.figure import Figure

    from .page import looks, svg

    layers: dict[str, list[tuple[int, Line]]] = {}
    for name, group in timed.items():
        if name.startswith("linear, M="):
            num_rows, sizes = name.removeprefix("linear, M=").split(" ", 1)
            layers.setdefault(sizes, []).extend((int(num_rows), line) for line in group)
    if not layers:
        return ""
    look = looks([line["contestant"] for points in layers.values() for _, line in points])
    figure = Figure(figsize=(10, 4))
    grid = figure.subplots(1, len(layers), squeeze=False)[0]
    for axes, (sizes, points) in zip(grid, layers.items(), strict=True):
        for name in dict.fromkeys(line["contestant"] for _, line in points):
            curve = sorted((m, line["us"]) for m, line in points if line["contestant"] == name)
            colour, marker = look[name]
            axes.plot(*zip(*curve, strict=True), marker=marker, color=colour, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.set_title(sizes, fontsize=10)
        axes.set_xlabel("rows")
        axes.set_ylabel("us")
        axes.grid(alpha=0.3)
    grid[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return svg(figure)


def main() -> None:
    """Print the tables, and write the page beside the file, or to another folder."""
    parser = argparse.ArgumentParser(description="Report what tests/gpu/device.sh wrote.")
    parser.add_argument("results", type=Path, help="results.jsonl, whole or not")
    parser.add_argument("--out", type=Path, help="the folder of device.html and its plots; that of the file by default")
    options = parser.parse_args()
    try:
        results = read(options.results)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(text(results))
    try:
        paths = write_page(results, options.out or options.results.parent)
    except ImportError as error:
        print(f"no page: {error} (pip install mgt-kernels[bench])", file=sys.stderr)
        return
    print("", *paths, sep="\n")


if __name__ == "__main__":
    main()
