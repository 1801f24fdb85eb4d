"""A stand-in for CUDA graphs: what a step does on CPU tensors is recorded, not run, and replayed on the same memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only


class Recorder(TorchDispatchMode):
    """Records PyTorch's ops, and by `add` what goes past PyTorch.

    As in the capture of a CUDA graph, nothing that exists before is written to, and a value that the host asks for is
    an error. New tensors get memory that stays theirs; what is in it before the first replay is of no meaning.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Callable[[], None]] = []
        self.made: list[Tensor] = []

    def add(self, run: Callable[[], None]) -> None:
        """Record what is to run at each replay."""
        self.records.append(run)

    def replay(self) -> None:
        """Run what was recorded, in its order."""
        for run in self.records:
            run()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host asks for a value while a graph is captured")
        written = {
            id(value)
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        }
        originals: dict[int, Tensor] = {}

        def spare(x: Tensor) -> Tensor:
            if id(x) not in written:
                return x
            copy = x.clone()
            originals[id(copy)] = x
            return copy

        made = func(*tree_map_only(Tensor, spare, args), **kwargs)
        made = tree_map_only(Tensor, lambda x: originals.get(id(x), x), made)
        given = {x.untyped_storage().data_ptr() for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)}
        outputs = [x if isinstance(x, Tensor) else None for x in tree_flatten(made)[0]]
        # a view sees what the replay does to its base
        new = [x if x is not None and x.untyped_storage().data_ptr() not in given else None for x in outputs]
        if not written and not any(x is not None for x in new):
            return made

        def run() -> None:
            for static, result in zip(new, tree_flatten(func(*args, **kwargs))[0], strict=True):
                if static is not None:
                    static.copy_(result)

        self.add(run)
        self.made += [x for x in new if x is not None]
        return made


def capture(step: Callable[[], Any], recorder: Recorder | None = None) -> tuple[Callable[[], None], Any]:
    """Do what `mgt_sampler.graphs.capture` does."""
    recorder = Recorder() if recorder is None else recorder
    with recorder:
        result = step()
    for tensor in recorder.made:
        # nothing has run yet
        tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
    return recorder.replay, result
