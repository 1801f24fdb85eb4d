"""Compile the kernels with every version of Triton that the package allows; prints a table, fails where one fails.

    python tests/gpu/versions.py        or: make triton-versions
    python tests/gpu/versions.py --install 3.6.0, to have that version in build/triton/3.6.0 and no more

Each version is installed into a folder of its own below build/triton, beside the PyTorch of this environment. Compiled
are the configurations that are counted, for every capability of CAPABILITIES, and for the first of them the cases that
the emulator runs: what these have besides is a matter of the front end, which no capability changes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

# the newest patch release of each minor version from the lower bound of pyproject.toml on
VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
CAPABILITIES = (80, 89, 90, 100)
TESTS = Path(__file__).parents[1]
BUILD = TESTS.parent / "build" / "triton"


@dataclass(frozen=True)
class Outcome:
    version: str
    capability: int
    # launches that compiled, and what the others said
    num_compiled: int
    failures: tuple[str, ...]
    seconds: float


def architecture_to_compile() -> int:
    """Return the one architecture that the tests compile for with the version that is imported."""
    import triton

    return 90 if triton.__version__ == VERSIONS[0] else 80


def install(version: str) -> Path:
    """Return the folder that holds a version and nothing else."""
    folder = BUILD / version
    if not (folder / "triton").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, f"triton=={version}"], check=True)
    return folder


def compile_in_a_process(version: str, capability: int) -> Outcome:
    """Compile everything for a capability, in a process that imports this version."""
    # compiled anew each time, since a cache would say nothing of the compiler
    environment = os.environ | {
        "PYTHONPATH": f"{BUILD / version}:{TESTS}", "TRITON_ALWAYS_COMPILE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    started = time.monotonic()
    command = [sys.executable, __file__, "--version", version, "--capability", str(capability)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - started
    lines = process.stdout.splitlines()
    if process.returncode:
        ended = f"ended with {process.returncode}"
        return Outcome(version, capability, 0, (*lines, *process.stderr.splitlines()[-1:], ended), seconds)
    return Outcome(version, capability, int(lines[-1]), tuple(lines[:-1]), seconds)


def compile_everything(version: str, capability: int) -> None:
    """Print a line per failure, then how many launches compiled."""
    import triton
    from cases import CASES
    from configurations import CONFIGURATIONS
    from driver import standin_gpu

    if triton.__version__ != version:
        sys.exit(f"expected Triton {version}, got {triton.__version__}")
    works = {f"{x.op}, {x.name}": x.launch for x in CONFIGURATIONS}
    if capability == CAPABILITIES[0]:
        works |= {str(case): lambda case=case: case.run(case.make_arguments()) for case in CASES}  # type: ignore[misc]
    num_compiled = 0
    for name, launch in works.items():
        with standin_gpu(capability, execute=False) as launches:
            try:
                launch()
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[-300:]}")
        num_compiled += len(launches)
    print(num_compiled)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the kernels with every version of Triton.")
    parser.add_argument("--version", choices=VERSIONS, help="this one, which is the one that is imported")
    parser.add_argument("--capability", type=int, choices=CAPABILITIES)
    parser.add_argument("--install", choices=VERSIONS, help="install this one, and compile nothing")
    options = parser.parse_args()
    if options.install:
        install(options.install)
        return
    if options.version:
        compile_everything(options.version, options.capability)
        return
    for version in VERSIONS:
        install(version)
    print("| Triton | capability | launches compiled | failures | seconds |\n|---|---|---:|---:|---:|", flush=True)
    failures = []
    with ThreadPoolExecutor(2) as pool:
        for x in pool.map(lambda job: compile_in_a_process(*job), product(VERSIONS, CAPABILITIES)):
            row = f"| {x.version} | sm_{x.capability} | {x.num_compiled} | {len(x.failures)} | {x.seconds:.0f} |"
            print(row, flush=True)
            failures += [f"Triton {x.version}, sm_{x.capability}: {failure}" for failure in x.failures]
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
