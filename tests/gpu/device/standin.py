"""CPU tensors in the place of a GPU's: what the public ops launch for them is compiled and, if asked for, emulated."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from driver import Launch, standin_gpu


@contextmanager
def cpu_tensors_on(capability: int, *, execute: bool) -> Iterator[list[Launch]]:
    """Let ops take CPU tensors for those of a GPU of this compute capability, 10 major + minor; yields the launches."""
    with (
        mock.patch.object(torch.Tensor, "is_cuda", True),
        mock.patch.object(torch.Tensor, "is_cpu", False),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: divmod(capability, 10)),
        standin_gpu(capability, execute=execute) as launches,
    ):
        yield launches
