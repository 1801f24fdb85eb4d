"""What moved between two runs, and whether it is beyond their noise."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from .report import Row, short

# McGill, Tukey and Larsen (1978): medians differ at about 95 % where intervals of median +- 1.57 IQR / sqrt(n) part
_NOTCH = 1.57
# what the same build shows from one process to the next, whatever its rounds say: where its memory happens to lie
FLOOR = 0.05


@dataclass(frozen=True)
class Change:
    """One contestant of one case. Speed is the roofline share: time, in units of the machine's own limits then."""

    case: str
    contestant: str
    faster: float
    """New speed over old."""
    noise: float
    """What `faster` would have to differ from 1 by, as a factor."""
    instructions: float
    """New instructions over old; NaN where either was not counted."""

    @property
    def moved(self) -> bool:
        """Whether this is beyond the noise."""
        return abs(math.log(self.faster)) > math.log(self.noise)

    @property
    def verdict(self) -> str:
        """In a word."""
        return ("faster" if self.faster > 1 else "slower") if self.moved else ""


def changes(old: Iterable[Row], new: Iterable[Row]) -> tuple[list[Change], list[str]]:
    """Return what both runs have, and the names of what only one has."""
    olds, news = (
        {(row["case"], row["contestant"]): row for row in table if row["roofline_share"]} for table in (old, new)
    )
    found = []
    for key in olds.keys() & news.keys():
        before, after = olds[key], news[key]
        spread = math.hypot(_relative_notch(before), _relative_notch(after))
        counts = [float(row["instructions_per_element"] or "nan") for row in (before, after)]
        found.append(
            Change(
                *key,
                faster=float(after["roofline_share"]) / float(before["roofline_share"]),
                noise=1 + max(FLOOR, spread),
                instructions=counts[1] / counts[0],
            )
        )
    alone = [" of ".join(reversed(key)) for key in sorted(olds.keys() ^ news.keys())]
    return sorted(found, key=lambda change: (not change.moved, change.faster)), alone


def _relative_notch(row: Row) -> float:
    low, median, high = (float(row[f"roofline_share{which}"]) for which in ("_q1", "", "_q3"))
    return _NOTCH * (high - low) / median / math.sqrt(int(row["rounds"]))


def print_changes(found: list[Change], alone: list[str]) -> None:
    """Print what moved, then how many did not."""
    moved = [change for change in found if change.moved or abs(change.instructions - 1) > 0.01]
    table = Table()
    for name in ("case", "contestant", "speed, new / old", "noise", "instructions, new / old", "verdict"):
        table.add_column(name, justify="left" if name in ("case", "contestant", "verdict") else "right")
    for change in moved:
        count = "" if math.isnan(change.instructions) else f"{change.instructions:.3f}"
        table.add_row(
            change.case, change.contestant, short(f"{change.faster:.3f}"), f"±{change.noise - 1:.0%}", count,
            change.verdict, style={"slower": "red", "faster": "green"}.get(change.verdict),
        )  # fmt: skip
    console = Console()
    if moved:
        Console(width=console.width if console.is_terminal else 200).print(table)
    print(f"{sum(change.moved for change in found)} of {len(found)} moved beyond the noise")
    for name in alone:
        print(f"in one of the two runs alone: {name}")
