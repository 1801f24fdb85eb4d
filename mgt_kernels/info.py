"""What runs here: version, instruction set, threads and the libraries met."""

import importlib.metadata

import torch

from mgt_kernels import _C, cpu

__version__: str = _C.version()


def info() -> dict[str, str | int | list[str]]:
    """Return what this installation runs on: version, isa in use, isas available, threads, torch and Triton."""
    pool = cpu.torch_thread_pool()[1]
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    return {
        "version": __version__,
        "isa": cpu.resolve_isa(),
        "isas": cpu.available_isas(),
        "num_threads": torch.get_num_threads(),
        "thread_pool": f"PyTorch's ({pool})" if pool else "own threads per call",
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "not available",
    }
