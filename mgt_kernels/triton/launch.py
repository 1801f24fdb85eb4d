"""What the launchers share: how a kernel is launched, and what they compute of shapes and layouts."""

from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import JITFunction, driver

# what Triton compiled and loaded, and the values of the constexprs in the kernel's order
_Variant = tuple[Any, tuple[Any, ...]]
# by all that a variant depends on
_LOADED: dict[tuple[Any, ...], _Variant] = {}
# The same by the integers themselves, which is asked faster: the steps of a generation have the same sizes. Where sizes
# do not repeat it would grow without end, so it is emptied when it is full.
_LOADED_FOR: dict[tuple[Any, ...], _Variant] = {}
_MOST_LOADED_FOR = 4096


def launch(kernel: JITFunction, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Do what `kernel[grid](*arguments, **settings)` does, launch a kernel, with less work on the host.

    At each launch Triton sorts the arguments anew and compares every global that the kernel reads. What a variant of
    these kernels depends on is less: the types of the arguments, whether pointers and integers are multiples of 16,
    whether an integer is 1 or takes more than 32 bits, and the settings. The first launch of a variant is Triton's,
    which compiles and loads it, and hands it back; later ones go to the variant itself.

    Args:
        kernel: what `triton.jit` returned.
        grid: one to three numbers of programs.
        arguments: tensors, ints, floats and None, all that the kernel takes before its constexprs.
        settings: the constexprs, and the options of the compiler.

    Raises:
        RuntimeError: if the variant is not loaded yet and the current stream is being captured.
    """
    active = driver.active
    device = active.get_current_device()
    # a kernel's own hash is that of its source; what is loaded keeps the kernel, and so its id
    sizes = (
        id(kernel), device, *settings, *settings.values(),
        *[
            x if (kind := type(x)) is int else kind if kind is float or x is None else (x.dtype, x.data_ptr() % 16 == 0)
            for x in arguments
        ],
    )  # fmt: skip
    variant = _LOADED_FOR.get(sizes)
    if variant is None:
        depends_on = _depends_on(device, kernel, arguments, settings)
        variant = _LOADED.get(depends_on)
        if variant is None:
            variant = _launch_first(kernel, grid, arguments, settings)
            if variant is not None:
                _LOADED[depends_on] = variant
            return
        if len(_LOADED_FOR) == _MOST_LOADED_FOR:
            _LOADED_FOR.clear()
        _LOADED_FOR[sizes] = variant
    compiled, constants = variant
    grid = (*grid, 1, 1)[:3]
    hooks = knobs.runtime
    if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
        # a profiler wants to know more
        compiled[grid](*arguments, *constants)
    else:
        stream = active.get_current_stream(device)
        compiled.run(
            *grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *constants
        )


def _depends_on(
    device: int, kernel: JITFunction, arguments: tuple[Any, ...], settings: dict[str, Any]
) -> tuple[Any, ...]:
    """Return all that Triton compiles a variant for."""
    key = [id(kernel), device, *settings, *settings.values()]
    for value, parameter in zip(arguments, kernel.params, strict=False):
        kind = type(value)
        if kind is int:
            if not parameter.do_not_specialize:
                key.append(1 if value == 1 else 16 if value % 16 == 0 else 0)
            key.append(-(2**31) <= value < 2**31)
        elif kind is float or value is None:
            key.append(kind)
        else:
            key.append(value.dtype)
            if not parameter.do_not_specialize:
                key.append(value.data_ptr() % 16 == 0)
    return tuple(key)


def _launch_first(
    kernel: JITFunction, grid: tuple[int, ...], arguments: tuple[Any, ...], settings: dict[str, Any]
) -> _Variant | None:
    """Let Triton compile, load and launch a variant; return it, or None where a hook of Triton's kept it from that."""
    # PyTorch without CUDA has nothing to ask
    if torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{kernel.__name__}: expected a variant that is loaded before the capture of a CUDA graph, got a first "
            "launch within it; call mgt_kernels.warm_up, or run the step once, before the capture"
        )
    compiled = kernel[grid](*arguments, **settings)
    if compiled is None:
        return None
    return compiled, tuple(settings[name] for name in kernel.arg_names[len(arguments) :])


# Triton's own functions for both take microseconds to tell numbers from constants
def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


def laid_out(x: Tensor, *others: Tensor | None) -> list[Any]:
    """Return the tensors of a linear layer as its kernels assume them: each row of x dense, the others contiguous."""
    rows = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    return [rows, *(None if tensor is None else tensor.contiguous() for tensor in others)]


# one warp for each scheduler of an A100, which has fewer than an H100 or an RTX 4090
_PROGRAMS = 4 * 108
# steps that take about as long as a second launch, estimated: 0.25 to 0.3 us each, the latency of DRAM, against 2 us
_STEPS = 8


def splits_for(num_programs: int, num_steps: int) -> int:
    """Return among how many programs to divide the loop of each, where there are too few to keep a GPU busy."""
    return max(min(_PROGRAMS // num_programs, num_steps // _STEPS), 1)
