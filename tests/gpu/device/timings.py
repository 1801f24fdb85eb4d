"""Times of every workload, with inputs that take turns so that the L2 does not hold them."""

from __future__ import annotations

import torch

from device.clock import measure
from device.results import DEVICE, REHEARSED
from device.workloads import Workload, timed

_MOST_COPIES = 32


def names() -> list[str]:
    """Return the items."""
    return [workload.item for workload in timed()]


def work(name: str) -> dict[str, object]:
    """Time one item."""
    return time_one({workload.item: workload for workload in timed()}[name])


def time_one(workload: Workload) -> dict[str, object]:
    """Return what is known of a workload, and its times."""
    copies = num_copies(workload.num_bytes)
    with torch.no_grad():
        calls = [workload.make(DEVICE, True) for _ in range(copies)]
        times = measure(calls, workload.captured)
    return {
        "workload": workload.name, "contestant": workload.contestant, "bytes": workload.num_bytes,
        "operations": workload.operations, "arithmetic": workload.arithmetic, "copies": copies, **times,
    }  # fmt: skip


def num_copies(num_bytes: int) -> int:
    """Return how many inputs together are twice the L2, or as many as there may be."""
    if REHEARSED:
        return 2
    card = torch.cuda.get_device_properties(0)
    fitting = max(1, torch.cuda.mem_get_info()[0] // 4 // num_bytes)
    return min(max(2, -(-2 * card.L2_cache_size // num_bytes)), _MOST_COPIES, fitting)
