"""A small case of each kernel under compute-sanitizer: accesses out of bounds, then races in shared memory."""

import os
import shutil
import subprocess
import sys

from device import correctness
from device.results import REHEARSED, AbsentError

_SECONDS = 55
_FOUND = 99
_NAMES = (
    "sample_tokens: bf16 split over four programs",
    "sample_tokens: fp16 position-major, odd, noise",
    "mask_by_confidence: N=4097 temperature=1.3 digits=3",
    "commit_tokens: entropy_bound N=150 temperature=0.0 within edit",
    "differential_sample: paper bf16",
    "differential_sample: official, aliased, bf16, noise",
    "w4a8_linear: w4a8 bf16, two static scales, a short group",
    "w4a8_linear: w4a8 bf16, few rows",
    "w4a16_linear: w4a16 bf16, groups of 128",
    "w4a16_linear: w4a16 bf16, few rows, a short group",
    "w4a8_linear: w4a8 bf16, split",
    "w4a16_linear: w4a16 bf16, split",
    "w4a16_linear: w4a16 bf16, dequantized",
)


def names() -> list[str]:
    """Return tools with cases; AbsentError without the tools."""
    program()
    cases = correctness.REHEARSED_CASES[-1:] if REHEARSED else _NAMES
    return [f"{tool}, {case}" for tool in ("memcheck", "racecheck") for case in cases][: 1 if REHEARSED else None]


def work(name: str) -> dict[str, object]:
    """Run one case in a process under one tool; AssertionError shows what the tool found."""
    tool, case = name.split(", ", 1)
    command = [program(), "--tool", tool, "--error-exitcode", str(_FOUND)]
    # PyTorch asks the driver for functions that it may not have, and takes no for an answer
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command += [sys.executable, "-c"]
    command.append(f"from device import correctness; correctness.work({case!r})")
    # an allocation for every tensor, so that what lies behind it is nobody's
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"took longer than {_SECONDS} s") from None
    said = "\n".join(line for line in done.stdout.splitlines() if line.startswith("=========")) or done.stderr
    assert not done.returncode, f"exit code {done.returncode}: {said[-1500:]}"
    return {}


def program() -> str:
    """Return the sanitizer's path."""
    path = shutil.which(
        "compute-sanitizer", path=f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/local/cuda/bin"
    )
    if path is None:
        raise AbsentError("compute-sanitizer is not on the PATH, nor in /usr/local/cuda/bin")
    return path
