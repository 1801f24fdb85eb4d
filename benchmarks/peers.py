"""`python -m benchmarks.peers`: our int4 layers beside those of other libraries, each in an environment of its own.

The libraries bring their own PyTorch and thread pools, and pools in one process slow each other down, so every
measurement is a process. The environments are made at the first run, with pip, in build/peers: zentorch's takes several
gigabytes where pip brings a CUDA build of PyTorch.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import venv
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import mgt_kernels
from benchmarks.kept_memory import ENVIRONMENT
from benchmarks.peer_worker import LAYERS

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "benchmarks" / "peer_worker.py"
# what is installed into each environment
REQUIREMENTS = {"zentorch": ["zentorch==2.14.0.1"], "openvino": ["openvino==2026.4.1", "numpy"]}
HERE = tuple(name for name in LAYERS if name not in REQUIREMENTS)
# (rows, inputs, outputs, group size); Meissonic's MLP at 1024 image tokens and 77 of text
FULL = tuple((1101, k, n, group_size) for group_size in (128, 32) for k, n in ((1024, 4096), (4096, 1024)))
TINY = ((33, 256, 128, 64),)


def interpreter(name: str, folder: Path) -> Path:
    """Return the Python that `name` runs in, whose environment is made if it is missing."""
    if name in HERE:
        return Path(sys.executable)
    environment = folder / name
    python = environment / "bin" / "python"
    finished = environment / "finished"
    if not finished.exists():
        print(f"installing {' '.join(REQUIREMENTS[name])} into {environment}", file=sys.stderr)
        venv.create(environment, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS[name]], check=True)
        finished.touch()
    return python


def measure(name: str, python: Path, layer: tuple[int, int, int, int], threads: int, calls: int) -> dict[str, float]:
    """Time one library at one layer in a process of its own."""
    arguments = json.dumps({"name": name, "layer": layer, "threads": threads, "calls": calls})
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    if name in HERE:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    run = subprocess.run([python, WORKER, arguments], capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(f"{name} failed at layer {layer}:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join(REQUIREMENTS)}; both where none is named.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds, a process each.")] = 3,
    calls: Annotated[int, typer.Option(min=1, help="Timed calls in a process, of which the median counts.")] = 15,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    scale: Annotated[str, typer.Option(help="full, or tiny for a try.")] = "full",
    folder: Annotated[Path, typer.Option(help="Where the environments are.")] = ROOT / "build" / "peers",
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the results to this file.")] = None,
) -> None:
    """Time W4A8 layers of several libraries, quantization of the activations included."""
    names = list(REQUIREMENTS) if names is None else names
    for name in names:
        if name not in REQUIREMENTS:
            raise typer.BadParameter(f"expected some of {tuple(REQUIREMENTS)}, got {name!r}", param_hint="NAMES")
    if scale not in ("full", "tiny"):
        raise typer.BadParameter(f"expected full or tiny, got {scale!r}", param_hint="--scale")
    pythons = {name: interpreter(name, folder) for name in (*HERE, *names)}
    print(f"{threads} threads, {rounds} rounds, isa {mgt_kernels.info()['isa']}")
    rows: list[dict[str, object]] = []
    for layer in FULL if scale == "full" else TINY:
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
        for turn in range(rounds):
            for name, python in pythons.items():
                print(f"layer {layer}, round {turn + 1} of {rounds}: {name}", file=sys.stderr)
                measured[name].append(measure(name, python, layer, threads, calls))
        seconds = {name: statistics.median(run["seconds"] for run in runs) for name, runs in measured.items()}
        sizes = dict(zip(("rows", "inputs", "outputs", "group"), layer, strict=True))
        for name, runs in measured.items():
            gops = 2e-9 * layer[0] * layer[1] * layer[2] / seconds[name]
            ratio = seconds["float32"] / seconds[name]
            rows.append(
                {
                    **sizes,
                    "library": name,
                    "GOP/s": f"{gops:.0f}",
                    "x float32": f"{ratio:.2f}",
                    "error": f"{runs[0]['error']:.4f}",
                }
            )
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=100).print(table)
    print("zentorch and the bfloat16 layers take and return bfloat16; error: of the Frobenius norm, on normal data")
    if csv_file is not None:
        with csv_file.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    typer.run(main)
