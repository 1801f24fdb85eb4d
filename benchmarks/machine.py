"""The machine's limits, measured beside the cases: memory bandwidth, and the peak of its arithmetic."""

import functools
import os
import platform
import time
from pathlib import Path

import torch

import mgt_kernels
from mgt_kernels import _C

# larger than the last-level caches of today's servers hold for one tenant
BANDWIDTH_BYTES = 2**30


@functools.cache
def _parts(device: str) -> list[torch.Tensor]:
    return list(torch.ones(BANDWIDTH_BYTES // 8, dtype=torch.int64, device=device).chunk(64))


def read_bandwidth(device: str = "cpu") -> float:
    """Bytes per second at which all threads together read a buffer larger than the caches, once."""
    parts = _parts(device)
    start = time.perf_counter()
    # the maximum of int64 is one load and one compare: bound by memory
    for part in parts:
        part.amax()
    if device != "cpu":
        torch.cuda.synchronize()
    return BANDWIDTH_BYTES / (time.perf_counter() - start)


def peak(isa: str, dtype: str, threads: int) -> float:
    """Operations per second of loops that stay in the registers; a multiply-add counts as two."""
    return _C.peak(isa, dtype, threads, 0.01)


def describe() -> dict[str, str]:
    """Return what the figures of a run hold for."""
    info = mgt_kernels.info()
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "instruction set": str(info["isa"]),
        "GPU": str(info["cuda"]),
        "system": " ".join((platform.system(), platform.machine(), *platform.libc_ver())),
        "mgt-kernels": str(info["version"]),
        "PyTorch": str(info["torch"]),
        "thread pool": Path(str(info["thread_pool"])).name.rstrip(")"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
