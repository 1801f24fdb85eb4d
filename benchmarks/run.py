"""Timing: a correctness gate, then interleaved rounds of ours and the peers, medians of each."""

import statistics
import time
from dataclasses import dataclass

import torch

from benchmarks.cases import Case, Run

# larger than the last-level caches of today's servers hold for one tenant
BANDWIDTH_BYTES = 2**30


@dataclass(frozen=True)
class Result:
    """One case: medians in seconds, and what they mean."""

    case: Case
    seconds: float
    peer_seconds: dict[str, float]
    extra_bytes: int

    @property
    def ratios(self) -> dict[str, float]:
        """Each peer's time over ours."""
        return {peer: seconds / self.seconds for peer, seconds in self.peer_seconds.items()}

    def bandwidth_share(self, bandwidth: float) -> float:
        """The time that moving the bytes takes at `bandwidth` (bytes per second), over ours."""
        return self.case.bytes_moved / bandwidth / self.seconds


def elapsed(run: Run) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def read_bandwidth(rounds: int) -> float:
    """Bytes per second at which all threads together read a buffer larger than the caches."""
    buffer = torch.ones(BANDWIDTH_BYTES // 8, dtype=torch.int64)
    parts = buffer.chunk(64)

    def read() -> None:
        # the maximum of int64 is one load and one compare: bound by memory
        for part in parts:
            part.amax()

    read()
    return BANDWIDTH_BYTES / statistics.median(elapsed(read) for _ in range(rounds))


def allocated_bytes(run: Run) -> int:
    """Bytes that PyTorch allocates during one call, whether or not they are freed in it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    # one event per allocation or release: positive sizes are allocations
    events = profile.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0)


def time_case(case: Case, rounds: int) -> Result:
    """Check, then time `case` in interleaved rounds."""
    case.check()
    runs = {"": case.ours, **case.peers}
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            # ours is short: the median of three keeps one interruption out of the round
            repeats = 1 if name in ("pytorch", "diffusers") else 3
            seconds[name].append(statistics.median(elapsed(run) for _ in range(repeats)))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours = medians.pop("")
    return Result(case, ours, medians, allocated_bytes(case.ours))
