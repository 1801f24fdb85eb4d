"""Times of a call: on the GPU by CUDA events around replays of a graph, and on the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from device.results import REHEARSED

Call = Callable[[], object]

_ROUNDS = 15
# what a replay takes at least, in microseconds, and the calls in it at most
_REPLAY_US, _MOST_CALLS = 2000.0, 256
_HOST_CALLS = 40


def measure(calls: Sequence[Call], captured: bool) -> dict[str, object]:
    """Time calls of the same kind in turn, each with inputs of its own.

    Args:
        calls: enough of them that their inputs do not fit into the L2 together, where a caller wants that.
        captured: whether a graph of them is timed. What waits for the device cannot be captured; it is timed as
            called, by events around many calls, and so takes the host's time where that is longer.

    Returns:
        us, us_low, us_high: median and quartiles over replays, microseconds of a call on the device. host_us: median
        microseconds until a call returns. how: "graph" or "calls". In a rehearsal, which calls once, nothing.
    """
    for call in calls:
        call()
    if REHEARSED:
        return {}
    torch.cuda.synchronize()
    host_us = _host_us(calls)
    once = _event_us(lambda: [call() for call in calls]) / len(calls)
    rounds_of_calls = min(-(-_REPLAY_US // (once * len(calls))), _MOST_CALLS // len(calls))
    in_order = [*calls] * max(1, int(rounds_of_calls))

    def every() -> None:
        for call in in_order:
            call()

    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            every()
        replay: Call = graph.replay
    else:
        replay = every
    replay()
    times = [_event_us(replay) / len(in_order) for _ in range(_ROUNDS)]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {
        "us": round(median, 3), "us_low": round(low, 3), "us_high": round(high, 3), "host_us": round(host_us, 2),
        "how": "graph" if captured else "calls",
    }  # fmt: skip


def _event_us(run: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _host_us(calls: Sequence[Call]) -> float:
    times = []
    for number in range(_HOST_CALLS):
        began = time.perf_counter()
        calls[number % len(calls)]()
        times.append((time.perf_counter() - began) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)
