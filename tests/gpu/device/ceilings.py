"""What this card reaches in a copy and in products: the limits that the timings are held to."""

from device.timings import time_one
from device.workloads import ceilings


def names() -> list[str]:
    """Return the ceilings."""
    return [workload.name for workload in ceilings()]


def work(name: str) -> dict[str, object]:
    """Time one."""
    return time_one({workload.name: workload for workload in ceilings()}[name])
