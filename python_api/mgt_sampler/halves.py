"""Guidance in a part of a pipeline's steps: in the others its transformer sees the conditional half alone.

A run with guidance in a share g of its steps costs (1 + g) / 2 of what it costs with guidance in all of them
(arXiv 2404.07724).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import kind
from .deferred import DeferredLogits, Known, tensor_of
from .interval import NextStep

# arguments of Meissonic's transformer whose rows are positions, not samples
_OF_POSITIONS = ("img_ids", "txt_ids")


class IntervalForward:
    """The forward of a pipeline's transformer, which leaves the unconditional half out at steps outside an interval.

    Outside, the call is made where its output is used: by `chunk(2)` with the conditional half, which is what both
    halves then are, and in any other way, as without guidance, as it was asked for.
    """

    def __init__(self, transformer: nn.Module, interval: tuple[float, float], next_step: NextStep) -> None:
        """Hold the transformer, start and end, and who knows the step."""
        self._transformer, self._interval, self._next_step = transformer, interval, next_step
        self._original = vars(transformer).get("forward")

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the transformer's own forward."""
        return inspect.signature(self.original)

    @property
    def original(self) -> Callable[..., Any]:
        """The transformer's forward without the interval."""
        if self._original is not None:
            return self._original  # type: ignore[no-any-return]
        return type(self._transformer).forward.__get__(self._transformer)  # type: ignore[no-any-return]

    # which step it is can't be compiled; the forward itself still is
    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the transformer, or put it off."""
        step = None if torch.is_grad_enabled() else self._next_step.get()
        start, end = self._interval
        # a tuple is no output that could be put off
        if step is None or start <= step.share < end or kwargs.get("return_dict") is False:
            return self.original(*args, **kwargs)
        return _PutOff(self.original, args, kwargs)


class _PutOff(DeferredLogits):
    """A call that was not made yet."""

    def __init__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self._forward, self._args, self._kwargs = forward, args, kwargs
        self._whole: Tensor | DeferredLogits | None = None

    def halves(self) -> tuple[DeferredLogits, DeferredLogits]:
        """The conditional half, twice."""
        if self._whole is None:
            args, kwargs = conditional_half(self._forward, self._args, self._kwargs)
            output = self._forward(*args, **kwargs)
        else:
            output = tensor_of(self._whole).chunk(2)[1]
        half = output if isinstance(output, DeferredLogits) else Known(output)
        return half, half

    def hidden(self) -> Any:
        if self.was_read:
            return None
        whole = self._output()
        return whole.hidden() if isinstance(whole, DeferredLogits) else None

    def _output(self) -> Tensor | DeferredLogits:
        if self._whole is None:
            self._whole = self._forward(*self._args, **self._kwargs)
        return self._whole

    def _compute(self) -> Tensor:
        return tensor_of(self._output())


def conditional_half(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with both guidance halves, cut down to the second one.

    The first integers of two or more dimensions among them are the tokens, 2B in the batch. Every tensor whose first
    dimension is 2B is cut, in lists, tuples and dicts too, but for `img_ids` and `txt_ids` of two dimensions, whose
    rows are positions.

    Raises:
        TypeError: no argument holds token ids.
        ValueError: an odd number of samples.
    """
    bound = inspect.signature(forward).bind(*args, **kwargs)
    tokens = next((value for value in bound.arguments.values() if _is_tokens(value)), None)
    if tokens is None:
        raise TypeError("transformer: expected one that is called with token ids, integers of two or more dimensions")
    if len(tokens) % 2:
        raise ValueError(f"transformer: expected tokens of both guidance halves, got {kind(tokens)}")

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[len(tokens) // 2 :] if value.ndim and len(value) == len(tokens) else value
        if isinstance(value, dict):
            return type(value)((key, cut(each)) for key, each in value.items())
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(cut, value))
        return type(value)(map(cut, value)) if type(value) in (list, tuple) else value

    for name, value in bound.arguments.items():
        is_of_positions = name in _OF_POSITIONS and isinstance(value, Tensor) and value.ndim == 2
        # of **kwargs, each has a name of its own
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            bound.arguments[name] = {
                key: each if key in _OF_POSITIONS and getattr(each, "ndim", 0) == 2 else cut(each)
                for key, each in value.items()
            }
        elif not is_of_positions:
            bound.arguments[name] = cut(value)
    return bound.args, bound.kwargs


def _is_tokens(value: object) -> bool:
    is_tensor = isinstance(value, Tensor) and value.ndim >= 2
    return is_tensor and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)  # type: ignore[attr-defined]
