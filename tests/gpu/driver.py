"""A Triton driver without a device: kernels are compiled for a GPU that is not there and emulated on CPU tensors."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from typing import Any

import torch
import triton
from ptx_emulator import Emulator, Program, PtxError, Report
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler.compiler import CompiledKernel, make_backend

from mgt_kernels.draw import Draw

# bytes of shared memory that a block may have
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}
_NUM_MULTIPROCESSORS = 108
# Versions of Triton whose missing fence.proxy.async is waived: 3.6 puts a barrier between cp.async and the wgmma that
# reads what it copied, but not the fence that PTX asks for besides; 3.7.1 does (triton #9610). A kernel cannot add it
# where it belongs, and no wrong result is known of it: PyTorch 2.10 and 2.11 run all their wgmma so.
MISSING_FENCES_WAIVED = ("3.6.0",)


@dataclass
class Launch:
    """One launch of a kernel; `report` is None where nothing was executed."""

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    # bytes
    shared: int
    cubin: bytes
    ptx: str
    # the arguments that are not compiled in
    arguments: dict[str, Any]
    # those that are: constexprs, None, and integers that Triton specialises on
    constants: dict[str, Any]
    device: int
    stream: int
    # what Triton compiled it with
    metadata: Any
    report: Report | None = None


@dataclass
class _Settings:
    execute: bool
    approx_ulp: int
    edit_ptx: Callable[[str], str] | None
    check_races: bool


@dataclass
class _Function:
    """What load_binary hands to the launcher."""

    cubin: bytes
    ptx: str


class _Launcher:
    """Takes what Triton's runtime passes to a compiled launcher."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.metadata = metadata
        self.signature = dict(zip(src.fn.arg_names, src.signature.values(), strict=True))

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        function: _Function,
        packed_metadata: Any,
        launch_metadata: Any,
        enter_hook: Any,
        exit_hook: Any,
        *args: Any,
    ) -> None:
        driver = triton.runtime.driver.active
        values = dict(zip(self.signature, args, strict=True))
        constants = {name: value for name, value in values.items() if self.signature[name] == "constexpr"}
        arguments = {name: value for name, value in values.items() if name not in constants}
        ptx = driver.settings.edit_ptx(function.ptx) if driver.settings.edit_ptx else function.ptx
        launch = Launch(
            self.metadata.name, (grid_x, grid_y, grid_z), self.metadata.num_warps, self.metadata.shared,
            function.cubin, ptx, arguments, constants, driver.get_current_device(), stream, self.metadata,
        )  # fmt: skip
        driver.launches.append(launch)
        if driver.settings.execute and grid_x * grid_y * grid_z:
            self._execute(launch, driver.settings)

    def _execute(self, launch: Launch, settings: _Settings) -> None:
        buffers = [storage_of(value) for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
        bits = [_to_bits(value, self.signature[name]) for name, value in launch.arguments.items()]
        emulator = Emulator(_decode(launch.ptx, settings.approx_ulp), launch.shared)
        launch.report = emulator.run(launch.grid, bits, buffers)
        races = [*launch.report.races]
        if triton.__version__ not in MISSING_FENCES_WAIVED:
            races += launch.report.missing_fences
        if settings.check_races and races:
            raise PtxError(f"races in {launch.kernel}: " + "; ".join(races))


@lru_cache(maxsize=64)
def _decode(ptx: str, approx_ulp: int) -> Program:
    return Program(ptx, approx_ulp)


def storage_of(tensor: torch.Tensor) -> Any:
    """The whole storage of a CPU tensor as a uint8 array that shares its memory."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def _to_bits(value: Any, kind: str) -> int:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if kind == "fp32":
        return int.from_bytes(struct.pack("<f", value), "little")
    if kind == "fp64":
        return int.from_bytes(struct.pack("<d", value), "little")
    if kind.startswith(("i", "u")):
        return int(value)
    raise TypeError(f"an argument of type {kind} is not supported")


class _Utils:
    """The functions of a driver that touch the device."""

    def __init__(self, driver: StandinDriver) -> None:
        self.driver = driver

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[None, _Function, int, int, int]:
        """Load nothing; the numbers are registers, spills and the threads that a block may have."""
        return None, _Function(cubin, self.driver.ptx_of[cubin]), 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        """What the runtime asks for."""
        return {
            "max_shared_mem": SHARED_BYTES[self.driver.capability],
            "multiprocessor_count": _NUM_MULTIPROCESSORS,
            "max_num_regs": 65536,
            "warpSize": 32,
        }


class StandinDriver(DriverBase):
    """The driver of a GPU of some compute capability."""

    launcher_cls = _Launcher

    def __init__(self, capability: int, settings: _Settings) -> None:
        """Take the compute capability, 10 major + minor."""
        super().__init__()
        if capability not in SHARED_BYTES:
            raise ValueError(f"capability must be one of {list(SHARED_BYTES)}, not {capability}")
        self.capability = capability
        self.settings = settings
        self.launches: list[Launch] = []
        self.ptx_of: dict[bytes, str] = {}
        self.utils = _Utils(self)

    @classmethod
    def is_active(cls) -> bool:
        """Whether Triton may choose it by itself: never."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """The C type of an argument."""
        return {"fp32": "float", "fp64": "double"}.get(ty, "int64_t")

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """One cache of compiled kernels per capability."""
        return self.capability

    def set_current_device(self, device: int) -> None:
        """There is one device."""

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        """Major and minor."""
        return divmod(self.capability, 10)

    def get_active_torch_device(self) -> torch.device:
        """Where the arguments are."""
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """The module of the device."""
        return torch.cpu

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        """Nothing is timed."""
        return torch.empty(1)

    def clear_cache(self, cache: torch.Tensor) -> None:
        """Nothing is timed."""

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """A benchmark that runs nothing and finds all configurations equal, so that the first one wins."""

        def benchmark(kernel_call: Callable, *, quantiles: Sequence[float] = (0.5,), **kwargs: Any) -> list[float]:
            return [1.0] * len(quantiles)

        return benchmark


_load = CompiledKernel._init_handles


def _load_with_ptx(kernel: CompiledKernel) -> None:
    """Tell the stand-in which PTX a cubin was assembled from."""
    driver = triton.runtime.driver.active
    if isinstance(driver, StandinDriver):
        driver.ptx_of[kernel.kernel] = kernel.asm["ptx"]
    _load(kernel)


def ptxas_warnings(launch: Launch) -> list[str]:
    """Assemble the PTX of a launch again, as Triton did, and return what ptxas warns of with a number.

    C7514 and C7515 say that it serialises every wgmma, C7517 that it adds a wait.
    """
    backend = make_backend(launch.metadata.target)
    options = backend.parse_options(launch.metadata._asdict())
    log = StringIO()
    with triton.knobs.nvidia.scope(), redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(launch.ptx, {}, options, launch.metadata.target.arch)
    return re.findall(r"\(C\d+\)[^\n]*", log.getvalue())


def draw_of(*fields: Any, **named: Any) -> Draw:
    """Return a draw on CUDA, whose step and, if they are given so, scalars are tensors."""
    return Draw(*fields, **named)


@contextmanager
def standin_gpu(
    capability: int,
    *,
    execute: bool = True,
    approx_ulp: int = 0,
    edit_ptx: Callable[[str], str] | None = None,
    check_races: bool = True,
) -> Iterator[list[Launch]]:
    """Let `kernel[grid](cpu_tensors)` compile for a compute capability and run its PTX in the emulator.

    Args:
        capability: 10 major + minor; 80, 86, 89 and 90 can be executed, 100 only compiled.
        execute: whether to run, not only to compile and to record the launch.
        approx_ulp: error of the approximate instructions, units in the last place.
        edit_ptx: what to do to the PTX before it is run; the cubin stays as it is.
        check_races: whether a race raises; if not, `Launch.report.races` tells.

    Yields:
        The launches so far, in order.

    Raises:
        ValueError: the capability is unknown, or cannot be executed.
        PtxError: PTX that the emulator does not know, a bad access, a race.
    """
    if execute and capability >= 100:
        raise ValueError("the emulator knows no PTX past sm_90: execute must be False")
    driver = StandinDriver(capability, _Settings(execute, approx_ulp, edit_ptx, check_races))
    config = triton.runtime.driver
    previous, previous_load, mm = config._active, CompiledKernel._init_handles, torch.mm

    def mm_of_a_gpu(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        dtype = out_dtype or a.dtype
        return mm(a.to(dtype), b.to(dtype)) if execute else a.new_empty(len(a), b.shape[1], dtype=dtype)

    config.set_active(driver)
    CompiledKernel._init_handles = _load_with_ptx
    # the CPU's has no out_dtype
    torch.mm = mm_of_a_gpu  # type: ignore[assignment]
    try:
        yield driver.launches
    finally:
        torch.mm = mm
        config._active = previous
        CompiledKernel._init_handles = previous_load
