"""Which step a generation is at, for what works inside the model and is not told: each thread has its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch import Tensor


class Moment(NamedTuple):
    """The step whose logits the model is asked for.

    Attributes:
        step: k, 0 to T - 1.
        num_inference_steps: T.
        number: k as a tensor on the device where a CUDA graph is captured, else k.
    """

    step: int
    num_inference_steps: int
    number: int | Tensor


_NOW: ContextVar[Moment | None] = ContextVar("mgt_sampler_step", default=None)


def now() -> Moment | None:
    """The step that this thread's generation is at; None outside of one."""
    return _NOW.get()


@contextmanager
def at_step(step: int, num_inference_steps: int, number: int | Tensor | None = None) -> Iterator[None]:
    """Say which step the model is called for, inside the `with` alone."""
    token = _NOW.set(Moment(step, num_inference_steps, step if number is None else number))
    try:
        yield
    finally:
        _NOW.reset(token)
