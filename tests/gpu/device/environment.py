"""What the figures hold for: the card, its driver, the compilers, the processors."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from device.results import REHEARSED, AbsentError


def names() -> list[str]:
    """Return what is asked."""
    return list(FACTS)


def work(name: str) -> dict[str, object]:
    """Return the value of one fact."""
    return {"value": FACTS[name]()}


def printed(*command: str, line: int = 0) -> str:
    """Return a line of what a program prints; AbsentError where it is not there or fails."""
    if shutil.which(command[0]) is None:
        raise AbsentError(f"{command[0]} is not on the PATH")
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if done.returncode or not done.stdout.strip():
        raise AbsentError(f"{command[0]} fails: {(done.stderr or done.stdout).strip()[:200]}")
    return done.stdout.strip().splitlines()[line]


def _of_card(name: str) -> object:
    if REHEARSED:
        raise AbsentError("a rehearsal has no card")
    if not torch.cuda.is_available():
        raise AbsentError("PyTorch sees no CUDA device")
    return getattr(torch.cuda.get_device_properties(0), name)


def _capability() -> str:
    return f"{_of_card('major')}.{_of_card('minor')}"


def _asked_of_driver(name: str) -> str:
    return printed("nvidia-smi", "--id=0", f"--query-gpu={name}", "--format=csv,noheader")


def _ptxas_of_triton() -> str:
    from triton.backends.nvidia.compiler import get_ptxas_version

    return get_ptxas_version(80).strip().splitlines()[-1]


def _version(package: str) -> Callable[[], str]:
    def version() -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise AbsentError(f"{package} is not installed") from None

    return version


FACTS: dict[str, Callable[[], object]] = {
    "card": lambda: _of_card("name"),
    "compute capability": _capability,
    "multiprocessors": lambda: _of_card("multi_processor_count"),
    "memory, bytes": lambda: _of_card("total_memory"),
    "L2, bytes": lambda: _of_card("L2_cache_size"),
    "driver": lambda: _asked_of_driver("driver_version"),
    "power limit": lambda: _asked_of_driver("power.limit"),
    "largest clock": lambda: _asked_of_driver("clocks.max.sm"),
    "Python": platform.python_version,
    "PyTorch": lambda: torch.__version__,
    "CUDA of PyTorch": lambda: torch.version.cuda or "none",
    "Triton": _version("triton"),
    "ptxas of Triton": _ptxas_of_triton,
    "nvcc": lambda: printed("nvcc", "--version", line=-1),
    "compute-sanitizer": lambda: printed("compute-sanitizer", "--version", line=-1),
    "C compiler": lambda: printed(os.environ.get("CC", "cc"), "--version"),
    "setuptools": _version("setuptools"),
    "processors": lambda: len(os.sched_getaffinity(0)),
    "commit": lambda: printed("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
    "system": lambda: f"{platform.platform()}, {sys.byteorder}-endian",
}
