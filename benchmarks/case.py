"""What a case is: a call of ours, the peers that do the same job, the check, and what the job moves and computes."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

Run = Callable[[], object]
T = TypeVar("T")


class AbsentError(Exception):
    """A peer cannot run here; the message says why."""


class Contestant(Protocol):
    """What is timed."""

    def seconds(self) -> float:
        """Do the job once; return how long it took."""
        ...


@dataclass(frozen=True)
class Call:
    """A function of this process. `before` runs before each call and is not timed."""

    run: Run
    before: Run | None = None

    def seconds(self) -> float:
        """Call it, and wait for the GPU where there is one."""
        if self.before is not None:
            self.before()
        _synchronize()
        start = time.perf_counter()
        self.run()
        _synchronize()
        return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Target:
    """What a case is held to: `figure` against `peer` (its time over ours), or our median in ms where peer is ""."""

    figure: float
    peer: str = ""

    def met(self, ratios: dict[str, float], median_ms: float) -> bool:
        """Whether the figures of one run reach the target."""
        return ratios[self.peer] >= self.figure if self.peer else median_ms <= self.figure

    def __str__(self) -> str:
        return f">= {self.figure:.3g}x {self.peer}" if self.peer else f"<= {self.figure:g} ms"


@dataclass(frozen=True)
class Setting:
    """The parameters of a case, as they stand in every report."""

    op: str
    variant: str
    model: str
    shape: str
    dtype: torch.dtype = torch.float32
    layout: str = "token-major"
    masked_share: float = 1.0
    backend: str = "auto"
    threads: int = 2

    @property
    def name(self) -> str:
        """Every parameter that is not what it is by default; unique."""
        special = (
            self.layout if self.layout != "token-major" else "",
            f"{self.masked_share:.0%} masked" if self.masked_share < 1 else "",
            self.backend if self.backend != "auto" else "",
            f"{self.threads} thread{'s' * (self.threads > 1)}",
        )
        return ", ".join(
            filter(None, (self.op, self.variant, self.model, self.shape, DTYPE_NAMES[self.dtype], *special))
        )


DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Work:
    """How much a case has to do."""

    bytes_moved: int
    """The least that is read from memory and written to it."""
    num_positions: int
    operations: int = 0
    """Multiplications and additions, where they and not the bytes may be the limit; else 0."""
    arithmetic: tuple[str, str] = ("", "")
    """Instruction set and dtype that the operations are done in, as `_C.peak` names them."""


@dataclass(frozen=True)
class Job:
    """A case, ready to be timed, with its inputs. `check` raises where ours computes something else than the oracle."""

    work: Work
    ours: Contestant
    peers: dict[str, Contestant]
    check: Run
    skipped: dict[str, str] = field(default_factory=dict)
    """Peers that cannot run here, and why."""


@dataclass(frozen=True)
class Case:
    """One thing to time."""

    setting: Setting
    prepare: Callable[[], Job]
    """Makes the inputs, which are large, and starts the peers: called when the case's turn comes."""
    targets: tuple[Target, ...] = ()
    bytes_per_position: float = 64
    """What a call may allocate, its outputs included."""
    curve: tuple[str, float] | None = None
    """The axis along which this is a point of a curve, and where."""


def in_turn(contestants: Mapping[str, T], turn: int) -> list[tuple[str, T]]:
    """The contestants in the order of a round: each begins in turn, for the first finds other caches than the rest."""
    listed = list(contestants.items())
    first = turn % max(1, len(listed))
    return listed[first:] + listed[:first]
