"""Instructions that each kernel executes, held against the committed instructions.json.

    python -m mgt_benchmarks.instructions            compare
    python -m mgt_benchmarks.instructions --write    make what is there the budget

Times of a busy machine hide a regression of a few percent; counts do not. instructions.c single-steps one call of each
kernel of the C library: callgrind knows no AVX-512, and virtual machines seldom lend perf the processor's counters.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated

import typer

import mgt_kernels
from mgt_kernels import cpu
from mgt_kernels.info import OPS
from mgt_sampler.files import whole_file

from .case import DTYPE_NAMES, AbsentError, Setting

SOURCE = Path(__file__).with_name("instructions.c")
BUDGET = Path(__file__).with_name("instructions.json")
GROWTH = 1.03

Counts = dict[str, int]


def count(isas: Collection[str] = (), library: Path | None = None) -> tuple[Counts, dict[str, float]]:
    """Return the instructions of a call of each kernel, and those per element: a logit, or a multiply-add.

    Of every instruction set of this processor, or of `isas`. Raises AbsentError where it cannot be done.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise AbsentError("no C compiler")
    library = library or mgt_kernels.library_path()
    with tempfile.TemporaryDirectory() as folder:
        # bound at once: the first call of a function would else be its search
        options = ["-std=c99", "-O1", f"-I{mgt_kernels.include_dir()}", f"-Wl,-z,now,-rpath,{library.parent}"]
        build = [compiler, *options, str(SOURCE), str(library), "-lm", "-o", "instructions"]
        done = subprocess.run(build, cwd=folder, capture_output=True, text=True)
        if done.returncode == 0:
            # names and environment lie on the stack: the same, so that it is aligned the same
            done = subprocess.run(["./instructions", *isas], cwd=folder, env={}, capture_output=True, text=True)
        if done.returncode:
            raise AbsentError((done.stderr.splitlines() or [f"status {done.returncode}"])[-1])
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    counts = {name: int(instructions) for name, _, instructions in lines}
    if not all(counts.values()):
        raise AbsentError("the processor's trap flag has no effect here")
    return counts, {name: int(instructions) / int(elements) for name, elements, instructions in lines}


def in_use() -> dict[str, float]:
    """Return the instructions per element of the kernels that run where no backend is named."""
    return count({cpu.kernel_isa(op) for op in OPS})[1]


def key(setting: Setting) -> str:
    """Return the name under which the instructions of a case's kernel are counted; a step's are those of its draw."""
    op = "sample_tokens" if setting.op == "step" else setting.op
    if op not in OPS or setting.backend == "triton":
        return ""
    # which reads no logits
    variant = "guided" if op == "mask_by_confidence" else setting.variant
    kernel = cpu.kernel_isa(op, setting.backend)
    return ", ".join((op, variant, DTYPE_NAMES[setting.dtype], setting.layout, kernel))


def compiler_of(library: Path | None = None) -> str:
    """Return what compiled the library: counts are those of one compiler."""
    found = re.findall(
        rb"(?:GCC: \([^)\0]*\) |clang version )[\d.]+", (library or mgt_kernels.library_path()).read_bytes()
    )
    # the C library's start-up files leave the name of theirs
    return max(found, key=found.count).decode() if found else "unknown"


def differences(budget: Counts, actual: Counts) -> Iterator[str]:
    """Say which kernels execute more than the budget allows; a kernel that this processor lacks is not counted."""
    for name, instructions in actual.items():
        if name not in budget:
            yield f"{name}: not in {BUDGET.name}"
        elif instructions > GROWTH * budget[name]:
            yield f"{name}: {instructions} instructions, {instructions / budget[name] - 1:+.1%} of {budget[name]}"


def read_budget() -> tuple[str, Counts]:
    """Return the compiler that the budget holds for, and the budget."""
    budget = json.loads(BUDGET.read_text())
    return budget["compiler"], budget["instructions"]


def main(write: Annotated[bool, typer.Option(help="Make what is counted the budget.")] = False) -> None:
    """Count the instructions of every kernel of this processor, and compare them with the budget."""
    counts, per_element = count()
    for name, each in per_element.items():
        print(f"{name}: {counts[name]}, {each:.3g} per element")
    compiler = compiler_of()
    if write:
        # what this processor lacks stays
        kept = read_budget()[1] if BUDGET.exists() and read_budget()[0] == compiler else {}
        written = {"compiler": compiler, "instructions": dict(sorted((kept | counts).items()))}
        with whole_file(BUDGET) as file:
            file.write((json.dumps(written, indent=1) + "\n").encode())
        return
    of, budget = read_budget()
    if of != compiler:
        raise typer.BadParameter(f"the library was compiled by {compiler}, the budget holds for {of}")
    found = list(differences(budget, counts))
    print("\n".join(found) or "within the budget")
    if found:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
