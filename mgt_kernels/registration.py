"""How an op becomes one of torch's: `torch.ops.mgt_kernels.NAME`.

`torch.library.custom_op` would do most of this, but the first call of such an op imports PyTorch's compiler, at the
cost of those who never compile.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("mgt_kernels", "DEF")


def register(
    name: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    mutates_args: tuple[str, ...] = (),
) -> None:
    """Register an op, whose last argument names the backend, with its kernels.

    Args:
        name: of the op, and of its CUDA kernel in `mgt_kernels.triton`.
        reference: the implementation in PyTorch, whose annotations are the op's schema; for backend "reference" and for
            devices without kernels.
        fake: returns empty results of the right shapes, for `torch.compile`.
        cpu: takes what the reference takes, an instruction set for a backend. None: the reference on every device.
        mutates_args: the arguments that are written to.
    """
    schema = torch.library.infer_schema(reference, mutates_args=mutates_args)
    mutated = [i for i, argument in enumerate(inspect.signature(reference).parameters) if argument in mutates_args]
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))

    def on_cuda(*arguments: Any) -> Any:
        from mgt_kernels import triton

        return getattr(triton, name)(*arguments[:-1])

    def implement(dispatch_key: str, kernel: Callable[..., Any]) -> None:
        def run(*arguments: Any) -> Any:
            for i in mutated:
                if not arguments[i].is_inference():
                    torch.autograd.graph.increment_version(arguments[i])
            return (reference if arguments[-1] == "reference" else kernel)(*arguments)

        _LIBRARY.impl(name, run, dispatch_key)

    implement("CompositeExplicitAutograd", reference)
    if cpu is not None:
        implement("CPU", cpu)
        implement("CUDA", on_cuda)

    def no_gradient(*_: Any) -> None:
        raise NotImplementedError(f"mgt_kernels.{name} has no gradient; call it under torch.no_grad()")

    torch.library.register_fake(f"mgt_kernels::{name}", fake, lib=_LIBRARY)
    # torch takes no formula for an op that writes to its arguments
    if not mutated:
        torch.library.register_autograd(f"mgt_kernels::{name}", no_gradient, lib=_LIBRARY)
