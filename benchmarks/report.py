"""The results as a table for people (terminal or Markdown) and as CSV, in one schema."""

import csv
import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.run import Result

FIELDS = [
    "case",
    "peer",
    "median_ms",
    "peer_median_ms",
    "ratio",
    "bytes_moved",
    "bandwidth_share",
    "extra_bytes_per_position",
    "target",
    "met",
]


def rows(results: list[Result], bandwidth: float) -> list[dict[str, str]]:
    """One row per case and peer."""
    table = []
    for result in results:
        for peer, seconds in result.peer_seconds.items():
            targets = [target for target in result.case.targets if target.peer in ("", peer)]
            extra = result.extra_bytes / result.case.num_positions
            limit = result.case.bytes_per_position
            met = extra <= limit
            met &= all(target.met(result.ratios, result.seconds * 1e3) for target in targets)
            table.append(
                {
                    "case": result.case.name,
                    "peer": peer,
                    "median_ms": f"{result.seconds * 1e3:.2f}",
                    "peer_median_ms": f"{seconds * 1e3:.2f}",
                    "ratio": f"{result.ratios[peer]:.2f}" if result.ratios[peer] < 10 else f"{result.ratios[peer]:.0f}",
                    "bytes_moved": str(result.case.bytes_moved),
                    "bandwidth_share": f"{result.bandwidth_share(bandwidth):.2f}",
                    "extra_bytes_per_position": f"{extra:.0f}",
                    "target": ", ".join(
                        [*map(str, targets), *([f"<= {limit:g} B/position"] if limit < math.inf else [])]
                    ),
                    "met": "yes" if met else "NO",
                }
            )
    return table


def write_csv(path: Path, table: list[dict[str, str]]) -> None:
    """Write the rows."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(table)


def print_table(table: list[dict[str, str]], markdown: bool) -> None:
    """Print the rows for people."""
    columns = [name for name in FIELDS if name not in ("median_ms", "peer_median_ms")] if markdown else FIELDS
    if markdown:
        print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
        for row in table:
            print("| " + " | ".join(row[name] for name in columns) + " |")
        return
    view = Table()
    for name in columns:
        view.add_column(name, justify="left" if name in ("case", "peer", "target") else "right")
    for row in table:
        view.add_row(*(row[name] for name in columns), style="red" if row["met"] == "NO" else None)
    Console(width=200).print(view)
