"""Every case against the CPU, and what only a device has: graphs, the compiler, more elements than 32 bits count."""

from __future__ import annotations

from typing import Any

import torch
from cases import CASES, Case

from device.extras import EXTRAS
from device.results import DEVICE, REHEARSED
from device.standin import cpu_tensors_on

# a small case of each op, whose kernels other tests compile for sm_80 too
REHEARSED_CASES = (
    "sample_tokens: fp32 one token",
    "mask_by_confidence: N=5 temperature=0.0 digits=0",
    "commit_tokens: count N=5 temperature=0.0",
    "differential_sample: first step",
    "match_tokens: match fp32, nothing merges, one channel",
    "merge_tokens: merge bf16, one channel, apart",
    "unmerge_tokens: unmerge bf16, one channel, apart",
    "w4a8_linear: w4a8 fp32, an input",
    "w4a16_linear: w4a16 fp32, an input",
)


def names() -> list[str]:
    """Return the cases, and the rest."""
    return list(REHEARSED_CASES) if REHEARSED else [*map(str, CASES), *EXTRAS]


def work(name: str) -> dict[str, object]:
    """Check one; AssertionError says what differs."""
    # what torch.empty returns holds NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    if name in EXTRAS:
        EXTRAS[name]()
        return {}
    case = case_of(name)
    arguments = case.make_arguments()
    expected = case.expected(*arguments)
    case.check(arguments, expected, to("cpu", run(case, to(DEVICE, arguments))))
    return {}


def case_of(name: str) -> Case:
    """Return the case of this name."""
    return {str(case): case for case in CASES}[name]


def run(case: Case, arguments: tuple) -> tuple:
    """Run a case's kernels: on the GPU, in a rehearsal in the emulator."""
    if not REHEARSED:
        return case.run(arguments)
    with cpu_tensors_on(80, execute=True):
        return case.run(arguments)


def to(device: str, arguments: tuple) -> tuple:
    """Move the tensors among the arguments, each with all of its storage, and so with its strides."""
    return tuple(_moved(device, x) if isinstance(x, torch.Tensor) else x for x in arguments)


def _moved(device: str, tensor: torch.Tensor) -> torch.Tensor:
    whole: Any = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    whole = whole.set_(tensor.untyped_storage()).to(device, copy=True)
    moved: Any = torch.empty(0, dtype=tensor.dtype, device=device)
    return moved.set_(whole.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
