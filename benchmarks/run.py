"""Timing: a correctness gate, then interleaved rounds of ours, the peers and the machine's limits."""

import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch

from . import machine
from .case import Case, Contestant, Work, in_turn

OURS = "mgt-kernels"
# a round of a short call is the median of as many as take this long
_SECONDS_OF_A_ROUND, _MOST_REPEATS = 0.02, 25
_SECONDS_OF_A_LONG_CALL = 5.0


@dataclass(frozen=True)
class Quartiles:
    """The quartiles of a figure over the rounds."""

    low: float
    median: float
    high: float


def quartiles(values: list[float]) -> Quartiles:
    """Return the quartiles of one value for each round."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Result:
    """One case: seconds of each contestant in each round, and the machine's limits in the same rounds."""

    case: Case
    work: Work
    skipped: dict[str, str]
    seconds: dict[str, list[float]]
    bandwidth: list[float]
    peak: list[float]
    """Empty where arithmetic is no limit."""
    extra_bytes: int

    @cached_property
    def ratios(self) -> dict[str, Quartiles]:
        """Each peer's time over ours."""
        ours = self.seconds[OURS]
        return {
            name: quartiles([a / b for a, b in zip(seconds, ours, strict=True)])
            for name, seconds in self.seconds.items()
            if name != OURS
        }

    @cached_property
    def roofline(self) -> dict[str, Quartiles]:
        """The time that the job takes at the machine's limits, over each contestant's."""
        least = [self.work.bytes_moved / bandwidth for bandwidth in self.bandwidth]
        if self.peak:
            arithmetic = [self.work.operations / peak for peak in self.peak]
            least = list(map(max, least, arithmetic))
        return {
            name: quartiles([a / b for a, b in zip(least, seconds, strict=True)])
            for name, seconds in self.seconds.items()
        }

    @property
    def missed(self) -> list[str]:
        """What the case is held to and does not reach."""
        ratios = {peer: ratio.median for peer, ratio in self.ratios.items()}
        median_ms = statistics.median(self.seconds[OURS]) * 1e3
        missed = [
            str(target)
            for target in self.case.targets
            if target.peer in ("", *ratios) and not target.met(ratios, median_ms)
        ]
        if self.extra_bytes / self.work.num_positions > self.case.bytes_per_position:
            missed.append(f"<= {self.case.bytes_per_position:g} B/position")
        return missed


@contextmanager
def _no_messages() -> Iterator[None]:
    """The profiler reports its start and end on the standard error stream, past Python."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def allocated_bytes(contestant: Contestant) -> int:
    """Bytes that PyTorch allocates during one call, whether or not they are freed in it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _no_messages(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        contestant.seconds()
    # one event per allocation or release: positive sizes are allocations
    events = profile.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0)


def time_case(case: Case, rounds: int) -> Result:
    """Prepare and check, then time `case` in interleaved rounds."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.setting.threads)
    try:
        return _time_case(case, rounds)
    finally:
        torch.set_num_threads(before)


def _warm_up(contestant: Contestant) -> float:
    # the first call compiles, packs or touches memory; the second is what a call takes, if not minutes
    first = contestant.seconds()
    return first if first > _SECONDS_OF_A_LONG_CALL else min(first, contestant.seconds())


def _time_case(case: Case, rounds: int) -> Result:
    job = case.prepare()
    for target in case.targets:
        if target.peer not in ("", *job.peers, *job.skipped):
            raise ValueError(f"{case.setting.name}: a target against {target.peer}, of {[*job.peers, *job.skipped]}")
    job.check()
    contestants = {OURS: job.ours, **job.peers}
    device = "cuda" if case.setting.backend == "triton" else "cpu"
    machine.read_bandwidth(device)
    expected = {name: _warm_up(contestant) for name, contestant in contestants.items()}
    repeats = {
        name: max(1, min(_MOST_REPEATS, round(_SECONDS_OF_A_ROUND / seconds))) for name, seconds in expected.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    bandwidth: list[float] = []
    peak: list[float] = []
    for turn in range(rounds):
        for name, contestant in in_turn(contestants, turn):
            seconds[name].append(statistics.median(contestant.seconds() for _ in range(repeats[name])))
        bandwidth.append(machine.read_bandwidth(device))
        if job.work.operations and device == "cpu":
            peak.append(machine.peak(*job.work.arithmetic, case.setting.threads))
    return Result(case, job.work, job.skipped, seconds, bandwidth, peak, allocated_bytes(job.ours))
