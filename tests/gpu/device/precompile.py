"""Every kernel that a later part launches, compiled by a driver without a device into the cache that all parts use.

Triton's key for a compiled kernel has the target, the options and the assembler, and not the driver.
"""

import torch
from cases import CASES

from device.correctness import REHEARSED_CASES, case_of
from device.results import REHEARSED
from device.standin import cpu_tensors_on
from device.workloads import NOT_INVARIANT, Workload, timed
from mgt_benchmarks.run import OURS

# PTX of which the emulator executes
REHEARSED_CAPABILITY = 80


def names() -> list[str]:
    """Return what launches kernels of ours."""
    return list(REHEARSED_CASES) if REHEARSED else [*_workloads(), *map(str, CASES)]


def work(name: str) -> dict[str, object]:
    """Compile what one item launches, and execute nothing."""
    workload = _workloads().get(name)
    # a case of several steps takes the first ones on the CPU
    arguments = () if workload else case_of(name).make_arguments()
    with cpu_tensors_on(capability(), execute=False) as launches, torch.no_grad():
        if workload:
            workload.make("cpu", False)()
        else:
            case_of(name).run(arguments)
    return {"launches": len(launches)}


def capability() -> int:
    """Return the compute capability to compile for, 10 major + minor."""
    if REHEARSED:
        return REHEARSED_CAPABILITY
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _workloads() -> dict[str, Workload]:
    ours = (OURS, "w4a8_linear", "w4a16_linear", NOT_INVARIANT)
    return {workload.item: workload for workload in timed() if workload.contestant in ours}
