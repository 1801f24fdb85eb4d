"""The int4 layers as the toolkit's ptxas assembles them: it may not have the faults of the one that Triton brings."""

import os
import shutil

from cases import CASES

from device import correctness
from device.results import REHEARSED, AbsentError


def names() -> list[str]:
    """Return the cases of the layers; AbsentError without a second assembler."""
    ptxas = shutil.which("ptxas", path=f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/local/cuda/bin")
    if ptxas is None:
        raise AbsentError("ptxas is not on the PATH, nor in /usr/local/cuda/bin")
    # before Triton asks for either
    os.environ["TRITON_PTXAS_PATH"] = os.environ["TRITON_PTXAS_BLACKWELL_PATH"] = ptxas
    if REHEARSED:
        return list(correctness.REHEARSED_CASES[-1:])
    return [str(case) for case in CASES if case.op.endswith("linear")]


def work(name: str) -> dict[str, object]:
    """Check one."""
    return correctness.work(name)
