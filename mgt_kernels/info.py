"""What runs here: version, instruction set, threads and the libraries met."""

import importlib.metadata
from pathlib import Path

import torch

from mgt_kernels import _C, cpu

__version__: str = _C.version()


_PACKAGE = Path(__file__).parent

OPS = (
    "sample_tokens",
    "differential_sample",
    "mask_by_confidence",
    "commit_tokens",
    "match_tokens",
    "merge_tokens",
    "w4a8_linear",
    "w4a16_linear",
)


def include_dir() -> Path:
    """Return the folder of the C library's header, mgt_kernels.h; its parent is a prefix for CMake's find_package."""
    return _PACKAGE / "include"


def library_path() -> Path:
    """Return the C library to link or to load: the kernels without Python and torch."""
    return _PACKAGE / "lib" / "libmgt_kernels.so"


def info() -> dict[str, str | int | list[str] | dict[str, str]]:
    """Return what this installation runs on: version, isa in use, each op's kernel, isas available, threads, torch."""
    pool = cpu.torch_thread_pool()[1]
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    return {
        "version": __version__,
        "isa": cpu.resolve_isa(),
        "kernels": {op: cpu.kernel_isa(op) for op in OPS},
        "isas": cpu.available_isas(),
        "num_threads": cpu.num_threads(),
        "thread_pool": f"PyTorch's ({pool})" if pool else "own threads per call",
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "not available",
    }
