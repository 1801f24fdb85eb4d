"""The results: rows of one schema, as CSV, as a table on the terminal or in Markdown, and for pytest-benchmark."""

import csv
import json
import math
import statistics
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mgt_sampler.files import whole_file

from .case import DTYPE_NAMES, Case
from .run import OURS, Result, quartiles

FIELDS = (
    "case", "op", "variant", "model", "shape", "dtype", "layout", "masked_share", "backend", "threads", "axis", "at",
    "contestant", "rounds", "q1_ms", "median_ms", "q3_ms", "ratio", "ratio_q1", "ratio_q3", "roofline_share",
    "roofline_share_q1", "roofline_share_q3", "bytes_moved", "operations", "bandwidth", "peak",
    "instructions_per_element", "extra_bytes_per_position", "target", "missed", "skipped",
)  # fmt: skip
"""A row is a contestant of a case; `ratio` its time over ours, `roofline_share` the time that the job takes at the
machine's limits over its time, both with quartiles over the rounds. Bandwidth is in bytes per second, peak in
operations per second."""

Row = dict[str, str]


def of_case(case: Case) -> Row:
    """Return what every row of a case has."""
    setting = case.setting
    axis, at = case.curve or ("", math.nan)
    return dict.fromkeys(FIELDS, "") | {
        "case": setting.name,
        "op": setting.op,
        "variant": setting.variant,
        "model": setting.model,
        "shape": setting.shape,
        "dtype": DTYPE_NAMES[setting.dtype],
        "layout": setting.layout,
        "masked_share": f"{setting.masked_share:g}",
        "backend": setting.backend,
        "threads": str(setting.threads),
        "axis": axis,
        "at": f"{at:g}" if axis else "",
    }


def rows(result: Result, instructions_per_element: float | None = None) -> list[Row]:
    """Return a row for us, one for each peer, and one for each that was skipped."""
    case, work = result.case, result.work
    common = of_case(case) | {
        "rounds": str(len(result.bandwidth)),
        "bytes_moved": str(work.bytes_moved),
        "operations": str(work.operations),
        "bandwidth": f"{statistics.median(result.bandwidth):.4g}",
        "peak": f"{statistics.median(result.peak):.4g}" if result.peak else "",
    }
    found = []
    for name, seconds in result.seconds.items():
        time, roofline = quartiles(seconds), result.roofline[name]
        row = common | {
            "contestant": name,
            "q1_ms": f"{time.low * 1e3:.4g}",
            "median_ms": f"{time.median * 1e3:.4g}",
            "q3_ms": f"{time.high * 1e3:.4g}",
            "roofline_share": f"{roofline.median:.4g}",
            "roofline_share_q1": f"{roofline.low:.4g}",
            "roofline_share_q3": f"{roofline.high:.4g}",
        }
        if name == OURS:
            row |= {
                "extra_bytes_per_position": f"{result.extra_bytes / work.num_positions:.0f}",
                "target": ", ".join(
                    [*map(str, case.targets)]
                    + [f"<= {case.bytes_per_position:g} B/position"] * (case.bytes_per_position < math.inf)
                ),
                "missed": ", ".join(result.missed),
            }
            if instructions_per_element is not None:
                row["instructions_per_element"] = f"{instructions_per_element:.4g}"
        else:
            ratio = result.ratios[name]
            row |= {
                "ratio": f"{ratio.median:.4g}",
                "ratio_q1": f"{ratio.low:.4g}",
                "ratio_q3": f"{ratio.high:.4g}",
            }
        found.append(row)
    return found + [common | {"contestant": name, "skipped": reason} for name, reason in result.skipped.items()]


def read_csv(path: Path) -> list[Row]:
    """Read rows; ValueError where the file has other columns."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise ValueError(f"{path}: expected the columns of a results.csv of mgt bench, got {reader.fieldnames}")
        return list(reader)


def write_json(path: Path, results: list[Result], machine: dict[str, str]) -> None:
    """Write what `pytest-benchmark compare` reads: seconds of each round, a group for each case."""
    benchmarks = []
    for result in results:
        setting = result.case.setting
        for name, seconds in result.seconds.items():
            low, median, high = (getattr(quartiles(seconds), which) for which in ("low", "median", "high"))
            mean = statistics.fmean(seconds)
            spread = high - low
            outside = [x for x in seconds if not low - 1.5 * spread <= x <= high + 1.5 * spread]
            within = [x for x in seconds if x not in outside]
            deviation = statistics.pstdev(seconds)
            far = sum(abs(x - mean) > deviation for x in seconds)
            benchmarks.append(
                {
                    "group": setting.name,
                    "name": f"{setting.name} [{name}]",
                    "fullname": f"{setting.name} [{name}]",
                    "params": None,
                    "param": None,
                    "extra_info": {"contestant": name},
                    "options": {"disable_gc": False, "timer": "perf_counter", "min_rounds": len(seconds)},
                    "stats": {
                        "min": min(seconds), "max": max(seconds), "mean": mean, "stddev": deviation,
                        "rounds": len(seconds), "median": median, "iqr": spread, "q1": low, "q3": high,
                        "iqr_outliers": len(outside), "stddev_outliers": far, "outliers": f"{far};{len(outside)}",
                        "ld15iqr": min(within), "hd15iqr": max(within), "ops": 1 / mean, "total": sum(seconds),
                        "data": seconds, "iterations": 1,
                    },
                }
            )  # fmt: skip
    document = {
        "machine_info": machine,
        "commit_info": {"id": "", "dirty": False, "project": "mgt-kernels"},
        "benchmarks": benchmarks,
        "datetime": datetime.now(timezone.utc).isoformat(),
        "version": "5.0.0",
    }
    with whole_file(path) as file:
        file.write(json.dumps(document, indent=1).encode())


COLUMNS = ("case", "contestant", "median ms", "x ours", "roofline share", "instructions/element", "target", "missed")


def short(number: str) -> str:
    """Three digits are what the noise leaves; no exponent."""
    if not number:
        return ""
    value = float(number)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cells(row: Row) -> list[str]:
    """Return what the table shows of a row."""
    ratio = f"{short(row['ratio'])} ({short(row['ratio_q1'])} to {short(row['ratio_q3'])})" if row["ratio"] else ""
    return [
        row["case"] if row["contestant"] == OURS else "",
        row["contestant"],
        f"skipped: {row['skipped']}" if row["skipped"] else short(row["median_ms"]),
        ratio,
        short(row["roofline_share"]),
        short(row["instructions_per_element"]),
        row["target"],
        row["missed"],
    ]


def print_table(table: list[Row]) -> None:
    """Print the rows on the terminal."""
    view = Table(show_lines=False)
    for name in COLUMNS:
        view.add_column(name, justify="right" if name in COLUMNS[2:6] else "left", overflow="fold")
    for i, row in enumerate(table):
        if i and row["contestant"] == OURS:
            view.add_section()
        style = "red" if row["missed"] else "dim" if row["skipped"] else None
        view.add_row(*cells(row), style=style)
    console = Console()
    # piped, as wide as the table needs
    Console(width=console.width if console.is_terminal else 220).print(view)


def markdown(table: list[Row]) -> str:
    """Return the ratios as a Markdown table: times in one run, of whatever machine, mean nothing elsewhere."""
    lines = ["| case | peer | x ours | quartiles | ours, of the roofline | target | missed |", "| --- |" + " --- |" * 6]
    ours: Row = {}
    for row in table:
        if row["contestant"] == OURS:
            ours = row
        elif row["ratio"]:
            quarters = f"{short(row['ratio_q1'])} to {short(row['ratio_q3'])}"
            targets = [target for target in ours["target"].split(", ") if target.endswith(f"x {row['contestant']}")]
            targets += [target for target in ours["target"].split(", ") if target.endswith((" ms", "position"))]
            missed = [target for target in targets if target in ours["missed"].split(", ")]
            shown = (
                row["case"], row["contestant"], short(row["ratio"]), quarters, short(ours["roofline_share"]),
                ", ".join(targets), ", ".join(missed),
            )  # fmt: skip
            lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)
