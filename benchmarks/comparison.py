"""What moved between two runs, and whether it is beyond their noise."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from .report import Row, short
from .run import OURS

# McGill, Tukey and Larsen (1978): medians differ at about 95 % where intervals of median +- 1.57 IQR / sqrt(n) part
_NOTCH = 1.57
# what one build may show from one process to the next, whatever its rounds say: where its memory happens to lie
FLOOR = 0.10


@dataclass(frozen=True)
class Change:
    """One contestant of one case. Speed is the roofline share, over the drift of the machine."""

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


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common, and what only one has."""

    changes: list[Change]
    drift: float
    """New speed over old of the peers, in the median: their code did not change, so this is the machine."""
    alone: list[str]


def compare(old: Iterable[Row], new: Iterable[Row]) -> Comparison:
    """Return what both runs have, what moved first, slowest first."""
    olds, news = (
        {(row["case"], row["contestant"]): row for row in table if row["roofline_share"]} for table in (old, new)
    )
    faster = {
        key: float(news[key]["roofline_share"]) / float(olds[key]["roofline_share"])
        for key in sorted(olds.keys() & news.keys())
    }
    drift = statistics.median([ratio for (_, name), ratio in faster.items() if name != OURS] or [1.0])
    found = []
    for key, ratio in faster.items():
        before, after = olds[key], news[key]
        spread = math.hypot(_relative_notch(before), _relative_notch(after))
        counts = [float(row["instructions_per_element"] or "nan") for row in (before, after)]
        found.append(Change(*key, ratio / drift, 1 + max(FLOOR, spread), counts[1] / counts[0]))
    found.sort(key=lambda change: (not change.moved, change.faster))
    return Comparison(found, drift, [" of ".join(reversed(key)) for key in sorted(olds.keys() ^ news.keys())])


def _relative_notch(row: Row) -> float:
    low, median, high = (float(row[f"roofline_share{which}"]) for which in ("_q1", "", "_q3"))
    return _NOTCH * (high - low) / median / math.sqrt(int(row["rounds"]))


def print_comparison(comparison: Comparison) -> None:
    """Print what moved, then how many did not."""
    table = Table()
    for name in ("case", "contestant", "speed, new / old", "noise", "instructions, new / old", "verdict"):
        table.add_column(name, justify="left" if name in ("case", "contestant", "verdict") else "right")
    moved = [change for change in comparison.changes if change.moved or abs(change.instructions - 1) > 0.01]
    for change in moved:
        count = "" if math.isnan(change.instructions) else f"{change.instructions:.3f}"
        table.add_row(
            change.case, change.contestant, short(f"{change.faster:.3f}"), f"±{change.noise - 1:.0%}", count,
            change.verdict, style={"slower": "red", "faster": "green"}.get(change.verdict),
        )  # fmt: skip
    console = Console()
    if moved:
        Console(width=console.width if console.is_terminal else 200).print(table)
    print(f"the peers, whose code is the same, ran {comparison.drift:.2f} times as fast: taken out of every speed")
    print(f"{sum(change.moved for change in comparison.changes)} of {len(comparison.changes)} moved beyond the noise")
    for name in comparison.alone:
        print(f"in one of the two runs alone: {name}")
