"""How an op becomes one of torch's, `torch.ops.mgt_kernels.NAME`, and when a call may go round PyTorch's dispatcher.

`torch.library.custom_op` would do most of the former, but the first call of such an op imports PyTorch's compiler, at
the cost of those who never compile.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _dispatch_keys, _dispatch_tls_local_include_set
from torch.utils._pytree import tree_map

from mgt_kernels.checks import check_capability
from mgt_kernels.draw import Draw

Kernel = Callable[..., Any]


@dataclass
class _Definition:
    """What PyTorch holds of an op; it looks the kernels up at each call."""

    schema: str
    library: torch.library.Library
    kernels: dict[str, Kernel]


# PyTorch takes one definition per process, and a notebook imports this module anew: the definitions outlive the module
_DEFINITIONS: dict[str, _Definition] = vars(torch).setdefault("_mgt_kernels_definitions", {})

# by the op's name, the function that `register` returned
CALLS: dict[str, Kernel] = {}

# of an op's arguments; to ask whether one of them is a tensor takes longer
_NO_TENSORS = frozenset({int, float, bool, str, type(None)})

_NUM_DRAW = len(Draw._fields)

_UNCHANGING_KEYS = ("BackendSelect", "ADInplaceOrView", "CPU", "AutogradCPU", "AutocastCPU")
_UNCHANGING_CUDA_KEYS = ("CUDA", "AutogradCUDA", "AutocastCUDA")
_OTHER_KEYS = ~sum(
    1 << bit
    for bit in range(64)
    if any(
        DispatchKeySet(getattr(DispatchKey, key)).raw_repr() >> bit & 1
        for key in _UNCHANGING_KEYS + _UNCHANGING_CUDA_KEYS
    )
)


def is_plain(tensors: list[Tensor]) -> bool:
    """Tell whether PyTorch's dispatcher would do nothing with these tensors but call the kernel of their device.

    It would do more under a mode, a transform, a trace, a profiler or the compiler, for tensors of another kind or
    layout, and where a gradient may be asked for.
    """
    if torch.compiler.is_compiling() or torch.overrides.has_torch_function(tensors):
        return False
    keys = _dispatch_tls_local_include_set().raw_repr()
    for tensor in tensors:
        keys |= _dispatch_keys(tensor).raw_repr()
    if keys & _OTHER_KEYS or torch._C._autograd._profiler_enabled():
        return False
    return not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors)


def _prototype(reference: Kernel) -> tuple[Kernel, bool]:
    """Return what has the op's flat arguments for a signature, and whether its first ones are those of a `Draw`."""
    signature = inspect.signature(reference)
    first, *others = signature.parameters.values()
    if first.annotation is not Draw:
        return reference, False
    # the op has all arguments, always
    fields = [first.replace(name=name, annotation=kind) for name, kind in Draw.__annotations__.items()]

    def prototype() -> None: ...

    vars(prototype)["__signature__"] = signature.replace(parameters=[*fields, *others])
    return prototype, True


def register(
    name: str,
    reference: Kernel,
    fake: Kernel,
    cpu: Kernel | None = None,
    *,
    mutates_args: tuple[str, ...] = (),
    per_sample: tuple[str, ...] = (),
    numbers: Mapping[str, Callable[[Any], None]] | None = None,
) -> Kernel:
    """Register an op, whose last argument names the backend, with its kernels; return the function that calls it.

    A compiled graph holds for all values of a tensor. So the op's arguments in `numbers` are 0-dimensional tensors, and
    those in `per_sample` tensors (B,); the function that is returned takes numbers and ints there too.

    A reference whose first argument is a `Draw` makes an op of the draw's fields and of its other arguments; every
    kernel but `fake` gets them as a `Draw` again.

    Args:
        name: of the op, and of its CUDA kernel in `mgt_kernels.triton`.
        reference: the implementation in PyTorch, whose annotations are the op's schema; for backend "reference" and for
            devices without kernels.
        fake: returns empty results of the right shapes, for `torch.compile`.
        cpu: takes what the reference takes, an instruction set for a backend. None: the reference on every device.
        mutates_args: the arguments that are written to.
        per_sample: the int64 arguments for which an int may stand, the same for all samples.
        numbers: the arguments that the reference and the CPU's kernel get as a number, each with the check of its
            value. Other kernels get a float where the value is known on the host, else a tensor on their device.
    """
    numbers = numbers or {}
    prototype, takes_draw = _prototype(reference)
    schema = torch.library.infer_schema(prototype, mutates_args=mutates_args)
    names = [argument.split()[-1] for argument in schema[1 : schema.index(") -> ")].split(", ")]
    for argument in numbers:
        for scalar in (f"SymInt {argument},", f"float {argument},"):
            schema = schema.replace(scalar, f"Tensor {argument},")
    mutated = [names.index(argument) for argument in mutates_args]
    samples = [names.index(argument) for argument in per_sample]
    checks = [(names.index(argument), check) for argument, check in numbers.items()]

    # what prepares the arguments of a kernel returns them, so that little is between a call and its kernel
    def with_values(arguments: Sequence[Any], needs_values: bool) -> list[Any]:
        read = list(arguments)
        for i, check in checks:
            value = read[i]
            if isinstance(value, Tensor):
                # one for each sample the kernel checks
                if value.ndim or not (needs_values or (value.is_cpu and value.is_floating_point())):
                    continue
                value = read[i] = value.item()
            check(value)
        return joined(read)

    def joined(arguments: list[Any]) -> list[Any]:
        for i in mutated:
            if not arguments[i].is_inference():
                torch.autograd.graph.increment_version(arguments[i])
        return [Draw._make(arguments[:_NUM_DRAW]), *arguments[_NUM_DRAW:]] if takes_draw else arguments

    def on_cpu(*arguments: Any) -> Any:
        return cpu_kernel(arguments[-1])(*with_values(arguments, True))

    def cpu_kernel(backend: str) -> Kernel:
        return reference if cpu is None or backend == "reference" else cpu

    def on_cuda(*arguments: Any) -> Any:
        if cpu is None or arguments[-1] == "reference":
            return anywhere(*arguments)
        from mgt_kernels import triton

        check_capability(name, arguments[0].device)
        # a small model's step takes less time than a careless one of these loops
        read = list(arguments[:-1])
        for i in samples:
            if type(read[i]) is int:
                read[i] = torch.full((len(read[0]),), read[i], dtype=torch.int64, device=read[0].device)
        for i, check in checks:
            value = read[i]
            if type(value) is float:
                check(value)
            elif type(value) is int:
                read[i] = torch.full((), value, dtype=torch.int64, device=read[0].device)
            elif value.is_cpu and value.is_floating_point():
                if value.ndim:
                    read[i] = value.to(read[0].device)
                    continue
                check(number := value.item())
                read[i] = number
        return getattr(triton, name)(*joined(read))

    def anywhere(*arguments: Any) -> Any:
        return reference(*with_values(arguments, cpu is not None))

    kernels = {"CompositeExplicitAutograd": anywhere, "fake": fake}
    if cpu is not None:
        kernels |= {"CPU": on_cpu, "CUDA": on_cuda}
    _define(name, schema, kernels, differentiable=not mutates_args)

    def as_tensors(arguments: tuple[Any, ...], device: torch.device, batch: int) -> list[Any]:
        compiling = torch.compiler.is_compiling()
        made = list(arguments)
        for i in samples:
            if isinstance(made[i], int):
                made[i] = torch.full((batch,), made[i], dtype=torch.int64, device=device)
        for i, check in checks:
            value = made[i]
            if isinstance(value, int):
                made[i] = torch.full((), value, dtype=torch.int64, device=device)
            elif isinstance(value, float):
                # on CPU the kernel checks it
                if device.type != "cpu":
                    check(value)
                # what a compiled graph captures as a CUDA graph may not look at the host
                one = torch.ones((), dtype=torch.float64, device=device if compiling else "cpu")
                # the compiler keeps a number that changes out of its guards in a product, not in a fill
                made[i] = one * value
            elif isinstance(value, Tensor) and compiling:
                made[i] = value.to(device)
        return made

    def call(*arguments: Any) -> Any:
        tensors = [x for x in arguments if type(x) not in _NO_TENSORS and isinstance(x, Tensor)]
        if is_plain(tensors):
            if tensors[0].is_cpu:
                return cpu_kernel(arguments[-1])(*with_values(arguments, True))
            if tensors[0].is_cuda:
                return on_cuda(*arguments)
        op = getattr(torch.ops.mgt_kernels, name).default
        return op(*as_tensors(arguments, tensors[0].device, tensors[0].shape[0]))

    CALLS[name] = call
    return call


def _one_by_one(name: str) -> Kernel:
    """What `torch.vmap` does with an op: a call for each member of the batch, whose results are stacked."""

    def one_by_one(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        op = getattr(torch.ops.mgt_kernels, name).default
        for argument, dim in zip(op._schema.arguments, in_dims, strict=True):
            if dim is None and argument.alias_info is not None and argument.alias_info.is_write:
                raise ValueError(f"{argument.name}: vmap needs one for each member of its batch, as it is written to")

        def call(member: int) -> Any:
            return op(*(x if dim is None else x.select(dim, member) for x, dim in zip(arguments, in_dims, strict=True)))

        results = [call(member) for member in range(info.batch_size)]
        stacked = tree_map(lambda *members: torch.stack(members), *results)
        return stacked, tree_map(lambda _: 0, stacked)

    return one_by_one


def _define(name: str, schema: str, kernels: dict[str, Kernel], differentiable: bool) -> None:
    definition = _DEFINITIONS.get(name)
    if definition is not None:
        if definition.schema == schema:
            definition.kernels = kernels
            return
        definition.library._destroy()
    library = torch.library.Library("mgt_kernels", "FRAGMENT")
    definition = _DEFINITIONS[name] = _Definition(schema, library, kernels)
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))

    def kernel_of(key: str) -> Kernel:
        return lambda *arguments: definition.kernels[key](*arguments)

    def no_gradient(*_: Any) -> None:
        raise NotImplementedError(f"mgt_kernels.{name} has no gradient; call it under torch.no_grad()")

    for key in sorted(kernels.keys() - {"fake"}):
        library.impl(name, kernel_of(key), key)
    torch.library.register_fake(f"mgt_kernels::{name}", kernel_of("fake"), lib=library)
    torch.library.register_vmap(f"mgt_kernels::{name}", _one_by_one(name), lib=library)
    # torch takes no formula for an op that writes to its arguments
    if differentiable:
        torch.library.register_autograd(f"mgt_kernels::{name}", no_gradient, lib=library)
