"""Cases of the int4 layers, against PyTorch's layers and those of other libraries."""

import math
from collections.abc import Callable
from functools import partial

import torch

import mgt_kernels
from mgt_kernels import cpu

from .case import Call, Case, Contestant, Job, Setting, Target, Work
from .kept_memory import keep_freed_memory
from .models import Layer
from .peers import FOLDER, OUTSIDE, Worker
from .steps import device_of, gather_peers

# the instruction set and dtype whose multiply-adds a kernel does
_ARITHMETIC = {
    "w4a8_linear": {"avx2": "int8", "avx512": "int8", "avx512_vnni": "int8", "amx": "int8"},
    "w4a16_linear": {"avx2": "float32", "avx512": "float32", "avx512_bf16": "bfloat16", "amx": "bfloat16"},
}


def linear_case(
    layer: Layer,
    *,
    op: str = "w4a8_linear",
    dtype: torch.dtype = torch.float32,
    group_size: int = 128,
    backend: str = "auto",
    threads: int = 2,
    others: bool = False,
    targets: tuple[Target, ...] = (),
    curve: tuple[str, float] | None = None,
) -> Case:
    """An int4 layer against PyTorch's in float32 and bfloat16 and, where `others`, against other libraries' W4A8.

    Those run in processes of their own, where `python -m mgt_benchmarks.peers` has installed them.
    """
    num_rows, num_inputs, num_outputs = layer.num_rows, layer.num_inputs, layer.num_outputs
    setting = Setting(
        op, f"group {group_size}", layer.name, f"M={num_rows} K={num_inputs} N={num_outputs}", dtype, backend=backend,
        threads=threads,
    )  # fmt: skip

    def prepare() -> Job:
        keep_freed_memory()
        generator = torch.Generator().manual_seed(0)
        device = device_of(backend)
        x = torch.randn(num_rows, num_inputs, generator=generator).to(device, dtype)
        dense = torch.randn(num_outputs, num_inputs, generator=generator)
        weight = mgt_kernels.quantize_int4(dense, group_size).to(device)
        dense = dense.to(device)
        function = getattr(mgt_kernels, op)
        run = partial(function, x, weight, backend=backend)

        def check() -> None:
            y, some = run(), slice(0, num_rows, max(1, num_rows // 16))
            truth = function(x[some], weight, backend="reference")
            error = float((y[some].double() - truth).abs().max() / truth.abs().max())
            # a result in 16 bits is rounded once
            limit = 1e-5 if dtype is torch.float32 else 2.0**-8
            if not error < limit:
                raise AssertionError(f"results differ from the oracle's by {error:.1e} of the largest")

        wanted: dict[str, Callable[[], Contestant]] = {
            "torch fp32": lambda: Call(partial(torch.nn.functional.linear, x.float(), dense)),
            "torch bf16": lambda: Call(partial(torch.nn.functional.linear, x.bfloat16(), dense.bfloat16())),
        }
        if others:
            sizes = (num_rows, num_inputs, num_outputs, group_size)
            wanted |= {name: partial(Worker.start, name, FOLDER, sizes, threads) for name in OUTSIDE}
        peers, skipped = gather_peers(wanted)
        kernel = "" if device == "cuda" else cpu.kernel_isa(op, backend)
        arithmetic = _ARITHMETIC[op].get(kernel)
        operations = 2 * num_rows * num_inputs * num_outputs
        work = Work(
            bytes_moved=(x.numel() + num_rows * num_outputs) * x.element_size() + weight.nbytes,
            num_positions=num_rows,
            operations=operations if arithmetic else 0,
            arithmetic=(kernel, arithmetic) if arithmetic else ("", ""),
        )
        return Job(work, Call(run), peers, check, skipped)

    return Case(setting, prepare, targets, math.inf, curve)
